"""Networks whose CUDA kernels run on the emulator, with every access checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import Grid, Word
from sparsify.codegen.cuda.strategies import make_strategies
from sparsify.codegen.cuda.strategy import CudaStrategy
from sparsify.codegen.emulator.device import EmulatedDevice, EmulatedFunction, Schedule
from sparsify.comparing.figures import Verification
from sparsify.options import Options
from sparsify.recording.keep_state import keep_state
from sparsify.serving.engine import Engine
from sparsify.serving.install import install
from sparsify.verification.model import verify
from tests.models.training_nets import TrainingNet
from tests.models.zoo import Entry, tensors_of
from tests.training_harness import assert_trained, gradients_of

STEPS, BATCH = 4, 3
SEED = 5  # of the random order of threads
SCHEDULES: tuple[Schedule, ...] = ("forward", "reverse", "random")


class AnyOrder(EmulatedDevice):
    """A device whose threads take another order when they are told to; checks every access."""

    launched: list[Schedule]

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule, SEED, checks=True)
        object.__setattr__(self, "launched", [])

    def take(self, schedule: Schedule) -> None:
        object.__setattr__(self, "schedule", schedule)

    def load(self, path: Path, entry: str, device: torch.device, title: str = "") -> AnyFunction:
        return AnyFunction(self, path, entry, title)


class AnyFunction(EmulatedFunction):
    """A kernel that notes in which orders it ran."""

    device: AnyOrder

    def launch(self, grid: Grid, words: Sequence[Word]) -> None:
        self.device.launched.append(self.device.schedule)
        super().launch(grid, words)


class OnlyStrategies(CudaBackend):
    """A backend that has the named strategies alone, or all."""

    device: AnyOrder

    def __init__(self, schedule: Schedule, names: Collection[str] = ()) -> None:
        super().__init__(AnyOrder(schedule))
        self.names = names

    @cached_property
    def strategies(self) -> tuple[CudaStrategy, ...]:
        known = make_strategies(self.limits)
        return tuple(each for each in known if not self.names or each.name in self.names)


def emulated(
    model: nn.Module, schedule: Schedule = "forward", strategies: Collection[str] = ()
) -> Any:
    backend = OnlyStrategies(schedule, strategies)
    return install(Engine(model, Options(timing=False), None, {"cpu": backend}))


def check_forward(
    entry: Entry,
    schedule: Schedule = "forward",
    strategies: Collection[str] = (),
    steps: int = STEPS,
    others: Iterable[Schedule] = (),
) -> Verification:
    """Verify a call without gradients; all expected sites ran on the emulator.

    Those that read events ran as such; of a pruned weight dense sums will do. In ``others``, orders
    of threads, the call returns the same bits.
    """
    model, x = entry.model(), entry.inputs(steps, BATCH)
    fast = emulated(model, schedule, strategies)
    with torch.no_grad():
        fast(x)
        figures = verify(model, fast, x)
    sites = {site.name: site for site in fast.report.sites}
    found = {name: (sites[name].decision, sites[name].weight_density or 1) for name in entry.events}
    missing = [n for n, (how, density) in found.items() if how != "event" and density > 0.5]
    missing += [name for name, (how, _) in found.items() if how == "kept"]
    assert not missing, f"{missing}\n{fast.report}"
    assert_emulated(fast, strategies)
    with torch.no_grad():
        assert_same_bits(fast, x, lambda: dict(enumerate(tensors_of(fast(x)))), schedule, others)
    return figures


def check_training(
    entry: TrainingNet,
    schedule: Schedule = "forward",
    strategies: Collection[str] = (),
    steps: int = STEPS,
    others: Iterable[Schedule] = (),
) -> Verification:
    """Verify a call and its gradients; kernels ran all that they run on the processor.

    In ``others``, orders of threads, the gradients have the same bits.
    """
    model, x = entry.model(torch.float32), entry.inputs(steps, BATCH, torch.float32)
    fast = emulated(model, schedule, strategies)
    gradients_of(fast, x)
    leaf = x.requires_grad_(x.is_floating_point())
    events = None if entry.on_cuda else 0
    figures = verify(model, fast, leaf, gradients=True, events=events)
    assert figures.gradients
    assert_trained(fast, entry.sites if entry.on_cuda else ())
    assert_emulated(fast, strategies)
    assert_same_bits(fast, x, lambda: gradients_of(fast, x.detach()), schedule, others)
    return figures


def assert_same_bits(
    fast: Any,
    x: Tensor,
    run: Callable[[], Mapping[Any, Tensor | None]],
    first: Schedule,
    others: Iterable[Schedule],
) -> None:
    """What ``run`` finds is the same in all orders of threads, bit by bit, and kernels found it."""
    found = {}
    for schedule in dict.fromkeys((first, *others)):
        devices = [entry.backend.device for entry in fast.compiled.entries]
        for device in devices:
            device.take(schedule)
            device.launched.clear()
        with keep_state(fast.original, ((x,), {})):
            values = {name: value for name, value in run().items() if value is not None}
        assert {order for device in devices for order in device.launched} == {schedule}
        assert values
        found[schedule] = {name: bits_of(value) for name, value in values.items()}
        assert found[schedule] == found[first], f"in order {schedule}"


def bits_of(value: Tensor) -> bytes:
    return bytes(value.detach().flatten().view(torch.uint8).numpy())


def assert_emulated(fast: Any, strategies: Collection[str]) -> None:
    """Kernels of CUDA text, under no other strategy than those asked for."""
    for entry in fast.compiled.entries:
        assert entry.backend.name == "cuda-emulated"
        assert entry.compiled.regions
        for region in entry.compiled.regions.values():
            launchable = region.launchable
            assert not strategies or launchable.schedule.strategy in strategies
    assert all("__global__" in made.source.text for made in fast.compiled.binaries.values())
