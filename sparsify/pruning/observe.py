"""What criteria look at: how often each sender is active, and gradients of pruned weights too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import PruningError
from sparsify.pruning.masks import set_mask
from sparsify.pruning.prunable import Prunable
from sparsify.recording.keep_state import keep_state

Kwargs = Mapping[str, Any]


class _Counter:
    """Counts non-zeros of the senders ``[..., S]`` of one weight."""

    def __init__(self) -> None:
        self.active: Tensor | None = None
        self.rows = 0

    def add(self, values: Any) -> None:
        found = _plain(values)
        rows = found.detach().reshape(-1, found.shape[-1])
        active = rows.count_nonzero(0)
        self.active = active if self.active is None else self.active + active
        self.rows += len(rows)


def measure_activity(
    model: nn.Module, weights: Sequence[Prunable], args: Sequence[Any], kwargs: Kwargs
) -> dict[str, Tensor]:
    """By layer, the share of time that each sender ``[S]`` is active while the model runs.

    The model's own operations run once, and its state is put back. Raises PruningError for layers
    that do not run as modules.
    """
    counters = {weight.layer: _Counter() for weight in weights}
    hooks = [hook for w in weights for hook in _watch(w, counters[w.layer])]
    try:
        with torch.no_grad(), keep_state(model, (args, kwargs)):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: _share(layer, counter) for layer, counter in counters.items()}


def _watch(weight: Prunable, counter: _Counter) -> Iterator[Any]:
    """Count what the weight's senders are: inputs, the last hidden values, or outputs."""
    module, name = weight.module, weight.name
    if not isinstance(module, (nn.Linear, nn.RNNBase, nn.RNNCellBase)):
        return
    layer_of_rnn = name.rpartition("_l")[2] if isinstance(module, nn.RNNBase) else ""
    if name.startswith("weight_hh") and isinstance(module, nn.RNNCellBase):
        hidden = _first_hidden
        yield module.register_forward_hook(lambda _, args, out: counter.add(hidden(out)))
    elif name.startswith("weight_hh") or layer_of_rnn not in ("", "0"):
        # Of layers inside, states are not to be seen; the last one's stand for all.
        size = int(weight.parameter.shape[1])
        yield module.register_forward_hook(
            lambda _, args, out: counter.add(_plain(out[0])[..., :size])
        )
    else:
        yield module.register_forward_pre_hook(lambda _, args: counter.add(args[0]))


def _first_hidden(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _plain(values: Any) -> Tensor:
    """The values themselves, of a packed sequence too."""
    found: Tensor = values if isinstance(values, Tensor) else values.data
    return found


def _share(layer: str, counter: _Counter) -> Tensor:
    if counter.active is None:
        raise PruningError(
            f"event-weighted: {layer} did not run as a module on the example, so that nobody knows "
            f"how active its senders are; call the module, or leave it out: except_={layer!r}"
        )
    return counter.active / counter.rows


def dense_gradients(weights: Sequence[Prunable], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradients of ``loss()`` by layer, of weights that are pruned as well.

    Those are zero meanwhile, and may be changed by what is called. Other gradients stay as they
    are. Raises PruningError where ``loss`` returns no loss, or that of another model.
    """
    parameters = [weight.parameter for weight in weights]
    with _opened(weights), torch.enable_grad():
        value: Any = loss()
        if not isinstance(value, Tensor) or not value.requires_grad:
            got = "a tensor without gradients" if isinstance(value, Tensor) else repr(value)
            raise PruningError(f"loss returned {got}; return the loss itself, before backward")
        found = torch.autograd.grad(value, parameters, allow_unused=True)
    if all(each is None for each in found):
        raise PruningError(
            "loss has no gradient for any weight that is to be pruned: it calls another model. A "
            "copy is pruned, which loss cannot know, unless in_place=True; a Pruner makes no copy"
        )
    return {
        weight.layer: torch.zeros_like(weight.parameter) if each is None else each.detach()
        for weight, each in zip(weights, found, strict=True)
    }


@contextmanager
def _opened(weights: Sequence[Prunable]) -> Iterator[None]:
    """Masks of ones over weights in which zeros stand for what is pruned."""
    masked = [weight for weight in weights if weight.is_masked]
    kept = [weight.kept.clone() for weight in masked]
    values = [weight.parameter.detach().clone() for weight in masked]
    with torch.no_grad():
        for weight, mask in zip(masked, kept, strict=True):
            weight.parameter.mul_(mask)
            set_mask(weight, torch.ones_like(mask))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, mask, value in zip(masked, kept, values, strict=True):
                weight.parameter.copy_(value)
                set_mask(weight, mask)
