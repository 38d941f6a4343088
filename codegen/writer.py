"""Text of generated C++: indentation, safe comments, identifiers that cannot collide."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

MOST_COMMENT = 90  # characters

_KEYWORDS = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t
    char32_t char8_t class co_await co_return co_yield compl concept const const_cast consteval
    constexpr constinit continue decltype default delete do double dynamic_cast else enum
    explicit export extern false final float for friend goto if import inline int linux long
    main module mutable namespace new noexcept not not_eq nullptr operator or or_eq override
    private protected public register reinterpret_cast requires return short signed sizeof
    static static_assert static_cast struct switch template this thread_local throw true try
    typedef typeid typename union unix unsigned using virtual void volatile wchar_t while xor
    xor_eq
"""

# What skeletons, fixed headers and standard headers say at the places where model names appear.
_SKELETON = """
    AHEAD ALL Ahead Arena BLOCK Bits Blocks Call Columns DENSE_BLOCK DENSE_ROWS DENSE_VECTORS Events
    FAR GROUP KeptRuns KeptSenders MaskedRows One Only Own Payload RING Ring Rows Runtime
    SOURCE_BLOCK STRIP Share Shared TAPS_AT_ONCE THREADS TILE Taps TapsAnywhere Team VECTOR_BYTES
    Values Vector WARP WIDTH Windows Words active convolve_dense convolve_events convolve_row
    put_taps sum_taps
    add_count add_row_steps ahead append arena arrange as_bits b band batch before blockDim blockIdx
    blocks_of body bytes call chunk columns common context convert copy_values count count_active
    count_events errno error fetch_row fetch_step first found gamma gather gather_all gather_dense
    gather_events gather_kept gather_restricted gather_runs gather_wanted gridDim group
    has_finite_payloads helper helpers here i inputs int16_t int32_t int64_t int8_t is_finite
    is_wild item j0 j1 jn k keep_wanted lane_of last leader leaders left list_events load mark
    mask_bytes measure measured memory most n next now number own pack place pointers pool row rows
    rows_here run runtime scan share shared shared_memory signgam size_t slot sparsify spread
    start std step steps store store_bits strides t team thread threadIdx threads tile uint16_t
    uint32_t uint64_t uint8_t unpack warpSize warp_of warp_sum width wild_from wild_rows words_of y0
    y1 yn
"""

# What skeletons append to the name of a value.
_SUFFIXES = (
    *("", "_t", "_b", "_from", "_to", "_tile", "_sum", "_events", "_values", "_active", "_blocks"),
    *("_wild", "_rows", "_total", "_next", "_list", "_mask", "_kept", "_wanted", "_found"),
    *("_slice", "_by_receiver_counts", "_by_receiver_places", "_by_receiver_kept"),
    *("_by_receiver_overflow", "_by_receiver_fits"),
    *(f"{rows}_{of}" for rows in ("", "_rows") for of in ("masks", "counts", "places", "fits")),
    *("_overflow", "_rows_overflow", "_rows_kept"),
    *("_map", "_windows"),
)
_RESERVED = frozenset((*_KEYWORDS.split(), *_SKELETON.split()))


class Names:
    """Maps names of the model to C++ identifiers, each given out once."""

    def __init__(self) -> None:
        self._taken = set(_RESERVED)

    def new(self, wish: str) -> str:
        """An unused identifier that resembles ``wish``."""
        base = re.sub(r"[^A-Za-z0-9]+", "_", wish).strip("_")[:48] or "value"
        base = f"n{base}" if base[0].isdigit() else base
        base = base.lower() if base.isupper() and len(base) > 2 else base  # macros are upper case
        name, number = base, 2
        while not self._taken.isdisjoint(_spellings(name)):
            name, number = f"{base}_{number}", number + 1
        self._taken |= _spellings(name)
        return name


@lru_cache(maxsize=512)  # some 4 KiB each
def _spellings(name: str) -> frozenset[str]:
    """``name`` with all suffixes: kernels are named anew for every prediction."""
    return frozenset(name + suffix for suffix in _SUFFIXES)


def comment_text(text: str, limit: int = MOST_COMMENT) -> str:
    """``text`` as it may stand in a ``//`` comment: one line of printable ASCII.

    A backslash could continue the comment, ``*/`` end one that surrounds it, ``??/`` is a
    backslash to old compilers.
    """
    plain = "".join(c if " " <= c <= "~" else "_" for c in text).replace("\\", "/")
    plain = plain.replace("*/", "* /").replace("/*", "/ *").replace("??", "? ?")
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


class Writer:
    """Collects lines; ``block`` indents what is written inside it."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0

    def line(self, text: str = "", note: str = "") -> None:
        comment = f"  // {comment_text(note)}" if note else ""
        self._lines.append(("  " * self._depth + text + comment).rstrip())

    def comment(self, text: str, limit: int = MOST_COMMENT) -> None:
        self.line(f"// {comment_text(text, limit)}")

    @contextmanager
    def block(self, head: str, end: str = "}") -> Iterator[None]:
        self.line(f"{head} {{".lstrip())
        self._depth += 1
        yield
        self._depth -= 1
        self.line(end)

    @contextmanager
    def indented(self, head: str) -> Iterator[None]:
        self.line(head)
        self._depth += 1
        yield
        self._depth -= 1

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"
