"""Calling a compiled kernel: checks of tensors, strides, packed weights, event counters."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsify import ir
from sparsify.codegen.backend import Source
from sparsify.codegen.compressed import band_width
from sparsify.codegen.contents import Contents, layout_of
from sparsify.codegen.cpp.neurons_per_thread import NeuronsPerThread
from sparsify.codegen.cpp.packed_weight import Current, PackedWeight
from sparsify.codegen.cpp.prepared_call import (
    Native,
    Prepared,
    PreparedPacking,
    PreparedWeight,
    like,
)
from sparsify.codegen.given_weights import given_weights
from sparsify.codegen.native_call import Repeater
from sparsify.codegen.predict_cost import count_pairs
from sparsify.codegen.runtime import Runtime
from sparsify.codegen.slots import (
    CPU,
    TORCH_DTYPES,
    Slots,
    counted,
    fits,
    lead,
    misfit,
    take_operand,
    take_output,
)

PAIRS_PER_NEURON = 64  # weights that cost as much as the update of a neuron, at some 20 % activity
ALONE = 8192  # neuron updates that take one thread no longer than it takes to wake another
PREPARED = 64  # calls with other numbers of steps and rows that are remembered
FunctionOf = Callable[[ir.Kernel, ir.Schedule], Any]


@dataclass(frozen=True, slots=True)
class _PackedSlot:
    """A weight of the kernel in one layout. ``places`` are the neurons of a band, if it has any."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    packed: PackedWeight
    places: int

    def pack(
        self, weight: torch.Tensor, frozen: bool, content: int | None, threads: int, tile: int
    ) -> Current:
        """``threads`` share the bands of receivers."""
        band = band_width(self.places, threads, tile) if self.places else 0
        return self.packed.get(weight, frozen=frozen, band=band, content=content)


@dataclass(frozen=True, slots=True)
class _Variant:
    """The kernel under one schedule, and what it is given of weights."""

    function: Any
    weights: list[_PackedSlot]


class CppLaunchable:
    """A loaded kernel; see ``backend.Launchable``. Any number of threads may call it at once.

    ``function_of`` compiles the kernel for another schedule: gathers whose weights are not finite
    run dense, because skipping a zero would skip 0 * inf.
    """

    def __init__(
        self,
        kernel: ir.Kernel,
        schedule: ir.Schedule,
        source: Source,
        function: Any,
        runtime: Runtime,
        tile: int,
        function_of: FunctionOf,
    ) -> None:
        self.kernel, self.schedule, self.source = kernel, schedule, source
        self._runtime, self._function_of = runtime, function_of
        self._slots = Slots(kernel)
        self._tile, self._divides = tile, schedule.strategy == NeuronsPerThread.name
        self._contents = {weight.name: Contents(runtime) for weight in kernel.weights}
        variant = _Variant(function, self._weights_of(schedule))
        self._counted = {g.result: counted(kernel, g) for g in kernel.gathers}
        # By gather, and behind them time steps times batch rows of all calls.
        self._active = (ctypes.c_int64 * (len(kernel.gathers) + 1))()
        self._operands = [operand.name for operand in kernel.operands]
        self._weights = [weight.name for weight in kernel.weights]
        self._names = {*self._operands, *self._weights}
        self._work = sum(kernel.population_size(phase.population) for phase in kernel.phases)
        self._work += (
            sum(count_pairs(kernel, kernel.weight(w.name)) for w in variant.weights)
            // PAIRS_PER_NEURON
        )
        self._variants = {frozenset[str](): variant}
        self._prepared: dict[tuple[int, int], Prepared] = {}  # by steps and batch
        strided = (*self._slots.operands, *self._slots.outputs)
        self._strides = ctypes.c_int64 * max(1, sum(len(lead(s.axes)) for s in strided))

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

        Raises ValueError and TypeError for tensors that do not fit, naming them, and ValueError
        for zero steps where an output is the last step's value.
        """
        if not outputs and (steps, batch) in self._prepared and tensors.keys() >= self._names:
            given = [tensors[name] for name in (*self._operands, *self._weights)]
            results = self.repeat(given, steps, batch, frozen)
            if results is not None:
                return self._named(results)
        return self._run(tensors, steps, batch, outputs, None if frozen else {})

    def repeat(
        self,
        tensors: Sequence[torch.Tensor],
        steps: int,
        batch: int,
        frozen: bool,
        unread: frozenset[int] = frozenset(),
    ) -> list[torch.Tensor] | None:
        """See ``backend.Repeatable``."""
        prepared = self._prepared.get((steps, batch))
        if prepared is None:
            return None
        looked = None if frozen else dict[str, int]()
        outputs = prepared(tensors, looked, unread)
        if outputs is not None or not looked:
            return outputs
        # A weight holds something else: what was looked at need not be read again.
        named = dict(zip((*self._operands, *self._weights), tensors, strict=True))
        return list(self._run(named, steps, batch, None, looked).values())

    def repeater(
        self,
        tensors: Sequence[torch.Tensor],
        steps: int,
        batch: int,
        places: Sequence[tuple[int, int]],
        returned: Sequence[int],
        unread: frozenset[int],
    ) -> tuple[Repeater, int] | None:
        """See ``backend.Repeatable``."""
        prepared = self._prepared.get((steps, batch))
        found = prepared.repeater(tensors, places, returned, unread) if prepared else None
        return None if found is None else (found, sys.maxsize)

    def _named(self, outputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {slot.name: o for slot, o in zip(self._slots.outputs, outputs, strict=True)}

    def _run(
        self,
        tensors: Mapping[str, torch.Tensor],
        steps: int,
        batch: int,
        outputs: Mapping[str, torch.Tensor] | None,
        looked: dict[str, int] | None,
    ) -> dict[str, torch.Tensor]:
        """The call, and what makes it again if it can be.

        ``looked`` is what weights were found to hold in this call; None promises no change.
        """
        _, operand_shapes, output_shapes = self._slots.shapes(steps, batch)
        pointers: list[int] = []
        strides: list[int] = []
        operands: list[torch.Tensor] = []  # some may be made for this call only
        for slot, shape in zip(self._slots.operands, operand_shapes, strict=True):
            operand = take_operand(tensors, slot, shape, CPU, strides)
            pointers.append(operand.data_ptr())
            operands.append(operand)
        threads = torch.get_num_threads()
        variant, kept = self._pack_weights(tensors, threads, looked)
        pointers += [current.packed.tiles.data_ptr() for current in kept]
        results = {}
        for slot, shape in zip(self._slots.outputs, output_shapes, strict=True):
            output = results[slot.name] = take_output(outputs, slot, shape, CPU, strides)
            pointers.append(output.data_ptr())
        if not steps or not batch:
            return results
        known = self._prepared.get((steps, batch))
        examples = known.examples if known else [like(output) for output in results.values()]
        packed = list(zip(variant.weights, kept, strict=True))
        held = {slot.name: current.content for slot, current in packed}
        laid = self._strides(*strides)
        native = Native(
            ctypes.cast(variant.function, ctypes.c_void_p),
            ctypes.addressof(laid),
            steps,
            batch,
            threads if steps * batch * self._work > ALONE else 1,
            len(self.kernel.gathers),
            ctypes.addressof(self._active),
        )
        prepared = Prepared(
            self._runtime,
            threads,
            native,
            (laid, self._active, variant.function),
            operands,
            [tensors[name] for name in self._weights],
            [
                PreparedWeight(n, self._contents[n], held[n], layout_of(tensors[n]))
                for n in self._weights
            ],
            [PreparedPacking.of(slot.packed, current) for slot, current in packed],
            examples,
        )
        prepared.launch(pointers)
        is_copied = any(o is not tensors[n] for o, n in zip(operands, self._operands, strict=True))
        # A frozen weight that is packed twice may have changed in between.
        agree = all(held[slot.name] == current.content for slot, current in packed)
        if not outputs and not is_copied and agree:
            if len(self._prepared) >= PREPARED:
                self._prepared = {}
            self._prepared[steps, batch] = prepared
        return results

    @property
    def events(self) -> dict[str, tuple[int, int]]:
        """Per Gather, how many senders were active and how many there were, over all calls.

        Of restricted ones, how many sums were wanted and how many there were.
        """
        *found, row_steps = self._active
        pairs = zip(found, self._counted.items(), strict=True)
        return {result: (active, row_steps * n) for active, (result, n) in pairs}

    def reset_events(self) -> None:
        ctypes.memset(self._active, 0, ctypes.sizeof(self._active))

    def _pack_weights(
        self, tensors: Mapping[str, torch.Tensor], threads: int, looked: dict[str, int] | None
    ) -> tuple[_Variant, list[Current]]:
        """The kernel for what the weights hold, and what it reads of them."""
        threads = threads if self._divides else 1
        variant = self._variants[frozenset()]
        while True:
            kept = [self._pack(slot, tensors, looked, threads) for slot in variant.weights]
            pairs = zip(variant.weights, kept, strict=True)
            infinite = frozenset(slot.name for slot, one in pairs if not one.packed.all_finite)
            wanted = self._variants.get(infinite) or self._dense_variant(infinite)
            if wanted.weights is variant.weights:
                return wanted, kept
            variant = wanted

    def _pack(
        self,
        slot: _PackedSlot,
        tensors: Mapping[str, torch.Tensor],
        looked: dict[str, int] | None,
        threads: int,
    ) -> Current:
        weight = tensors.get(slot.name)
        if not fits(weight, slot.dtype, slot.shape, CPU):
            wanted = f"{list(slot.shape)} of {slot.dtype}"
            raise misfit(weight, slot.name, wanted, slot.dtype, CPU)
        if looked is not None and slot.name not in looked:
            # Before packing: a write in between is then found at the next call.
            looked[slot.name] = slot.packed.contents.look(weight)
        content = None if looked is None else looked[slot.name]
        return slot.pack(weight, looked is None, content, threads, self._tile)

    def _dense_variant(self, infinite: frozenset[str]) -> _Variant:
        """The kernel whose gathers through ``infinite`` weights are dense, compiled at need.

        Restricted ones skip no sender, and what they skip is zero whatever the weights are. Through
        rows that are not dense, too: what is left out is multiplied by zero or not at all.
        """
        reading = [g for g in self.kernel.gathers if g.only is None and g.weight in infinite]
        dense, whole = {g.result for g in reading}, {g.weight for g in reading}
        gathers: tuple[tuple[str, Any], ...] = tuple(
            (result, "dense" if result in dense else how) for result, how in self.schedule.gathers
        )
        layouts = tuple(pair for pair in self.schedule.layouts if pair[0] not in whole)
        known = self._variants[frozenset()]
        # The tile stays what weights are packed in, also where all products are dense now.
        schedule = replace(self.schedule, gathers=gathers, layouts=layouts, tile=self._tile)
        if (gathers, layouts) == (self.schedule.gathers, self.schedule.layouts):
            variant = known
        else:
            function = self._function_of(self.kernel, schedule)
            packed_alike = layouts == self.schedule.layouts
            variant = _Variant(
                function, known.weights if packed_alike else self._weights_of(schedule)
            )
        self._variants[infinite] = variant
        return variant

    def _weights_of(self, schedule: ir.Schedule) -> list[_PackedSlot]:
        slots = []
        for given in given_weights(self.kernel, schedule):
            weight, by_senders = given.weight, given.by == "senders"
            receivers, senders = self.kernel.weight_shape(weight)
            form, contents = given.form(self._tile), self._contents[weight.name]
            slots.append(
                _PackedSlot(
                    weight.name,
                    (receivers, senders),
                    TORCH_DTYPES[weight.dtype],
                    PackedWeight(self._runtime, form, contents, by_senders),
                    receivers if given.is_kept and not by_senders else 0,
                )
            )
        return slots
