"""What a code object can read: the globals it names, the attributes, or anything at all."""

from __future__ import annotations

import copy
import dataclasses
import dis
import inspect
import operator
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Literal

import torch

Origin = Literal["user", "torch", "library"]
PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
TORCH = os.path.dirname(os.path.realpath(torch.__file__))
STANDARD = tuple(
    {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    | {os.path.dirname(os.path.realpath(os.__file__))}
)
OUR_FOLDERS = (
    PACKAGE,
    *(os.path.realpath(os.path.join(PACKAGE, p)) for p in ("passes", "codegen")),
)
# The demo's network is code as users write it: its loops are found, and its lines named.
DEMO = os.path.join(PACKAGE, "command_line", "demo_model.py")
# With these a name need not stand in the code.
BY_VALUE = {"getattr", "setattr", "hasattr", "delattr"}
GIVEN = ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM")  # by a module, under whatever name
ANYTHING = {
    "__dict__",
    "__getattribute__",
    "attrgetter",
    "methodcaller",
    "vars",
    "dir",
    "globals",
    "eval",
    "exec",
    "__getstate__",
    "__reduce_ex__",
    "asdict",
    "astuple",
    "getmembers",
    "getattr_static",
    "deepcopy",
}
# The same where they are met as values, which may have another name in the code.
LOOK_UP_ANYTHING = frozenset(
    map(
        id,
        (
            *(getattr, setattr, hasattr, delattr, vars, dir, globals, eval, exec),
            *(operator.attrgetter, operator.methodcaller, copy.deepcopy),
            *(dataclasses.asdict, dataclasses.astuple),
            *(inspect.getmembers, inspect.getattr_static),
        ),
    )
)
NO_OPERATION = {"PRECALL", "CACHE", "PUSH_NULL", "NOP", "RESUME", "EXTENDED_ARG"}


@dataclass(frozen=True)
class CodeNames:
    """``anything``: attributes are also looked up under computed names."""

    globals: frozenset[str]
    imports: frozenset[str]
    attributes: frozenset[str]
    anything: bool


@lru_cache(maxsize=4096)
def origin(file: str, module_name: str = "") -> Origin:
    """Whose code a file is; only user code (third-party packages included) reads globals.

    Generated code has no file and belongs to the module in whose namespace it runs.
    """
    if file.startswith("<"):
        made_in = getattr(sys.modules.get(module_name), "__file__", None)
        foreign = file.startswith("<frozen") or (made_in is not None and origin(made_in) != "user")
        return "library" if foreign else "user"
    path = os.path.realpath(file) if os.path.isabs(file) else file
    if _is_in(path, TORCH):
        return "torch"
    if path == DEMO:
        return "user"
    if any(_is_in(path, folder) for folder in OUR_FOLDERS) or _is_in(path, _numpy()):
        return "library"
    if "site-packages" in path or "dist-packages" in path:
        return "user"
    return "library" if any(_is_in(path, folder) for folder in STANDARD) else "user"


def _numpy() -> str:
    numpy = sys.modules.get("numpy")
    return os.path.dirname(os.path.realpath(str(numpy.__file__))) if numpy else "numpy"


def _is_in(path: str, folder: str) -> bool:
    return path.startswith(folder + os.sep)


def is_users(module_name: str | None) -> bool:
    """True if the module of this name is neither Python's, torch's, numpy's nor ours."""
    if module_name is None or module_name in ("builtins", "typing"):
        return False
    module = sys.modules.get(module_name)
    file = getattr(module, "__file__", None)
    if file is None:
        return module_name not in sys.builtin_module_names
    return origin(file) == "user"


def names_of(code: CodeType) -> CodeNames:
    """The names that user code can read when ``code`` runs."""
    reads: set[str] = set()
    imports: set[str] = set()
    instructions = list(dis.get_instructions(code))
    anything = False
    for at, instruction in enumerate(instructions):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            reads.add(instruction.argval)
            anything |= _looks_up_computed_names(instructions, at)
        elif instruction.opname == "IMPORT_NAME":
            imports.add(instruction.argval)
        elif instruction.opname in GIVEN:
            anything |= instruction.argval in BY_VALUE
    attributes = {*code.co_names, code.co_name, *_identifiers(code.co_consts)}
    anything |= not ANYTHING.isdisjoint(code.co_names)
    return CodeNames(frozenset(reads), frozenset(imports), frozenset(attributes), anything)


def _looks_up_computed_names(instructions: list[dis.Instruction], at: int) -> bool:
    """``getattr`` and its like, unless the second argument can be seen to be a literal."""
    function = instructions[at]
    if function.argval not in BY_VALUE:
        return False
    if function.opname == "LOAD_GLOBAL" and not (function.arg or 0) & 1:
        return True  # it is no call: the function is given to somebody
    ahead = [i for i in instructions[at + 1 : at + 12] if i.opname not in NO_OPERATION]
    depth = 0  # of the stack, above the function
    for position, instruction in enumerate(ahead):
        if depth == 1 and instruction.opname == "LOAD_CONST":
            literal = isinstance(instruction.argval, str)
            return not (literal and _ends_call(ahead[position + 1 :]))
        if not instruction.opname.startswith("LOAD_"):
            return True
        depth += dis.stack_effect(instruction.opcode, instruction.arg)
    return True


def _ends_call(ahead: list[dis.Instruction]) -> bool:
    """At most one more plain argument, then the call: the literal is not part of a computation."""
    names = [instruction.opname for instruction in ahead[:2]]
    if names[:1] == ["CALL"]:
        return True
    if len(names) < 2 or names[0] in GIVEN:  # of the literal, as in "NAME".lower()
        return False
    return names[0].startswith("LOAD_") and names[1] == "CALL"


def _identifiers(constants: tuple[object, ...]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
        elif isinstance(constant, tuple):
            yield from _identifiers(constant)


def find_write(codes: list[CodeType], name: str) -> tuple[str, int] | None:
    """The first line of ``codes`` that stores to ``name``, or else that mentions it."""
    for wanted in (("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "STORE_NAME"), ("LOAD_",)):
        for code in codes:
            for instruction in dis.get_instructions(code):
                if instruction.opname.startswith(wanted) and instruction.argval == name:
                    line = _line_at(code, instruction.offset)
                    return code.co_filename, line
    return None


def _line_at(code: CodeType, offset: int) -> int:
    for start, end, line in code.co_lines():
        if start <= offset < end and line is not None:
            return line
    return code.co_firstlineno
