"""Calling a CUDA kernel: checks of tensors, strides, packed weights, event counters.

Nothing here waits for the device but reading ``events``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparsify import ir
from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import Device, Function, Grid, Memory, Word
from sparsify.codegen.cuda.frame_text import Scratch
from sparsify.codegen.cuda.packed_weight import PackedWeight
from sparsify.codegen.cuda.strategy import Plan
from sparsify.codegen.slots import (
    TORCH_DTYPES,
    Slots,
    counted,
    fits,
    misfit,
    take_operand,
    take_output,
)
from sparsify.codegen.usage import packings
from sparsify.errors import KernelFault

FunctionOn = Callable[[torch.device], Function]
GRIDS = 64  # of calls with other numbers of steps and rows that are remembered


class GivenUp(NamedTuple):
    """What a kernel sets when it ends before its time: memory of the host that devices reach."""

    memory: Memory
    flag: npt.NDArray[np.int64]

    @staticmethod
    def make(name: str, device: torch.device) -> GivenUp:
        # What is pinned has the same address on every device (unified virtual addressing).
        pinned = device.type == "cuda"
        tensor = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=pinned)
        return GivenUp(Memory(tensor, name, written=True), tensor.numpy())


class Sized(NamedTuple):
    """What a launch takes of the numbers of steps and rows."""

    grid: Grid
    scratch: Sequence[int]
    numbers: Sequence[int]


class CudaLaunchable:
    """A loaded kernel; see ``backend.Launchable``. Any number of threads may call it at once.

    It serves all devices of its type: the kernel is loaded on each when tensors come from there.
    """

    def __init__(
        self,
        kernel: ir.Kernel,
        schedule: ir.Schedule,
        source: Source,
        plan: Plan,
        device: Device,
        function_on: FunctionOn,
    ) -> None:
        self.kernel, self.schedule, self.source = kernel, schedule, source
        self._plan, self._device, self._function_on = plan, device, function_on
        self._slots = Slots(kernel)
        self._weights = [PackedWeight(kernel, schedule, p) for p in packings(kernel, schedule)]
        self._counted = {g.result: counted(kernel, g) for g in kernel.gathers}
        self._functions: dict[torch.device, Function] = {}
        self._active: dict[torch.device, Memory] = {}
        self._sized: dict[tuple[torch.device, int, int], Sized] = {}
        self._given_up: dict[str, GivenUp] = {}
        self._lock = Lock()

    def __call__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        steps: int,
        batch: int,
        outputs: Mapping[str, torch.Tensor] | None = None,
        frozen: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Run the kernel; see ``backend.Launchable``.

        Raises ValueError and TypeError for tensors that do not fit, naming them, ValueError for
        zero steps where an output is the last step's value, and KernelFault where an earlier call
        is found to have failed.
        """
        _, operand_shapes, output_shapes = self._slots.shapes(steps, batch)
        device = self._device_of(tensors)
        words: list[Word] = [steps, batch]
        for slot, shape in zip(self._slots.operands, operand_shapes, strict=True):
            strides: list[int] = []
            operand = take_operand(tensors, slot, shape, device, strides)
            words.append(Memory(operand, slot.name))
            words += strides
        self._add_weights(tensors, device, frozen, words)
        results = {}
        for slot, shape in zip(self._slots.outputs, output_shapes, strict=True):
            strides = []
            output = results[slot.name] = take_output(outputs, slot, shape, device, strides)
            is_made = not outputs or slot.name not in outputs
            words.append(Memory(output, slot.name, written=True, fresh=is_made))
            words += strides
        if steps and batch:
            self._launch(device, steps, batch, words)
        return results

    @property
    def events(self) -> dict[str, tuple[int, int]]:
        """Per Gather, how many senders were active and how many there were, over all calls.

        Of restricted ones, how many sums were wanted and how many there were. Waits for the device.
        Raises KernelFault where a call is found to have failed.
        """
        with self._lock:
            kept = [memory.tensor for memory in self._active.values()]
        totals = [0] * (len(self._counted) + 1)
        for tensor in kept:
            totals = [a + b for a, b in zip(totals, tensor.tolist(), strict=True)]
        self._check_given_up()
        *found, row_steps = totals
        pairs = zip(found, self._counted.items(), strict=True)
        return {result: (active, row_steps * n) for active, (result, n) in pairs}

    def reset_events(self) -> None:
        with self._lock:
            for memory in self._active.values():
                memory.tensor.zero_()

    def _launch(self, device: torch.device, steps: int, batch: int, words: list[Word]) -> None:
        function = self._functions.get(device) or self._load(device)
        self._check_given_up()
        sized = self._sized.get((device, steps, batch)) or self._size(device, steps, batch)
        words.append(self._active[device])
        for scratch, size in zip(self._plan.scratch, sized.scratch, strict=True):
            lasting = self._given_up.get(scratch.name)
            words.append(lasting.memory if lasting else _make_scratch(scratch, size, device))
        words += sized.numbers
        function.launch(sized.grid, words)
        self._check_given_up()

    def _check_given_up(self) -> None:
        """Raise KernelFault if a kernel that was launched before has given up.

        Nothing waits: what is on its way now is found by a later call.
        """
        for given_up in self._given_up.values():
            if given_up.flag[0]:
                given_up.flag[0] = 0
                note = next(s.note for s in self._plan.scratch if s.name == given_up.memory.name)
                report = f"A call has given up ({note}); what it was to compute is wrong."
                raise KernelFault(self.kernel.name, [report])

    def _device_of(self, tensors: Mapping[str, torch.Tensor]) -> torch.device:
        """The device of the first tensor that is on one of the backend's."""
        kernel = self.kernel
        names = [o.name for o in kernel.operands] + [w.name for w in kernel.weights]
        for tensor in map(tensors.get, names):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self._device.type:
                return tensor.device
        return torch.device(self._device.type)

    def _add_weights(
        self,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        frozen: bool,
        words: list[Word],
    ) -> None:
        for slot in self._weights:
            weight = tensors.get(slot.name)
            if not fits(weight, slot.dtype, slot.shape, device):
                wanted = f"{list(slot.shape)} of {slot.dtype}"
                raise misfit(weight, slot.name, wanted, slot.dtype, device)
            words += slot.get(weight, frozen=frozen)

    def _load(self, device: torch.device) -> Function:
        """The kernel on ``device``, with counters there that all its calls add to."""
        with self._lock:
            if device not in self._active:
                with torch.inference_mode(False):
                    count = len(self._counted) + 1
                    counters = torch.zeros(count, dtype=torch.int64, device=device)
                    for scratch in self._plan.scratch:
                        if scratch.lasting and scratch.name not in self._given_up:
                            self._given_up[scratch.name] = GivenUp.make(scratch.name, device)
                self._active[device] = Memory(counters, "event counters", written=True)
            function = self._functions[device] = self._function_on(device)
        return function

    def _size(self, device: torch.device, steps: int, batch: int) -> Sized:
        plan, resident = self._plan, self._functions[device].resident_blocks
        grid = plan.grid(steps, batch, self._device.limits(device), resident)
        if len(self._sized) >= GRIDS:
            self._sized = {}
        sized = Sized(grid, tuple(plan.sizes(grid, batch)), tuple(plan.numbers(grid, batch)))
        self._sized[device, steps, batch] = sized
        return sized


def _make_scratch(scratch: Scratch, size: int, device: torch.device) -> Memory:
    dtype = torch.int32 if scratch.dtype == "word" else TORCH_DTYPES[scratch.dtype]
    make = torch.zeros if scratch.zeroed else torch.empty
    tensor = make(size, dtype=dtype, device=device)
    return Memory(tensor, scratch.name, written=True, fresh=not scratch.zeroed)
