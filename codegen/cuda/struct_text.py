"""C++ structs of which Python knows the size: kernels are launched with so much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.codegen.writer import Writer

SIZES = {
    **{"float": 4, "double": 8, "int32_t": 4, "int64_t": 8, "uint32_t": 4},
    **{"bool": 1, "uint8_t": 1, "sparsify::float16": 2, "sparsify::bfloat16": 2},
}
Dim = tuple[str, int]  # a C++ expression and what it is


@dataclass(frozen=True)
class Array:
    """A member of a struct: ``kind name[dims[0]]...``; ``size``, ``alignment`` are the kind's."""

    kind: str
    name: str
    dims: tuple[Dim, ...]
    size: int
    alignment: int
    note: str = ""

    @staticmethod
    def of(kind: str, name: str, dims: Sequence[Dim], note: str = "") -> Array:
        return Array(kind, name, tuple(dims), SIZES[kind], SIZES[kind], note)

    @property
    def declaration(self) -> str:
        return f"{self.kind} {self.name}" + "".join(f"[{text}]" for text, _ in self.dims) + ";"


def struct_layout(arrays: Sequence[Array]) -> tuple[int, int]:
    """Size and alignment of a struct of these, as compilers lay it out."""
    at, widest = 0, 1
    for array in arrays:
        count = 1
        for _, extent in array.dims:
            count *= extent
        at = -(-at // array.alignment) * array.alignment + array.size * count
        widest = max(widest, array.alignment)
    return max(1, -(-at // widest) * widest), widest


def write_struct(w: Writer, name: str, note: str, arrays: Sequence[Array]) -> None:
    """The struct, and a check that it has the size for which kernels are launched."""
    w.line()
    w.comment(note)
    with w.block(f"struct {name}", "};"):
        for array in arrays:
            w.line(array.declaration, array.note)
    if arrays:
        size = struct_layout(arrays)[0]
        w.line(f'static_assert(sizeof({name}) == {size}, "as launched");')
