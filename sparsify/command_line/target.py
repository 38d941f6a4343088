"""Load ``FILE.py:factory``: the user's model and its example inputs."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.errors import SparsifyError

Factory = Callable[..., Any]


class UsageError(Exception):
    """The command line or the file that it names is wrong; the message says what to change."""


@dataclass(frozen=True)
class UserCode:
    """A block that runs the user's code: whatever that raises becomes a UsageError.

    The message is ``what`` and the traceback from the user's first line on.
    """

    what: str

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: Any
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, SparsifyError):
            return
        lines = traceback.format_exception(type(error), error, _skip_own_frames(frames))
        raise UsageError(f"{self.what}\n{''.join(lines).rstrip()}") from error


@dataclass(frozen=True)
class Target:
    """A model and a call of it."""

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def to(self, device: str) -> Target:
        """The same on another device; the model itself is moved."""
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (self.args, dict(self.kwargs))
        )
        return Target(self.name, self.model.to(device), args, kwargs)


def load_target(text: str, batch: int | None = None) -> Target:
    """Run the factory that ``text`` names. Raises UsageError for whatever keeps it from working."""
    path, factory = _find_factory(text)
    named: dict[str, Any] = {}
    if batch is not None:
        named["batch"] = batch
        if "batch" not in inspect.signature(factory).parameters:
            raise UsageError(
                f"--batch needs a factory that takes it: def {factory.__name__}(batch=1): ..."
            )
    with UserCode(f"{text} raised"):
        returned = factory(**named)
    model, args, kwargs = _unpack(text, returned)
    return Target(f"{path.name}:{factory.__name__}", model, args, kwargs)


def _find_factory(text: str) -> tuple[Path, Factory]:
    name, separator, attribute = text.rpartition(":")
    if not separator or not name.endswith(".py") or not attribute:
        raise UsageError(f"{text!r} is not FILE.py:factory, as in model.py:make")
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    module = _import_file(path)
    factory = getattr(module, attribute, None)
    if factory is None:
        raise UsageError(f"{path} has no {attribute}; {_suggest(module)}")
    if not callable(factory) or isinstance(factory, nn.Module):
        kind = type(factory).__name__
        raise UsageError(
            f"{text} is a {kind}; it has to be a function without arguments that returns "
            "(model, example_inputs)"
        )
    return path, factory


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, str(path.resolve().parent))
    with UserCode(f"{path} cannot be imported"):
        spec.loader.exec_module(module)
    return module


def _suggest(module: ModuleType) -> str:
    functions = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    return f"it defines {', '.join(functions)}" if functions else "it defines no function"


def _unpack(text: str, returned: Any) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]:
    wanted = "it has to return (model, example_inputs)"
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UsageError(f"{text} returned {_describe(returned)}; {wanted}")
    model, inputs = returned
    if not isinstance(model, nn.Module):
        raise UsageError(f"{text} returned {_describe(model)} for the model; {wanted}")
    if isinstance(inputs, Tensor):
        return model, (inputs,), {}
    if isinstance(inputs, Mapping):
        return model, (), {str(name): value for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return model, tuple(inputs), {}
    raise UsageError(
        f"{text} returned {_describe(inputs)} for the inputs; they have to be a tensor, a tuple of "
        "arguments, or a dict of keyword arguments"
    )


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _skip_own_frames(frames: TracebackType | None) -> TracebackType | None:
    """Drop the frames above the user's code: this package's and the import system's."""
    own = str(Path(__file__).parents[1])
    first = frames
    while first is not None:
        file = first.tb_frame.f_code.co_filename
        if not file.startswith((own, "<frozen importlib")):
            return first
        first = first.tb_next
    return frames
