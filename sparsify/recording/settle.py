"""What only a first call does, done before a recording and undone after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sparsify.recording.guard import watch
from sparsify.recording.keep_state import keep_state
from sparsify.recording.recording import Args, Kwargs


@contextmanager
def settled(model: nn.Module, args: Args, kwargs: Kwargs) -> Iterator[None]:
    """Inside, the model is as a first call leaves it; afterwards it is as it was before.

    A recording that is made inside serves the calls after the first one.
    """
    with keep_state(model, (args, kwargs)):
        with watch(model, args, kwargs) as seen:
            model.forward(*args, **kwargs)
        seen.side_effects(())
        try:
            yield
        finally:
            seen.restore_python()
