"""Kernels for CUDA whose text is kept in golden files, and compiled for every target."""

from __future__ import annotations

from dataclasses import replace

from sparsify import ir
from tests.kernels.example_kernels import (
    gate_of_bits,
    lif,
    lif_gradient,
    product,
    schedule,
    two_layers,
)
from tests.kernels.gated_kernels import egru
from tests.kernels.half_kernels import half_lif

COMPRESSED = ir.Layout("compressed-rows", room=0.25)
TWO_OF_FOUR = ir.Layout("masked-rows", 4, 0.5)
BLOCKS = ir.Layout("block-rows", 8)


def kept(schedule: ir.Schedule, **layouts: ir.Layout) -> ir.Schedule:
    """With these layouts of weights."""
    return replace(schedule, layouts=tuple(layouts.items()))


CUDA_CASES: dict[str, tuple[ir.Kernel, ir.Schedule]] = {
    "lif_row": (lif(70, 130), schedule(lif(70, 130), "row-per-block")),
    "lif_dense_row": (
        lif(70, 130, "float64"),
        schedule(lif(70, 130), "row-per-block", "dense"),
    ),
    "lif_large_row": (
        replace(lif(70, 8000), reverse=True),
        schedule(lif(70, 8000), "row-per-block"),
    ),
    "lif_gradient_row": (lif_gradient(1300), schedule(lif_gradient(1300), "row-per-block")),
    "gate_of_bits_row": (gate_of_bits(70), schedule(gate_of_bits(70), "row-per-block")),
    "two_layers_row": (
        two_layers(140, 33),
        ir.Schedule("row-per-block", (("back", "event"), ("forward", "dense"))),
    ),
    "half_lif_row": (
        half_lif(70, 130, "bfloat16"),
        schedule(half_lif(70, 130, "bfloat16"), "row-per-block"),
    ),
    "product_row": (product(300, 40), schedule(product(300, 40), "row-per-block")),
    "lif_kept_row": (
        lif(70, 700),
        kept(schedule(lif(70, 700), "row-per-block"), w_in=TWO_OF_FOUR, w_rec=COMPRESSED),
    ),
    "two_layers_kept_row": (
        two_layers(1400, 330),
        kept(
            ir.Schedule("row-per-block", (("back", "event"), ("forward", "dense"))),
            w_back=BLOCKS,
            w_forward=COMPRESSED,
        ),
    ),
    "lif_gradient_kept_row": (
        lif_gradient(1300),
        kept(schedule(lif_gradient(1300), "row-per-block"), w_rec=COMPRESSED),
    ),
    "lif_grid": (lif(70, 300), schedule(lif(70, 300), "neurons-per-grid")),
    "gates_grid": (egru(590), schedule(egru(590), "neurons-per-grid")),
    "mailed_gates_grid": (egru(1350), schedule(egru(1350), "neurons-per-grid")),
    "half_gates_grid": (
        egru(1350, "float16"),
        schedule(egru(1350, "float16"), "neurons-per-grid"),
    ),
    "half_lif_grid": (
        half_lif(70, 300, "bfloat16"),
        kept(schedule(half_lif(70, 300, "bfloat16"), "neurons-per-grid"), w_in=TWO_OF_FOUR),
    ),
    "lif_masked_grid": (
        lif(70, 300),
        kept(schedule(lif(70, 300), "neurons-per-grid"), w_in=TWO_OF_FOUR, w_rec=TWO_OF_FOUR),
    ),
    "lif_gradient_masked_grid": (
        lif_gradient(3000),
        kept(
            schedule(lif_gradient(3000), "neurons-per-grid"),
            w_rec=replace(TWO_OF_FOUR, along="senders"),
        ),
    ),
    "lif_gradient_grid": (lif_gradient(1300), schedule(lif_gradient(1300), "neurons-per-grid")),
    "gate_of_bits_grid": (gate_of_bits(70), schedule(gate_of_bits(70), "neurons-per-grid")),
    "lif_tiles": (lif(70, 300), schedule(lif(70, 300), "dense-tiles", "dense")),
    "lif_gradient_tiles": (
        lif_gradient(300),
        schedule(lif_gradient(300), "dense-tiles", "dense"),
    ),
    "lif_gradient_divided_tiles": (
        lif_gradient(2048),
        schedule(lif_gradient(2048), "divided-tiles", "dense"),
    ),
    "half_gates_event_tiles": (
        egru(1350, "float16", "float16"),
        schedule(egru(1350, "float16", "float16"), "event-tiles", "dense"),
    ),
    "two_layers_cluster": (
        two_layers(140, 33),
        ir.Schedule("neurons-per-cluster", (("back", "event"), ("forward", "dense"))),
    ),
}
