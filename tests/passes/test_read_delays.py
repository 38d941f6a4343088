"""Buffers of a loop, as lines of delay: a read of a part is the value that was put there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.passes.loops.read_delays import read_delays
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.pipeline import PIPELINE
from tests.models.looped_models import W1, WEIGHTS, B, H
from tests.passes.test_roll_loops import assert_same
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

aten = torch.ops.aten
STEPS, DELAY = 7, 3
Turn = Callable[[Tensor, Tensor, int], Tensor]  # the buffer with one more value
Read = Callable[[Tensor, int], Tensor]


def recorded(shape: tuple[int, ...], read: Read, turn: Turn, returned: bool = False) -> Unrolled:
    def model(tape: Tape, x: Tensor) -> list[Tensor]:
        v, buffer = torch.zeros(B, H), torch.zeros(shape)
        out = []
        for t in tape.loop(range(x.size(0))):
            v = 0.5 * v + x[t] + F.linear(read(buffer, t), W1)
            z = (v > 0.25).float()
            buffer = turn(buffer, z, t)
            out.append(z)
        return [torch.stack(out), *([buffer] if returned else [])]

    return record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)


def written(buffer: Tensor, z: Tensor, place: int) -> Tensor:
    buffer = buffer.clone()
    buffer[place] = z
    return buffer


FIRST, LAST = (DELAY, B, H), (B, H, DELAY)
TURNED: dict[str, tuple[tuple[int, ...], Read, Turn]] = {
    "joined": (FIRST, lambda b, t: b[-1], lambda b, z, t: torch.cat([z[None], b[:-1]])),
    "turned": (FIRST, lambda b, t: b[-1], lambda b, z, t: written(b.roll(1, 0), z, 0)),
    "turned back": (FIRST, lambda b, t: b[0], lambda b, z, t: written(b.roll(-1, 0), z, -1)),
    "neurons before": (
        LAST,
        lambda b, t: b[..., 0],
        lambda b, z, t: torch.cat([b[..., 1:], z.unsqueeze(-1)], -1),
    ),
    "written as a slice": (
        FIRST,
        lambda b, t: b[2],
        lambda b, z, t: b.roll(1, 0).slice_scatter(z[None], 0, 0, 1),
    ),
}
RINGS: dict[str, tuple[tuple[int, ...], Read, Turn]] = {
    "a ring": (FIRST, lambda b, t: b[t % DELAY], lambda b, z, t: written(b, z, t % DELAY)),
    "a ring of more": (
        (5, B, H),
        lambda b, t: b[(t - 2) % 5],
        lambda b, z, t: b.select_scatter(z, 0, t % 5),
    ),
}


@pytest.mark.parametrize("name", [*TURNED, *RINGS])
@pytest.mark.parametrize("returned", [False, True])
def test_delays_are_carries(name: str, returned: bool) -> None:
    found = recorded(*{**TURNED, **RINGS}[name], returned)
    result = read_delays(found.graph)
    assert len(result.done) >= STEPS
    assert_same(result.graph(*found.operands), found.results)
    rolled = roll_loops(result.graph)
    # In which order a ring ends depends on how many steps there were.
    is_rolled = name in TURNED or not returned
    assert bool(rolled.done) is is_rolled, rolled.declined
    assert_same(rolled.graph(*found.operands), found.results)


def test_what_was_in_a_buffer_before_is_read_from_there() -> None:
    def model(tape: Tape, x: Tensor, buffer: Tensor) -> list[Tensor]:
        out = []
        for t in tape.loop(range(x.size(0))):
            z = (x[t] + F.linear(buffer[-1], W1) > 0.25).float()
            buffer = torch.cat([z[None], buffer[:-1]])
            out.append(z)
        return [torch.stack(out), buffer]

    found = record_unrolled(model, [dyadic(STEPS, B, H), dyadic(*FIRST)], WEIGHTS)
    result = read_delays(found.graph)
    rolled = roll_loops(result.graph)
    assert rolled.done, rolled.declined
    assert_same(rolled.graph(*found.operands), found.results)


def test_a_result_that_the_last_step_hands_on_is_stacked_after_the_loop() -> None:
    def model(tape: Tape, x: Tensor) -> list[Tensor]:
        buffer, out = torch.zeros(FIRST), []
        for t in tape.loop(range(x.size(0))):
            z = (x[t] + F.linear(buffer[-1], W1) > 0.25).float()
            buffer = torch.cat([z[None], buffer.roll(1, 0)[1:]])
            result = torch.ops.aten.alias.default(buffer)  # as of results with gradients
            out.append(z)
        return [torch.stack(out), result]

    found = record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)
    result = read_delays(found.graph)
    assert result.done[-1].endswith("is stacked after the loop")
    rolled = roll_loops(result.graph)
    assert rolled.done, rolled.declined
    targets = {node.target for node in result.graph.graph.nodes}
    assert torch.ops.aten.roll.default not in targets
    assert_same(rolled.graph(*found.operands), found.results)


OTHERS: dict[str, tuple[tuple[int, ...], Read, Turn]] = {
    "computed with": (
        FIRST,
        lambda b, t: b[-1],
        lambda b, z, t: torch.cat([z[None], b[:-1]]) * 0.5,
    ),
    "cast": (
        FIRST,
        lambda b, t: b[1],
        lambda b, z, t: torch.stack([z.double(), z.double() * b[0], z.double()]).float(),
    ),
    "another dim": (
        (B, B, H),
        lambda b, t: b[:, 0],
        lambda b, z, t: written(b, z, 1),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_reads_stay(name: str) -> None:
    found = recorded(*OTHERS[name])
    result = read_delays(found.graph)
    assert_same(result.graph(*found.operands), found.results)
    reads = [node for node in result.graph.graph.nodes if node.target is aten.select.int]
    assert len(reads) >= STEPS - 1


def test_a_layer_s_spikes_of_all_steps_are_read_as_a_whole() -> None:
    def model(tape: Tape, x: Tensor) -> Tensor:
        for _ in tape.loop(range(2)):
            v, out = torch.zeros(B, H), []
            for x_t in tape.loop(x.unbind(0)):
                v = 0.5 * v + F.linear(x_t, W1)
                out.append((v > 0.25).float())
            x = torch.stack(out)
        return x

    found = record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)
    assert read_delays(found.graph).graph is found.graph


def test_what_is_returned_keeps_its_strides() -> None:
    def model(tape: Tape, x: Tensor) -> list[Tensor]:
        v, buffer = torch.zeros(B, H), torch.zeros(B, H, DELAY)
        for t in tape.loop(range(x.size(0))):
            buffer = buffer.clone()
            buffer[..., t % DELAY] = v
            taken = buffer[..., t % DELAY]
            v = 0.5 * v + x[t] + F.linear(taken, W1)
        return [v, taken]

    found = record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)
    result = read_delays(found.graph)
    assert len(result.done) >= STEPS
    assert_same(result.graph(*found.operands), found.results)


def test_views_of_parts_stay_where_what_was_put_there_is_transposed() -> None:
    def model(tape: Tape, x: Tensor) -> Tensor:
        v, buffer, out = torch.zeros(H, B), torch.zeros(DELAY, B, H), []
        for t in tape.loop(range(x.size(0))):
            rows = buffer[-1].view(-1).view(B, H)
            v = 0.5 * v + (x[t] + F.linear(rows, W1)).t()
            buffer = torch.cat([v.t()[None], buffer[:-1]])
            out.append(rows)
        return torch.stack(out)

    found = record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)
    assert_same(read_delays(found.graph).graph(*found.operands), found.results)


def test_an_empty_tensor_joins_with_all() -> None:
    def model(tape: Tape, x: Tensor) -> Tensor:
        v, buffer = torch.zeros(B, H), torch.zeros(B, H, DELAY)
        for t in tape.loop(range(x.size(0))):
            v = 0.5 * v + x[t] + F.linear(buffer[..., 0], W1)
            buffer = torch.cat([torch.zeros(0), buffer[..., 1:], v.unsqueeze(-1)], -1)
        return v

    found = record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)
    assert_same(read_delays(found.graph).graph(*found.operands), found.results)


def test_a_delay_of_a_delay_is_a_longer_one() -> None:
    def model(tape: Tape, x: Tensor) -> Tensor:
        v, first, second = torch.zeros(B, H), torch.zeros(2, B, H), torch.zeros(2, B, H)
        for t in tape.loop(range(x.size(0))):
            v = 0.5 * v + x[t] + F.linear(second[-1], W1)
            second = torch.cat([first[-1].unsqueeze(0), second[:-1]])
            first = torch.cat([v.unsqueeze(0), first[:-1]])
        return v

    found = record_unrolled(model, [dyadic(STEPS, B, H)], WEIGHTS)
    result = read_delays(found.graph)
    rolled = roll_loops(result.graph)
    assert rolled.done, rolled.declined
    assert_same(rolled.graph(*found.operands), found.results)


def test_the_pass_stands_before_loops_are_rolled() -> None:
    assert PIPELINE.index(read_delays) < PIPELINE.index(roll_loops)
