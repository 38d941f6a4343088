"""Every row of the scalar ops: numpy reference against torch, and against C++ bit for bit."""

from __future__ import annotations

from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch

from sparsify import ir
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.reference import Array, run_reference
from sparsify.scalars import elementary
from sparsify.scalars.error_function import error_function
from sparsify.scalars.logarithms import logarithm, logarithm_of_one_plus
from sparsify.scalars.scalar_op import ANY, ScalarOp
from sparsify.scalars.scalar_ops import SCALAR_OPS, operand_dtypes, why_malformed
from tests.codegen.test_kernels import assert_same_bits

SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, np.inf, -np.inf, np.nan, 1e-42, 3e38, 1e-310, 88.9)
OURS = {
    "exp": (elementary.exponential, mpmath.exp, 1.0),
    "tanh": (elementary.tanh, mpmath.tanh, 2.5),
    "sigmoid": (elementary.sigmoid, lambda x: 1 / (1 + mpmath.exp(-x)), 2.0),
    "expm1": (elementary.exponential_less_one, mpmath.expm1, 2.0),
    "log": (logarithm, mpmath.log, 1.0),
    "log1p": (logarithm_of_one_plus, mpmath.log1p, 1.0),
    "erf": (error_function, mpmath.erf, 2.5),
}
LEAST = {"log": 0.0, "log1p": -1.0}  # of the domain


def values_of(dtype: ir.DType, seed: int) -> Array:
    """Shape [1, 1, N]; every pair of special values meets somewhere for seeds 0 and 1."""
    rng = np.random.default_rng(seed)
    count = len(SPECIAL) ** 2
    if dtype == "bool":
        return rng.random((1, 1, count)) < 0.5
    if dtype in ("int32", "int64"):
        return rng.integers(-5, 6, (1, 1, count)).astype(dtype)
    special = np.repeat(SPECIAL, len(SPECIAL)) if seed % 2 else np.tile(SPECIAL, len(SPECIAL))
    ordinary = rng.standard_normal(count) * 10.0 ** rng.integers(-3, 3, count)
    with np.errstate(over="ignore"):
        return np.where(rng.random(count) < 0.7, special, ordinary).astype(dtype)[None, None]


def cases(op: ScalarOp) -> list[tuple[tuple[ir.DType, ...], ir.DType]]:
    """Operand and result dtypes. A float cast to an integer is undefined out of range."""
    if op.rule == "cast":
        floats = ("float32", "float64")
        return [
            ((a,), b) for a in ANY for b in ANY if not (a in floats and b in ("int32", "int64"))
        ]
    found: list[tuple[tuple[ir.DType, ...], ir.DType]] = []
    for dtype in op.dtypes:
        result: ir.DType = "bool" if op.rule in ("compare", "logical") else dtype
        given: tuple[ir.DType, ...] = (dtype,) * op.arity
        found.append((("bool", dtype, dtype) if op.rule == "select" else given, result))
    return found


def kernel_of(op: ScalarOp) -> tuple[ir.Kernel, dict[str, Array]]:
    """One kernel that applies ``op`` in all of its dtypes."""
    operands, outputs, data = [], [], {}
    body: list[ir.Statement] = []
    size = len(SPECIAL) ** 2
    for number, (given, result) in enumerate(cases(op)):
        names = [f"a{number}_{index}" for index in range(op.arity)]
        for index, (name, dtype) in enumerate(zip(names, given, strict=True)):
            operands.append(ir.Operand(name, ("T", "B", "N"), "p", dtype))
            data[name] = values_of(dtype, index)
        body.append(ir.Let(f"r{number}", op.name, tuple(names), result))
        body.append(ir.Store(f"o{number}", f"r{number}"))
        outputs.append(ir.Output(f"o{number}", ("T", "B", "N"), "p", result))
    phase = ir.Phase("p", tuple(body))
    population = ir.Population("p", size)
    kernel = ir.Kernel(op.name, (population,), tuple(operands), (), (), (phase,), tuple(outputs))
    return kernel, data


@pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("name", SCALAR_OPS)
def test_compiled_as_the_reference(name: str) -> None:
    kernel, data = kernel_of(SCALAR_OPS[name])
    backend = CppBackend()
    launch = backend.load(backend.compile(kernel, ir.Schedule("rows-per-thread", ())))
    got = launch({n: torch.from_numpy(v) for n, v in data.items()}, steps=1, batch=1)
    wanted = run_reference(kernel, data, steps=1, batch=1)
    assert wanted.keys() == {f"o{i}" for i in range(len(cases(SCALAR_OPS[name])))}
    for output, value in wanted.items():
        assert_same_bits(got[output], value, f"{name} {output}")


def call_torch(overload: str, args: list[torch.Tensor], result: torch.dtype) -> torch.Tensor:
    packet, name = overload.removeprefix("aten.").rsplit(".", 1)
    function: Any = getattr(getattr(torch.ops.aten, packet), name)
    if overload == "aten._to_copy.default":
        return torch.as_tensor(function(*args, dtype=result))
    if overload == "aten.to.dtype":
        return torch.as_tensor(function(*args, result))
    return torch.as_tensor(function(*args))


@pytest.mark.parametrize("name", sorted(SCALAR_OPS.keys() - OURS.keys()))
def test_means_what_torch_means(name: str) -> None:
    """Overloads of tensors only; those of scalars compute the same from one literal."""
    op = SCALAR_OPS[name]
    overloads = [t for t in op.torch if "Scalar" not in t]
    assert overloads
    kernel, data = kernel_of(op)
    wanted = run_reference(kernel, data, steps=1, batch=1)
    for number in range(len(cases(op))):
        args = [torch.from_numpy(data[f"a{number}_{i}"]) for i in range(op.arity)]
        value = wanted[f"o{number}"]
        for overload in overloads:
            got = call_torch(overload, args, torch.from_numpy(value).dtype)
            what = f"{overload} of {cases(op)[number]}"
            if name == "sqrt":  # eager's vector library is within 1 ulp, ours rounds correctly
                with np.errstate(all="ignore"):
                    apart = np.abs(got.numpy().astype("longdouble") - value)
                    assert (~(apart > np.spacing(value))).all(), what
            elif name == "fmod":  # eager's vector library gives NaN where the quotient overflows
                with np.errstate(all="ignore"):
                    a, b = (operand.numpy() for operand in args)
                    is_far = np.abs(a / b) > np.finfo(a.dtype).max / 2**25
                    is_far |= np.abs(b) < np.finfo(b.dtype).tiny
                assert is_far.mean() < 0.5, what
                assert_same_bits(got[torch.from_numpy(~is_far)], value[~is_far], what)
            else:
                assert_same_bits(got, value, what)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OURS)
def test_accuracy(name: str, dtype: str) -> None:
    """Within the units in the last place that the row's note states."""
    ours, exact, bound = OURS[name]
    assert f"within {bound:g} ulp" in SCALAR_OPS[name].note
    rng = np.random.default_rng(0)
    low, high = (-87.0, 88.0) if dtype == "float32" else (-708.0, 709.0)
    x = np.concatenate(
        [rng.standard_normal(700), rng.uniform(low, high, 300), rng.standard_normal(300) * 1e-3]
    ).astype(dtype)
    x = x[x > LEAST.get(name, low)]
    got = ours(x)
    assert got.dtype == x.dtype
    with mpmath.workprec(120):
        for value, result in zip(x, got, strict=True):
            true = exact(mpmath.mpf(float(value)))
            unit = np.spacing(np.abs(np.dtype(dtype).type(float(true))))
            assert abs(mpmath.mpf(float(result)) - true) <= bound * mpmath.mpf(float(unit)), value


@pytest.mark.parametrize("name", OURS)
def test_limits_are_those_of_torch(name: str) -> None:
    """Where the result is 0, 1, infinite or NaN."""
    for dtype in (np.float32, np.float64):
        numbers = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e4, -1e4]
        x = np.asarray([v for v in numbers if name not in LEAST or v != 1e4], dtype)
        with np.errstate(all="ignore"):
            got = OURS[name][0](x)
        assert_same_bits(getattr(torch, name)(torch.from_numpy(x)), got, name)


def test_rules() -> None:
    add, where, gt, cast = (SCALAR_OPS[n] for n in ("add", "where", "gt", "cast"))
    assert why_malformed(add, ("float32", None), "float32") is None
    assert why_malformed(add, ("float32",), "float32") == "add takes 2 operands, not 1"
    reason = why_malformed(add, ("float32", "float64"), "float32")
    assert reason == "operand 1 of add is float64, expected float32"
    assert why_malformed(add, ("bool", "bool"), "bool") == "add does not take bool"
    assert why_malformed(gt, ("int32", None), "int32") == "gt gives bool, not int32"
    assert why_malformed(gt, (None, None), "bool") is not None
    assert why_malformed(where, ("bool", "int32", None), "int32") is None
    assert why_malformed(where, ("int32", "int32", None), "int32") is not None
    assert operand_dtypes(cast, ("bool",), "float32") == ("bool",)


def test_an_overload_belongs_to_one_row() -> None:
    taken = [overload for op in SCALAR_OPS.values() for overload in op.torch]
    assert len(set(taken)) == len(taken)
