"""The demo's pieces; CI runs the whole of it."""

from __future__ import annotations

import sys

import pytest
import torch
from sklearn.datasets import load_digits

from sparsify.command_line import demo
from sparsify.command_line.demo_model import (
    PEAK_RATE,
    DigitNet,
    Digits,
    accuracy,
    encode_rates,
    split_digits,
    train,
)
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.recording.record import record
from sparsify.recording.recording import Recording


@pytest.fixture
def generator() -> torch.Generator:
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


@pytest.fixture
def digits(generator: torch.Generator) -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    scaled = torch.tensor(pixels / 16, dtype=torch.float32)
    return split_digits(scaled, torch.tensor(labels), generator)


def test_split_keeps_every_digit_once(digits: Digits) -> None:
    assert len(digits.train_labels) == 1400 and len(digits.test_labels) == 397
    counts = torch.cat([digits.train_labels, digits.test_labels]).bincount()
    assert counts.tolist() == torch.tensor(load_digits().target).bincount().tolist()


def test_brightness_is_the_rate(generator: torch.Generator) -> None:
    spikes = encode_rates(torch.tensor([[0.0, 0.5, 1.0]]), 20_000, generator)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    rates = spikes.mean(dim=(0, 1))
    # Four standard deviations of a mean of 20,000 draws are below 4 * 0.5 / sqrt(20000).
    assert (rates - PEAK_RATE * torch.tensor([0.0, 0.5, 1.0])).abs().max() < 2 / 20_000**0.5


def test_a_little_training_learns(digits: Digits, generator: torch.Generator) -> None:
    model = DigitNet(hidden=128, second=128)
    x = encode_rates(digits.test_pixels, 10, generator)
    before = accuracy(model, x, digits.test_labels)
    train(model, digits, steps=10, epochs=3, generator=generator, progress=iter)
    after = accuracy(model, x, digits.test_labels)
    assert before < 0.25 and after > 0.5


def test_hoisted_is_the_same_network(digits: Digits, generator: torch.Generator) -> None:
    """In float64, where a product of many rows rounds far below any distance from threshold."""
    model = DigitNet(hidden=64, second=32).double()
    x = encode_rates(digits.test_pixels[:16], 6, generator).double()
    with torch.no_grad():
        expected, got = model(x), demo.hoisted(model, x)
    # Both sum the same 32 products and 6 steps, in another order at most.
    assert (got - expected).abs().max() <= 64 * 2.0**-53 * expected.abs().max()
    assert expected.abs().max() > 0


@pytest.mark.parametrize("steps", [10, 25])
def test_the_loop_is_seen_as_in_a_users_file(steps: int) -> None:
    """Code of the package itself has no loops to record; its demo stands in for a user's code."""
    model = DigitNet(hidden=64, second=32)
    recording = record(model, ((torch.rand(steps, 4, 64) < 0.3).float(),), {}, restore=True)
    assert isinstance(recording, Recording)
    rolled = roll_loops(recording.graph)
    assert len(rolled.done) == 1 and rolled.done[0].endswith(f"rolled {steps} iterations")
    assert "demo_model.py" in rolled.done[0] and not rolled.declined


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn.datasets", "scikit-learn"), ("tqdm", "tqdm")]
)
def test_missing_package_is_named(
    module: str,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert demo.main([]) == 1
    assert f"pip install {package}" in capsys.readouterr().err
