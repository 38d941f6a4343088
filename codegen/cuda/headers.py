"""The fixed device code that kernels include: ``.cuh`` files, and ``.h`` files shared with C++."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

from sparsify.codegen.backend import Source
from sparsify.codegen.toolchain import read_source

INCLUDED = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def headers_for(source: Source) -> dict[str, str]:
    """The texts of all that ``source`` includes, also by way of others, by name."""
    return headers_of(*INCLUDED.findall(source.text))


def headers_of(*files: str) -> dict[str, str]:
    """The texts of ``files`` and of all that they include, by name."""
    found: dict[str, str] = {}
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = read_header(file)
            waiting += INCLUDED.findall(found[file])
    return found


@cache
def read_header(file: str) -> str:
    """The text of one file."""
    if file.endswith(".h"):
        return read_source(file)
    return resources.files("sparsify.codegen.cuda").joinpath(file).read_text(encoding="utf-8")
