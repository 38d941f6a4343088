"""The kernel IR: what a compiled region computes, independent of any backend.

A kernel loops over time steps ``T`` and batch rows ``B``. A step is an ordered list of phases, each
over one population of neurons ``N``. Inside a phase every statement runs for all its neurons before
the next phase starts. States keep their value from the start of the step until the step ends:
``Update`` takes effect for the next step. ``reference.py`` is the executable definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

# "bits" is how an Operand or an Output with axes T, B, N keeps bools in memory: bytes [T, B,
# ceil(N / 8)] of eight neurons each, the first in the lowest bit. Statements read and store bools.
# Halves, "float16" and "bfloat16", are dtypes of memory: statements read them as float32, which has
# all their values, and only ``cast`` rounds to them.
DType = Literal["float32", "float64", "float16", "bfloat16", "int32", "int64", "bool", "bits"]
Axis = Literal["T", "B", "N"]
Payload = Literal["binary", "real"]


@dataclass(frozen=True)
class Population:
    """A layer of ``size`` neurons."""

    name: str
    size: int


@dataclass(frozen=True)
class Operand:
    """A tensor the kernel reads. ``axes`` is an ordered subset of T, B, N; none is a scalar.

    ``population`` gives the extent of the N axis and is None where there is no N axis.
    """

    name: str
    axes: tuple[Axis, ...]
    population: str | None
    dtype: DType
    note: str = ""  # for the reader of generated code: the model's name of it


Pair = tuple[int, int]  # of rows and columns


@dataclass(frozen=True)
class Convolution:
    """Which senders a receiver reads: those of all channels that lie under its window.

    Neurons of a population are those of ``channels`` maps of ``rows`` times ``columns``, in this
    order. Rows and columns beyond the senders' own, of the padding, hold no neurons. A convolution
    along one dim has one row.

    With ``pooling`` the window lies on maps of blocks of so many rows and columns of senders, each
    of them active where a sender is; senders that fill no block are left out. Payloads are binary.
    """

    channels: Pair  # of senders and of receivers
    senders: Pair  # rows and columns of a map
    window: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    pooling: Pair = (1, 1)

    @property
    def maps(self) -> Pair:
        """Rows and columns of what windows lie on."""
        return self.senders[0] // self.pooling[0], self.senders[1] // self.pooling[1]

    @property
    def receivers(self) -> Pair:
        """Rows and columns of a map of receivers."""
        rows, columns = (
            (size + 2 * pad - spread * (window - 1) - 1) // step + 1
            for size, pad, spread, window, step in zip(
                self.maps, self.padding, self.dilation, self.window, self.stride, strict=True
            )
        )
        return rows, columns

    @property
    def taps(self) -> int:
        """How many senders are under a window that lies within the map."""
        return self.channels[0] * self.window[0] * self.window[1]


@dataclass(frozen=True)
class Weight:
    """A matrix ``[receivers, senders]`` (populations) of floats that a Gather reads.

    That of a ``convolution`` is ``[channels of receivers, taps]``, where a tap is one of
    ``[channels of senders, rows of the window, columns of the window]`` in this order.
    """

    name: str
    receivers: str
    senders: str
    dtype: DType
    note: str = ""
    convolution: Convolution | None = None


@dataclass(frozen=True)
class State:
    """A value ``[B, N]`` carried from step to step; ``init`` names an Operand without T."""

    name: str
    population: str
    dtype: DType
    init: str
    note: str = ""


@dataclass(frozen=True)
class Output:
    """A tensor the kernel writes: every step if T is among ``axes``, else the value of the step
    that runs last.
    """

    name: str
    axes: tuple[Axis, ...]  # ("T", "B", "N") or ("B", "N")
    population: str
    dtype: DType
    note: str = ""


@dataclass(frozen=True, eq=False)
class Const:
    """A literal. Floats are rounded to the dtype of the statement that uses them.

    0.0 and -0.0 are two literals, and a kernel with the one is another than with the other; NaN
    is one.
    """

    value: float | int | bool

    @cached_property
    def _written(self) -> tuple[type, str]:
        return type(self.value), repr(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and self._written == other._written

    def __hash__(self) -> int:
        return hash(self._written)


Ref = str  # a State (old value), Operand, or the result of an earlier Let or Gather
Arg = Ref | Const


@dataclass(frozen=True)
class Let:
    """``result = op(*args)``, one scalar op of ``scalar_ops.SCALAR_OPS`` per neuron and batch row.

    ``dtype`` is the result's. Arguments that lack an axis are broadcast along it. A result of an
    earlier phase may be read where the population is the same.
    """

    result: str
    op: str
    args: tuple[Arg, ...]
    dtype: DType
    note: str = ""


@dataclass(frozen=True)
class Gather:
    """``result[b, r] = sum over senders s of weight[r, s] * source[b, s]``.

    ``source`` is a State (its old value), an Operand with axes (T,)B,N, or a result of an earlier
    phase. Only senders with ``source != 0`` (NaN counts) are added, in ascending order within
    blocks of 256 sender indices, each block from +0, then the block sums in ascending order, from
    +0; a product is added with one rounding to the weight's dtype, as by ``fma``. ``binary``
    promises that sources are 0 or 1. Through a weight of halves all of this is float32, the result
    as well.

    A restricted Gather names in ``only`` a value ``[B, R]`` of the receivers: a State (its old
    value), an Operand with axes (T,)B,N, or a result of an earlier phase. What has ``only == 0`` is
    not computed but 0: the way back from a neuron whose surrogate gradient is zero there. A row
    with a wild source, one that is not below ``WILD`` in magnitude, is computed for all receivers:
    in the whole product it may give infinities and NaN, which a factor of zero does not undo.
    The order of additions is free. Its weight is none of halves: a sum that is finite in float32
    may be infinite where it is rounded to a half.
    """

    result: str
    weight: str
    source: Ref
    payload: Payload
    note: str = ""
    only: Ref | None = None


@dataclass(frozen=True)
class Store:
    """Write ``value`` to ``output`` at this step (or keep it, if the output has no T axis)."""

    output: str
    value: Arg


@dataclass(frozen=True)
class Update:
    """Give ``state`` its value for the next step. Once per state, in a phase of its population."""

    state: str
    value: Arg


Statement = Let | Gather | Store | Update


@dataclass(frozen=True)
class Phase:
    """Statements over one population. Gathers may not read results of their own phase."""

    population: str
    body: tuple[Statement, ...]

    @cached_property
    def gathers(self) -> tuple[Gather, ...]:
        return tuple(s for s in self.body if isinstance(s, Gather))


@dataclass(frozen=True)
class Kernel:
    """A region, ready to be rendered. ``origin`` says which lines of the model it came from.

    With ``reverse`` time runs from the last step to step 0, as gradients do; tensors with a T axis
    keep their order, so that step t reads and writes row t.
    """

    name: str
    populations: tuple[Population, ...]
    operands: tuple[Operand, ...]
    weights: tuple[Weight, ...]
    states: tuple[State, ...]
    phases: tuple[Phase, ...]
    outputs: tuple[Output, ...]
    origin: tuple[str, ...] = ()
    reverse: bool = False

    def population_size(self, name: str) -> int:
        return next(p.size for p in self.populations if p.name == name)

    def weight(self, name: str) -> Weight:
        return next(w for w in self.weights if w.name == name)

    def weight_shape(self, weight: Weight) -> Pair:
        """Of the matrix that is given."""
        if weight.convolution is not None:
            return weight.convolution.channels[1], weight.convolution.taps
        return self.population_size(weight.receivers), self.population_size(weight.senders)

    @cached_property
    def gathers(self) -> tuple[Gather, ...]:
        return tuple(gather for phase in self.phases for gather in phase.gathers)

    def weight_of(self, result: str) -> str:
        """The name of the weight that the Gather of ``result`` reads."""
        return next(g.weight for g in self.gathers if g.result == result)


LayoutKind = Literal["dense-rows", "compressed-rows", "block-rows", "masked-rows"]


@dataclass(frozen=True)
class Layout:
    """How the weights of a sender lie in memory: which of them are kept, and where they belong.

    It changes no result: weights that are left out are zero, found anew in every weight that is
    packed, and a sender whose value is infinite or NaN still reaches every receiver, because
    0 * inf is NaN. Any layout takes any weight; the pattern decides which one is fast.

    dense-rows       every weight.
    compressed-rows  the weights that are not zero, each with its receiver.
    block-rows       runs of ``width`` receivers of which one weight is not zero, each with its
                     place: all of a run is kept.
    masked-rows      the weights that are not zero, and a bit for every receiver that says whether
                     it has one: N:M patterns, and densities at which receivers' numbers would
                     outweigh what they save.

    Restricted Gathers, which add up what a receiver gets, read the same with senders and receivers
    exchanged.

    Kernels on a GPU cannot wait until what is kept has been counted: there is ``room`` for so large
    a share of a row, and of 32 receivers of it; where more is kept, they read every weight. In
    masked-rows with a ``width`` it is a share of each group of so many receivers: N:M. The weights
    of a gradient are those of the model with receivers and senders exchanged: ``along`` senders.
    """

    kind: LayoutKind
    width: int = 1  # of a run of block-rows, or M
    room: float = 1.0
    along: Literal["receivers", "senders"] = "receivers"

    def __str__(self) -> str:
        return f"{self.kind} of {self.width}" if self.kind == "block-rows" else self.kind


DENSE_ROWS = Layout("dense-rows")


@dataclass(frozen=True)
class Schedule:
    """How a kernel is to be run: the strategy's name and, per Gather result, event or dense.

    The events of a restricted Gather are its wanted sums: "event" computes those alone, "dense"
    computes all and clears the others. ``layouts`` has the weights that are not in dense rows:
    "event" and "dense" alike then leave out weights that are zero.
    """

    strategy: str
    gathers: tuple[tuple[str, Literal["event", "dense"]], ...]
    tile: int = 0  # receivers per tile; 0 lets the strategy choose
    layouts: tuple[tuple[str, Layout], ...] = ()

    def layout_of(self, weight: str) -> Layout:
        return dict(self.layouts).get(weight, DENSE_ROWS)


GATHER_BLOCK = 256

# Sources from here on are wild. Below, a sum of products stays finite as long as the magnitudes of
# a receiver's weights add up to less than 2**64 (2**512), which no trained network comes near.
WILD: dict[DType, float] = {"float32": 2.0**63, "float64": 2.0**511}
