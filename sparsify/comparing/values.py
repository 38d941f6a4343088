"""Compare tensors element by element and name the place of what differs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsify.errors import Location, MismatchError
from sparsify.rounding.bounded import Bounded


@dataclass(frozen=True)
class Place:
    """What is being compared; ``step`` is None for a value that no step computes."""

    check: str
    output: str
    region: str = ""
    step: int | None = None
    location: Location | None = None

    def __str__(self) -> str:
        text = f"{self.region}, {self.output}" if self.region else self.output
        return text if self.step is None else f"{text}, step {self.step}"

    def error(self, message: str, **facts: object) -> MismatchError:
        where = f"\n  computed at {self.location}" if self.location else ""
        known = {"region": self.region, "output": self.output, "step": self.step}
        return MismatchError(
            f"{self.check}: {self}, {message}{where}", check=self.check, **known, **facts
        )


def check_layout(place: Place, got: Tensor, expected: Tensor) -> None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        found, wanted = (f"{list(t.shape)} {t.dtype}" for t in (got, expected))
        raise place.error(f"is {found}, expected {wanted}", value=found, expected=wanted)


def check_equal(place: Place, got: Tensor, expected: Tensor) -> None:
    """Raise MismatchError unless all values are the same; NaN equals NaN, and 0 equals -0."""
    check_layout(place, got, expected)
    differs = ~is_same(got, expected)
    if bool(differs.any()):
        _raise_first(place, differs, got, expected)


def check_within(place: Place, got: Tensor, bounded: Bounded) -> None:
    """Raise MismatchError unless ``got`` is where a legal evaluation can be."""
    outside = find_outside(got, bounded)
    if bool(outside.any()):
        _raise_first(place, outside, got, bounded.value, bounded)


def find_outside(got: Tensor, bounded: Bounded) -> Tensor:
    error = bounded.full_error
    near = (got.double() - bounded.value.double()).abs() <= error
    return ~(near | is_same(got, bounded.value) | error.isinf())


def is_same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | ((a != a) & (b != b))


def _raise_first(
    place: Place, wrong: Tensor, got: Tensor, expected: Tensor, bounded: Bounded | None = None
) -> None:
    index = tuple(int(i) for i in wrong.nonzero()[0])
    value, wanted = got[index].item(), expected[index].item()
    facts: dict[str, object] = {"index": index, "value": value, "expected": wanted}
    text = f"{describe_index(index)}: {value:.9g}, expected {wanted:.9g}"
    if bounded is not None:
        bound = float(bounded.full_error[index])
        facts["bound"] = bound
        text += f"; they differ by {abs(value - wanted):.3g}, rounding explains {bound:.3g}"
    if bounded is not None and bounded.margin is not None:
        distance, limit = (float(part.expand(got.shape)[index]) for part in bounded.margin)
        facts["distance"] = distance
        text += f"; {distance:.3g} from the threshold, decided from {limit:.3g} on"
    others = int(wrong.sum()) - 1
    if others:
        text += f" ({others:,} more of {wrong.numel():,} values)"
    raise place.error(text, **facts)


def describe_index(index: tuple[int, ...]) -> str:
    if not index:
        return "the value"
    if len(index) == 1:
        return f"neuron {index[0]}"
    row, *neuron = index
    return f"batch row {row}, neuron {neuron[0] if len(neuron) == 1 else tuple(neuron)}"
