"""Whether the backward of a user's Function may decide by sizes, told from its code alone.

It runs when the recording is over, so nobody notes what it asks of them.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

READING = {"shape", "size", "numel", "nelement", "len"}


def find_decision(function: Callable[..., Any]) -> tuple[str, int, int] | None:
    """The place of the first branch in a function that reads sizes; None if there is none.

    ``if ctx.needs_input_grad[0]`` is none that sizes could decide.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else _find_branch(code)


def _find_branch(code: CodeType) -> tuple[str, int, int] | None:
    if READING.isdisjoint((*code.co_names, *code.co_varnames)):
        return None
    asked = False  # whether what is tested was read of needs_input_grad
    line = code.co_firstlineno
    for step in dis.get_instructions(code):
        if step.starts_line:
            line, asked = _line(step, line), False
        asked = asked or step.argval == "needs_input_grad"
        if "JUMP" in step.opname and "_IF_" in step.opname and not asked:
            return code.co_filename, line, step.offset
    return None


def _line(step: dis.Instruction, line: int) -> int:
    """The line that an instruction starts, which newer Pythons tell in another attribute."""
    number = getattr(step, "line_number", None)
    if number is None and step.starts_line is not True:
        number = step.starts_line
    return line if number is None else int(number)
