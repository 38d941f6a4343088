"""The weights of a model that can be pruned: where they are and what their masks are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsify.errors import PruningError
from sparsify.products.find_products import layer_name
from sparsify.pruning.request import Pruning

LAYERS = (nn.Linear, nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class Prunable:
    """One weight ``[R, S]``: tensor ``name`` of ``module``, which is called ``layer``.

    ``fraction`` is the share of ``pool``, the weights that are pruned together, that becomes zero.
    """

    layer: str
    module: nn.Module
    name: str
    pool: str
    fraction: float

    @property
    def is_masked(self) -> bool:
        return _is_masked(self.module, self.name)

    @property
    def parameter(self) -> nn.Parameter:
        """What is trained: the weight of the dense model."""
        name = f"{self.name}_orig" if self.is_masked else self.name
        return self.module.get_parameter(name)

    @property
    def mask(self) -> Tensor:
        """1 for what is kept; the buffer itself where there is one."""
        if not self.is_masked:
            return torch.ones_like(self.parameter, dtype=torch.bool)
        return self.module.get_buffer(f"{self.name}_mask")

    @property
    def kept(self) -> Tensor:
        return self.mask != 0

    @property
    def receivers_of_group(self) -> int:
        """Consecutive receivers that belong together: those of one gate."""
        gates = {nn.GRU: 3, nn.GRUCell: 3, nn.LSTM: 4, nn.LSTMCell: 4}
        return int(self.parameter.shape[0]) // gates.get(type(self.module), 1)


def find_prunable(model: nn.Module, pruning: Pruning) -> list[Prunable]:
    """The weights that ``pruning`` names. Raises PruningError where one cannot be pruned."""
    found: list[Prunable] = []
    for path, module, name in _matrices(model):
        pool = _pool(module, path, pruning)
        if pool is not None:
            fraction = pruning.fractions[pool]
            found.append(Prunable(layer_name(path), module, name, pool, fraction))
    if not found:
        raise PruningError(
            f"{_asked(pruning)} fits no weight of {type(model).__name__}; {_known(model)}"
        )
    _check_globs(model, pruning, found)
    _check_shared(found)
    for weight in found:
        _check(weight)
    return found


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The path, the module and the name there of every matrix."""
    for module_name, module in model.named_modules():
        for name in _weights_of(module):
            yield f"{module_name}.{name}".lstrip("."), module, name


def _weights_of(module: nn.Module) -> list[str]:
    """The matrices that a module has by itself, by their names in the dense model."""
    names = [_unmasked(module, name) for name in _own(module)]
    if parametrize.is_parametrized(module):
        tables: Any = module.parametrizations
        names += list(tables.keys())
    return names


def _own(module: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 2 and parameter.is_floating_point()
    ]


def _unmasked(module: nn.Module, name: str) -> str:
    """What the parameter ``weight_orig`` of a mask of torch is called without the mask."""
    plain = name.removesuffix("_orig")
    return plain if _is_masked(module, plain) else name


def _is_masked(module: nn.Module, name: str) -> bool:
    return f"{name}_orig" in module._parameters and f"{name}_mask" in module._buffers


def _pool(module: nn.Module, path: str, pruning: Pruning) -> str | None:
    """The glob of the fraction that applies; None if the weight stays."""
    names = _names(path)
    asked = _globs(pruning.only)
    if _fits(names, _globs(pruning.except_)) or (asked and not _fits(names, asked)):
        return None
    pool = next((glob for glob in pruning.fractions if _fits(names, (glob,))), None)
    named = (*asked, *pruning.fractions)
    if not isinstance(module, LAYERS) and not _fits((path,), [g for g in named if g != "*"]):
        return None  # perhaps no product reads it; whoever names it knows
    return pool


def _check_globs(model: nn.Module, pruning: Pruning, found: Sequence[Prunable]) -> None:
    """A name that fits nothing is a mistake: what it was to spare, or to prune, is another layer.

    Those of ``except_`` and ``only`` may fit what is not pruned for another reason.
    """
    paths = [path for path, _, _ in _matrices(model)]
    for what in ("only", "except_"):
        for glob in _globs(getattr(pruning, what)):
            if not any(_fits(_names(path), (glob,)) for path in paths):
                raise PruningError(f"{what}: {glob!r} fits no weight; {_known(model)}")
    for glob in pruning.fractions:
        if not any(weight.pool == glob for weight in found):
            raise PruningError(f"fraction: {glob!r} fits no weight; {_known(model)}")


def _names(path: str) -> tuple[str, str, str]:
    """What a glob may name a weight by: its layer, its module, its path."""
    return layer_name(path), path.rpartition(".")[0], path


def _globs(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _fits(names: Sequence[str], globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _asked(pruning: Pruning) -> str:
    asked = {"only": pruning.only, "except_": pruning.except_, "fraction": pruning.fraction}
    return ", ".join(
        f"{name}={value!r}" for name, value in asked.items() if value not in ((), None)
    )


def _known(model: nn.Module) -> str:
    names = [path for path, _, _ in _matrices(model)]
    if not names:
        return "it has no matrices (kernels of convolutions are not pruned)"
    known = f"its matrices are {', '.join(names)}"
    if not any(isinstance(module, LAYERS) for module in model.modules()):
        known += f"; those of your own modules have to be named: only={names[0]!r}"
    return known


def _check_shared(weights: Sequence[Prunable]) -> None:
    """One tensor under two names would need one mask."""
    seen: dict[int, str] = {}
    for weight in weights:
        if parametrize.is_parametrized(weight.module, weight.name):
            continue
        other = seen.setdefault(id(weight.parameter), weight.layer)
        if other != weight.layer:
            raise PruningError(
                f"{other} and {weight.layer} share one weight, of which each would get a mask of "
                f"its own; leave both out: except_=({other!r}, {weight.layer!r})"
            )


def _check(weight: Prunable) -> None:
    layer = weight.layer
    if parametrize.is_parametrized(weight.module, weight.name):
        raise PruningError(
            f"{layer} is computed by a parametrization, whose results no mask of torch.nn.utils."
            f"prune can hold; remove it (parametrize.remove_parametrizations) or leave the layer "
            f"out: except_={layer!r}"
        )
    value = weight.parameter.detach()
    if not bool(value.isfinite().all()):
        what = "NaN" if bool(value.isnan().any()) else "infinite"
        raise PruningError(
            f"{layer} has weights that are {what}, which have no rank among others; train it anew "
            f"or leave it out: except_={layer!r}"
        )
    if not weight.is_masked:
        return
    mask = weight.mask
    if mask.shape != value.shape:
        raise PruningError(
            f"{layer} has a mask of {list(mask.shape)} for weights of {list(value.shape)}; give "
            f"it their shape"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise PruningError(
            f"{layer} has a mask with values beside 0 and 1, which scales weights; multiply them "
            f"into the weight with torch.nn.utils.prune.remove first"
        )
