"""The drop-in module: the user's object under a second class whose forward runs the kernels.

``fast`` shares the original's ``__dict__``, so parameters, buffers, submodules, hooks, flags and
every attribute are the same objects on both; only the class, and with it ``forward``, differs. What
belongs to the compiler lives in a slot, outside of the shared dictionary.
"""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from sparsify.codegen.native_call import native_call
from sparsify.errors import SparsifyError
from sparsify.serving.engine import Engine
from sparsify.serving.last_call import CALL, CALL_IMPL, MISSED, is_called_plainly
from sparsify.serving.outside_graphs import call_outside, is_compiled_around, is_seen_by_dynamo

# The shortcuts that a sparsified module offers; a model's own attribute of that name wins.
SHORTCUTS = ("report", "plan", "graph", "code", "kernels", "stages")

# What torch.compile(module) and module.compile() write to a module; not shared with the original.
COMPILED = ("_is_torch_compile", "_compiled_call_impl")


class Sparsified:
    """Mixed into the class of every sparsified module; see ``install``."""

    __slots__ = ()
    _engine: Engine

    @property
    def compiled(self) -> Engine:
        """Everything that sparsify knows about this module; always reachable under this name."""
        return self._engine

    @property
    def original(self) -> nn.Module:
        """The untouched model; shares parameters and attributes with this module."""
        return self._engine.original

    def freeze(self, frozen: bool = True) -> nn.Module:
        """Promise that weights stay as they are, so that calls stop looking for changes.

        A change after ``freeze()`` is not seen until ``freeze(False)``.
        """
        self._engine.freeze(frozen)
        return cast(nn.Module, self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiled_around():
            return call_outside(self._engine, args, kwargs)
        return self._engine(args, kwargs)

    def _call_sooner(self, *args: Any, **kwargs: Any) -> Any:
        """``nn.Module.__call__``, which finds no hooks where a call is like the last one."""
        module, original = cast(Any, self), self._engine.original
        is_compiled = is_seen_by_dynamo() or module._compiled_call_impl
        has_forward = type(self).forward is Sparsified.forward  # not one of a class derived from it
        if has_forward and not is_compiled and is_called_plainly(original):
            last_call = self._engine.last_call
            result = MISSED if last_call is None else last_call(args, kwargs)
            if result is not MISSED:
                return result
            hasten(type(self))
        return type(original).__call__(module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What Python asks where a shortcut raised an AttributeError: its message is the answer."""
        if name in SHORTCUTS and name in vars(type(self)):
            return getattr(self._engine, name)
        return cast(Any, super()).__getattr__(name)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` asks first. Raises SparsifyError: scripts have no kernels."""
        name = type(self._engine.original).__name__
        raise SparsifyError(
            f"torch.jit.script cannot compile a sparsified {name}: a script has no place for its "
            "kernels; script its .original, which has the same parameters and no kernels"
        )

    def _get_name(self) -> str:
        return f"Sparsified[{type(self._engine.original).__name__}]"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        engine = self._engine
        original = copy.deepcopy(engine.original, memo)
        clone = rebuild(original, engine.options, engine.plan, engine.pruned)
        memo[id(self)] = clone
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        engine = self._engine
        return rebuild, (engine.original, engine.options, engine.plan, engine.pruned)


def hasten(cls: type) -> None:
    """Have calls of modules of ``cls`` do natively what ``_call_sooner`` does, if that can be."""
    native = native_call()
    if native is not None and vars(cls).get("__call__") is Sparsified._call_sooner:
        native.call_sooner(
            *(cls, CALL, CALL_IMPL, Sparsified.forward, MISSED, get_eval_frame_callback)
        )


def rebuild(model: nn.Module, options: Any, plan: Any, pruned: Any = None) -> nn.Module:
    """Install an engine that compiles at its first call: how copies and pickles come back."""
    from sparsify.serving.engine import (
        Engine,  # the engine's own imports are what a pickle must not pay for
    )

    return install(Engine(model, options, plan, pruned=pruned))


def _shortcut(name: str) -> property:
    return property(lambda self: getattr(self._engine, name), doc=f"Same as ``compiled.{name}``.")


def install(engine: Engine) -> nn.Module:
    """Return the drop-in module of ``engine.original``.

    Raises SparsifyError where a second class cannot take over: a ``forward`` set on the instance.
    """
    model = engine.original
    if "_orig_mod" in model._modules:
        raise SparsifyError(
            "this is what torch.compile returned; sparsify the model that it was given, and "
            "torch.compile the result if more of it is to be compiled"
        )
    if "forward" in vars(model):
        raise SparsifyError(
            f"{type(model).__name__}.forward is replaced on the instance (model.forward = ...); "
            "define forward on the class, then call sparsify again"
        )
    taken = frozenset(name for name in SHORTCUTS if _has_own(model, name))
    cls = _find_class(type(model), taken) or _make_class(type(model), taken)
    fast = cast(nn.Module, cast(Any, cls).__new__(cls))
    object.__setattr__(fast, "__dict__", vars(model))
    object.__setattr__(fast, "_engine", engine)
    object.__setattr__(fast, "_compiled_call_impl", None)
    return fast


def _find_class(kind: type[nn.Module], taken: frozenset[str]) -> type | None:
    """The class that another model of this one has: as ``torch.func`` asks of an ensemble."""
    for cls in kind.__subclasses__():
        own = vars(cls)
        is_ours = cls.__bases__ == (Sparsified, kind) and cls.__module__ == kind.__module__
        same_call = ("__call__" in own) == (kind.__call__ is CALL)
        if is_ours and same_call and taken == {n for n in SHORTCUTS if n not in own}:
            return cls
    return None


def _make_class(kind: type[nn.Module], taken: frozenset[str]) -> type:
    members: dict[str, Any] = {n: _shortcut(n) for n in SHORTCUTS if n not in taken}
    if kind.__call__ is CALL:
        members["__call__"] = Sparsified._call_sooner
    members |= {"__slots__": ("_engine", *COMPILED), "__module__": kind.__module__}
    return type(kind.__name__, (Sparsified, kind), members)


def _has_own(model: nn.Module, name: str) -> bool:
    if name in vars(model) or any(name in vars(c) for c in type(model).__mro__):
        return True
    return any(name in getattr(model, d) for d in ("_parameters", "_buffers", "_modules"))
