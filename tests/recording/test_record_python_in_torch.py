"""What the user's Python reads where torch runs it in the middle of one of its own operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.recording.record import record
from sparsify.recording.recording import Recording

STATE = 0  # what all of it reads


class Chosen:
    def __index__(self) -> int:
        return STATE


class Doubling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would import its compiler, which draws random numbers."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {})) * (2.0 if STATE else 1.0)


def chosen(x: Tensor) -> Tensor:
    return x.select(0, Chosen())  # type: ignore[arg-type]


def doubled(x: Tensor) -> Tensor:
    with Doubling():  # type: ignore[no-untyped-call]
        return x.sin()


def replaced(x: Tensor) -> Tensor:
    return x.sinh()


def sinh(x: Tensor) -> Tensor:
    return x * (2.0 if STATE else 1.0)


@pytest.fixture
def kernel() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("sinh", sinh, "AutogradCPU")  # type: ignore[no-untyped-call]
    yield
    library._destroy()  # type: ignore[no-untyped-call]


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) + 1


@pytest.mark.parametrize("function", [chosen, doubled, replaced], ids=lambda f: f.__name__)
@torch.no_grad()
def test_what_it_reads_is_part_of_the_guard(
    function: Callable[[Tensor], Tensor], kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Model(function), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = record(model, (x,), {}, restore=True)
    assert isinstance(found, Recording), found.error
    before = model(x)
    assert found.guard.matches((x,), {})
    monkeypatch.setattr("tests.recording.test_record_python_in_torch.STATE", 1)
    assert not torch.equal(model(x), before), "the change matters"
    assert not found.guard.matches((x,), {})
