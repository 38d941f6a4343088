"""Autocast: what is on, turning it off, and operations that run as it makes them run.

A recording holds the casts of autocast as operations, so its graphs run with autocast off: what
the model computes where it is switched off stays in its own dtype. Only what is recorded above the
casts, whole, carries the autocast that it ran under.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

DEVICES = ("cpu", "cuda")
Settings = tuple[tuple[str, torch.dtype], ...]  # the devices on which it is on, with its dtype

is_any_on = torch._C._is_any_autocast_enabled


def autocast() -> Settings:
    """What is on now."""
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in DEVICES
        if torch.is_autocast_enabled(device)
    )


@contextmanager
def autocast_off() -> Iterator[None]:
    """Inside, nothing is cast; casts of weights that a context around keeps stay kept."""
    if not is_any_on():
        yield
        return
    devices = [device for device in DEVICES if torch.is_autocast_enabled(device)]
    for device in devices:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, True)


@contextmanager
def autocast_as(settings: Settings) -> Iterator[None]:
    """Inside, exactly ``settings`` are on."""
    with autocast_off(), ExitStack() as stack:
        for device, dtype in settings:
            stack.enter_context(torch.autocast(device, dtype))
        yield


@dataclass(frozen=True)
class Autocast:
    """The target of a node that runs ``op`` under ``settings``."""

    op: Any
    settings: Settings

    @property
    def __name__(self) -> str:
        name: str = self.op._schema.name.partition("::")[2]
        return name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with autocast_as(self.settings):
            return self.op(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{self.op} under autocast"


def bare(target: Any) -> Any:
    """The operation of a node's target, whatever it runs under."""
    return target.op if isinstance(target, Autocast) else target
