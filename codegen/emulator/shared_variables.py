"""Rewrites what CUDA text says with words that no other compiler has: shared variables, entries."""

from __future__ import annotations

import re

_ALIGNMENT = r"(?:(?:__align__|alignas)\s*\(\s*(?P<align>\d+)\s*\)\s*)?"
_DYNAMIC_ALIGNMENT = r"(?:__align__\s*\(\s*\d+\s*\)\s*)?"  # nvcc takes no alignas there
_STATIC = re.compile(
    r"__shared__\s+" + _ALIGNMENT + r"(?P<type>[A-Za-z_][\w:<>,\s]*?)\s*"
    r"\b(?P<name>[A-Za-z_]\w*)\s*(?P<sizes>(?:\[[^\]]*\]\s*)*);"
)
_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+" + _DYNAMIC_ALIGNMENT + r"(?P<type>[A-Za-z_][\w:\s]*?)\s*"
    r"\b(?P<name>\w+)\s*\[\s*\]\s*;"
)
_ENTRY = re.compile(r"\b(\w+)\s*\(\s*(?:const\s+)?Call\s+\w+\s*\)\s*\{")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def rewrite_shared(text: str) -> str:
    """Declare shared variables as references to memory that the emulator has for each block.

    Before:  __shared__ float sums[4][32];
    After:   a unique address, a type and ``float (&sums)[4][32] = ...`` in the same line

    so that the numbers of lines stay. One variable per declaration; others do not compile.
    """
    text = _DYNAMIC.sub(
        r"\g<type>* const \g<name> ="
        r" static_cast<\g<type>*>(emulator::emulator_dynamic_shared());",
        text,
    )
    return _STATIC.sub(_reference, text)


def _reference(declaration: re.Match[str]) -> str:
    kind, name, sizes = declaration["type"], declaration["name"], declaration["sizes"].strip()
    if "," in kind and "<" not in kind:
        return declaration[0]
    alignment = declaration["align"] or f"alignof({kind})"
    memory = (
        f"emulator::emulator_static_shared(&{name}__tag, sizeof({name}__type),"
        f' {alignment}, "{name}")'
    )
    return (
        f"static const char {name}__tag = 0; typedef {kind} {name}__type{sizes};"
        f" {name}__type& {name} = *static_cast<{name}__type*>({memory});"
    )


def find_entries(text: str) -> list[str]:
    """The kernels of ``text``: all functions whose one parameter is a ``Call``."""
    return _ENTRY.findall(_COMMENT.sub("", text))
