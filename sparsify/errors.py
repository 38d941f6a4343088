"""The two ways things go wrong: refusals (values, in the report) and errors (exceptions)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

RefusalCode = Literal[
    "no-gain",  # measured or predicted slower than what it would replace
    "no-event",  # the linear op reads a value without a threshold (tanh RNN, LSTM, GRU)
    "not-rolled",  # the time loop could not be rolled up
    "unsupported-op",  # an operation that the kernel IR does not have
    "unsupported-layout",  # shapes, dtypes or a connectivity that no strategy takes
    "random",  # random numbers are drawn inside the region
    "observed",  # a hook or monitor reads values inside the region
    "needs-grad",  # gradients were asked for
    "non-finite-weights",  # skipping zeros would change 0 * inf
    "backend-unavailable",  # no compiler, no driver
    "pinned",  # the user's plan says so
    "bug",  # sparsify itself failed; the message says how to report it
]
REFUSAL_CODES: tuple[str, ...] = get_args(RefusalCode)


@dataclass(frozen=True)
class Location:
    """A place in the user's source: ``model.py:41  z = self.fc(s)``."""

    file: str
    line: int
    code: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.code}".rstrip()


@dataclass(frozen=True)
class Refusal:
    """Why something was left as it is. Returned by questions named ``why_not``, never raised.

    ``reason`` says what was found, ``remedy`` what the user can do; both are full sentences.
    ``facts`` holds the figures behind the reason, for programs.
    """

    code: RefusalCode
    reason: str
    remedy: str = ""
    location: Location | None = None
    facts: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        where = f"{self.location}: " if self.location else ""
        return f"{where}[{self.code}] {self.reason} {self.remedy}".rstrip()


class SparsifyError(Exception):
    """Base of every exception that sparsify raises on purpose."""


class TraceError(SparsifyError):
    """The model does something that cannot be recorded soundly; names the user's line.

    ``may_settle`` says that only a first call may do it, such as filling a cache.
    """

    def __init__(
        self, message: str, location: Location | None = None, may_settle: bool = False
    ) -> None:
        super().__init__(f"{location}: {message}" if location else message)
        self.location = location
        self.may_settle = may_settle


class RefusedError(SparsifyError):
    """``strict=True`` was given and something was refused."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class PlanError(SparsifyError, ValueError):
    """A plan that does not fit the model."""


class PruningError(SparsifyError, ValueError):
    """A model cannot be pruned as it was asked for; names the layer and what to do."""


class CompileError(SparsifyError):
    """A bug of sparsify: the compiler rejected generated code, or a pass failed.

    ``log`` is the compiler's, or the traceback; ``source_path`` is the generated source, or the
    line of sparsify that failed.
    """

    def __init__(self, message: str, log: str, source_path: str) -> None:
        super().__init__(f"{message}\nsource: {source_path}\n{log}")
        self.log = log
        self.source_path = source_path


class KernelFault(SparsifyError):
    """A bug of sparsify: a CUDA kernel did what it must not, or could not be launched.

    ``kernel`` names it and what of the model it computes, ``reports`` say what was found, in a
    sentence each.
    """

    def __init__(self, kernel: str, reports: Sequence[str]) -> None:
        super().__init__("\n".join((f"kernel {kernel!r} failed:", *reports)))
        self.kernel = kernel
        self.reports = tuple(reports)


class NothingCompiled(SparsifyError, AttributeError, RuntimeError):
    """What a call makes was asked for before one; an AttributeError, so that ``hasattr`` is False.

    It says what to do.
    """


class BackendUnavailable(SparsifyError):
    """A backend was asked for by name and cannot run here; says what to install."""


class MismatchError(SparsifyError):
    """Verification found a value that rounding cannot explain.

    ``facts`` has what the message says, for programs: of a wrong value ``check``, ``region``,
    ``output``, ``step``, ``index``, ``value``, ``expected``, ``bound``, ``distance``.
    """

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts
