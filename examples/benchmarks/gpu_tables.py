"""The GPU benchmark's figures as tables: what a step costs, and where events break even."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]


def tables(sections: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Text for all sections that have rows."""
    for row in sections.get("machine", ()):
        yield "the device's constants: " + ", ".join(
            f"{name} {value:.3g}" for name, value in row.items() if name.endswith(("_us", "per_s"))
        )
    for name in ("lif", "egru", "egru-half", "feed-forward"):
        for row in _measured(sections.get(name, ())):
            yield _forward_line(row)
    for row in sections.get("training", ()):
        if "ms_per_step" in row:
            yield _training_line(row)
    for row in sections.get("torch.compile", ()):
        if "ms_per_step" in row:
            forward = _listed(row["us_per_step"], "us a step")
            yield f"{_title(row)}: {forward}; training: {_listed(row['ms_per_step'], 'ms')}"
    for name in ("lif", "egru"):
        yield from _break_even_map(name, _measured(sections.get(name, ())))


def best(times: Mapping[str, float], kind: str) -> float:
    """The shortest time of our kernels that are called ``event, ...`` or ``dense, ...``."""
    return min((t for name, t in times.items() if name.startswith(kind)), default=float("nan"))


def break_even(rows: Sequence[Row]) -> float:
    """The activity at which events and dense kernels take equally long, of rows of one size.

    The time with events is a line in the activity; nan without two activities to draw it through.
    """
    points = [
        (row["measured_activity"], best(row["us_per_step"], "event"), best_dense)
        for row in rows
        if np.isfinite(best_dense := best(row["us_per_step"], "dense"))
    ]
    points = [point for point in points if np.isfinite(point[1])]
    if len({activity for activity, _, _ in points}) < 2:
        return float("nan")
    activity, event, dense = np.array(points).T
    slope, base = np.polyfit(activity, event, 1)
    level = float(np.mean(dense))
    if slope <= 0:
        return 1.0 if base < level else 0.0
    return float(np.clip((level - base) / slope, 0.0, 1.0))


def _break_even_map(name: str, rows: Sequence[Row]) -> Iterator[str]:
    sizes = sorted({row["hidden"] for row in rows})
    batches = sorted({row["batch"] for row in rows})
    if not rows:
        return
    yield f"\nbreak-even of {name}: below this activity, events are faster than our dense kernels"
    yield "  batch " + "".join(f"{f'H={hidden}':>10}" for hidden in sizes)
    for batch in batches:
        cells = [
            break_even([r for r in rows if (r["hidden"], r["batch"]) == (hidden, batch)])
            for hidden in sizes
        ]
        yield f"  {batch:>5} " + "".join(f"{'-' if c != c else f'{c:.1%}':>10}" for c in cells)


def _forward_line(row: Row) -> str:
    times = row["us_per_step"]
    text = f"{_title(row)}: {_listed(times, 'us a step')}"
    predicted = {n: t for n, t in row["predicted_us_per_step"].items() if n in times}
    if predicted:
        text += f" (predicted: {_listed(predicted, 'us')})"
    return text + "".join(f"\n    {name} FAILED: {why}" for name, why in row["failed"].items())


def _training_line(row: Row) -> str:
    text = f"{_title(row)}, {row['surrogate']}: {_listed(row['ms_per_step'], 'ms a step')}"
    if row["mib_per_step"]:
        text += f"; {_listed(row['mib_per_step'], 'MiB')}"
    return text + "".join(f"\n    {name} FAILED: {why}" for name, why in row["failed"].items())


def _title(row: Row) -> str:
    share = row.get("measured_activity", row["activity"])
    return f"{row['network']} {row['hidden']}, batch {row['batch']}, {share:.1%} active"


def _listed(values: Mapping[str, float], unit: str) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items()) + f" {unit}"


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "us_per_step" in row]
