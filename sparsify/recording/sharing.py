"""What a recording assumes of tensors: which share no memory, and the contents that Python read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsify.recording.recorder import Recorder
from sparsify.recording.recording import Args, Guard, Kwargs
from sparsify.recording.sources import Fetch, KnownTensors, fetcher


@dataclass(frozen=True)
class Pin:
    """A state whose content Python has read."""

    name: str
    fetch: Fetch
    content: Tensor

    def why_not(self, args: Args, kwargs: Kwargs) -> str:
        now = self.fetch(args, kwargs)
        if isinstance(now, Tensor) and _same(now, self.content):
            return ""
        return f"{self.name} was {self.content.tolist()} and is not any more"


@dataclass(frozen=True)
class Apart:
    """The tensors that forward writes share no memory with one another or with others it uses."""

    names: tuple[str, ...]
    written: tuple[int, ...]
    fetch: tuple[Fetch, ...]

    def why_not(self, args: Args, kwargs: Kwargs) -> str:
        memories = [fetch(args, kwargs).untyped_storage().data_ptr() for fetch in self.fetch]
        if len(set(memories)) == len(memories):
            return ""
        for written in self.written:
            memory = memories[written]
            shared = [i for i, other in enumerate(memories) if other == memory and i != written]
            if shared and memory != 0:  # without elements it has none
                names = self.names[written], self.names[shared[0]]
                return f"{names[0]}, which is written to, shares memory with {names[1]}"
        return ""


@dataclass(frozen=True)
class Requires:
    """Which of the tensors require gradients, in the order of the placeholders."""

    names: tuple[str, ...]
    required: tuple[bool, ...]
    fetch: tuple[Fetch, ...]

    def why_not(self, args: Args, kwargs: Kwargs) -> str:
        for index, fetch in enumerate(self.fetch):
            if fetch(args, kwargs).requires_grad is not self.required[index]:
                now = "does not any more" if self.required[index] else "does now"
                then = "required" if self.required[index] else "did not require"
                return f"{self.names[index]} {then} gradients and {now}"
        return ""


Assumption = Pin | Apart | Requires


class SharingGuard:
    """A guard (``recording.Guard``) with assumptions about tensors added."""

    def __init__(self, inner: Guard, assumptions: Sequence[Assumption]) -> None:
        self._inner = inner
        self._assumptions = tuple(assumptions)

    def matches(self, args: Args, kwargs: Kwargs) -> bool:
        return self._inner.matches(args, kwargs) and not self._broken(args, kwargs)

    def explain(self, args: Args, kwargs: Kwargs) -> str:
        return self._inner.explain(args, kwargs) or self._broken(args, kwargs)

    def _broken(self, args: Args, kwargs: Kwargs) -> str:
        for assumption in self._assumptions:
            try:
                why_not = assumption.why_not(args, kwargs)
            except (LookupError, AttributeError) as error:
                return f"a tensor is not there any more: {error}"
            if why_not:
                return why_not
        return ""


def find_assumptions(
    known: KnownTensors,
    recorder: Recorder,
    written: set[fx.Node],
    operands: Sequence[fx.Node],
) -> list[Assumption]:
    """What the recording with these placeholders assumes."""
    tensors = {node: recorder.placeholders[node] for node in operands}
    fetch = {node: fetcher(known.origin(tensor)) for node, tensor in tensors.items()}
    found: list[Assumption] = []
    for node, tensor in tensors.items():
        name = node.meta["source"].name
        if node in recorder.pinned:
            found.append(Pin(name, fetch[node], tensor.detach().clone()))
    names = tuple(node.meta["source"].name for node in operands)
    fetchers = tuple(fetch.values())
    places = tuple(i for i, node in enumerate(operands) if node in written)
    if places:
        found.append(Apart(names, places, fetchers))
    if recorder.histories is not None:
        required = tuple(map(recorder.histories.required, tensors.values()))
        found.append(Requires(names, required, fetchers))
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return bool(torch.equal(a, b))
