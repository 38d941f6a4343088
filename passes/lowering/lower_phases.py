"""Order a step's statements into phases: one exchange between neurons ends a phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsify import ir


@dataclass(frozen=True)
class Placed:
    """A statement and the population whose neurons run it."""

    population: str
    statement: ir.Let | ir.Gather


@dataclass(frozen=True)
class Write:
    """A statement that writes a state or an output of a population."""

    population: str
    statement: ir.Store | ir.Update


def order_phases(placed: Sequence[Placed], writes: Sequence[Write]) -> tuple[ir.Phase, ...]:
    """Phases in order; ``placed`` is in order of dependence, ``writes`` follow.

    A Gather waits for the phase before it only if what it reads is computed in the same step. What
    nothing waits for is computed beside what needs it, so that it need not be kept in memory.
    """
    levels = _latest(placed, _earliest(placed))
    phases: dict[tuple[int, str], list[ir.Statement]] = {}
    owners = [item.population for item in placed] + [item.population for item in writes]
    populations = list(dict.fromkeys(owners))
    for item in placed:
        level = levels[item.statement.result]
        phases.setdefault((level, item.population), []).append(item.statement)
    for write in writes:
        value = write.statement.value
        home = min((n for n, name in phases if name == write.population), default=0)
        level = levels.get(value, home) if isinstance(value, str) else home
        phases.setdefault((level, write.population), []).append(write.statement)
    ordered = sorted(phases, key=lambda key: (key[0], populations.index(key[1])))
    return tuple(ir.Phase(key[1], tuple(phases[key])) for key in ordered)


def _reads(statement: ir.Let | ir.Gather) -> list[str]:
    if isinstance(statement, ir.Gather):
        return [statement.source, *([] if statement.only is None else [statement.only])]
    return [arg for arg in statement.args if isinstance(arg, str)]


def _earliest(placed: Sequence[Placed]) -> dict[str, int]:
    level: dict[str, int] = {}
    for item in placed:
        crosses = isinstance(item.statement, ir.Gather)
        before = [level[name] + crosses for name in _reads(item.statement) if name in level]
        level[item.statement.result] = max(before, default=0)
    return level


def _latest(placed: Sequence[Placed], earliest: dict[str, int]) -> dict[str, int]:
    anchors: dict[str, set[int]] = {}  # levels at which a population has to run anyway
    owners = {item.statement.result: item.population for item in placed}
    for item in placed:
        if not isinstance(item.statement, ir.Gather):
            continue
        anchors.setdefault(item.population, set()).add(earliest[item.statement.result])
        for name in _reads(item.statement):
            if name in earliest:
                anchors.setdefault(owners[name], set()).add(earliest[name])
    latest: dict[str, int] = {}
    bounds: dict[str, int] = {}
    for item in reversed(placed):
        result = item.statement.result
        bound = bounds.get(result)
        if bound is None:
            wanted = sorted(anchors.get(item.population, ()))
            bound = next((a for a in wanted if a >= earliest[result]), earliest[result])
        latest[result] = bound
        crosses = isinstance(item.statement, ir.Gather)
        for name in _reads(item.statement):
            bounds[name] = min(bounds.get(name, bound), bound - crosses)
    return latest
