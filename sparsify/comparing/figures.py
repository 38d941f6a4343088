"""What verification found, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sparsify.errors import Location


@dataclass(frozen=True)
class OutputFigures:
    """One result of a region over all steps, each started from the reference's states.

    ``worst_share`` is the largest distance to float64 as a share of its bound, ``distance`` and
    ``eager_distance`` the largest distances themselves (maximum norm) of kernel and eager torch.
    ``rate`` and ``eager_rate`` are the shares of non-zeros when both run freely.
    """

    name: str
    location: Location | None
    event: bool
    values: int
    worst_share: float
    distance: float
    eager_distance: float
    rate: float | None = None
    eager_rate: float | None = None


@dataclass(frozen=True)
class RegionFigures:
    """``undecided`` of ``thresholds`` comparisons were too close to their threshold to judge."""

    name: str
    location: Location | None
    steps: int
    thresholds: int
    undecided: int
    outputs: tuple[OutputFigures, ...]
    without_bound: frozenset[str] = frozenset()
    launched: bool = True

    @property
    def excluded(self) -> float:
        return self.undecided / self.thresholds if self.thresholds else 0.0


@dataclass(frozen=True)
class StageFigures:
    """``stage`` compared with ``reference``: equal bits, or within the bound in float64.

    ``worst_share`` is the largest distance as a share of its bound, None where bits were compared;
    ``largest_bound`` the largest bound as a share of an output's largest value.
    """

    stage: str
    reference: str
    values: int
    worst_share: float | None = None
    undecided: int = 0
    largest_bound: float = 0.0


@dataclass(frozen=True)
class ResultFigures:
    """A tensor that the model returns, both running freely."""

    name: str
    values: int
    equal: float
    distance: float
    rate: float
    eager_rate: float


@dataclass(frozen=True)
class GradientFigures:
    """The gradient of an operand of a region, from the same saved values: 2-norms.

    ``distance`` is that of kernels to float64, ``eager_distance`` that of torch's operations.
    """

    region: str
    operand: str
    values: int
    norm: float
    distance: float
    eager_distance: float


@dataclass(frozen=True, repr=False)
class Verification:
    """The figures of a verification that found nothing wrong; prints as a table.

    ``kept`` says why nothing is replaced, where that is so: the call runs the original operations,
    and there are no kernels to check. ``gradients_kept`` says the same of a call with gradients.
    """

    events: int
    sites: int
    stages: tuple[StageFigures, ...]
    regions: tuple[RegionFigures, ...]
    results: tuple[ResultFigures, ...]
    metric: Mapping[str, float] = field(default_factory=dict)
    gradients: tuple[GradientFigures, ...] = ()
    backend: str = "cpp"
    kept: tuple[str, ...] = ()
    gradients_kept: tuple[str, ...] = ()

    @property
    def is_replaced(self) -> bool:
        """Whether kernels run in a call without gradients."""
        return not self.kept

    @property
    def thresholds(self) -> int:
        return sum(region.thresholds for region in self.regions)

    @property
    def undecided(self) -> int:
        return sum(region.undecided for region in self.regions)

    @property
    def excluded(self) -> float:
        return self.undecided / self.thresholds if self.thresholds else 0.0

    def __repr__(self) -> str:
        """The table: what an interactive session shows."""
        return str(self)

    def __str__(self) -> str:
        head = f"verified: {self.events} of {self.sites} sites run as events"
        if self.kept:
            lines = [f"{head}: nothing is replaced", *_indented(self.kept)]
        else:
            lines = [f"{head}, kernels of the backend {self.backend}"]
        lines += ["", "stages on the same input", *map(_stage_line, self.stages)]
        for region in self.regions:
            lines += ["", *region_lines(region)]
        ran = "the original's operations" if self.kept else "kernels"
        lines += ["", f"free-running, {ran} against eager torch", *map(_result_line, self.results)]
        if self.gradients:
            lines += ["", "gradients, distance to float64 (2-norm)"]
            lines += map(_gradient_line, self.gradients)
        if self.gradients_kept:
            told = _indented(self.gradients_kept)
            lines += ["", "nothing is replaced in calls with gradients", *told]
        if self.metric:
            kernels, eager = self.metric["sparsified"], self.metric["eager"]
            lines.append(f"  metric                        {kernels:.6g}, eager {eager:.6g}")
        return "\n".join(lines)


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def region_lines(region: RegionFigures) -> list[str]:
    head = f"{region.name}, {region.steps} steps, each from eager's states"
    if region.location is not None:
        head += f"   {region.location}"
    decided = region.thresholds - region.undecided
    lines = [
        head,
        f"  {decided:,} of {region.thresholds:,} threshold decisions equal, "
        f"{region.undecided:,} undecided ({region.excluded:.1e})",
    ]
    lines += [_output_line(output) for output in region.outputs]
    if region.without_bound:
        names = ", ".join(sorted(region.without_bound))
        lines.append(f"  no bound is known for {names}: compared with eager's distance to float64")
    return lines


def _output_line(output: OutputFigures) -> str:
    kind = "events" if output.event else "values"
    line = f"  {output.name:<26} {output.values:>12,} {kind}  "
    if output.event:
        rates = f"rate {_rate(output.rate)}, eager {_rate(output.eager_rate)}"
        return line + rates
    return line + (
        f"at most {output.worst_share:.3f} of the bound; distance to float64 "
        f"{output.distance:.1e}, eager {output.eager_distance:.1e}"
    )


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.4f}"


def _stage_line(stage: StageFigures) -> str:
    if stage.worst_share is None:
        how = "equal bits"
    else:
        how = f"float64: at most {stage.worst_share:.3f} of a bound of {stage.largest_bound:.1e}"
        how += f", {stage.undecided:,} undecided" if stage.undecided else ""
    return f"  {stage.stage:<26} {stage.values:>12,} values  {how}, against {stage.reference}"


def _gradient_line(figures: GradientFigures) -> str:
    return (
        f"  {figures.operand:<26} {figures.values:>12,} values  {figures.distance:.1e}, eager "
        f"{figures.eager_distance:.1e}, norm {figures.norm:.1e}   {figures.region}"
    )


def _result_line(result: ResultFigures) -> str:
    return (
        f"  {result.name:<26} {result.values:>12,} values  {result.equal:.2%} equal, "
        f"distance at most {result.distance:.1e}; rate {result.rate:.4f}, "
        f"eager {result.eager_rate:.4f}"
    )
