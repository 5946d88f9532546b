"""`ddm compress RUN --budget "bytes<=0.25,kid<=1.05"`: try compressions, the gentlest first, until one keeps to it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from ensemble.compression.config import DynamicInt8Config
from ensemble.compression.measurement import REPORT_FILE, CompressionReport, describe
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import ConfigError, RunFailed
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage_configs import COMPRESSION_KINDS, compression_configs
from orchestrator.reporting.pareto import MEASURES, CompressionPoint, compression_points, pareto_table
from orchestrator.run.run_folder import RunFolder

CANDIDATES: Sequence[Sequence[str]] = (
    ("quantize=int8_weight_only",),
    ("quantize=int8_dynamic",),
    ("accelerate=cache",),
    ("accelerate=cache", "quantize=int8_dynamic"),
    ("quantize=int4_weight_only",),
    ("quantize=int4_dynamic",),
    ("quantize=shared_base",),
    ("quantize=svdquant",),
    ("quantize=mixed_precision", "quantize.mean_bits=3.5"),
    ("prune=ecodiff",),
    ("prune=ecodiff", "quantize=int4_dynamic"),
    ("prune=laptop", "prune.ratio=0.3", "quantize=int8_dynamic"),
    ("prune=laptop", "prune.ratio=0.3", "quantize=int4_dynamic"),
    ("prune=laptop", "prune.ratio=0.5", "quantize=int4_dynamic"),
    ("prune=laptop", "prune.ratio=0.3", "quantize=int4_weight_only"),
    ("prune=laptop", "prune.ratio=0.5", "quantize=int4_weight_only"),
    ("distill=sid", "distill.steps=4"),
    ("distill=sid", "distill.steps=1", "accelerate=refine"),
    ("distill=sid", "distill.steps=1", "accelerate=refine", "quantize=int8_dynamic"),
    ("distill=sid", "distill.steps=2", "quantize=int8_dynamic"),
    ("distill=sid", "distill.steps=2", "prune=laptop", "prune.ratio=0.3", "quantize=int4_dynamic"),
)
"""What is tried, in this order: what needs no training first."""

BOUND = re.compile(r"\s*(\w+)\s*<=\s*([0-9.]+)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionBudget:
    """Upper bounds by measure."""

    bounds: Mapping[str, float]

    @classmethod
    def parsed(cls, text: str) -> "CompressionBudget":
        """From `measure<=number,…`; raises `ConfigError` with the known measures."""
        bounds = {}
        for part in text.split(","):
            found = BOUND.fullmatch(part)
            if found is None or found[1] not in MEASURES or found[2].count(".") > 1:
                raise ConfigError(
                    f"--budget takes bounds such as bytes<=0.25,kid<=1.05, with {', '.join(MEASURES)}, each as a ratio "
                    f"to the whole ensemble (l2 is a distance to it); given: {part!r}"
                )
            bounds[found[1]] = float(found[2])
        return cls(bounds=bounds)

    def broken(self, point: CompressionPoint) -> Iterator[str]:
        """Every bound that a compressed ensemble does not keep, with what it has."""
        for measure, bound in self.bounds.items():
            value = getattr(point, measure)
            if value is None or value > bound:
                yield f"{measure} is {'not measured' if value is None else f'{value:.3f}'}, at most {bound:g} was asked"


def search(
    budget: CompressionBudget,
    make: Callable[[Sequence[str]], CompressionPoint],
    say: Callable[[Sequence[str], CompressionPoint, list[str]], None],
) -> CompressionPoint:
    """The first candidate within the budget; `say` hears of each that was tried.

    A candidate that these networks cannot be given is left out by `make`, which raises `Unsuitable` for it. Raises
    `ConfigError` if none is within.
    """
    tried: list[tuple[float, CompressionPoint]] = []
    for overrides in CANDIDATES:
        try:
            point = make(overrides)
        except UnsuitableCompression:
            continue
        broken = list(budget.broken(point))
        say(overrides, point, broken)
        if not broken:
            return point
        tried.append((_excess(budget, point), point))
    if not tried:
        raise ConfigError("none of the known compressions can be given to this ensemble")
    nearest = min(tried, key=lambda one: one[0])[1]
    raise ConfigError(
        f"none of the {len(tried)} compressions that were tried is within the budget; the nearest is {nearest.name}: "
        f"{'; '.join(budget.broken(nearest))}. Ask for less, or try your own: ddm compress RUN prune=… quantize=…"
    )


class UnsuitableCompression(Exception):  # noqa: N818 - says what it is
    """A compression does not fit this ensemble's networks."""


def _excess(budget: CompressionBudget, point: CompressionPoint) -> float:
    """How far the worst bound is missed, as a ratio."""
    values = [(getattr(point, measure), bound) for measure, bound in budget.bounds.items()]
    return max(float("inf") if value is None else value / bound for value, bound in values)


def with_compression(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run's configuration with the stages of these overrides, and nothing else of it changed."""
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in COMPRESSION_KINDS:
            raise ConfigError(
                f"{override}: a compression consists of {', '.join(COMPRESSION_KINDS)}, such as quantize=int4_weight_only; nothing else of a "
                "finished run changes"
            )
    asked = parse_config(compose([*overrides, f"seed={config.seed}"]))
    if not compression_configs(asked):
        raise ConfigError("no stage is named, so nothing would be compressed; try quantize=int8_weight_only")
    return replace(config, **{kind: getattr(asked, kind) for kind in COMPRESSION_KINDS})


def compress_run(run: RunFolder, config: RunConfig, console: Console) -> RunConfig:
    """Bring the run with these stages to its end, and show every compressed ensemble that it has."""
    config = replace(config, folder=str(run.root))
    if run_pipeline(config, console).stopped:
        raise RunFailed("stopped; the same command goes on from there")
    console.print(pareto_table(compression_points(run, build_graph(config))))
    return config


def search_run(run: RunFolder, text: str, console: Console) -> RunConfig:
    """The configuration of the first compression within a budget; raises `ConfigError` if there is none.

    Everything that was tried is kept, and found again by the next search.
    """
    budget, whole, configs = CompressionBudget.parsed(text), run.load_config(), {}

    def make(overrides: Sequence[str]) -> CompressionPoint:
        config = replace(with_compression(whole, overrides), folder=str(run.root))
        try:
            if run_pipeline(config, console).stopped:
                raise ConfigError("stopped; the same command goes on from there")
        except RunFailed as error:
            raise UnsuitableCompression(str(error)) from error
        graph = build_graph(config)
        folder = run.artifact([stage for stage in graph if stage.kind in COMPRESSION_KINDS][-1])
        configs[folder] = config
        return next(point for point in compression_points(run, graph) if point.folder == folder)

    def say(overrides: Sequence[str], point: CompressionPoint, broken: list[str]) -> None:
        console.print(f"{' '.join(overrides)}: {'; '.join(broken) or 'within the budget'}", highlight=False)

    found = search(budget, make, say)
    console.print(pareto_table(compression_points(run, build_graph(configs[found.folder]))))
    return configs[found.folder]


def describe_compression(run: RunFolder, config: RunConfig) -> str:
    """What each stage did, where the smallest ensemble is, and whether this processor can make use of it."""
    from experts.compressed.quantization.int8_linear import NO_INSTRUCTIONS, computes_in_int8

    stages = [stage for stage in build_graph(config) if stage.kind in COMPRESSION_KINDS]
    lines = [describe(CompressionReport.read(run.checked(stage, REPORT_FILE))) for stage in stages]
    folder = run.artifact(stages[-1])
    lines.append(f"ddm sample {run.root} --ensemble {folder}")
    if isinstance(config.quantize, DynamicInt8Config) and not computes_in_int8():
        lines.append(f"Warning: {NO_INSTRUCTIONS}")
    return "\n".join([str(folder), *(f"  {line}" for line in lines)])
