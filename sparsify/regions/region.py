"""A compiled Scan: the same call, computed by one kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from sparsify import ir
from sparsify.codegen.backend import Launchable
from sparsify.scans.lowered import Binding, Lowered, Returned, Role
from sparsify.scans.scan import Scan

Operands = Mapping[str, Sequence[Tensor]]  # by role
ROLES: tuple[Role, ...] = get_args(Role)  # in the order of arguments


@dataclass(frozen=True)
class Fetch:
    """How one tensor of the kernel is made of the Scan's operand."""

    binding: Binding
    operand: ir.Operand | None  # None for a weight

    @property
    def has_rows(self) -> bool:
        return self.operand is not None and "B" in self.operand.axes

    @property
    def is_plain(self) -> bool:
        """True if the tensor itself is the operand, where it has the call's steps and rows."""
        return not self.binding.views

    def rows(self, tensor: Tensor) -> int:
        time = int(self.binding.role == "x")
        return math.prod(tensor.shape[time : time + self.binding.lead])

    def misfit(self, tensor: Tensor, batch: int) -> str | None:
        """What keeps ``tensor`` from being the operand in a call with ``batch`` rows."""
        if self.operand is None:
            return None
        rows = self.rows(tensor)
        if rows == 1 or (self.has_rows and rows == batch):
            return None
        return f"{self.binding.name} has {rows} rows, not {batch if self.has_rows else 1}"

    def __call__(self, tensor: Tensor, steps: int, batch: int) -> Tensor:
        """The operand with axes T, B, N, and contiguous neurons; a view where that is possible."""
        views = self.binding.views
        if self.operand is None:
            if "flatten" in views:
                return tensor.flatten(1)
            return tensor.t() if "transpose" in views else tensor
        if "channels" in views:
            tensor = tensor.reshape(-1, *[1] * (len(self.binding.neurons or (0, 0, 0)) - 1))
        axes = self.operand.axes
        if self.binding.role == "x" and tensor.shape[0] != steps:
            tensor = tensor[:steps]
        if "expand" in views:
            tensor = self._expanded(tensor)
        if "flatten" in views:
            tensor = self._flattened(tensor, steps, axes)
        if "B" in axes and tensor.shape[axes.index("B")] != batch:
            sizes = [batch if axis == "B" else -1 for axis in axes]
            tensor = tensor.expand(sizes)
        strided = "N" in axes and tensor.stride(-1) != 1 and tensor.shape[-1] != 1
        return tensor.contiguous() if strided else tensor

    def _expanded(self, tensor: Tensor) -> Tensor:
        binding = self.binding
        lead = int(binding.role == "x") + binding.lead
        kept, own = tensor.shape[:lead], tensor.shape[lead:]
        missing = len(binding.neurons) - len(own)
        aligned = tensor.reshape(*kept, *[1] * missing, *own)
        return aligned.expand(*kept, *binding.neurons)

    def _flattened(self, tensor: Tensor, steps: int, axes: tuple[ir.Axis, ...]) -> Tensor:
        time = int(self.binding.role == "x")
        neurons = math.prod(tensor.shape[time + self.binding.lead :])
        sizes = {"T": steps, "B": self.rows(tensor), "N": neurons}
        return tensor.reshape([sizes[axis] for axis in axes])


def fetches_of(lowered: Lowered) -> tuple[Fetch, ...]:
    """One Fetch for each tensor of the kernel."""
    operands = {operand.name: operand for operand in lowered.kernel.operands}
    return tuple(Fetch(binding, operands.get(binding.name)) for binding in lowered.bindings)


def batch_of(lowered: Lowered, operands: Operands) -> int:
    """The number of batch rows of a call; 1 where the Scan has no batch."""
    if lowered.batch is None:
        return 1
    binding = lowered.batch
    time = int(binding.role == "x")
    shape = operands[binding.role][binding.index].shape
    return shape[time] if binding.lead == 1 else math.prod(shape[time : time + binding.lead])


def released(returned: Returned, output: Tensor, has_time: bool, batch: int) -> Tensor:
    """The Scan's result in the shape that it has there, as a tensor that is no view of another.

    Views cannot be detached in place, as users do with states.
    """
    lead = (output.shape[0],) if has_time else ()
    if returned.first_row:
        output = output.select(int(has_time), 0).contiguous()
    shape = [batch if size == -1 else size for size in returned.shape]
    return output.view((*lead, *shape)).detach()


class Region(nn.Module):
    """Runs ``launchable`` where ``scan`` ran: same operands, same results.

    Zero steps, empty batches, operands whose sizes do not fit and calls that need gradients run the
    Scan itself. Nothing is written to operands, and results share no memory with ``carries`` but
    those that ``lowered`` says are returned. Weights are the caller's own tensors, so that a change
    is seen. ``settled`` says that nobody writes to them: other weights come as other tensors.
    """

    def __init__(
        self, scan: Scan, lowered: Lowered, launchable: Launchable, settled: bool = False
    ) -> None:
        super().__init__()
        self.scan, self.lowered, self.launchable = scan, lowered, launchable
        self.settled = settled
        self.frozen = False
        self._fetches = tuple(_Prepared.of(fetch) for fetch in fetches_of(lowered))
        timed = {output.name: "T" in output.axes for output in lowered.kernel.outputs}
        self._returned = tuple(
            (returned, timed.get(returned.output, False), _is_plain(lowered, returned))
            for returned in lowered.returned
        )
        are_plain = all(is_plain for *_, is_plain in self._returned)
        self._plain_returned = [r.output for r in lowered.returned] if are_plain else None
        batch = lowered.batch
        has_one_dim = batch is not None and batch.lead == 1
        self._batch_at = (
            (batch.role, batch.index, int(batch.role == "x")) if batch and has_one_dim else None
        )
        self.straight = Straight.of(lowered, self._fetches) if are_plain and has_one_dim else None

    def forward(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        return self.call(steps, carries, xs, consts)

    def call(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
        unread: frozenset[int] = frozenset(),
        again: bool = False,
        into: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """``forward``. Outputs ``unread`` of the kernel may hold anything.

        ``again``: the weights are those of the last call, unchanged. Results of which ``into`` has
        a tensor, by their index, are written to it where that can be: the result is then that very
        tensor.
        """
        frozen = again or self.frozen or self.settled
        if into:
            return self._run(steps, carries, xs, consts, frozen, self._outputs(into))
        results = self._run_again(unread, steps, carries, xs, consts, frozen)
        return results or self._run(steps, carries, xs, consts, frozen)

    def is_plain(self, result: int) -> bool:
        """True if an output of the kernel is the result as it is."""
        returned, _, is_plain = self._returned[result]
        return is_plain and returned.carry is None

    @property
    def weight_consts(self) -> tuple[int, ...]:
        """Which of the Scan's consts are weights; empty if another operand is one."""
        weights = {weight.name for weight in self.lowered.kernel.weights}
        found = [binding for binding in self.lowered.bindings if binding.name in weights]
        are_consts = all(binding.role == "const" for binding in found)
        return tuple(binding.index for binding in found) if are_consts else ()

    def again(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
        into: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """``call``, where the weights are those of the last call, unchanged."""
        return self._run(steps, carries, xs, consts, True, self._outputs(into or {}))

    def _outputs(self, into: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {self._returned[i][0].output: y for i, y in into.items() if self.is_plain(i)}

    def _run(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
        frozen: bool,
        given: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        operands = {"carry": carries, "x": xs, "const": consts}
        batch = self.batch_of(operands)
        tensors = self._tensors(steps, batch, operands)
        if tensors is None:
            # The Scan may return what it is given, which others may hold: see direct_graph.py.
            result: tuple[Tensor, ...] = self.scan(steps, [c.clone() for c in carries], xs, consts)
            return result
        outputs = self.launchable(tensors, steps=steps, batch=batch, outputs=given, frozen=frozen)
        if self._plain_returned is not None:
            return tuple([outputs[name] for name in self._plain_returned])
        results = []
        for returned, has_time, is_plain in self._returned:
            if is_plain:
                results.append(outputs[returned.output])
            elif returned.carry is not None:
                results.append(carries[returned.carry])
            else:
                results.append(released(returned, outputs[returned.output], has_time, batch))
        return tuple(results)

    def _run_again(
        self,
        unread: frozenset[int],
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
        frozen: bool,
    ) -> tuple[Tensor, ...] | None:
        """What ``_run`` returns, if the launchable can repeat such a call; in less time.

        Outputs ``unread`` of the kernel may hold anything.
        """
        straight = self.straight
        repeat = getattr(self.launchable, "repeat", None)
        if straight is None or repeat is None:
            return None
        operands = {"carry": carries, "x": xs, "const": consts}
        if _needs_grad(operands):
            return None
        batch = self.batch_of(operands)
        tensors = [operands[role][place] for role, place in straight.places]
        outputs = repeat(tensors, steps, batch, frozen, unread)
        return None if outputs is None else tuple([outputs[i] for i in straight.returned])

    def batch_of(self, operands: Operands) -> int:
        if self._batch_at is None:
            return batch_of(self.lowered, operands)
        role, place, dim = self._batch_at
        return operands[role][place].shape[dim]

    def _tensors(self, steps: int, batch: int, operands: Operands) -> dict[str, Tensor] | None:
        """The kernel's tensors, or None where the Scan itself has to run."""
        if steps == 0 or batch == 0 or _needs_grad(operands):
            return None
        tensors = {}
        for name, role, place, time, rows, is_plain, fetch in self._fetches:
            tensor = operands[role][place]
            shape = tensor.shape
            fits = is_plain and (time < 0 or shape[0] == steps)
            if fits and (rows < 0 or shape[rows] == batch):
                tensors[name] = tensor
                continue
            too_short = time == 0 and shape[0] < steps
            if too_short or fetch.misfit(tensor, batch) is not None:
                return None
            tensors[name] = fetch(tensor, steps, batch)
        return tensors


class _Prepared(NamedTuple):
    """A Fetch with what a call looks at; ``time`` and ``rows`` are dims, -1 where there is none."""

    name: str
    role: Role
    place: int
    time: int
    rows: int
    is_plain: bool
    fetch: Fetch

    @staticmethod
    def of(fetch: Fetch) -> _Prepared:
        binding, axes = fetch.binding, fetch.operand.axes if fetch.operand else ()
        time = 0 if binding.role == "x" else -1
        rows = axes.index("B") if "B" in axes else -1
        return _Prepared(
            binding.name, binding.role, binding.index, time, rows, fetch.is_plain, fetch
        )


class Straight(NamedTuple):
    """Where the kernel's operands and weights are, by role and index, and which of its outputs are
    results, if all of them are that as they are.
    """

    places: Sequence[tuple[Role, int]]
    returned: Sequence[int]

    @staticmethod
    def of(lowered: Lowered, fetches: Sequence[_Prepared]) -> Straight | None:
        if not lowered.returned or not all(fetch.is_plain for fetch in fetches):
            return None
        kernel = lowered.kernel
        found = {fetch.name: (fetch.role, fetch.place) for fetch in fetches}
        outputs = [output.name for output in kernel.outputs]
        return Straight(
            [found[o.name] for o in kernel.operands] + [found[w.name] for w in kernel.weights],
            [outputs.index(returned.output) for returned in lowered.returned],
        )


def _needs_grad(operands: Operands) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensors in operands.values() for tensor in tensors)


def _is_plain(lowered: Lowered, returned: Returned) -> bool:
    """True if the kernel's output is the result as it is."""
    return lowered.batch is not None and len(returned.shape) == 2 and returned.shape[0] == -1
