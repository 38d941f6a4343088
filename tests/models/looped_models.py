"""Networks that loop over time in all the ways people write; each takes ``(tape, x)``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unrolled import Tape, dyadic

H = 8
B = 3
WEIGHTS = {f"w{i}": dyadic(H, H, seed=i) for i in range(4)} | {"bias": dyadic(H, seed=9)}
W0, W1, W2, W3, BIAS = WEIGHTS.values()


def lif(v: Tensor | float, current: Tensor) -> tuple[Tensor, Tensor]:
    v = 0.5 * v + current
    z = (v > 1).float()
    return v - z, z


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(B, H)


def recurrent(tape: Tape, x: Tensor) -> Tensor:
    v, z, out = zeros(x), zeros(x), []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0, BIAS) + F.linear(z, W1))
        out.append(z)
    return torch.stack(out)


def batch_first(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    v, spikes, traces = zeros(x), [], []
    z = v
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x.transpose(0, 1)[:, t], W0))
        spikes.append(z)
        traces.append(v)
    ends = (spikes[0], spikes[-1], v)
    return (torch.stack(spikes, 1), torch.stack(traces, dim=2), torch.cat(spikes, 1), *ends)


def iterated(tape: Tape, x: Tensor) -> Tensor:
    v, out = zeros(x), []
    for x_t in tape.loop(x.unbind(0)):
        v, z = lif(v, F.linear(x_t, W0))
        out.append(z)
    return torch.stack(out)


def reversed_time(tape: Tape, x: Tensor) -> Tensor:
    v, out = zeros(x), []
    for t in tape.loop(reversed(range(x.size(0)))):
        v, z = lif(v, F.linear(x[t], W0))
        out.append(z)
    return torch.stack(out)


def kept_dim(tape: Tape, x: Tensor) -> Tensor:
    v, out = torch.zeros(1, B, H), []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t : t + 1], W0))
        out.append(z)
    return torch.cat(out)


def float_start(tape: Tape, x: Tensor) -> Tensor:
    v: Tensor | float = 0.0
    total: Tensor | float = 0
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0))
        total = total + z
    assert isinstance(total, Tensor)
    return total / x.size(0)


def none_start(tape: Tape, x: Tensor) -> Tensor:
    v, out = None, []
    for t in tape.loop(range(x.size(0))):
        current = F.linear(x[t], W0)
        v = torch.zeros_like(current) if v is None else v
        v, z = lif(v, current)
        out.append(z)
    return torch.stack(out)


def broadcast_start(tape: Tape, x: Tensor) -> Tensor:
    v, out = torch.zeros(1), []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0))
        out.append(z)
    return torch.stack(out)


def cached_transpose(tape: Tape, x: Tensor) -> Tensor:
    v, out, weight = zeros(x), [], None
    for t in tape.loop(range(x.size(0))):
        weight = W0 * 0.5 if weight is None else weight
        v, z = lif(v, F.linear(x[t], weight))
        out.append(z)
    return torch.stack(out)


def delayed(tape: Tape, x: Tensor) -> Tensor:
    v, history = zeros(x), [zeros(x)] * 5
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0) + F.linear(history[t], W1) + history[t + 3])
        history.append(z)
    return torch.stack(history[5:])


def ring(tape: Tape, x: Tensor) -> Tensor:
    v, buffer, out = zeros(x), [zeros(x)] * 3, []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0) + F.linear(buffer[t % 3], W1))
        buffer[t % 3] = z
        out.append(z)
    return torch.stack(out)


def decaying(tape: Tape, x: Tensor) -> Tensor:
    v, out = zeros(x), []
    for t in tape.loop(range(x.size(0))):
        v, _ = lif(v, F.linear(x[t], W0) * 0.9**t + 1 / (t + 1))
        out.append(torch.where(v > 0.1 * t, v, 0.0))
    return torch.stack(out)


def microsteps(tape: Tape, x: Tensor) -> Tensor:
    v, out = zeros(x), []
    for t in tape.loop(range(x.size(0))):
        current = F.linear(x[t], W0)
        z = current
        for _ in tape.loop(range(4), line=3):
            v, z = lif(v, current)
        out.append(z)
    return torch.stack(out)


def step_order(tape: Tape, x: Tensor) -> tuple[Tensor | int, ...]:
    states, out = [zeros(x) for _ in range(3)], []
    for t in tape.loop(range(x.size(0))):
        h = x[t]
        for k in tape.loop(range(3), line=3):
            states[k], h = lif(states[k], F.linear(h, (W0, W1, W2)[k]))
        out.append(h)
    return torch.stack(out), sum(out), states[1]


def layer_order(tape: Tape, x: Tensor) -> Tensor:
    for weight in tape.loop((W0, W1, W2), line=1):
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(0)), line=2):
            v, z = lif(v, F.linear(x[t], weight))
            out.append(z)
        x = torch.stack(out)
    return x


def skip_connection(tape: Tape, x: Tensor) -> Tensor:
    v1, v2, v3, readout, out = zeros(x), zeros(x), zeros(x), zeros(x), []
    for t in tape.loop(range(x.size(0))):
        v1, z1 = lif(v1, F.linear(x[t], W0))
        v2, z2 = lif(v2, F.linear(z1, W1))
        v3, z3 = lif(v3, F.linear(z2, W2) + z1)
        readout = readout * 0.5 + F.linear(z3, W3)
        out.append(readout)
    return torch.stack(out)


def feedback(tape: Tape, x: Tensor) -> Tensor:
    v1, v2, z2, out = zeros(x), zeros(x), zeros(x), []
    for t in tape.loop(range(x.size(0))):
        v1, z1 = lif(v1, F.linear(x[t], W0) + F.linear(z2, W3))
        v2, z2 = lif(v2, F.linear(z1, W1))
        out.append(z2)
    return torch.stack(out)


def static_input(tape: Tape, x: Tensor) -> tuple[Tensor | int, ...]:
    v, out = zeros(x), []
    for _ in tape.loop(range(6)):
        v, z = lif(v, F.linear(x[0], W0) * torch.clamp(BIAS, 0, 1))
        out.append(z)
    return torch.stack(out).mean(0), sum(out)


def written(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    steps = x.size(0)
    v, record, longer = zeros(x), torch.zeros(B, steps, H), torch.ones(steps + 2, B, H)
    for t in tape.loop(range(steps)):
        v, z = lif(v, F.linear(x[t], W0))
        record[:, t] = z
        longer[t + 1] = v
    return record, longer


def accumulated_in_place(tape: Tape, x: Tensor) -> Tensor:
    v, record = zeros(x), torch.ones(B, x.size(0), H)
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0))
        record[:, t] += z
    return record


def two_loops(tape: Tape, x: Tensor) -> Tensor:
    currents = [F.linear(x[t], W0) for t in tape.loop(range(x.size(0)))]
    v, out = zeros(x), []
    for current in tape.loop(currents, line=3):
        v, z = lif(v, current)
        out.append(z)
    return torch.stack(out)


def previous_input(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    v, before, z, out = zeros(x), zeros(x), zeros(x), []
    for t in tape.loop(range(x.size(0))):
        out.append(F.linear(z, W1))
        v, z = lif(v, F.linear(x[t] - before, W0))
        before = x[t]
    return torch.stack(out), before, v, z


ROLLED_WHOLE = (
    recurrent,
    batch_first,
    iterated,
    reversed_time,
    kept_dim,
    float_start,
    none_start,
    broadcast_start,
    cached_transpose,
    delayed,
    ring,
    decaying,
    microsteps,
    step_order,
    layer_order,
    skip_connection,
    feedback,
    static_input,
    written,
    accumulated_in_place,
    two_loops,
    previous_input,
)
