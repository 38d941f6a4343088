"""The last word on a recording: it must give the model's bits on inputs that it has not seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparsify.arrangement import map_tensors, take_apart
from sparsify.autocast import autocast_off
from sparsify.bench import wait_for_devices
from sparsify.call_conditions import needs_grad
from sparsify.checking.check_gradients import differentiate_model, why_gradients_differ
from sparsify.checking.fingerprint import Fingerprint
from sparsify.checking.run_graph import run_graph
from sparsify.recording.keep_state import keep_state
from sparsify.recording.recording import Recording
from sparsify.training_step import differentiate_result

# What a model raises for values that it does not take: an index out of range, a failed assertion.
NOT_TAKEN = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
# Operations of LAPACK, whose bits depend on how the memory that they are given is aligned.
LAPACK = (
    *("linalg_svd", "linalg_eig", "linalg_qr", "linalg_cholesky", "linalg_inv", "linalg_lu"),
    *("linalg_solve", "linalg_lstsq", "linalg_pinv", "linalg_matrix_norm", "svd", "eig", "qr"),
    *("cholesky", "inverse", "lu", "geqrf", "triangular_solve", "lstsq", "symeig"),
)
RRELU = torch.ops.aten.rrelu_with_noise_functional.default
Call = tuple[tuple[Any, ...], Mapping[str, Any]]
Differentiate = Callable[[Any, list[Tensor]], list[Tensor | None]]


@dataclass(frozen=True)
class Repetition:
    """How a recording differs from its model, "" if it repeats it; what the model took."""

    differs: str
    seconds: float


def why_not_repeated(
    model: nn.Module, recording: Recording, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """How the recorded graph differs from the model; see ``repeat``."""
    return repeat(model, recording, args, kwargs).differs


def repeat(
    model: nn.Module,
    recording: Recording,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    clock: Callable[[], float] = time.perf_counter,
) -> Repetition:
    """Run the model, then the recorded graph, on perturbed inputs, and compare.

    Both start from the same state and random numbers, which are put back, and all that they return
    or leave in buffers is compared bit by bit: they run the same operations on the same shapes.
    Of the model's run only fingerprints are kept, so that a check needs no more memory than a call
    on new inputs. Where gradients are needed, those of all results are compared too. ``clock``
    tells what the model takes. Raises TraceError if the model's own backward fails or changes
    Python state.
    """
    given = args, kwargs

    def differentiate(result: Any, operands: list[Tensor]) -> list[Tensor | None]:
        return differentiate_model(recording, given, result, operands)

    def run(call: Call, forward: Callable[..., Any], gradients: Differentiate) -> _Outcome:
        return _run(model, recording, given, call, forward, gradients, clock)

    call = perturb(given)
    try:
        expected = run(call, model.forward, differentiate)
    except NOT_TAKEN:  # the example must do
        call = given
        expected = run(given, model.forward, differentiate)
    else:
        if not expected.is_fresh or recording.calling.written(*given):
            call = perturb(given)  # anew
    # What the model has left free is just what the graph needs, so it is not given back.
    got = run(call, _repeating(recording), differentiate_result)
    differs = _compare(got.values, expected.values)
    differs = differs and f"{differs}{_blame(recording.graph)}"
    if not differs:
        differs = why_gradients_differ(recording, call, got.gradients, expected.gradients)
        differs = differs and f"{differs}{_blame_slopes(recording.graph)}"
    return Repetition(differs, expected.seconds)


def _blame(graph: fx.GraphModule) -> str:
    """The line that may round differently at each call, or one that makes the results."""
    for node in graph.graph.nodes:
        name = str(node.target).removeprefix("aten.").split(".")[0].strip("_")
        if name.startswith(LAPACK) and node.meta.get("location") is not None:
            return (
                f". {name} in {node.meta['location']} may round in another way at each call: "
                "compute it outside of forward, and keep it in a buffer or pass it in"
            )
    output = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    made = [node for node in output.all_input_nodes if node.meta.get("location") is not None]
    return f"; a result is made in {made[0].meta['location']}" if made else ""


def _blame_slopes(graph: fx.GraphModule) -> str:
    """The line of an ``rrelu`` in training mode, which has no right gradient as a graph's node."""
    for node in graph.graph.find_nodes(op="call_function", target=RRELU):
        return (
            f". rrelu in {node.meta['location']} has a gradient by slopes that it draws aside: "
            "write torch.where(x > 0, x, x * torch.empty_like(x).uniform_(lower, upper))"
        )
    return ""


def perturb(call: Call) -> Call:
    """The arguments with their elements in other places, so that values stay typical."""
    made: dict[int, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = _moved(tensor)
        return made[id(tensor)]

    args, kwargs = pytree.tree_map_only(Tensor, moved, (call[0], dict(call[1])))
    return args, kwargs


def _moved(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0 or tensor.layout is not torch.strided or 0 in tensor.stride():
        return tensor
    source = tensor.detach()
    if source.is_floating_point() or source.is_complex():
        moved = source.flatten().roll(source.numel() // 3 + 1).view(source.shape)
        if torch.equal(moved, source):
            moved = source * 0.5
    elif source.dim() > 1:
        moved = source.roll(1, 0)  # columns may be indices of different ranges
    else:
        return tensor
    # The order of dims in memory decides which kernels torch runs.
    if moved.stride() != source.stride():
        placed = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype)
        moved = placed.to(source.device).copy_(moved)
    return moved.requires_grad_(tensor.requires_grad)


def _repeating(recording: Recording) -> Callable[..., Any]:
    """The recorded graph as forward; every value is freed after its last use."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        operands = recording.calling.operands(args, kwargs)
        with autocast_off():
            values = run_graph(recording.graph, operands)
        return recording.calling.deliver(values, args, kwargs)

    return forward


@dataclass(frozen=True)
class _Outcome:
    """What a call made: ``values`` with fingerprints for tensors, and gradients of operands.

    ``is_fresh`` says that its arguments are as they were.
    """

    values: Any
    is_fresh: bool
    gradients: list[Tensor | None]
    seconds: float


def _run(
    model: nn.Module,
    recording: Recording,
    given: Call,
    call: Call,
    forward: Callable[..., Any],
    differentiate: Differentiate,
    clock: Callable[[], float],
) -> _Outcome:
    """What ``forward`` makes of ``call``.

    The values are its result, what buffers hold after the call, and arguments that were written.
    The state is put back, and the arguments of ``call`` that are the ones of the ``given`` call.
    """
    tensors = _tensors(call)
    theirs = set(map(id, _tensors(given)))
    with keep_state(model, [tensor for tensor in tensors if id(tensor) in theirs]):
        versions = [_version(tensor) for tensor in tensors]
        required = [tensor.requires_grad for tensor in tensors]
        operands = recording.calling.operands(*call)  # before forward puts others in their places
        wait_for_devices()
        start = clock()
        result = forward(*call[0], **call[1])
        with autocast_off():  # whose casts backward is not meant to run under
            gradients = differentiate(result, operands) if needs_grad(operands) else []
        wait_for_devices()
        seconds = clock() - start
        written = [
            tensor if version is None or tensor._version != version else None
            for tensor, version in zip(tensors, versions, strict=True)
        ]
        outcome = result, dict(model.named_buffers()), written
        values = map_tensors(Fingerprint.of, outcome)
        is_fresh = required == [tensor.requires_grad for tensor in tensors]
        is_fresh = is_fresh and all(tensor is None for tensor in written)
        return _Outcome(values, is_fresh, gradients, seconds)


def _tensors(call: Call) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]


def _version(tensor: Tensor) -> int | None:
    """How often it was written; inference tensors do not count."""
    return None if tensor.is_inference() else tensor._version


def _compare(got: Any, expected: Any) -> str:
    ours, arrangement = take_apart(got, whole=(Fingerprint,))
    theirs, expected_arrangement = take_apart(expected, whole=(Fingerprint,))
    if arrangement != expected_arrangement:
        if str(arrangement) == str(expected_arrangement):  # as of a namedtuple in forward
            return "each call makes a class for its result anew; define it outside of forward"
        return f"it returns {arrangement} where the model returns {expected_arrangement}"
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(a, Fingerprint) and isinstance(b, Fingerprint):
            differs = a.why_not(b)
            if differs:
                return f"value {index} is not the model's: {differs}"
        elif a != b:
            return f"value {index} is {a!r} where the model gives {b!r}"
    return ""
