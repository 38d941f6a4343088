"""The code that autograd Functions run: of ``forward`` and ``setup_context``, by identity of both.

Torch calls these two from C++, so a use of a Function is seen from their frames, in every version.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType

import torch

METHODS = ("forward", "setup_context")


class FunctionCodes:
    """Of all Functions that there are; looked up anew where code may be that of a new one."""

    def __init__(self) -> None:
        self._names: dict[CodeType, str] = {}

    def __contains__(self, code: CodeType) -> bool:
        return bool(self.name_of(code))

    def name_of(self, code: CodeType) -> str:
        """The name of a Function that has the code, which others may share; "" for no Function."""
        if not self._names or (code not in self._names and _may_be_new(code)):
            self._names.update(_named_codes(torch.autograd.Function))
        return self._names.setdefault(code, "")


def _may_be_new(code: CodeType) -> bool:
    return code.co_name in METHODS and code.co_varnames[:1] != ("self",)  # as modules have it


def code_of(function: object) -> CodeType | None:
    """What Python runs for a static method; None for all that is no plain function."""
    return function.__code__ if isinstance(function, FunctionType) else None


def _named_codes(function: type[torch.autograd.Function]) -> Iterator[tuple[CodeType, str]]:
    for cls in function.__subclasses__():
        for method in METHODS:
            inherited = getattr(torch.autograd.Function, method)
            found = getattr(cls, method)
            code = code_of(found)
            if code is not None and found is not inherited:
                yield code, cls.__name__
        yield from _named_codes(cls)
