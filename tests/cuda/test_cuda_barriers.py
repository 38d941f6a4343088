"""Every barrier of CUDA kernels is needed: the emulator objects when it is left out."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from sparsify import ir
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.emulator.device import SCHEDULES
from sparsify.errors import KernelFault
from sparsify.reference import Array
from tests.codegen.test_bits import gate_data
from tests.kernels.edited_kernels import EditedTexts, edited
from tests.kernels.emulated_kernels import TWO_BLOCKS, emulator, exact, load, needs_emulator, run
from tests.kernels.example_kernels import (
    gate_of_bits,
    gradient_data,
    lif,
    lif_data,
    lif_gradient,
    schedule,
    two_layers,
)

ROW = "row-per-block"

pytestmark = needs_emulator


def exchanging() -> dict[str, tuple[ir.Kernel, dict[str, Array]]]:
    """Kernels whose threads meet for every reason that there is, with their data."""
    rng = np.random.default_rng(3)
    layers = {
        "x": exact(rng, (5, 5, 300)),
        "bias": np.full(300, 0.2, "float32"),
        "h0": np.ones((), "float32"),
        "w_back": exact(rng, (300, 290)),
        "w_forward": exact(rng, (290, 300)),
    }
    recurrent, gradient, gates = lif(300, 530), lif_gradient(330), gate_of_bits(300)
    return {
        "lif": (recurrent, lif_data(recurrent, 5, 5)),
        "gradient": (gradient, gradient_data(gradient, 5, 5, 0.2)),
        "gates": (gates, gate_data(gates, 5, 5)),
        "layers": (two_layers(300, 290), layers),
    }


BARRIER = re.compile(r"__syncthreads\(\);.*\n")
EXCHANGING = exchanging()
BARRIERS = {
    f"{name}-{number}": (name, number)
    for name, (kernel, _) in EXCHANGING.items()
    for number in range(
        len(BARRIER.findall(CudaBackend(emulator()).render(kernel, schedule(kernel, ROW)).text))
    )
}


@pytest.mark.parametrize("case", BARRIERS)
def test_no_barrier_can_be_left_out(case: str) -> None:
    """Each block has several rows, of an odd number of steps: the last reads what begins a row."""
    name, number = BARRIERS[case]
    kernel, _ = EXCHANGING[name]
    plan = schedule(kernel, ROW)
    source = CudaBackend(emulator()).render(kernel, plan)
    lines = list(BARRIER.finditer(source.text))
    start, end = lines[number].span()
    texts = {source.filename: source.text[:start] + "\n" + source.text[end:]}
    devices = (edited(order, texts, TWO_BLOCKS) for order in SCHEDULES)
    objections = (why_wrong(device, name) for device in devices)
    assert any(objections), f"nobody misses {lines[number].group()!r} of {name}"


def why_wrong(device: EditedTexts, name: str) -> str | None:
    """What the emulator objects to in a call of an edited kernel."""
    kernel, data = EXCHANGING[name]
    backend = CudaBackend(device)
    launch = backend.load(backend.compile(kernel, schedule(kernel, ROW)))
    try:
        run(launch, data, 5, 5)
    except KernelFault as fault:
        return next(r for r in fault.reports if re.match("race|uninitialised|out of bounds", r))
    return None


@pytest.mark.parametrize("name", ["gradient", "gates"])
def test_all_threads_must_agree_on_what_is_wild(name: str) -> None:
    """Without the reduction, a warp knows of its own senders only."""
    kernel, data = EXCHANGING[name]
    plan = schedule(kernel, ROW)
    data = {key: value.copy() for key, value in data.items()}
    operand = {"gradient": "d0", "gates": "g"}[name]
    data[operand][..., 299] = np.float32(2.0**63)
    if name == "gates":
        data["near"][..., 37] |= 8
    source = CudaBackend(emulator()).render(kernel, plan)
    pattern = re.compile(r"__syncthreads_or\((is_wild.*)\);")
    assert pattern.search(source.text)
    text = pattern.sub(r"\1; __syncthreads();", source.text, count=1)
    texts = {source.filename: text}
    backend = CudaBackend(EditedTexts("forward", seed=1, played=TWO_BLOCKS, texts=texts))
    wrong = run(backend.load(backend.compile(kernel, plan)), data, 5, 5)
    wanted = run(load(kernel, plan), data, 5, 5)
    assert any(not torch.equal(wrong[key], wanted[key]) for key in wanted)
