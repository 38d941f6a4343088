"""Spikes that are kept for the backward pass, at one bit each.

The first of eight neurons is the lowest bit, as in ``numpy.packbits(..., bitorder="little")``.
Everything is made of torch operations, so it can be traced.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# A byte of 0 or 1 for each of eight neurons, times this, has their bits in its highest byte.
GATHER_BITS = sum(1 << (56 - 7 * bit) for bit in range(8))
# Row i has the bits of i. On the CPU looking them up takes less time than shifting and converting.
BITS_OF_BYTES = torch.tensor([[i >> bit & 1 for bit in range(8)] for i in range(256)], device="cpu")


def packed_size(neurons: int) -> int:
    """How many bytes hold the bits of ``neurons``."""
    return -(-neurons // 8)


def pack_bits(spikes: Tensor) -> Tensor:
    """``[..., N]`` of any dtype -> uint8 ``[..., ceil(N / 8)]``: which values are not zero."""
    active = spikes != 0
    missing = -active.shape[-1] % 8
    if missing:
        active = functional.pad(active, (0, missing))
    words = active.contiguous().view(torch.int64)
    return (words * GATHER_BITS >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, neurons: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """uint8 ``[..., ceil(N / 8)]`` -> ``[..., N]`` of 0 and 1.

    Raises ValueError if ``packed`` has not the bytes of so many neurons.
    """
    check_packed(packed, neurons)
    # On another device a table would have to be copied there, and be waited for.
    spread = look_up_bits if packed.device.type == "cpu" else shift_bits
    return spread(packed, dtype).view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :neurons]


def look_up_bits(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 of any shape -> ``[numel, 8]`` of 0 and 1, the lowest bit first."""
    return BITS_OF_BYTES.to(dtype).index_select(0, packed.flatten().to(torch.int32))


def shift_bits(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as ``look_up_bits``, without a table."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.flatten().unsqueeze(-1) >> places & 1).to(dtype)


def check_packed(packed: Tensor, neurons: int) -> None:
    """Raises ValueError if ``packed`` cannot be what ``pack_bits`` made of ``[..., neurons]``."""
    if packed.dtype is torch.uint8 and packed.shape[-1:] == (packed_size(neurons),):
        return
    given = f"{list(packed.shape)} of {packed.dtype}"
    wanted = f"[..., {packed_size(neurons)}] of torch.uint8"
    raise ValueError(f"the bits of {neurons} neurons are {wanted}, not {given}; use pack_bits")
