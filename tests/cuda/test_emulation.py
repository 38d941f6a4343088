from __future__ import annotations

import pytest

from sparsify.codegen.emulator.device import EmulatedDevice
from sparsify.serving.emulation import emulated_device

SETTINGS = {
    "": EmulatedDevice("forward", 0, True),
    "reverse": EmulatedDevice("reverse", 0, True),
    "random": EmulatedDevice("random", 0, True),
    "random:7, unchecked": EmulatedDevice("random", 7, False),
    "unchecked": EmulatedDevice("forward", 0, False),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_environment_says_how_threads_run(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_EMULATOR", setting)
    assert emulated_device() == SETTINGS[setting]


def test_without_a_setting_everything_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSIFY_EMULATOR", raising=False)
    assert emulated_device() == SETTINGS[""]


@pytest.mark.parametrize("setting", ["sideways", "random:", "random:x", "forward:3", "checks"])
def test_unknown_words_are_named(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_EMULATOR", setting)
    with pytest.raises(ValueError, match=f"unknown word '{setting}'; known: forward, reverse"):
        emulated_device()
