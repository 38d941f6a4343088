"""Weights packed without those that are zero: what kept_rows.h and masked_rows.h read."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from sparsify import ir

CHUNK = 8  # weights of a unit that are kept one by one, see kept_rows.h
WIDEST_BAND = 4096  # receivers whose sums stay in the first cache, see kept_rows.h
WIDEST_LINE = 32768  # senders of a band: their numbers take 16 bits
MOST_WORDS = 2**31  # of masked rows
HEAD = 6  # 64-bit words: band, lines, places, and where three arrays begin
EXPONENTS = {  # bits that are all set in infinities and NaN
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}
LINE = 64  # bytes to which arrays are aligned
LARGE_PAGE = 2 << 20  # bytes, see weights.h
INT, LONG, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


@dataclass(frozen=True)
class Form:
    """How to pack a matrix ``[places, lines]``: in bands, or tiles, of places.

    ``apart`` says that the places of a chunk have to differ, as sums that are written must.
    """

    layout: ir.Layout
    band: int
    apart: bool

    @property
    def is_masked(self) -> bool:
        return self.layout.kind == "masked-rows"


def band_width(receivers: int, threads: int, tile: int) -> int:
    """Receivers of a band: whole tiles, as many bands for each of the threads."""
    bands = threads * -(-receivers // (threads * WIDEST_BAND))
    return min(WIDEST_BAND, -(-receivers // (bands * tile)) * tile)


def matrix_of(weight: torch.Tensor) -> tuple[int, int, ctypes.Array[ctypes.c_int64]]:
    """``weight`` ``[places, lines]`` as runtime.cpp takes it: where it lies, bytes of an element,
    and lines, places and their strides.
    """
    places, lines = weight.shape
    shape = (LONG * 4)(lines, places, weight.stride(1), weight.stride(0))
    return weight.data_ptr(), weight.element_size(), shape


class Compressor:
    """Packs weights by the library of compress.cpp, on the threads of the Runtime at ``table``."""

    def __init__(self, library: ctypes.CDLL, table: ctypes.c_void_p) -> None:
        self._table = table
        matrix = (POINTER, POINTER, INT, POINTER)
        self._count = library["sparsify_count_kept"]
        self._count.argtypes = [*matrix, ctypes.c_uint64, *[LONG] * 3, POINTER, INT]
        self._count.restype = INT
        self._fill_kept = library["sparsify_fill_kept"]
        self._fill_kept.argtypes = [*matrix, LONG, LONG, INT, *[POINTER] * 3, INT]
        self._fill_kept.restype = None
        self._fill_masked = library["sparsify_fill_masked"]
        self._fill_masked.argtypes = [*matrix, LONG, POINTER, POINTER, INT]
        self._fill_masked.restype = None

    def pack(self, weight: torch.Tensor, form: Form) -> tuple[torch.Tensor, bool]:
        """Pack a matrix ``[places, lines]`` of floats of any strides, which lies in memory.

        Bytes, and whether all weights are finite.
        """
        places, lines = weight.shape
        size, threads = weight.element_size(), torch.get_num_threads()
        run = 1 if form.is_masked else form.layout.width
        together = CHUNK if form.layout.kind == "compressed-rows" else 1
        bands = -(-places // form.band)
        starts = torch.zeros(max(1, bands * (lines + 1)), dtype=torch.int32, device="cpu")
        given = (self._table, *matrix_of(weight))
        all_finite = self._count(
            *given, EXPONENTS[weight.dtype], form.band, run, together, starts.data_ptr(), threads
        )
        units = int(starts[-1])
        beside = chunks = 0
        if form.is_masked:  # a line's mask lies before its weights
            kept = units + bands * lines * -(-form.band // (8 * size))
            if kept >= MOST_WORDS:
                raise ValueError(f"masked-rows of {kept} words: where lines begin takes 31 bits")
        elif run > 1:
            kept, beside = units * run, 2 * units
        else:  # the places of a chunk lie before its weights
            kept, chunks = units * CHUNK, 2 * units * CHUNK
        packed, (first, at, weights) = _lay_out(
            (form.band, lines, places), starts, beside, kept * size + chunks, chunks > 0
        )
        if form.is_masked:
            self._fill_masked(*given, form.band, first, weights, threads)
        else:
            self._fill_kept(*given, form.band, run, form.apart, first, at, weights, threads)
        return packed, bool(all_finite)


def _lay_out(
    sizes: tuple[int, int, int], starts: torch.Tensor, beside: int, weights: int, chunks: bool
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Room for what is packed, with its head and ``starts``, and the addresses of its arrays.

    Behind the weights there is as much as a vector has, because whole vectors are read.
    """
    lengths = (HEAD * 8, starts.numel() * 4, beside, weights + LINE)
    places = [0]
    for length in lengths:
        places.append(places[-1] + -(-length // LINE) * LINE)
    packed = _room(places[-1], places[3])
    at, first = places[2], places[3]
    if chunks:
        at, first = first, first + 2 * CHUNK
    head = torch.tensor([*sizes, places[1], at, first], dtype=torch.int64)
    packed[: HEAD * 8] = head.view(torch.uint8)
    packed[places[1] : places[1] + lengths[1]] = starts.view(torch.uint8)
    address = packed.data_ptr()
    return packed, (address + places[1], address + at, address + first)


def _room(size: int, weights: int) -> torch.Tensor:
    """So many bytes. If they are many, those from ``weights`` on begin where a large page does.

    What lies before that page and behind the last byte is never touched, so it takes no memory.
    """
    if size - weights < LARGE_PAGE:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    room = torch.empty(size + LARGE_PAGE, dtype=torch.uint8, device="cpu")
    before = -(room.data_ptr() + weights) % LARGE_PAGE
    return room[before : before + size]
