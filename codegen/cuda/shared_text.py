"""CUDA text of shared memory: what the threads of a block exchange, and how much of it there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.usage import UINT16_SENDERS
from sparsify.codegen.writer import Writer

BYTES: dict[ir.DType, int] = {"float32": 4, "float64": 8, "int32": 4, "int64": 8}
BLOCK, WARP = 256, 32


@dataclass(frozen=True)
class Field:
    """A member of a struct in shared memory, with its size and alignment in bytes."""

    declaration: str
    bytes: int
    align: int
    note: str = ""


def events_field(name: str, size: str, senders: int, note: str) -> Field:
    """A list of events; see ``events.cuh``."""
    index = 2 if senders <= UINT16_SENDERS else 4
    taken = -(-senders * index // 4) * 4 + 4 * -(-senders // BLOCK)
    return Field(f"Events<{size}> {name};", taken, 4, note)


def words_field(name: str, size: str, neurons: int, note: str) -> Field:
    return Field(f"uint32_t {name}[words_of({size})];", 4 * -(-neurons // WARP), 4, note)


def values_field(
    kind: str, dtype: ir.DType, name: str, size: str, neurons: int, copies: int, note: str
) -> Field:
    """Values of a population, ``[N]`` or ``[copies][N]``."""
    many = f"[{copies}]" if copies > 1 else ""
    taken = BYTES[dtype] * neurons * copies
    return Field(f"{kind} {name}{many}[{size}];", taken, BYTES[dtype], note)


def sizeof(fields: Sequence[Field]) -> int:
    """The size of a struct of ``fields``, in this order."""
    end = 0
    for member in fields:
        end = -(-end // member.align) * member.align + member.bytes
    align = max((member.align for member in fields), default=1)
    return -(-end // align) * align


def write_shared(w: Writer, name: str, note: str, fields: Sequence[Field]) -> None:
    """The struct, and a check that it has the size for which kernels are launched."""
    w.line()
    w.comment(note)
    with w.block(f"struct {name}", "};"):
        for member in fields:
            w.line(member.declaration, member.note)
    w.line(f'static_assert(sizeof({name}) == {sizeof(fields)}, "as launched");')
