"""Events of ``sys.monitoring`` where Python has them, and recordings where it has none to give."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.recording import monitor
from sparsify.recording.monitor import NOT_AGAIN, Monitor
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from tests.recorded import of

X = torch.rand(3, 2)
HAS_MONITORING = sys.version_info >= (3, 12)


def often() -> None:
    pass


def once() -> None:
    pass


def failing() -> None:
    raise KeyError


def test_code_is_told_until_it_is_not_to_be_told_again() -> None:
    told: list[str] = []

    def start(frame: FrameType, offset: int) -> Any:
        told.append(frame.f_code.co_name)
        if frame.f_code is failing.__code__:
            watching.watch(frame.f_code)
        return NOT_AGAIN if frame.f_code is once.__code__ else None

    def end(frame: FrameType, offset: int, result: object) -> None:
        if frame.f_code is failing.__code__:
            told.append(f"{frame.f_code.co_name} ends")

    def call() -> None:
        for function in (often, once, failing):
            for _ in range(2):
                with contextlib.suppress(KeyError):
                    function()

    watching = Monitor({"PY_START": start, "PY_UNWIND": end, "PY_RETURN": end})
    for _ in range(2):  # the second one is told again what the first was not to be told
        assert watching.start() == HAS_MONITORING
        call()
        other = threading.Thread(target=call)
        other.start()
        told.append("other thread")
        other.join()
        watching.stop()
        call()
        seen = [name for name in told if name in ("often", "once") or name.startswith("failing")]
        failed = ["failing", "failing ends"] * 2
        assert seen == (["often", "often", "once", *failed] if HAS_MONITORING else [])
        told.clear()


def iterations() -> list[int]:
    def forward(x: Tensor) -> Tensor:
        total = x[0]
        for x_t in x:
            total = torch.sin(total) + x_t
        return torch.stack([total * i for i in range(4) if i % 2 or i > 3])

    with torch.no_grad():
        found = record(of(forward), (X,), {})
    assert isinstance(found, Recording)
    nodes = found.graph.graph.nodes
    return [node.meta["loops"][0].iteration for node in nodes if node.meta.get("loops")]


def test_recordings_are_the_same_where_others_use_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monitored = iterations()
    assert set(monitored) == {0, 1, 2, 3}
    monkeypatch.setattr(monitor, "_TOOLS", ())
    assert iterations() == monitored
