"""Kernels of gated units."""

from __future__ import annotations

from sparsify import ir
from tests.kernels.example_kernels import EVERY


def egru(hidden: int, weights: ir.DType = "float32", told: ir.DType = "float32") -> ir.Kernel:
    """Event-based gated units: three products of the same events, one exchange a step.

    ``told`` is the dtype of the events, as autocast converts them.
    """
    f: ir.DType = "float32"
    one, zero = ir.Const(1.0), ir.Const(0.0)
    gates = "zrg"
    body: tuple[ir.Statement, ...] = (
        *(ir.Gather(f"q_{gate}", f"r_{gate}", "y", "real") for gate in gates),
        ir.Let("a_z", "add", ("p_z", "q_z"), f),
        ir.Let("z", "sigmoid", ("a_z",), f),
        ir.Let("a_r", "add", ("p_r", "q_r"), f),
        ir.Let("r", "sigmoid", ("a_r",), f),
        ir.Let("reset", "mul", ("r", "q_g"), f),
        ir.Let("a_g", "add", ("p_g", "reset"), f),
        ir.Let("g", "tanh", ("a_g",), f),
        ir.Let("kept", "mul", ("z", "h"), f),
        ir.Let("rest", "sub", (one, "z"), f),
        ir.Let("new", "mul", ("rest", "g"), f),
        ir.Let("c", "add", ("kept", "new"), f),
        ir.Let("fires", "gt", ("c", "theta"), "bool"),
        ir.Let("y_new", "where", ("fires", "c", zero), f),
        *([ir.Let("y_told", "cast", ("y_new",), told)] if told != f else []),
        ir.Let("drop", "where", ("fires", "theta", zero), f),
        ir.Let("h_new", "sub", ("c", "drop"), f),
        ir.Update("h", "h_new"),
        ir.Update("y", "y_new" if told == f else "y_told"),
        ir.Store("out", "y_new"),
    )
    return ir.Kernel(
        name="egru",
        populations=(ir.Population("hidden", hidden),),
        operands=(
            *(ir.Operand(f"p_{gate}", EVERY, "hidden", f) for gate in gates),
            ir.Operand("theta", ("N",), "hidden", f),
            ir.Operand("h0", ("B", "N"), "hidden", f),
            ir.Operand("y0", ("B", "N"), "hidden", told),
        ),
        weights=tuple(ir.Weight(f"r_{gate}", "hidden", "hidden", weights) for gate in gates),
        states=(ir.State("h", "hidden", f, "h0"), ir.State("y", "hidden", told, "y0")),
        phases=(ir.Phase("hidden", body),),
        outputs=(ir.Output("out", EVERY, "hidden", f),),
    )
