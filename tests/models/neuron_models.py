"""Neurons as people write them, one a line of the libraries' options; each takes ``(tape, x)``.

All arithmetic stays on multiples of small powers of two for the few steps that tests run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.looped_models import WEIGHTS, B, H
from tests.unrolled import Tape, dyadic

W0, W1, W2, W3, BIAS = WEIGHTS.values()
BETA = torch.tensor([0.5, 0.75, 0.25, 1.0, 0.5, 1.5, 0.75, -0.5])
THETA = torch.tensor([1.0, 0.5, 0.25, 0.75, 1.0, 1.25, 0.5, 1.0])
ROW = torch.tensor([[1.0], [0.5], [2.0]])
CHANNELS = torch.tensor([0.5, 1.0]).view(2, 1, 1)
NEURONS = {**WEIGHTS, "beta": BETA, "theta": THETA, "row": ROW, "channels": CHANNELS}
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def loop(step: Step) -> Callable[[Tape, Tensor], Any]:
    """A recurrent layer whose neurons are ``step(v, current) -> v, z``."""

    def model(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
        v, z, out = torch.zeros(B, H), torch.zeros(B, H), []
        for t in tape.loop(range(x.size(0))):
            v, z = step(v, F.linear(x[t], W0, BIAS) + F.linear(z, W1))
            out.append(z)
        return torch.stack(out), v, z

    model.__name__ = step.__name__
    return model


def reset_to_zero_before(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v * (v <= 1) * 0.5 + current
    return v, (v > 1).float()


def reset_to_zero_after(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v * 0.5 + current
    z = (v >= 1).to(v)
    return torch.where(z.bool(), 0.0, v), z


def reset_to_value(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v + (current - (v - 0.25)) / 2.0
    z = (v >= 1).to(v)
    return z * -0.5 + (1.0 - z) * v, z


def reset_masked(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v * 0.5 + current
    spiked = v > 1
    return v.masked_fill(spiked, 0.125), spiked.float()


def no_reset(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = torch.lerp(v, current, 0.25)
    return v, (v > 0.5).float()


def delayed_reset(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    reset = ((v - THETA) > 0).float()
    v = BETA.clamp(0, 1) * v + current - reset * THETA
    return v, ((v - THETA) > 0).float()


def learnable_row(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = torch.addcmul(current, v, BETA[None], value=0.5)
    return v - (v > 1) * 1.0, (v > 1).float() * ROW


def multi_spike(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v * 0.5 + current
    z = torch.trunc(v / 0.5) * (v > 0)
    return v - z * 0.5, z.clamp(max=3)


def floored(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v + current
    z = torch.div(v, 0.5, rounding_mode="trunc").clamp_min(0.0)
    return v - 0.5 * z, z


def ternary(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v * 0.5 + current
    z = torch.sign(v) * (v.abs() >= 1)
    return v - z, z


def graded(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v * 0.5 + current
    z = torch.where(v > 1, v, 0.0)
    return v - z, z * 0.5


def heaviside(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v * 0.5 + current
    z = torch.heaviside(v - 1, torch.zeros(()))
    return torch.rsub(z, v), z


def relu(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = F.relu(current * 0.25)
    return v, v


def soft(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    return v, F.softshrink(current, 0.5) * 0.25


def hard(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    z = F.hardshrink(current, 0.5)
    return F.hardtanh(v + current, -2.0, 2.0), F.threshold(z, 0.25, 0.0) * 0.25


def quadratic(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = (v**2) * 0.125 + F.leaky_relu(current, 0.5) * 0.25
    return torch.clamp(v, -1.0, 1.0), (v > 1).float()


def bounded(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = torch.maximum(torch.minimum(v + current, THETA), -THETA)
    return v, torch.logical_and(v > 0.5, current < 2).float()


def refractory(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    v, out = torch.zeros(B, H), []
    wait, spiked = torch.zeros(B, H, dtype=torch.int64), torch.zeros(B, H, dtype=torch.bool)
    for t in tape.loop(range(x.size(0))):
        ready = (wait == 0) & ~spiked
        v = torch.where(ready, 0.5 * v + F.linear(x[t], W0), v)
        spiked = (v > 1) & ready
        wait = torch.where(spiked, 2, (wait - 1).clamp(min=0))
        v = v - spiked.float()
        out.append(spiked)
    return torch.stack(out), wait, spiked, v


def adaptive(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    v, a, z, out = torch.zeros(B, H), torch.zeros(B, H), torch.zeros(B, H), []
    for t in tape.loop(range(x.size(0))):
        a = 0.5 * a + z
        v = 0.5 * v + F.linear(x[t], W0) + F.linear(z, W1) - z * THETA
        z = (v - (THETA + 0.25 * a) > 0).float()
        out.append(z)
    return torch.stack(out), a, v


def second_order(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    v, i, z, out = torch.zeros(B, H), torch.zeros(B, H), torch.zeros(B, H), []
    for t in tape.loop(range(x.size(0))):
        i = i * 0.5 + F.linear(x[t], W0) + F.linear(z, W1)
        v = v + 0.25 * (i - v) - z
        z = (v > 0.25).float()
        out.append(torch.stack((z, v)))
    return torch.stack(out), i


def two_exchanges(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    """As the EGRU's paper form: the second product reads what this step computed."""
    c, y, out = torch.zeros(B, H), torch.zeros(B, H), []
    for t in tape.loop(range(x.size(0))):
        gate = F.hardtanh(F.linear(y, W1), 0.0, 1.0)
        candidate = F.linear(x[t], W0) + F.linear(F.relu(gate * y), W2)
        c = 0.5 * c + 0.25 * candidate - y
        y = c * (c > 1).float()
        out.append(y)
    return torch.stack(out), c


def channels(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    """States of a convolutional layer, parameters a channel, and a linear readout."""
    v, out = torch.zeros(B, 2, 2, 2), []
    for t in tape.loop(range(x.size(0))):
        v = v * CHANNELS + x[t].view(B, 2, 2, 2)
        z = (v > CHANNELS).float()
        v = v - z
        out.append(F.linear(z.flatten(1), W0))
    return torch.stack(out), v


def rows(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    """A gain per sample, and a value per step that all samples share."""
    v, out = torch.zeros(B, H), []
    for t in tape.loop(range(x.size(0))):
        gain = x[t, :, :1] * 2
        v = v * 0.5 + x[t] * gain + x[t, :1].abs()
        out.append((v > 1).float())
    return torch.stack(out), v


def unbatched(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    v, z, out = torch.zeros(H), torch.zeros(H), []
    for t in tape.loop(range(x.size(0))):
        v = v * BETA + x[t, 0] + z * THETA
        z = (v > 1).float()
        v = v - z
        out.append(z)
    return torch.stack(out), v


def unbatched_products(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    v, z, out = torch.zeros(H), torch.zeros(H), []
    for t in tape.loop(range(x.size(0))):
        v = v * 0.5 + F.linear(x[t, 0], W0, BIAS) + F.linear(z, W1)
        z = (v > 1).float()
        v = v - z
        out.append(z)
    return torch.stack(out), v


def narrow_and_wide(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    """Layers of other sizes, and a trace that all samples share."""
    v, u, trace, z, out = torch.zeros(B, H), torch.zeros(B, 3), torch.zeros(H), None, []
    for t in tape.loop(range(x.size(0))):
        trace = trace * 0.5 + THETA
        v = v * 0.5 + F.linear(x[t], W0) - trace * 0.25
        z = (v > 1).float()
        v = v - z
        u = u * 0.5 + z @ W1[:, :3]
        out.append((u > 1).float())
    return torch.stack(out), u, v, trace


LAYERS = tuple(
    loop(step)
    for step in (
        reset_to_zero_before,
        reset_to_zero_after,
        reset_to_value,
        reset_masked,
        no_reset,
        delayed_reset,
        learnable_row,
        multi_spike,
        floored,
        ternary,
        graded,
        heaviside,
        relu,
        soft,
        hard,
        quadratic,
        bounded,
    )
)
WHOLE = (
    refractory,
    adaptive,
    second_order,
    two_exchanges,
    channels,
    rows,
    unbatched,
    unbatched_products,
    narrow_and_wide,
)


def drive(steps: int) -> Tensor:
    """An input that makes these neurons fire."""
    return dyadic(steps, B, H, seed=11)
