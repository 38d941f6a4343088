"""Kernels with edited texts, and what the emulator, or the reference, objects to in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from sparsify import errors, ir
from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import Limits
from sparsify.codegen.emulator.device import EmulatedDevice, EmulatedFunction, Schedule
from sparsify.reference import Array
from tests.kernels.emulated_kernels import compare

ORDERS: tuple[Schedule, ...] = ("random", "forward", "reverse")
Case = tuple[ir.Kernel, dict[str, Array], int, int]  # with data, steps and rows


@dataclass(frozen=True)
class EditedTexts(EmulatedDevice):
    """Compiles ``texts``, by the names of files, in the place of those that it is given.

    What packs weights is the same for all of them, has tests of its own, and is not checked here.
    """

    texts: Mapping[str, str] = field(default_factory=dict, compare=False)

    def compile(self, source: Source, headers: Mapping[str, str]) -> Path:
        if _packs(source.entry):
            return _unchecked(self).compile(source, headers)
        text = self.texts.get(source.filename, source.text)
        given = {name: self.texts.get(name, header) for name, header in headers.items()}
        return super().compile(replace(source, text=text), given)

    def load(
        self, path: Path, entry: str, device: torch.device, title: str = ""
    ) -> EmulatedFunction:
        if _packs(entry):
            return _unchecked(self).load(path, entry, device, title)
        return super().load(path, entry, device, title)


def _packs(entry: str) -> bool:
    return entry.startswith("run_pack")


def _unchecked(device: EmulatedDevice) -> EmulatedDevice:
    return EmulatedDevice(device.schedule, device.seed, checks=False, played=device.played)


def edited(order: Schedule, texts: Mapping[str, str], limits: Limits) -> EditedTexts:
    """``texts`` are those of kernels and headers, by the names of their files."""
    return EditedTexts(order, seed=1, checks=True, played=limits, texts=texts)


def objection(
    case: Case,
    plan: ir.Schedule,
    texts: Mapping[str, str],
    limits: Limits,
    orders: Sequence[Schedule] = ORDERS,
) -> str:
    """What the emulator, or the reference, says in the first order in which all is not well."""
    kernel, data, steps, batch = case
    for order in orders:
        backend = CudaBackend(edited(order, texts, limits))
        launch = backend.load(backend.compile(kernel, plan))
        try:
            compare(launch, kernel, data, steps, batch)
        except (errors.KernelFault, AssertionError) as error:
            return str(error) or repr(error)
    return ""
