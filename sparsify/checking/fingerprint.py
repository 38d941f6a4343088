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
        hashes = map(_Hasher(whole).hash, _parts(whole))
        return Fingerprint(tensor.dtype, tuple(tensor.shape), tuple(hashes))

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


class _Hasher:
    """Hashes parts of one tensor, each in the same memory: freed copies of each leave holes."""

    def __init__(self, whole: Tensor) -> None:
        size = min(whole.numel(), PART) * (2 if whole.is_complex() else 1)
        dtype = whole.real.dtype if whole.is_complex() else whole.dtype
        self._copy = torch.empty(size, dtype=dtype, device=whole.device)
        self._is_nan = torch.empty(size if dtype.is_floating_point else 0, dtype=torch.bool)
        self._is_nan = self._is_nan.to(whole.device)

    def hash(self, part: Tensor) -> bytes:
        part = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
        copy = self._copy[: part.numel()].view(part.shape).copy_(part)
        if part.is_floating_point():
            copy.add_(0.0)  # -0.0 + 0.0 is 0.0
            is_nan = self._is_nan[: part.numel()].view(part.shape)
            copy.masked_fill_(torch.ne(copy, copy, out=is_nan), torch.nan)
        flat = copy.view(-1).view(torch.uint8)
        return hashlib.sha256(flat.cpu().numpy().data).digest()
