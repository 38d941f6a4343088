"""Rates of a device: the stated ones, and those that the benchmark has measured."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sparsify.codegen.backend import Workload
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import A100, H100
from sparsify.codegen.cuda.rates import H100_RATES, VARIABLE, measured_rates, rates_of
from sparsify.codegen.emulator.device import EmulatedDevice
from tests.kernels.example_kernels import lif, schedule

MACHINE = {
    "launch_us": 2.5,
    "grid_barrier_us": 1.5,
    "block_barrier_us": 0.0,  # too short to be measured
    "copy_gb_per_s": 3000.0,
    "l2_read_gb_per_s": 6000.0,
    "l2_read_of_multiprocessor_gb_per_s": 50.0,
    "launch_and_wait_us": 9.0,
    "cell": None,
    "took_s": 3.0,
}


def results(device: str = "H100") -> dict[str, Any]:
    return {"environment": {"device": device}, "sections": {"machine": [MACHINE]}}


def test_what_was_measured_takes_the_place_of_what_is_stated() -> None:
    rates = measured_rates(results(), "H100")
    wanted = replace(
        H100_RATES,
        launch=2.5e-6,
        grid_barrier=1.5e-6,
        hbm_bytes=3e12,
        l2_bytes=6e12,
        l2_bytes_of_multiprocessor=5e10,
    )
    assert rates is not None
    # Units are products with powers of ten: one rounding, of 1.1e-16.
    assert asdict(rates) == pytest.approx(asdict(wanted), rel=1e-15, abs=0)
    assert measured_rates({**results(), "sections": {}}, "H100") == H100_RATES
    assert measured_rates({**results(), "sections": {"machine": [{"error": "x"}]}}, "H100")


def test_another_device_has_its_own() -> None:
    assert measured_rates(results("A100"), "H100") is None


@pytest.mark.parametrize(
    "content",
    [[], {}, {"environment": {"device": "H100"}, "sections": {"machine": [{"launch_us": "?"}]}}],
)
def test_other_files_are_refused(content: Any) -> None:
    with pytest.raises(ValueError, match=r"not the results of gpu\.py"):
        measured_rates(content, "H100")


def test_the_environment_names_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backend predicts follows them."""
    path = tmp_path / "h100.json"
    path.write_text(json.dumps(results()))
    assert rates_of(H100, {}) == H100_RATES
    assert rates_of(H100, {VARIABLE: str(path)}).grid_barrier == 1.5e-6
    assert rates_of(A100, {VARIABLE: str(path)}) == H100_RATES
    kernel = lif(70, 1024)
    plan = schedule(kernel, "neurons-per-grid")
    seconds = []
    for value in ("", str(path)):
        monkeypatch.setenv(VARIABLE, value)
        backend = CudaBackend(EmulatedDevice(), H100)
        strategy = next(s for s in backend.strategies if s.name == plan.strategy)
        cost = strategy.predict(kernel, plan, Workload(1000, 1, {"drive": 0.1, "recurrent": 0.1}))
        seconds.append(backend.seconds(cost))
    # 0.4 us longer at each barrier; a launch that is half a microsecond shorter. Both take some
    # 2 ms, which a dozen operations round by 2e-19 each.
    difference = 1000 * 0.4e-6 - 0.5e-6
    assert seconds[1] - seconds[0] == pytest.approx(difference, rel=0, abs=1e-17)
