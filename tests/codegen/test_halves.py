"""Rounding to float16 and bfloat16: the reference, torch and C++ agree on every kind of number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsify import ir
from sparsify.check_ir import check_kernel, why_malformed_kernel
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.slots import TORCH_DTYPES
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.reference import Array, run_reference
from sparsify.scalars.halves import HALVES, to_dtype
from tests.codegen.test_kernels import assert_same_bits
from tests.kernels.random_kernels import array_of

# What follows the upper 16 bits of a float32: just below, at and just above what is in the middle
# of two bfloat16s, and bits that decide about float16s, whose last bit is bit 13.
LOWER = (0x0000, 0x0001, 0x1000, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


def all_kinds() -> Array:
    """Floats of every sign, exponent and leading bits: subnormal, too large, infinite, NaN."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    return np.concatenate([upper | np.uint32(lower) for lower in LOWER]).view(np.float32)


def casts(dtype: ir.DType, size: int) -> ir.Kernel:
    """To the half and back, through memory: a value, and the same as a state for the next step."""
    body = (
        ir.Let("half", "cast", ("x",), dtype),
        ir.Store("halves", "half"),
        ir.Let("wide", "cast", ("kept",), "float32"),
        ir.Update("kept", "half"),
        ir.Store("floats", "wide"),
    )
    return ir.Kernel(
        "casts",
        (ir.Population("p", size),),
        (
            ir.Operand("x", ("T", "B", "N"), "p", "float32"),
            ir.Operand("kept_start", (), None, dtype),
        ),
        (),
        (ir.State("kept", "p", dtype, "kept_start"),),
        (ir.Phase("p", body),),
        (
            ir.Output("halves", ("T", "B", "N"), "p", dtype),
            ir.Output("floats", ("T", "B", "N"), "p", "float32"),
        ),
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_rounds_as_torch(dtype: ir.DType) -> None:
    x = all_kinds()
    wanted = torch.from_numpy(x).to(TORCH_DTYPES[dtype])
    with np.errstate(all="ignore"):
        assert_same_bits(wanted, to_dtype(x, dtype), dtype)
        again = to_dtype(to_dtype(x, dtype), dtype)
    assert_same_bits(wanted, again, "rounded twice")
    whole = np.array([2**11 + 1, -(2**15), 7])
    assert_same_bits(torch.from_numpy(whole).to(TORCH_DTYPES[dtype]), to_dtype(whole, dtype), dtype)


@pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", HALVES)
def test_compiled_as_torch(dtype: ir.DType) -> None:
    x = np.stack([all_kinds(), np.roll(all_kinds(), 1)])[:, None]
    kernel = casts(dtype, x.shape[-1])
    backend = CppBackend()
    launch = backend.load(backend.compile(kernel, ir.Schedule("rows-per-thread", ())))
    zero = torch.zeros((), dtype=TORCH_DTYPES[dtype])
    got = launch({"x": torch.from_numpy(x), "kept_start": zero}, steps=2, batch=1)
    halves = torch.from_numpy(x).to(TORCH_DTYPES[dtype])
    assert got["halves"].dtype is halves.dtype
    assert_same_bits(got["halves"], array_of(halves), dtype)
    assert_same_bits(got["floats"][1], array_of(halves[0]), "widened")
    given = {"x": x, "kept_start": np.zeros((), np.float32)}
    wanted = run_reference(kernel, given, steps=2, batch=1)
    assert_same_bits(got["floats"], wanted["floats"], "the reference")


def test_sums_through_halves_are_float32() -> None:
    """4096 + 1 is no bfloat16 and no float16; the bias is added before anything is rounded."""
    for dtype in HALVES:
        body = (
            ir.Gather("sum", "w", "x", "binary"),
            ir.Let("biased", "add", ("sum", ir.Const(1.0)), "float32"),
            ir.Let("half", "cast", ("biased",), dtype),
            ir.Store("wide", "biased"),
            ir.Store("narrow", "half"),
        )
        kernel = ir.Kernel(
            "sums",
            (ir.Population("p", 1), ir.Population("q", 3)),
            (ir.Operand("x", ("T", "B", "N"), "q", dtype),),
            (ir.Weight("w", "p", "q", dtype),),
            (),
            (ir.Phase("p", body),),
            (
                ir.Output("wide", ("T", "B", "N"), "p", "float32"),
                ir.Output("narrow", ("T", "B", "N"), "p", dtype),
            ),
        )
        data = {"x": np.ones((1, 1, 3)), "w": np.array([[4096.0, 1.0, 2.0]])}
        halves = {name: to_dtype(value, dtype) for name, value in data.items()}
        got = run_reference(kernel, halves, steps=1, batch=1)
        assert got["wide"].item() == 4100.0
        assert got["narrow"].item() == torch.tensor(4100.0).to(TORCH_DTYPES[dtype]).item()


def test_halves_are_made_by_casts_only() -> None:
    def kernel(*body: ir.Statement, weight: ir.DType = "float16") -> ir.Kernel:
        return ir.Kernel(
            "k",
            (ir.Population("p", 2),),
            (ir.Operand("x", ("T", "B", "N"), "p", "float16"),),
            (ir.Weight("w", "p", "p", weight),),
            (),
            (ir.Phase("p", body),),
            (ir.Output("out", ("T", "B", "N"), "p", "float16"),),
        )

    store = ir.Store("out", "y")
    double = ir.Let("double", "add", ("x", "x"), "float32")
    check_kernel(kernel(double, ir.Let("y", "cast", ("double",), "float16"), store))
    wrong = kernel(ir.Let("y", "add", ("x", "x"), "float16"), store)
    assert "add does not take float16" in str(why_malformed_kernel(wrong))
    wrong = kernel(ir.Let("y", "add", ("x", "x"), "float32"), store)
    assert "output 'out' is float16, the value float32" in str(why_malformed_kernel(wrong))
    wrong = kernel(ir.Let("y", "where", (ir.Const(True), "x", "x"), "float16"), store)
    assert "where does not take float16" in str(why_malformed_kernel(wrong))
    wrong = kernel(ir.Gather("sum", "w", "x", "real", only="x"))
    assert "a restricted gather reads a weight of halves" in str(why_malformed_kernel(wrong))
    wrong = kernel(ir.Gather("sum", "w", "x", "real"), weight="float64")
    assert "different float dtypes" in str(why_malformed_kernel(wrong))
