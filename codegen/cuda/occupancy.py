"""How many blocks of a kernel a multiprocessor holds, of a device that need not be there."""

from __future__ import annotations

from sparsify.codegen.cuda.device import Grid, Limits
from sparsify.codegen.cuda.nvrtc import Usage

WARP = 32
PARTS = 4  # of a multiprocessor, each with a quarter of the registers
REGISTERS_AT_ONCE = 256  # what a warp is given is a multiple of it
THREADS_PER_BLOCK = 1024
BLOCKS_PER_GRID = 2**31 - 1


def resident_blocks(limits: Limits, usage: Usage, threads: int, shared_bytes: int) -> int:
    """Blocks of ``threads`` and ``shared_bytes`` of dynamic memory; 0 if not even one fits."""
    shared = usage.shared_bytes + shared_bytes
    if threads > THREADS_PER_BLOCK or shared > limits.shared_per_block:
        return 0
    warps = -(-threads // WARP)
    return min(
        limits.blocks_per_multiprocessor,
        limits.threads_per_multiprocessor // WARP // warps,
        _blocks_by_registers(limits, usage, warps),
        limits.shared_per_multiprocessor // _allocated(limits, shared),
    )


def why_not_resident(limits: Limits, usage: Usage, grid: Grid) -> str | None:
    """Why a device with ``limits`` cannot run ``grid``, or None.

    Where the blocks of a cluster are placed is not known here: only that each of them fits.
    """
    if not 0 < grid.blocks <= BLOCKS_PER_GRID or grid.blocks % grid.cluster:
        return f"{grid.blocks} blocks in clusters of {grid.cluster} are no grid"
    if grid.cluster > limits.cluster:
        return f"{limits.name} has clusters of at most {limits.cluster} blocks, not {grid.cluster}"
    held = resident_blocks(limits, usage, grid.threads, grid.shared_bytes)
    if not held:
        return f"{limits.name} has no room for one block of {grid} with {usage}"
    most = held * limits.multiprocessors
    if grid.cooperative and grid.blocks > most:
        return f"{limits.name} holds {most} blocks at once, not {grid.blocks}"
    return None


def _blocks_by_registers(limits: Limits, usage: Usage, warps: int) -> int:
    of_warp = _round_up(usage.registers * WARP, REGISTERS_AT_ONCE)
    # One block is checked as if each part had equally many of its warps; several are not.
    if of_warp * _round_up(warps, PARTS) > limits.registers_per_multiprocessor:
        return 0
    return limits.registers_per_multiprocessor // PARTS // of_warp * PARTS // warps


def _allocated(limits: Limits, shared: int) -> int:
    """From capability 8.0 on, the system keeps 1 KiB of each block."""
    if limits.capability < (8, 0):
        return max(_round_up(shared, 256), 1)
    return _round_up(shared + 1024, 128)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
