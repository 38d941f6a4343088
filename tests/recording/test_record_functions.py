"""Uses of autograd Functions are seen however they are written and reached."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.recording.application import Application
from sparsify.recording.record import record
from sparsify.recording.recording import Recording, Unrecorded
from tests.models.surrogates import ATan, FastSigmoid, Triangular
from tests.recorded_gradients import Weighted, check, refused

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()


class Doubled(torch.autograd.Function):
    """The gradient is twice that of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float = 3.0) -> Tensor:
        ctx.scale = scale
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # as many as apply was given
        return (2 * ctx.scale * grad, None)[: len(ctx.needs_input_grad)]


class Tripled(Doubled):
    """Another gradient for the forward that it inherits."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (3 * ctx.scale * grad, None)[: len(ctx.needs_input_grad)]


class CallsItsBase(Doubled):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float = 3.0) -> Tensor:
        return Doubled.forward(ctx, x + 1, scale)


class Cast(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x * scale

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return 5 * ctx.scale * grad, None


class CastToo(Cast):
    """Another Function with the code of the same decorator."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x - scale


def sixfold(x: Tensor, scale: float = 2.0, *others: Tensor) -> Tensor:
    return x * scale


class Split(torch.autograd.Function):
    """Its forward, which has no context, is a function that is called for other things, too."""

    forward = staticmethod(sixfold)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.scale, ctx.count = inputs[1], len(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (6 * ctx.scale * grad, *[None] * (ctx.count - 1))


class SplitToo(Split):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        Split.setup_context(ctx, inputs, output)
        ctx.scale = inputs[1] + 1


class Both(torch.autograd.Function):
    """Returns both arguments as they are, and one of them twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return x, x * y, y, x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * grads[0] + 5 * grads[3], 3 * grads[2] + 7 * grads[1]


class ReturnsWhatItGets(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, 3 * grads[1]


class Leaves(torch.autograd.Function):
    """Switches gradients on and off inside; torch puts back what was before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        torch.set_grad_enabled(True)
        spikes: Tensor = FastSigmoid.apply(y)
        return y + spikes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 11


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            raise ValueError(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Looped(torch.autograd.Function):
    """Has a loop, whose iterations are counted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x.sin()
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 13


class Closes(torch.autograd.Function):
    """Has a function that reads its argument, which Python therefore keeps in a cell."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        def scaled() -> Tensor:
            return x * scale

        return scaled()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 17, None


class Mapped(torch.autograd.Function):
    """For ``torch.vmap``, which makes a Function of it that is applied to all at once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 19, None


def bound(self: Any, x: Tensor) -> Any:
    return self.apply(x @ self.weight)


def shared(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    return Doubled.apply(h), Tripled.apply(h), Split.apply(h), SplitToo.apply(h) * sixfold(h)


def returned(output: int) -> Callable[..., Any]:
    """One at a time: gradients of several are added up in another order."""
    return lambda self, x: Both.apply(x @ self.weight, self.decay)[output] * 2


def returned_undifferentiated(self: Any, x: Tensor) -> Any:
    h, y = ReturnsWhatItGets.apply(x @ self.weight, x)
    return h * self.decay + y


def in_every_mode(self: Any, x: Tensor) -> Any:
    """What torch does not know to ask for gradients, with gradients on and off."""
    h = x @ self.weight
    with torch.no_grad():
        off = Tripled.apply(h), Split.apply(h), Triangular.apply(h), Doubled.apply(h.detach())
    with torch.inference_mode():
        Doubled.apply(h + 1)
    first = Leaves.apply(h)
    second = ATan.apply(x.detach(), 2.0)
    return sum(off) * h + first * Doubled.apply(second)


def caught(self: Any, x: Tensor) -> Any:
    try:
        Raises.apply(x)
    except ValueError:
        return Doubled.apply(x @ self.weight)


def made_here(self: Any, x: Tensor) -> Any:
    class Here(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 9

    return Here.apply(x @ self.weight)


def by_keyword(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    return Doubled.apply(h, scale=2.0) + Split.apply(h, scale=3.0) * Split.apply(x=h)


USES: dict[str, tuple[Callable[..., Any], list[tuple[str, tuple[Any, ...]]]]] = {
    "a bound apply": (bound, [("Doubled", ())]),
    "one forward, two classes": (
        shared,
        [("Doubled", ()), ("Tripled", ()), ("Split", (2.0,)), ("SplitToo", (2.0,))],
    ),
    "a forward that calls its base's": (
        lambda self, x: CallsItsBase.apply(x @ self.weight, 4.0),
        [("CallsItsBase", (4.0,))],
    ),
    "decorated": (
        lambda self, x: Cast.apply(x @ self.weight, 2.0) * CastToo.apply(x, 3.0),
        [("Cast", (2.0,)), ("CastToo", (3.0,))],
    ),
    "by keyword": (by_keyword, [("Doubled", (2.0,)), ("Split", (3.0,)), ("Split", (2.0,))]),
    "more than it names": (
        lambda self, x: Split.apply(x @ self.weight, 1.0, x, self.decay),
        [("Split", (1.0,))],
    ),
    **{f"arguments returned, {i}": (returned(i), [("Both", ())]) for i in range(4)},
    "an argument without gradient returned": (
        returned_undifferentiated,
        [("ReturnsWhatItGets", ())] * 2,
    ),
    "gradients on and off": (
        in_every_mode,
        [("Leaves", ()), ("ATan", (2.0,)), ("Doubled", ())],
    ),
    "one that raises": (caught, [("Doubled", ())]),
    "a class made in forward": (made_here, [("Here", ())]),
    "a closure in forward": (
        lambda self, x: Closes.apply(x @ self.weight, 2.0),
        [("Closes", (2.0,))],
    ),
    "under vmap": (
        lambda self, x: torch.vmap(lambda row: Mapped.apply(row, 3.0))(x @ self.weight),
        [("VmappedMapped", (3.0,))],
    ),
    "a loop in forward": (lambda self, x: Looped.apply(x @ self.weight), [("Looped", ())]),
}


def uses_of(recording: Recording) -> list[tuple[str, tuple[Any, ...]]]:
    """The name of each, and the arguments that are no tensors."""
    targets = [node.target for node in recording.graph.graph.nodes]
    return [
        (t.__name__, tuple(a for a in t.arguments if isinstance(a, float)))
        for t in targets
        if isinstance(t, Application)
    ]


@pytest.mark.parametrize("name", USES)
def test_uses(name: str) -> None:
    function, uses = USES[name]
    recording = check(Weighted(function, apply=Doubled.apply), X)
    assert uses_of(recording) == uses


def test_a_use_stands_where_it_is_applied() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        for _ in range(2):
            x = Looped.apply(x @ self.weight)
        return x

    recording = check(Weighted(forward), X)
    nodes = list(recording.graph.graph.nodes)
    uses = [node for node in nodes if isinstance(node.target, Application)]
    assert [use.meta["loops"][-1].iteration for use in uses] == [0, 1]
    for use in uses:
        assert "Looped.apply" in use.meta["location"].code and use.meta["grad"]
        inside = use.args[0].meta
        assert len(inside["loops"]) == 2 and inside["function"] == "Looped" and not inside["grad"]


def test_a_forward_that_is_called_is_what_it_computes() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        h = Split.forward(x @ self.weight) + Doubled.forward(SimpleNamespace(), x)
        with torch.no_grad():
            scale = Split.forward(h)
        return h * scale

    recording = check(Weighted(forward), X)
    assert uses_of(recording) == []


def test_a_forward_that_is_called_with_the_context_of_a_use() -> None:
    contexts: list[Any] = []

    class Kept(Doubled):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scale: float = 3.0) -> Tensor:
            contexts.append(ctx)
            return Doubled.forward(ctx, x, scale)

    def forward(self: Any, x: Tensor) -> Any:
        h = Kept.apply(x @ self.weight)
        with torch.no_grad():
            again = Kept.forward(contexts[-1], h)
        contexts.clear()
        return h * again

    recording = check(Weighted(forward), X)
    assert uses_of(recording) == [("Kept", ())]


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def wrapped_here(self: Any, x: Tensor) -> Any:
    wrapped(torch.sin)(x)  # met as that of no Function

    class Here(Doubled):
        forward = staticmethod(wrapped(lambda ctx, x: Doubled.forward(ctx, x * 2, 3.0)))

    return Here.apply(x @ self.weight)


def test_a_forward_that_is_not_seen_is_refused() -> None:
    found = record(Weighted(wrapped_here), (X,), {})
    assert isinstance(found, Unrecorded)
    assert "a gradient that no recorded operation has" in str(found.error)


class InPlaceToo(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp_(min=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_dirty(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_an_argument_that_is_written_in_place() -> None:
    error = refused(Weighted(lambda self, x: InPlaceToo.apply(x @ self.weight)), X)
    assert "InPlaceToo.forward writes to its argument in place (mark_dirty)" in str(error)
