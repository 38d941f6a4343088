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
from sparsify.codegen.cuda.device import Device, Function, Grid, Launch, Memory, Word, like_of
from sparsify.codegen.cuda.frame_text import Scratch
from sparsify.codegen.cuda.packed_weight import PackedWeights, PackingOn
from sparsify.codegen.cuda.strategy import Plan
from sparsify.codegen.slots import TORCH_DTYPES, Slots, counted, take_operand, take_output
from sparsify.errors import KernelFault

FunctionOn = Callable[[torch.device], Function]
GRIDS = 64  # of calls with other numbers of steps and rows that are remembered
MOST_KEPT = 2**18  # elements of scratch memory that are kept between calls
# A third of the time that torch.empty takes to read its arguments.
_empty_like: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like


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


class Given(NamedTuple):
    """What a tensor of a prepared call has to be."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]


class Prepared(NamedTuple):
    """A call that can be made again with other tensors of the same sizes and strides.

    ``outputs`` are tensors like which new ones are made. ``launch`` takes operands, outputs, and
    the scratch memory that is not kept, of ``loose`` sizes; it reads ``weights`` as they are
    packed.
    """

    device: torch.device
    stream: int
    operands: Sequence[Given]
    outputs: Sequence[tuple[str, torch.Tensor]]
    weights: Sequence[Memory]
    loose: Sequence[tuple[Scratch, int]]
    launch: Launch


class CudaLaunchable:
    """A loaded kernel; see ``backend.Launchable``. Any number of threads may call it at once.

    It serves all devices of its type: the kernel is loaded on each when tensors come from there.
    Memory is kept for each device and stream, on which calls follow each other.
    """

    def __init__(
        self,
        kernel: ir.Kernel,
        schedule: ir.Schedule,
        source: Source,
        plan: Plan,
        device: Device,
        function_on: FunctionOn,
        packing_on: PackingOn,
    ) -> None:
        self.kernel, self.schedule, self.source = kernel, schedule, source
        self._plan, self._device, self._function_on = plan, device, function_on
        self._slots = Slots(kernel)
        self._names = [o.name for o in kernel.operands] + [w.name for w in kernel.weights]
        self._weights = PackedWeights(kernel, schedule, packing_on, plan.kept)
        self._counted = {g.result: counted(kernel, g) for g in kernel.gathers}
        self._functions: dict[torch.device, Function] = {}
        self._active: dict[torch.device, Memory] = {}
        self._sized: dict[tuple[torch.device, int, int], Sized] = {}
        self._scratch: dict[tuple[torch.device, int, str], Memory] = {}
        self._prepared: dict[tuple[torch.device, int, int, int], Prepared] = {}
        self._given_up: dict[str, GivenUp] = {}
        self._lock = Lock()  # of what is loaded
        self._in_order = Lock()  # nobody packs other weights between packing and launching

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
        device = self._device_of(tensors)
        stream = self._device.stream(device)
        if not outputs and stream is not None:
            prepared = self._prepared.get((device, stream, steps, batch))
            if prepared is not None:
                results = self._run_again(prepared, tensors, frozen)
                if results is not None:
                    return results
        return self._run(tensors, steps, batch, outputs, frozen, device, stream)

    def _run_again(
        self, prepared: Prepared, tensors: Mapping[str, torch.Tensor], frozen: bool
    ) -> dict[str, torch.Tensor] | None:
        """The call, or None where a tensor is not as it was. This takes its few microseconds."""
        device, stream, operands, outputs, weights, loose, launch = prepared
        given = []
        try:
            for name, dtype, shape, strides in operands:
                tensor = tensors[name]
                # What has no strides says so: sparse tensors raise an error, now or at data_ptr.
                if (
                    tensor.dtype is not dtype
                    or tensor.shape != shape
                    or tensor.stride() != strides
                    or tensor.device != device
                    or tensor.is_neg()
                ):
                    return None
                given.append(tensor)
        except (KeyError, AttributeError, RuntimeError):
            return None  # the long way says what is wrong
        if self._given_up:
            self._check_given_up()
        with self._in_order:
            if self._weights.get(tensors, device, stream, frozen) is not weights:
                return None
            results = {}
            for name, like in outputs:
                results[name] = output = _empty_like(like)
                given.append(output)
            for scratch, size in loose:
                given.append(_make_scratch(scratch, size, device).tensor)
            launch(given)
        if self._given_up:
            self._check_given_up()
        return results

    def _run(
        self,
        tensors: Mapping[str, torch.Tensor],
        steps: int,
        batch: int,
        outputs: Mapping[str, torch.Tensor] | None,
        frozen: bool,
        device: torch.device,
        stream: int | None,
    ) -> dict[str, torch.Tensor]:
        """The call, and what makes it again if it can be."""
        _, operand_shapes, output_shapes = self._slots.shapes(steps, batch)
        words: list[Word] = [steps, batch]
        given: list[Given] | None = []
        of_operands, of_outputs = [], []
        for slot, shape in zip(self._slots.operands, operand_shapes, strict=True):
            strides: list[int] = []
            operand = take_operand(tensors, slot, shape, device, strides)
            if given is not None and operand is tensors[slot.name]:
                given.append(Given(slot.name, operand.dtype, operand.shape, operand.stride()))
            else:
                given = None  # it was copied
            of_operands.append(len(words))
            words += [Memory(operand, slot.name), *strides]
        of_weights = len(words)
        results = {}
        ends: list[Word] = []
        for slot, shape in zip(self._slots.outputs, output_shapes, strict=True):
            strides = []
            output = results[slot.name] = take_output(outputs, slot, shape, device, strides)
            is_made = not outputs or slot.name not in outputs
            of_outputs.append(len(ends))
            ends += [Memory(output, slot.name, written=True, fresh=is_made), *strides]
        with self._in_order:
            weights = self._weights.get(tensors, device, stream, frozen)
            if not steps or not batch:
                return results
            words += [*weights, *ends]
            first_end = of_weights + len(weights)
            sized, loose, of_loose = self._launch(device, stream, steps, batch, words)
            if outputs or given is None or stream is None:
                return results
            places = [*of_operands, *(first_end + i for i in of_outputs)]
            places += of_loose
            like = [(slot.name, like_of(results[slot.name])) for slot in self._slots.outputs]
            launch = self._functions[device].prepare(sized.grid, words, places, stream)
            if len(self._prepared) >= GRIDS:
                self._prepared = {}
            self._prepared[device, stream, steps, batch] = Prepared(
                device, stream, given, like, weights, loose, launch
            )
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

    def _launch(
        self, device: torch.device, stream: int | None, steps: int, batch: int, words: list[Word]
    ) -> tuple[Sized, list[tuple[Scratch, int]], list[int]]:
        """Complete the words and start the kernel.

        Returns what it takes of the sizes, the scratch memory that is of this call alone, and the
        places of that among the words.
        """
        function = self._functions.get(device) or self._load(device)
        self._check_given_up()
        sized = self._sized.get((device, steps, batch)) or self._size(device, steps, batch)
        words.append(self._active[device])
        loose, of_loose = [], []
        for scratch, size in zip(self._plan.scratch, sized.scratch, strict=True):
            memory = self._keep_scratch(scratch, size, device, stream)
            if memory is None:
                loose.append((scratch, size))
                of_loose.append(len(words))
                memory = _make_scratch(scratch, size, device)
            words.append(memory)
        words += sized.numbers
        function.launch(sized.grid, words)
        self._check_given_up()
        return sized, loose, of_loose

    def _keep_scratch(
        self, scratch: Scratch, size: int, device: torch.device, stream: int | None
    ) -> Memory | None:
        """Memory of a device and stream, None if it is too much to be kept."""
        if scratch.lasting:
            return self._given_up[scratch.name].memory
        if stream is None or size > MOST_KEPT:
            return None
        place = device, stream, scratch.name
        kept = self._scratch.get(place)
        if kept is None or kept.tensor.numel() < size:
            with torch.inference_mode(False):
                kept = self._scratch[place] = _make_scratch(scratch, size, device)
        return kept

    def _check_given_up(self) -> None:
        """Raise KernelFault if a kernel that was launched before has given up.

        Nothing waits: what is on its way now is found by a later call.
        """
        for given_up in self._given_up.values():
            if given_up.flag[0]:
                given_up.flag[0] = 0
                # What it has left in memory that is zero before a call is not.
                self._scratch, self._prepared = {}, {}
                note = next(s.note for s in self._plan.scratch if s.name == given_up.memory.name)
                report = f"A call has given up ({note}); what it was to compute is wrong."
                raise KernelFault(self.source.title or self.kernel.name, [report])

    def _device_of(self, tensors: Mapping[str, torch.Tensor]) -> torch.device:
        """The device of the first tensor that is on one of the backend's."""
        for name in self._names:
            tensor = tensors.get(name)
            if isinstance(tensor, torch.Tensor):
                device = tensor.device
                if device.type == self._device.type:
                    return device
        return torch.device(self._device.type)

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
