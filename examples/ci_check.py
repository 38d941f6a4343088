"""A test of your own project: the model must still be compiled, and still be right.

Save it as ``test_fast.py`` and run pytest; the fixture comes with the installed package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quickstart import INPUTS, SpikingNet


def test_events_are_used_and_right(sparsify_check: Any) -> None:
    """Fails if fewer than two products run on events, or a spike is wrong."""
    torch.manual_seed(0)
    x = (torch.rand(20, 4, INPUTS) < 0.02).float()
    figures = sparsify_check(SpikingNet().eval(), x, events=2)
    print(figures)


if __name__ == "__main__":
    raise SystemExit(pytest.main(["-q", "-s", "-p", "no:cacheprovider", str(Path(__file__))]))
