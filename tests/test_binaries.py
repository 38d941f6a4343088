"""Kernels are compiled beside what else is to be done."""

from __future__ import annotations

import time
from threading import Event
from typing import Any, cast

import pytest
import torch

from sparsify import ir
from sparsify.binaries import Binaries
from sparsify.check_recording import Check, repeat
from sparsify.errors import CompileError, TraceError
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from tests.small_nets import RecurrentNet, spikes

Key = tuple[ir.Kernel, ir.Schedule]
KEYS = [cast(Key, (f"kernel {k}", "schedule")) for k in range(64)]
SOON = 30.0  # seconds that a thread may take to begin on a busy machine


class Backend:
    """Compiles when it is ``allowed``; ``begun`` is set when it was asked for the first time."""

    def __init__(self, fails: bool = False) -> None:
        self.allowed, self.begun = Event(), Event()
        self.fails = fails
        self.compiled: list[Any] = []

    def compile(self, kernel: Any, schedule: Any) -> Any:
        self.begun.set()
        assert self.allowed.wait(SOON)
        if self.fails:
            raise CompileError("no such header", log="", source_path="kernel.cpp")
        self.compiled.append(kernel)
        return kernel


def binaries_of(backend: Backend) -> Binaries:
    return Binaries(cast(Any, backend))


def test_the_block_runs_while_compilers_do() -> None:
    backend = Backend()
    binaries = binaries_of(backend)
    with binaries.compiling(KEYS):
        assert backend.begun.wait(SOON)
        assert not binaries.made
        backend.allowed.set()
    assert list(binaries.made) == KEYS
    binaries.compile_all(KEYS)
    assert len(backend.compiled) == len(KEYS)


def test_a_block_that_raises_stops_what_has_not_begun() -> None:
    backend = Backend()
    binaries = binaries_of(backend)
    with pytest.raises(TraceError, match="does not repeat"), binaries.compiling(KEYS):
        assert backend.begun.wait(SOON)
        raise TraceError("it does not repeat the model")
    backend.allowed.set()
    assert not binaries.made
    assert len(backend.compiled) < len(KEYS)


def test_what_compilers_say_is_raised_after_the_block() -> None:
    backend = Backend(fails=True)
    backend.allowed.set()
    ran = []
    compiling = binaries_of(backend).compiling(KEYS[:1])
    with pytest.raises(CompileError, match="no such header"), compiling:
        ran.append(True)
    assert ran


def test_waiting_for_the_processor_is_no_time_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = 0.25
    monkeypatch.setattr("sparsify.check_recording.wait_for_devices", lambda: time.sleep(waits))
    model, x = RecurrentNet().eval(), spikes()
    with torch.no_grad():
        recording = record(model, (x,), {}, restore=True)
        assert isinstance(recording, Recording)
        check = Check(model, recording, (x,), {})
        check.run()
        assert 0 < check.seconds < waits
        assert 0 < repeat(model, recording, (x,), {}).seconds < waits
