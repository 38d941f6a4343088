"""A call of a C++ kernel that can be made again, with other tensors of the same layouts."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sparsify.codegen.contents import Contents
from sparsify.codegen.cpp.packed_weight import Current, PackedWeight
from sparsify.codegen.native_call import Repeater, native_call
from sparsify.codegen.runtime import Runtime, as_rows
from sparsify.codegen.write_watch import QUESTION

# A third of the time that torch.empty takes to read its arguments.
empty_like: Any = torch.empty_like
get_num_threads = torch.get_num_threads
NO_MEMORY, WRITTEN = 1, 2  # an Outcome of prepared_call.h
MOST_SPARE = 2**14  # elements: making a larger tensor takes no time beside the call


Spared = tuple[list[torch.Tensor], list[int], list[tuple[int, torch.Tensor]]]
"""Outputs and their addresses; in some places new tensors are made like others."""


Asked = list[Any]
"""[A question for each weight, empty for those to be read; all of them as one]"""


class Native(ctypes.Structure):
    """The ``Prepared`` of prepared_call.h."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("steps", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("gathers", ctypes.c_int64),
        ("active", ctypes.c_void_p),
    )


class Given(NamedTuple):
    """What a tensor has to be."""

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> Given:
        return Given(tensor.dtype, tensor.shape, tensor.stride())


class PreparedWeight(NamedTuple):
    """The tensor that a weight has to be, and what that has to hold. It is not kept."""

    name: str
    contents: Contents
    content: int
    layout: tuple[object, ...]

    @property
    def question(self) -> bytes | None:
        return self.contents.question(self.content, self.layout)

    def look(self, tensor: torch.Tensor) -> int:
        """What it holds now, read if the watch does not tell."""
        holds = self.contents.still_hold(self.content, self.layout)
        return self.content if holds else self.contents.look(tensor)


class PreparedPacking(NamedTuple):
    """Where a weight lies packed. ``packing`` tells whether that is still what was packed last.

    It does not keep it.
    """

    weight: PackedWeight
    packing: object
    address: int

    @staticmethod
    def of(weight: PackedWeight, current: Current) -> PreparedPacking:
        return PreparedPacking(weight, current.layout, current.packed.tiles.data_ptr())


class Prepared:
    """Makes such calls: takes operands and weights in the kernel's order, returns its outputs.

    ``threads`` is torch's number of them, which has to be the same. ``native`` is the rest of what
    a call takes; ``keeping`` is memory that it points to. ``examples`` are tensors like which
    outputs are made.
    """

    def __init__(
        self,
        runtime: Runtime,
        threads: int,
        native: Native,
        keeping: object,
        operands: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
        weights: Sequence[PreparedWeight],
        packings: Sequence[PreparedPacking],
        examples: Sequence[torch.Tensor],
    ) -> None:
        self.examples = examples
        self._threads, self._native, self._keeping = threads, native, keeping
        self._runtime, self._run, self._address = runtime, runtime.call, ctypes.addressof(native)
        self._given = [Given.of(tensor) for tensor in (*operands, *tensors)]
        self._operands = len(operands)
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._weights = weights
        self._packings = [(each.weight, each.packing) for each in packings]
        self._packed = [each.address for each in packings]
        self._pack = struct.Struct(f"{len(operands) + len(packings) + len(examples)}Q").pack
        self._asked: Asked = [(), b""]
        self._spared: dict[frozenset[int], Spared] = {}
        self._repeaters: dict[frozenset[int], Repeater | None] = {}  # by what is unread
        self._may_be_native = True

    def __call__(
        self,
        tensors: Sequence[torch.Tensor],
        looked: dict[str, int] | None,
        unread: frozenset[int] = frozenset(),
    ) -> list[torch.Tensor] | None:
        """The call, or None where a tensor is not as it was. This takes its few microseconds.

        ``looked`` gets what weights hold, of those that were looked at; None promises that they
        hold what they did in the last call. Outputs ``unread`` may be the same tensors in all
        calls. Raises MemoryError.
        """
        repeater = self._repeaters.get(unread)
        if repeater is not None:
            results = repeater(looked is None, tensors)
            if results is not None:
                return list(results)
        outputs = self._call(tensors, looked, unread)
        if outputs is not None and unread not in self._repeaters and native_call() is not None:
            places = [(0, index) for index in range(len(tensors))]
            made = self.repeater(tensors, places, [*range(len(outputs))], unread)
            self._repeaters[unread] = made
        return outputs

    def repeater(
        self,
        tensors: Sequence[torch.Tensor],
        places: Sequence[tuple[int, int]],
        returned: Sequence[int],
        unread: frozenset[int] = frozenset(),
    ) -> Repeater | None:
        """What makes calls like one with ``tensors`` natively, if that can be.

        ``places`` say where it finds each tensor: in which sequence, and where there. It returns
        the outputs ``returned``. None, too, for ``tensors`` that ``__call__`` does not take.
        """
        native = native_call()
        if native is None or not self._may_be_native or not self._takes(tensors):
            return None
        weights = []
        for weight, tensor in zip(self._weights, tensors[self._operands :], strict=True):
            *rows, readable = as_rows(tensor)
            if readable is not tensor:  # it was copied to be read
                self._may_be_native = False
                return None
            weights.append((weight.contents, weight.content, *rows))
        outputs, _, made = self._spared.get(unread) or self._spare(unread)
        anew = {place for place, _ in made}
        return native.repeater(
            *self._runtime.addresses,
            self._address,
            (self._native, self._keeping),
            self._threads,
            self._native.batch,
            list(places),
            list(tensors),
            [
                (weight, packing, address)
                for (weight, packing), address in zip(self._packings, self._packed, strict=True)
            ],
            weights,
            self._asked,
            [(output, place not in anew) for place, output in enumerate(outputs)],
            list(returned),
        )

    def _takes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether they lie as the kernel reads them: one that does not is copied for its call."""
        addresses = [tensor.data_ptr() for tensor in tensors[self._operands :]]
        return [Given.of(t) for t in tensors] == self._given and addresses == self._addresses

    def _call(
        self,
        tensors: Sequence[torch.Tensor],
        looked: dict[str, int] | None,
        unread: frozenset[int],
    ) -> list[torch.Tensor] | None:
        """What ``native_call.cpp`` does, in Python: for calls that it does not know, or not yet."""
        if get_num_threads() != self._threads:
            return None
        pointers = []
        try:
            for tensor, (dtype, shape, strides) in zip(tensors, self._given, strict=True):
                # What has no strides says so: sparse tensors raise an error, now or at data_ptr.
                if (
                    tensor.dtype is not dtype
                    or tensor.shape != shape
                    or tensor.stride() != strides
                    or not tensor.is_cpu
                    or tensor.is_neg()
                ):
                    return None
                pointers.append(tensor.data_ptr())
        except (AttributeError, RuntimeError):
            return None  # the long way says what is wrong
        if pointers[self._operands :] != self._addresses:
            return None
        kept: list[object] = []  # until the call ends
        for weight, packing in self._packings:
            current = weight.current
            if current is None or current.layout is not packing:
                return None
            kept.append(current)
        questions = b"" if looked is None else self._questions(tensors, looked, kept)
        if questions is None:
            return None
        outputs, addresses, made = self._spared.get(unread) or self._spare(unread)
        outputs, addresses = outputs.copy(), addresses.copy()
        for place, example in made:
            outputs[place] = output = empty_like(example)
            addresses[place] = output.data_ptr()
        pointers[self._operands :] = self._packed
        pointers += addresses
        if self.launch(pointers, questions):
            return outputs
        # A weight may have been written to: if it holds the same, this was for nothing.
        if looked is None or self._look(tensors, looked) is None:
            return None
        self.launch(pointers)
        return outputs

    def _spare(self, unread: frozenset[int]) -> Spared:
        """Small tensors that are kept for what nobody reads, and what is to be made anew."""
        places = enumerate(self.examples)
        is_spare = [i in unread and e.numel() <= MOST_SPARE for i, e in places]
        pairs = list(zip(self.examples, is_spare, strict=True))
        outputs = [empty_like(e) if spare else e for e, spare in pairs]
        made = [(i, e) for i, (e, spare) in enumerate(pairs) if not spare]
        found = self._spared[unread] = outputs, [o.data_ptr() for o in outputs], made
        return found

    def launch(self, pointers: Sequence[int], questions: bytes = b"") -> bool:
        """Run the kernel; whether all ``questions`` whether weights are unwritten found so.

        If not, outputs hold nothing of use. Raises MemoryError.
        """
        words, count = self._pack(*pointers), len(questions) // QUESTION.size
        outcome = self._run(self._address, words, questions, count)
        if outcome == NO_MEMORY:
            raise MemoryError(f"no memory for {self._native.batch} batch rows")
        return bool(outcome != WRITTEN)

    def _questions(
        self, tensors: Sequence[torch.Tensor], looked: dict[str, int], kept: list[object]
    ) -> bytes | None:
        """What is to be asked while the kernel runs; None if a weight holds something else."""
        asked: tuple[bytes, ...] = self._asked[0]
        questions: bytes = self._asked[1]
        if not asked:
            return self._look(tensors, looked)
        for weight, question in zip(self._weights, asked, strict=True):
            seen = weight.contents.seen
            if not question or seen is None or seen.question is not question:
                return self._look(tensors, looked)
            weight.contents.spared += 1
            kept.append(seen)
        return questions

    def _look(self, tensors: Sequence[torch.Tensor], looked: dict[str, int]) -> bytes | None:
        """Look at the weights now: nothing is left to be asked."""
        for weight, tensor in zip(self._weights, tensors[self._operands :], strict=True):
            looked[weight.name] = content = weight.look(tensor)
            if content != weight.content:
                return None
        asked = tuple([weight.question for weight in self._weights])
        known = [question for question in asked if question is not None]
        self._asked[:] = (asked, b"".join(known)) if len(known) == len(asked) else ((), b"")
        return b""


def like(output: torch.Tensor) -> torch.Tensor:
    """A tensor of one element that has the output's shape: ``empty_like`` makes it contiguous."""
    with torch.inference_mode(False):
        return torch.empty(1, dtype=output.dtype, device=output.device).expand(output.shape)
