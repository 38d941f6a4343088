"""Kernels for CUDA whose text is kept in golden files, and compiled for every target."""

from __future__ import annotations

from dataclasses import replace

from sparsify import ir
from tests.example_kernels import gate_of_bits, lif, lif_gradient, product, schedule, two_layers

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
    "product_row": (product(300, 40), schedule(product(300, 40), "row-per-block")),
    "lif_grid": (lif(70, 300), schedule(lif(70, 300), "neurons-per-grid")),
    "lif_gradient_grid": (lif_gradient(1300), schedule(lif_gradient(1300), "neurons-per-grid")),
    "gate_of_bits_grid": (gate_of_bits(70), schedule(gate_of_bits(70), "neurons-per-grid")),
    "lif_tiles": (lif(70, 300), schedule(lif(70, 300), "dense-tiles", "dense")),
    "lif_gradient_tiles": (
        lif_gradient(300),
        schedule(lif_gradient(300), "dense-tiles", "dense"),
    ),
    "two_layers_cluster": (
        two_layers(140, 33),
        ir.Schedule("neurons-per-cluster", (("back", "event"), ("forward", "dense"))),
    ),
}
