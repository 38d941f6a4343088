"""Finished trainings in a folder: what was trained is not trained again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from training_loop import Point, Run


@dataclass(frozen=True)
class KeptRuns:
    """Curves and last weights of every run; ``settings`` is what they were trained with.

    ``passes`` are asked for: of a run that was longer, the first ones are taken.
    """

    folder: Path
    settings: Mapping[str, int]
    passes: int

    def find(self, name: str, seed: int) -> Run | None:
        """The run that was kept, if it is long enough; of other settings it is an error."""
        path = self._path(name, seed)
        if not path.exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] != dict(self.settings):
            raise SystemExit(
                f"{path} was trained with {kept['settings']}, not {dict(self.settings)}: "
                "give the same options or another folder"
            )
        points = tuple(Point(**point) for point in kept["points"])
        return Run(name, seed, points[: self.passes]) if len(points) >= self.passes else None

    def keep(self, run: Run, module: nn.Module) -> None:
        """Write the weights, then the curves: a run with curves is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), self._weights(run.name, run.seed))
        path = self._path(run.name, run.seed)
        unfinished = path.with_suffix(".unfinished")
        kept = {"settings": dict(self.settings), "points": [asdict(point) for point in run.points]}
        unfinished.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)

    def load_weights(self, name: str, seed: int, module: nn.Module) -> None:
        """Give ``module`` the weights that the run ended with."""
        module.load_state_dict(torch.load(self._weights(name, seed), weights_only=True))

    def _path(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-{seed}.json"

    def _weights(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-{seed}.pt"
