"""The pytest fixture ``sparsify_check``: verify a sparsified model in a project's own tests.

A module of its own, because pytest imports the plugins of all installed packages whenever it
starts, and importing anything of ``sparsify`` imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from torch import nn

    from sparsify.comparing.figures import Verification
    from sparsify.plan import Plan


class SparsifyCheck(Protocol):
    def __call__(
        self,
        model: nn.Module,
        *args: Any,
        events: int | None = None,
        kwargs: dict[str, Any] | None = None,
        plan: Plan | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> Verification:
        """Sparsify ``model`` for a call with ``args`` and ``kwargs``, and verify that call.

        Fails when fewer than ``events`` sites run as events (if None, when none does, or leaves out
        zeros of its weight), when nothing is replaced at all, or when a value is one that rounding
        cannot explain. What is compiled is decided by the cost model, not by measuring, unless
        ``plan`` pins it: a busy machine must not change the result. With
        ``backend="cuda-emulated"`` the CUDA kernels run on the processor, which needs no GPU;
        ``events`` are then all sites that read events, unless it is given. ``options`` are those of
        ``sparsify.verify``: with ``gradients=True`` a call of training is checked as well, forward
        and backward.
        """


@pytest.fixture
def sparsify_check() -> SparsifyCheck:
    """Verify a sparsified model: ``sparsify_check(model, x, events=2)``."""
    import torch

    from sparsify.api import sparsify
    from sparsify.verification.model import verify

    def check(
        model: nn.Module,
        *args: Any,
        events: int | None = None,
        kwargs: dict[str, Any] | None = None,
        plan: Plan | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> Verification:
        __tracebackhide__ = True
        with torch.no_grad():
            fast = sparsify(
                model, *args, plan=plan, backend=backend, timing=False, **(kwargs or {})
            )
        options = {"kwargs": kwargs, "events": events, "must_replace": True, **options}
        return verify(model, fast, *args, **options)

    return check
