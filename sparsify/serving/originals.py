"""Which calls are known to run the original."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.recording.recording import Args, Kwargs
from sparsify.serving.call_key import call_key

MOST = 256  # keys that are remembered


@dataclass(frozen=True, slots=True)
class Known:
    """That the original runs, for as long as the same of ``weights`` require grad."""

    weights: tuple[weakref.ref[Tensor], ...] = ()
    required: tuple[bool, ...] = ()

    @staticmethod
    def of(weights: Sequence[Tensor]) -> Known:
        required = tuple([weight.requires_grad for weight in weights])
        return Known(tuple(map(weakref.ref, weights)), required)

    def holds(self) -> bool:
        """Whether it is still so; also asked by who serves the next calls (``last_call.py``)."""
        for weight, required in zip(self.weights, self.required, strict=True):
            found = weight()
            if found is None or found.requires_grad is not required:
                return False
        return True


class Originals:
    """By the keys of calls of ``model``, which tell nothing of its weights."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[object, Known] = {}

    def add(self, args: Args, kwargs: Kwargs, weights: Sequence[Tensor] = ()) -> None:
        """Have calls like this one run it; where nothing was gained, ``weights`` are those read."""
        if len(self._known) >= MOST:
            self._known.clear()
        asked = weights if torch.is_grad_enabled() else ()
        self._known[call_key(self._model, args, kwargs)] = Known.of(asked)

    def find(self, args: Args, kwargs: Kwargs) -> Known | None:
        """What is known of a call like this one; None if a kernel may serve it."""
        if not self._known:
            return None
        known = self._known.get(call_key(self._model, args, kwargs))
        return known if known is not None and known.holds() else None

    def clear(self) -> None:
        """Ask of all calls anew."""
        self._known.clear()
