"""The reference interpreter, checked against sums written out by hand and against torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsify import ir
from sparsify.reference import gather, run_reference
from tests.kernels.example_kernels import lif, lif_data, product, two_layers


def test_blocks_are_summed_on_their_own() -> None:
    """1 + tiny + tiny is 1, but a later block keeps what its own tiny values add up to."""
    tiny = np.float32(2.0**-24)
    weight = np.full((1, 259), tiny, np.float32)
    weight[0, 0] = 1.0
    everyone = np.ones((1, 259), np.float32)
    assert gather(weight, everyone)[0, 0] == np.float32(1.0) + 3 * tiny
    assert gather(weight[:, :256], everyone[:, :256])[0, 0] == 1.0


def test_silent_senders_are_skipped() -> None:
    weight = np.asarray([[np.inf, 2.0]], np.float32)
    assert gather(weight, np.asarray([[0.0, 3.0]], np.float32))[0, 0] == 6.0
    assert gather(weight, np.asarray([[-0.0, 0.0]], np.float32))[0, 0] == 0.0
    assert np.isnan(gather(weight, np.asarray([[np.nan, 0.0]], np.float32))[0, 0])


def test_products_are_added_with_one_rounding() -> None:
    """1 + 2^-12 times itself, less 1 + 2^-11, is 2^-24: the product alone loses it."""
    near_one, sums = np.float32(1 + 2.0**-12), np.float32(-(1 + 2.0**-11))
    weight, source = np.asarray([[sums, near_one]]), np.asarray([[1.0, near_one]], np.float32)
    assert gather(weight, source)[0, 0] == 2.0**-24


def test_no_sender_gives_plus_zero() -> None:
    nothing = gather(np.full((1, 3), -1.0, np.float32), np.zeros((2, 3), np.float32))
    assert not np.signbit(nothing).any() and not nothing.any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lif_as_torch_computes_it(dtype: ir.DType) -> None:
    """Weights and potentials are multiples of 1/64: both sum exactly, so spikes must be equal."""
    kernel = lif(12, 25, dtype)
    leak = ir.Const(0.5)
    body = tuple(
        replace(s, args=("v", leak)) if isinstance(s, ir.Let) and s.op == "mul" and s.args[0] == "v"
        else s
        for s in kernel.phases[0].body
    )  # fmt: skip
    kernel = replace(kernel, phases=(ir.Phase("hidden", body),))
    data = lif_data(kernel, 6, 3)
    data = {n: (np.rint(a * 64) / 64).astype(dtype) for n, a in data.items()}
    got = run_reference(kernel, data, steps=6, batch=3)
    x, v, s, w_in, w_rec = (torch.from_numpy(data[n]) for n in ("x", "v0", "s0", "w_in", "w_rec"))
    for t in range(6):
        v = 0.5 * v + x[t] @ w_in.T + s @ w_rec.T
        s = (v > 1.0).to(v.dtype)
        v = v - s
        assert torch.equal(torch.from_numpy(got["spikes"][t]), s)
    assert torch.equal(torch.from_numpy(got["last_v"]), v)
    assert 0 < got["spikes"].mean() < 1


def test_states_change_after_the_step() -> None:
    """A store of a state after its update, in a later phase, still has the old value."""
    phases = (
        ir.Phase("p", (ir.Let("new", "add", ("n", ir.Const(1)), "int32"), ir.Update("n", "new"))),
        ir.Phase("p", (ir.Store("old", "n"), ir.Store("now", "new"))),
    )
    axes: tuple[ir.Axis, ...] = ("T", "B", "N")
    kernel = ir.Kernel(
        "count", (ir.Population("p", 2),), (ir.Operand("zero", (), None, "int32"),), (),
        (ir.State("n", "p", "int32", "zero"),), phases,
        (ir.Output("old", axes, "p", "int32"), ir.Output("now", axes, "p", "int32")),
    )  # fmt: skip
    got = run_reference(kernel, {"zero": np.int32(5)}, steps=3, batch=1)  # type: ignore[dict-item]
    assert got["old"][:, 0, 0].tolist() == [5, 6, 7]
    assert got["now"][:, 0, 1].tolist() == [6, 7, 8]


def test_events_of_an_earlier_phase_arrive_in_the_same_step() -> None:
    kernel = two_layers(1, 1)
    data = {
        "x": np.asarray([1.0, 0.0], np.float32).reshape(2, 1, 1),
        "bias": np.zeros(1, np.float32),
        "h0": np.zeros((), np.float32),
        "w_back": np.asarray([[2.0]], np.float32),
        "w_forward": np.asarray([[50.0]], np.float32),  # tanh(50) is 1
    }
    got = run_reference(kernel, data, steps=2, batch=1)["out"].ravel()
    assert got.tolist() == [0.5, 0.5]  # the second step is driven by the first alone


def test_a_reversed_kernel_is_the_kernel_over_flipped_time() -> None:
    kernel = lif(12, 25)
    data = lif_data(kernel, 6, 3)
    flipped = {**data, "x": data["x"][::-1]}
    got = run_reference(replace(kernel, reverse=True), data, steps=6, batch=3)
    wanted = run_reference(kernel, flipped, steps=6, batch=3)
    assert 0 < got["spikes"].mean() < 1
    assert np.array_equal(got["spikes"], wanted["spikes"][::-1])
    assert np.array_equal(got["last_v"], wanted["last_v"])
    assert np.array_equal(got["last_s"], got["spikes"][0])


def test_zero_steps() -> None:
    data = {"x": np.zeros((0, 2, 3), np.float32), "w": np.zeros((4, 3), np.float32)}
    assert run_reference(product(3, 4), data, steps=0, batch=2)["out"].shape == (0, 2, 4)
    with pytest.raises(ValueError, match="zero steps"):
        run_reference(lif(3, 4), {}, steps=0, batch=2)
