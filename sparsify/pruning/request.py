"""What is to be pruned, and how: one frozen value."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from torch import Tensor, nn

NAMED_CRITERIA = ("magnitude", "movement", "gradient", "event-weighted")
N_OF_M = re.compile(r"([1-9]\d*):([1-9]\d*)")
BLOCK = re.compile(r"([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True)
class Context:
    """What a criterion may look at beside the weight ``[R, S]``.

    ``kept`` says which weights are not pruned yet. ``gradient`` is that of the weight, None where
    there is none. ``activity`` ``[S]`` is the measured share of time that each sender is active,
    None where no example was given.
    """

    kept: Tensor
    gradient: Tensor | None = None
    activity: Tensor | None = None


Criterion = Callable[[str, Tensor, Context], Tensor]


@dataclass(frozen=True)
class Pruning:
    """Which weights become zero.

    fraction: share of the weights that are pruned, counted over all of them together (the smallest
        scores of the whole model go first); or by glob of layers' names, such as
        ``{"recur": 0.95, "rnn.weight_hh_*": 0.9}``: the first one that fits a layer counts, each
        has its weights together, and what fits none stays. None for N:M, which says it itself.
    pattern: "unstructured"; "N:M", such as "2:4", of which N weights of every M are kept; or blocks
        of receivers x senders, such as "16x1", kept or pruned as a whole.
    along: what the M weights of an N:M group are: consecutive "receivers" of one sender, which is
        what event kernels gain from (an active sender walks its outgoing weights), or consecutive
        "senders" of one receiver, the direction of torch's semi-structured tensors, from which
        event kernels gain no more than from the same share of zeros anywhere.
    criterion: what is kept has the largest "magnitude"; "movement", away from zero while it was
        trained (Sanh et al. 2020); "gradient" times weight; "event-weighted" magnitude, which is
        multiplied by the measured activity of the sender: what seldom fires matters little. Or a
        function of the layer's name, its weight ``[R, S]`` and a ``Context`` that returns scores.
    only, except_: globs of layers, or of paths of parameters. Without ``only`` the weights of
        linear and recurrent layers (``nn.Linear``, ``nn.RNN``, ``nn.GRU``, ``nn.LSTM`` and their
        cells) are pruned. A matrix that is a parameter of your own module has to be named by its
        path, and its rows are taken as receivers, as in ``F.linear``.
    begin, end, every: of gradual pruning: the steps of training from which and to which the
        fraction grows, by a cubic schedule (Zhu and Gupta 2017), and how many lie between updates.
        These and ``regrow`` are for a ``Pruner``: ``prune=`` refuses what takes training.
    regrow: share of the kept weights that every update exchanges for pruned ones with large
        gradients, falling to zero by a cosine until ``end`` (RigL, Evci et al. 2020).
    loss: a function without arguments that returns the loss on a typical batch; what needs
        gradients of pruned weights, or any before training, calls it. It has to call the model that
        is pruned: the one given to a ``Pruner``, or with ``in_place``.
    evaluate: a function of the model that returns its accuracy, or another number that is better
        when it is larger.
    most_loss: when accuracy has fallen by more than this, pruning goes back to what it was before
        and stops there.
    in_place: prune the model itself in place of a copy.
    """

    fraction: float | Mapping[str, float] | None = None
    pattern: str = "unstructured"
    along: Literal["receivers", "senders"] = "receivers"
    criterion: str | Criterion = "magnitude"
    only: str | tuple[str, ...] = ()
    except_: str | tuple[str, ...] = ()
    begin: int = 0
    end: int = 0
    every: int = 100
    regrow: float = 0.0
    loss: Callable[[], Tensor] | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    most_loss: float | None = None
    in_place: bool = False

    @staticmethod
    def of(given: Pruning | float | str | Mapping[str, float]) -> Pruning:
        """``given`` itself, or the Pruning of a fraction or a pattern."""
        if isinstance(given, Pruning):
            return given
        if isinstance(given, str):
            return Pruning(pattern=given)
        return Pruning(given)

    def __post_init__(self) -> None:
        if self.n_of_m is None and self.block is None:
            known = "'unstructured', 'N:M' as in '2:4', blocks as in '16x1'"
            raise ValueError(f"unknown pattern {self.pattern!r}; known: {known}")
        if (self.fraction is None) != (self.n_of_m is not None):
            wanted = "leave fraction out" if self.n_of_m else "say which fraction to prune"
            raise ValueError(f"pattern={self.pattern!r} with fraction={self.fraction}: {wanted}")
        _check_fraction(self.fraction)
        if self.n_of_m is not None and not 0 < self.n_of_m[0] < self.n_of_m[1]:
            raise ValueError(f"pattern={self.pattern!r} prunes nothing: N must be smaller than M")
        if self.along not in ("receivers", "senders"):
            raise ValueError(f"along={self.along!r}: give 'receivers' or 'senders'")
        if isinstance(self.criterion, str) and self.criterion not in NAMED_CRITERIA:
            known = ", ".join(map(repr, NAMED_CRITERIA))
            raise ValueError(f"unknown criterion {self.criterion!r}; known: {known}, or a function")
        ends_early = self.end != 0 and self.end < self.begin  # without an end, all at begin
        if self.begin < 0 or ends_early or self.every < 1:
            raise ValueError(
                f"steps from {self.begin} to {self.end}, every {self.every}: begin is 0 or more, "
                "end is not before it, every is 1 or more"
            )
        if not 0 <= self.regrow < 1 or (self.regrow and self.pattern != "unstructured"):
            raise ValueError(
                f"regrow={self.regrow} with pattern={self.pattern!r}: single weights can be "
                "exchanged, and fewer than all of them"
            )
        if self.regrow and self.loss is None:
            raise ValueError("regrow needs gradients of pruned weights: give loss=")
        if self.most_loss is not None and (self.evaluate is None or self.most_loss < 0):
            raise ValueError(f"most_loss={self.most_loss} needs evaluate=, and is not negative")

    @property
    def fractions(self) -> dict[str, float]:
        """By glob; one for all where there is no choice."""
        if self.fraction is None or not isinstance(self.fraction, Mapping):
            return {"*": 0.0 if self.fraction is None else float(self.fraction)}
        return {glob: float(fraction) for glob, fraction in self.fraction.items()}

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        found = N_OF_M.fullmatch(self.pattern)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def block(self) -> tuple[int, int] | None:
        """Receivers and senders of what is kept or pruned as a whole; None for N:M."""
        if self.pattern == "unstructured":
            return 1, 1
        found = BLOCK.fullmatch(self.pattern)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def criterion_name(self) -> str:
        if isinstance(self.criterion, str):
            return self.criterion
        named: Any = self.criterion
        return str(getattr(named, "__name__", type(named).__name__))

    def progress(self, step: int) -> float:
        """How much of the pruning is to be done at ``step``: 0 before ``begin``, 1 from ``end``."""
        if step >= max(self.begin, self.end):
            return 1.0
        if step < self.begin:
            return 0.0
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return 1 - left**3

    def is_update(self, step: int) -> bool:
        """True if masks change at ``step``."""
        if step == max(self.begin, self.end):
            return True
        return self.begin <= step < self.end and (step - self.begin) % self.every == 0


def _check_fraction(given: object) -> None:
    """Raises ValueError unless ``given`` is a share, shares by glob, or None."""
    shares: Any = given.values() if isinstance(given, Mapping) else (given,)
    for share in shares if given is not None else ():
        is_number = isinstance(share, Real) and not isinstance(share, bool)
        if not is_number or not 0 <= float(share) <= 1:
            raise ValueError(
                f"a fraction of {share!r}: give a number from 0 to 1, or numbers by the names of "
                "layers"
            )
