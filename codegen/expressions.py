"""C text of values, the same in C++ and CUDA: types, names, literals, scalar operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sparsify import ir
from sparsify.codegen.writer import Names
from sparsify.scalars.halves import HALVES, computed, to_dtype
from sparsify.scalars.scalar_ops import SCALAR_OPS, operand_dtypes

C_TYPES: dict[ir.DType, str] = {
    "float32": "float",
    "float16": "float",  # halves are floats but in memory
    "bfloat16": "float",
    "float64": "double",
    "int32": "int32_t",
    "int64": "int64_t",
    "bool": "bool",
}


# In memory a bool is a byte: loops over bools are not vectorised, loops over bytes are.
MEMORY_TYPES: dict[ir.DType, str] = {
    **C_TYPES,
    "float16": "sparsify::float16",
    "bfloat16": "sparsify::bfloat16",
    "bool": "uint8_t",
    "bits": "uint8_t",
}


@dataclass(frozen=True)
class Symbols:
    """The C++ identifiers of a kernel, chosen once."""

    names: Names
    values: dict[str, str]  # operands, weights, states, results
    outputs: dict[str, str]
    sizes: dict[str, str]  # population -> constant
    phases: list[str]  # -> function
    starts: list[str]  # of start_phases -> function

    @staticmethod
    def of(kernel: ir.Kernel) -> Symbols:
        names = Names()
        values = [v.name for v in kernel.operands] + [v.name for v in kernel.weights]
        values += [v.name for v in kernel.states]
        values += [
            s.result for ph in kernel.phases for s in ph.body if isinstance(s, ir.Let | ir.Gather)
        ]
        return Symbols(
            names=names,
            sizes={p.name: names.new(f"n_{p.name}".lower()).upper() for p in kernel.populations},
            values={value: names.new(value) for value in values},
            outputs={o.name: names.new(o.name) for o in kernel.outputs},
            phases=[names.new(f"{phase.population}_step") for phase in kernel.phases],
            starts=[names.new(f"{phase.population}_start") for phase in start_phases(kernel)],
        )


def start_phases(kernel: ir.Kernel) -> list[ir.Phase]:
    """What has to be done before the first step: every state gets its initial value."""
    populations = dict.fromkeys(s.population for s in kernel.states)
    return [
        ir.Phase(p, tuple(ir.Update(s.name, s.init) for s in kernel.states if s.population == p))
        for p in populations
    ]


def literal(value: float | int | bool, dtype: ir.DType) -> str:
    """A C++ literal that reads back as ``value`` rounded to ``dtype``."""
    if dtype == "bool":
        return "true" if value else "false"
    if dtype in ("int32", "int64"):
        least, suffix = -(2**63), "LL" if dtype == "int64" else ""
        text = f"{int(value)}{suffix}" if int(value) != least else f"{least + 1}LL - 1"
        return f"{C_TYPES[dtype]}({text})"
    with np.errstate(over="ignore"):
        rounded = to_dtype(np.asarray(value), dtype)[()]
    if math.isnan(rounded):
        return f"sparsify::not_a_number<{C_TYPES[dtype]}>()"
    if math.isinf(rounded):
        return f"{'-' if rounded < 0 else ''}sparsify::infinity<{C_TYPES[dtype]}>()"
    # the shortest text that rounds to it
    return f"{rounded!s}{'f' if computed(dtype) == 'float32' else ''}"


def expression(let: ir.Let, symbols: Symbols, dtypes: dict[str, ir.DType]) -> str:
    op = SCALAR_OPS[let.op]
    given = tuple(None if isinstance(a, ir.Const) else dtypes[a] for a in let.args)
    wanted = operand_dtypes(op, given, let.dtype)
    assert wanted is not None  # check_kernel refuses comparisons of literals
    args = [operand_text(a, d, symbols) for a, d in zip(let.args, wanted, strict=True)]
    kinds = MEMORY_TYPES if let.dtype in HALVES else C_TYPES  # what rounds to a half
    return op.c.format(*args, type=kinds[let.dtype])


def operand_text(arg: ir.Arg, dtype: ir.DType, symbols: Symbols) -> str:
    if not isinstance(arg, ir.Const):
        return symbols.values[arg]
    text = literal(arg.value, dtype)
    return f"({text})" if text.startswith("-") else text
