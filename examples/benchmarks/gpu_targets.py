"""What to look at first in the figures of the GPU benchmark: what failed, then what was wished for.

The wishes for steps of recurrent layers are those of docs/cuda.md. A training step should take half
of the time of the best peer, and half of its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpu_ours import CHOSEN, HOW
from gpu_peers import EAGER
from gpu_training import DENSE

Row = Mapping[str, Any]
# Network, batch, the most neurons and what a step should take at most, in microseconds.
STEPS = (
    ("lif", 1, 1024, 2.0),
    ("egru", 1, 590, 2.0),
    ("egru", 16, 1350, 2.6),
    ("egru-half", 16, 1350, 1.8),
)
FASTER, LEANER = 2.0, 0.5
PREDICTED = 1.5  # times longer or shorter: the model of costs is wrong there


def summary(content: Mapping[str, Any]) -> Iterator[str]:
    """Text for all that the sections hold so far."""
    sections: Mapping[str, Sequence[Row]] = content["sections"]
    for name, cells in content["cells"].items():
        rows = sections.get(name, ())
        if len(rows) < cells:
            yield f"{name}: {cells - len(rows)} of {cells} cells were not measured"
        for row in rows:
            if "error" in row:
                yield f"{name} FAILED: {_cell(row)}: {row['error']}"
            for what, why in row.get("failed", {}).items():
                yield f"{name}: {_cell(row)}: {what} failed: {why}"
    for name, batch, most, wished in STEPS:
        for row in sections.get(name, ()):
            if "us_per_step" in row and row["batch"] == batch and row["hidden"] <= most:
                yield from _step(row, wished)
    for row in sections.get("training", ()):
        if "ms_per_step" in row:
            yield from _training(row, sections.get("torch.compile", ()))
    for name in ("lif", "egru", "egru-half", "feed-forward"):
        for row in sections.get(name, ()):
            yield from _predictions(name, row)


def _step(row: Row, wished: float) -> Iterator[str]:
    ours = {name: us for name, us in row["us_per_step"].items() if name.startswith((CHOSEN, *HOW))}
    if ours:
        name = min(ours, key=lambda each: ours[each])
        verdict = "as wished" if ours[name] <= wished else "TOO LONG"
        yield f"{_cell(row)}: {ours[name]:.2f} us a step ({name}), wished {wished}: {verdict}"


def _training(row: Row, compiled: Sequence[Row]) -> Iterator[str]:
    """Against the fastest peer, of which torch.compile was measured elsewhere."""
    times = dict(row["ms_per_step"])
    for other in compiled:
        if "ms_per_step" in other and _cell(other) == _cell(row):
            times |= other["ms_per_step"]
    peers = {name: ms for name, ms in times.items() if name not in (CHOSEN, DENSE)}
    if CHOSEN not in times or not peers:
        return
    best = min(peers, key=lambda each: peers[each])
    ratio = peers[best] / times[CHOSEN]
    verdict = "as wished" if ratio >= FASTER else "TOO SLOW"
    yield f"training {_cell(row)}: {ratio:.2f}x over {best}, wished {FASTER}x: {verdict}"
    memory = row["mib_per_step"]
    if memory.get(EAGER) and CHOSEN in memory:
        share = memory[CHOSEN] / memory[EAGER]
        verdict = "as wished" if share <= LEANER else "TOO MUCH"
        yield f"training {_cell(row)}: {share:.2f} of eager's memory, wished {LEANER}: {verdict}"


def _predictions(section: str, row: Row) -> Iterator[str]:
    for name, predicted in row.get("predicted_us_per_step", {}).items():
        took = row["us_per_step"].get(name)
        if took and not predicted / PREDICTED <= took <= predicted * PREDICTED:
            yield f"{section}: {_cell(row)}: {name} took {took:.2f} us, predicted {predicted:.2f}"


def _cell(row: Row) -> str:
    named = [f"{row[key]}" for key in ("network", "check", "kind", "hidden") if row.get(key)]
    named += [f"batch {row['batch']}, {row['activity']:.0%}"] if "batch" in row else []
    named += [row["surrogate"]] if "surrogate" in row else []
    return " ".join(named)
