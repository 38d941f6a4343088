"""A weight as one kernel reads it, packed anew when its content changes."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import torch

from sparsify.codegen.compressed import Form
from sparsify.codegen.contents import Contents
from sparsify.codegen.runtime import Packed, Runtime


@dataclass(frozen=True, slots=True)
class Current:
    """What was packed last: from which tensor, which is kept, and what that held.

    ``layout`` ends with the address. It is an object of its own, by which this is told from others
    without being kept.
    """

    layout: tuple[object, ...]
    content: int
    weight: torch.Tensor
    packed: Packed


class PackedWeight:
    """One weight of a kernel, packed; notices every change of the tensor it was packed from.

    ``contents`` looks at the weight at each call; those who pack it in other ways may share it.
    """

    def __init__(
        self,
        runtime: Runtime,
        form: int | Form,
        contents: Contents | None = None,
        by_senders: bool = False,
    ) -> None:
        """``form`` is the width of tiles, or says how zeros are left out.

        ``by_senders``: what is packed is the weight's transpose.
        """
        self._runtime, self._form, self._by_senders = runtime, form, by_senders
        self.contents = contents or Contents(runtime)
        self.current: Current | None = None  # replaced as a whole: several threads may call at once

    def get(
        self,
        weight: torch.Tensor,
        *,
        frozen: bool = False,
        band: int = 0,
        content: int | None = None,
    ) -> Current:
        """``weight`` ``[R, S]`` packed. Unless ``frozen``, its content is compared.

        ``band`` replaces that of the form, if it is not 0. ``content`` is what ``contents`` says
        of the weight, if it was asked in this call.
        Raises what ``Runtime.pack`` and ``Runtime.compress`` raise.
        """
        layout = (weight.dtype, weight.shape, weight.stride(), band, weight.data_ptr())
        current = self.current
        if frozen and current and current.layout == layout:
            return current
        # Before packing: a write in between is then found at the next call.
        content = self.contents.look(weight) if content is None else content
        is_torn = False
        if current and current.layout[:-1] == layout[:-1] and current.content == content:
            if current.layout == layout:
                return current
            packed = current.packed
        else:
            packed = self._pack(weight, band)
            # What is written in between may be taken back before the next call.
            is_torn = _has_other_writers(weight) and self.contents.look(weight) != content
        # The tensor is kept so that its memory is not given to another that looks the same.
        current = Current(layout, content, weight.detach(), packed)
        self.current = None if is_torn else current
        return current

    def _pack(self, weight: torch.Tensor, band: int) -> Packed:
        weight = weight.t() if self._by_senders else weight
        if isinstance(self._form, int):
            return self._runtime.pack(weight, self._form)
        return self._runtime.compress(weight, replace(self._form, band=band or self._form.band))


def _has_other_writers(weight: torch.Tensor) -> bool:
    """Whether other threads or processes may write to it at any time."""
    is_shared: bool = weight.is_shared()  # type: ignore[no-untyped-call]
    return is_shared or threading.active_count() > 1
