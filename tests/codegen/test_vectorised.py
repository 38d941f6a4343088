"""Loops over neurons become vector instructions: one that does not takes as long as many others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparsify import ir
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.toolchain import (
    KERNEL_HEADERS,
    Compiler,
    compile_flags,
    find_compiler,
    read_source,
    run_limited,
)


def gate(op: str, dtype: ir.DType) -> ir.Kernel:
    """Where a gradient passes an event's gate: where there is one, or a triangle is not zero."""
    body = (
        ir.Let("above", "sub", ("c", "theta"), dtype),
        ir.Let("fires", "gt", ("above", ir.Const(0.0)), "bool"),
        ir.Let("distance", "abs", ("above",), dtype),
        ir.Let("scaled", "mul", ("distance", ir.Const(1.5)), dtype),
        ir.Let("left", "sub", (ir.Const(1.0), "scaled"), dtype),
        ir.Let("slope", "relu", ("left",), dtype),
        ir.Let("is_near", "ne", ("slope", ir.Const(0.0)), "bool"),
        ir.Let("wanted", op, ("fires", "is_near"), "bool"),
        ir.Let("spike", "cast", ("fires",), dtype),
        ir.Store("mask", "wanted"),
        ir.Store("spikes", "spike"),
        ir.Store("slopes", "slope"),
    )
    axes: tuple[ir.Axis, ...] = ("T", "B", "N")
    return ir.Kernel(
        name="gate",
        populations=(ir.Population("hidden", 256),),
        operands=(
            ir.Operand("c", axes, "hidden", dtype),
            ir.Operand("theta", ("N",), "hidden", dtype),
        ),
        weights=(),
        states=(),
        phases=(ir.Phase("hidden", body),),
        outputs=(
            ir.Output("mask", axes, "hidden", "bool"),
            ir.Output("spikes", axes, "hidden", dtype),
            ir.Output("slopes", axes, "hidden", dtype),
        ),
    )


def loops_of(text: str, folder: Path, compiler: Compiler) -> dict[int, str]:
    """What GCC says of the loops over the neurons of a tile, by line."""
    for name in ("runtime.h", *KERNEL_HEADERS):
        (folder / name).write_text(read_source(name))
    (folder / "kernel.cpp").write_text(text)
    command = (*compiler.command, *compile_flags(), "-fopt-info-vec-all", "kernel.cpp")
    said = run_limited((*command, "-o", "kernel.so"), 60.0, folder)
    lines = text.splitlines()
    ours = [n + 2 for n, line in enumerate(lines) if line.strip() == "SPARSIFY_LANES"]
    found = re.findall(r"kernel\.cpp:(\d+):\d+: (optimized|missed): +(.*)", said)
    return {
        at: next((f"{kind}: {what}" for line, kind, what in found if int(line) == at), "nothing")
        for at in ours
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", ["logical_or", "logical_and"])
def test_loops_in_which_conditions_meet_are_vectorised(
    op: str, dtype: ir.DType, tmp_path: Path
) -> None:
    compiler = find_compiler()
    if not isinstance(compiler, Compiler) or "Free Software Foundation" not in compiler.version:
        pytest.skip("only GCC says what it vectorises")
    text = CppBackend().render(gate(op, dtype), ir.Schedule("rows-per-thread", ())).text
    loops = loops_of(text, tmp_path, compiler)
    assert len(loops) == 1
    assert all(said.startswith("optimized: loop vectorized") for said in loops.values()), loops
