"""What is kept of a tensor to compare another one with later: hashes take no memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

PART = 1 << 16  # elements that are hashed, and copied if need be, at once


@dataclass(frozen=True)
class Fingerprint:
    """A tensor's dtype and shape, and a SHA-256 of every ``PART`` of its elements.

    Tensors of other strides have the same one, and so have zeros of either sign and all NaNs.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    hashes: tuple[bytes, ...] = field(repr=False)

    @staticmethod
    def of(tensor: Tensor) -> Fingerprint:
        """The fingerprint of a tensor of any layout and device."""
        whole = tensor.detach()
        whole = whole if whole.layout is torch.strided else whole.to_dense()
        return Fingerprint(tensor.dtype, tuple(tensor.shape), tuple(map(_hash, _parts(whole))))

    def why_not(self, other: Fingerprint) -> str:
        """How a tensor differs from the one of ``other``; "" if it does not."""
        kind, wanted = f"{self.dtype} {list(self.shape)}", f"{other.dtype} {list(other.shape)}"
        if kind != wanted:
            return f"{kind} instead of {wanted}"
        differ = sum(a != b for a, b in zip(self.hashes, other.hashes, strict=True))
        parts = f" in {differ} of {len(self.hashes)} parts" if len(self.hashes) > 1 else ""
        return f"{kind} with other elements{parts}" if differ else ""


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in at most ``PART`` at a time, in an order that only the shape decides."""
    if tensor.numel() <= PART:
        yield tensor
        return
    row = math.prod(tensor.shape[1:])
    if row > PART:
        for each in tensor:
            yield from _parts(each)
    else:
        yield from torch.split(tensor, PART // row)


def _hash(part: Tensor) -> bytes:
    part = part.resolve_conj().resolve_neg()
    if part.is_complex():
        part = torch.view_as_real(part)
    if part.is_floating_point():
        part = torch.where(part.isnan(), torch.nan, part + 0.0)  # -0.0 + 0.0 is 0.0
    flat = part.contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.cpu().numpy().data).digest()
