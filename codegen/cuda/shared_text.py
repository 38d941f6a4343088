"""Members of the struct in shared memory: what the threads of a block exchange."""

from __future__ import annotations

from sparsify.codegen.cuda.struct_text import Array
from sparsify.codegen.usage import UINT16_SENDERS

BLOCK, WARP = 256, 32


def events_field(name: str, size: str, senders: int, note: str) -> Array:
    """A list of events; see ``events.cuh``."""
    index = 2 if senders <= UINT16_SENDERS else 4
    taken = -(-senders * index // 4) * 4 + 4 * -(-senders // BLOCK)
    return Array(f"Events<{size}>", name, (), taken, 4, note)


def words_field(name: str, size: str, neurons: int, note: str) -> Array:
    return Array.of("uint32_t", name, [(f"words_of({size})", -(-neurons // WARP))], note)


def values_field(kind: str, name: str, size: str, neurons: int, copies: int, note: str) -> Array:
    """Values of a population, ``[N]`` or ``[copies][N]``."""
    many = [(str(copies), copies)] if copies > 1 else []
    return Array.of(kind, name, [*many, (size, neurons)], note)
