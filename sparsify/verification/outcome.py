"""Compare what two calls returned and the state that they left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsify.arrangement import take_apart_named
from sparsify.comparing.figures import ResultFigures
from sparsify.comparing.values import Place, check_equal, is_same
from sparsify.recording.reachable import ATOMS


@dataclass(frozen=True)
class Outcome:
    """What a call returned and the state that it left, by path; all copied."""

    result: Any
    state: dict[str, Tensor]


def check_outcome(check: str, got: Outcome, expected: Outcome) -> int:
    """Returns how many values were compared."""
    ours, structure = _named_leaves(got.result)
    theirs, wanted = _named_leaves(expected.result)
    if structure != wanted:
        place = Place(check, "the result")
        raise place.error(f"is {structure}, expected {wanted}", value=structure, expected=wanted)
    count = 0
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        count += _check_leaf(Place(check, name), a, b)
    for path in sorted(got.state.keys() | expected.state.keys()):
        place = Place(check, f"state {path}")
        if path not in got.state or path not in expected.state:
            raise place.error("is left by only one of the two")
        count += _check_leaf(place, got.state[path], expected.state[path])
    return count


def _check_leaf(place: Place, got: Any, expected: Any) -> int:
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        check_equal(place, got, expected)
        return expected.numel()
    is_value = isinstance(expected, ATOMS)  # other objects may be equal to themselves only
    if type(got) is not type(expected) or (is_value and got != expected):
        raise place.error(f"is {got!r}, expected {expected!r}", value=got, expected=expected)
    return 0


def _named_leaves(result: Any) -> tuple[list[tuple[str, Any]], str]:
    leaves, arrangement = take_apart_named(result, "result")
    return leaves, str(arrangement)


def compare_results(kernels: Any, eager: Any) -> tuple[ResultFigures, ...]:
    pairs = zip(_named_leaves(kernels)[0], _named_leaves(eager)[0], strict=True)
    return tuple(
        _result_figures(name, ours, theirs)
        for (name, ours), (_, theirs) in pairs
        if isinstance(ours, Tensor) and theirs.numel()
    )


def _result_figures(name: str, ours: Tensor, theirs: Tensor) -> ResultFigures:
    distance = (ours.double() - theirs.double()).abs().nan_to_num(0.0, 0.0, 0.0)
    return ResultFigures(
        name,
        theirs.numel(),
        float(is_same(ours, theirs).double().mean()),
        float(distance.max()),
        float((ours != 0).double().mean()),
        float((theirs != 0).double().mean()),
    )
