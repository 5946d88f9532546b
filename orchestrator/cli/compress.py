"""`ddm compress`: run chosen compression stages, or search for the mildest compression within a budget.

A budget is a list of bounds, such as `--budget "bytes<=0.25,kid<=1.05"`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ensemble.compression.config import DynamicInt8Config
from ensemble.compression.report import REPORT_FILE, CompressionReport, describe
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, change_config, parse_config
from orchestrator.config.stage_kinds import COMPRESSION_KINDS
from orchestrator.controller import run_pipeline
from orchestrator.errors import ConfigError, RunFailed
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage_configs import compression_configs
from orchestrator.planning.compression_bounds import least_ratios
from orchestrator.planning.plan import plan_run
from orchestrator.planning.tables import format_duration
from orchestrator.reporting.pareto import MEASURES, CompressionPoint, load_compression_points, pareto_table
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
"""Candidates of the search in this order: those without training first."""

BOUND = re.compile(r"\s*(\w+)\s*<=\s*([0-9.]+)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionBudget:
    """Upper bounds by measure, each as a ratio to the original ensemble."""

    bounds: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> "CompressionBudget":
        """Parse `measure<=number,…`; raises `ConfigError` with the known measures."""
        bounds = {}
        for part in text.split(","):
            match = BOUND.fullmatch(part)
            if match is None or match[1] not in MEASURES or match[2].count(".") > 1:
                raise ConfigError(
                    f"--budget takes bounds such as bytes<=0.25,kid<=1.05, with {', '.join(MEASURES)}, each as a ratio "
                    f"to the original ensemble (l2 is a distance to it); got {part!r}"
                )
            bounds[match[1]] = float(match[2])
        return cls(bounds=bounds)

    def violations(self, point: CompressionPoint) -> Iterator[str]:
        """Yield every bound that a compressed ensemble exceeds, with its value."""
        for measure, bound in self.bounds.items():
            value = getattr(point, measure)
            if value is None or value > bound:
                measured = "no measurement" if value is None else f"{value:.3f}"
                yield f"{measure} must be at most {bound:g}; got {measured}"


def plan_search(budget: CompressionBudget, run: RunFolder, config: RunConfig, console: Console) -> list[Sequence[str]]:
    """Print the candidates that the budget leaves, with their times, and return them; `ConfigError` if it leaves none.

    Times are those of `ddm plan`, which a calibration must have measured.
    """
    table, kept = Table(title="Candidates of the search, in this order"), []
    for heading in ("candidate", "would run", "time"):
        table.add_column(heading)
    least: dict[str, float] = {}
    for overrides in CANDIDATES:
        candidate = replace(with_compression(config, overrides), folder=str(run.root))
        bounds = least_ratios(candidate)
        least |= {measure: min(value, least.get(measure, value)) for measure, value in bounds.items()}
        if all(bounds.get(measure, 0.0) <= bound for measure, bound in budget.bounds.items()):
            plan = plan_run(candidate, run)
            stages = sum(row.state != "finished" for row in plan.stages)
            table.add_row(
                " ".join(overrides), f"{stages} stages", "–" if plan.seconds is None else format_duration(plan.seconds)
            )
            kept.append(overrides)
    if not kept:
        reach = ", ".join(f"{measure} {value:.3f}" for measure, value in least.items())
        raise ConfigError(f"no known compression can reach this budget, so nothing was run; the least are {reach}")
    console.print(table)
    return kept


def search_candidates(
    budget: CompressionBudget,
    compress: Callable[[Sequence[str]], CompressionPoint],
    on_result: Callable[[Sequence[str], CompressionPoint, list[str]], None],
    candidates: Sequence[Sequence[str]] = CANDIDATES,
) -> CompressionPoint:
    """Return the first candidate within the budget; call `on_result` for each candidate.

    `compress` raises `UnsuitableCompression` for candidates that do not fit the networks; these are skipped. Raises
    `ConfigError` if no candidate is within the budget.
    """
    tried: list[tuple[float, CompressionPoint]] = []
    for overrides in candidates:
        try:
            point = compress(overrides)
        except UnsuitableCompression:
            continue
        violations = list(budget.violations(point))
        on_result(overrides, point, violations)
        if not violations:
            return point
        tried.append((_excess(budget, point), point))
    if not tried:
        raise ConfigError("none of the known compressions fits this ensemble; choose stages instead of --budget")
    nearest = min(tried, key=lambda excess_and_point: excess_and_point[0])[1]
    raise ConfigError(
        f"none of the {len(tried)} tried compressions is within the budget; the nearest is {nearest.name}: "
        f"{'; '.join(budget.violations(nearest))}. Relax the budget, or choose stages: "
        "ddm compress RUN prune=… quantize=…"
    )


class UnsuitableCompression(Exception):  # noqa: N818 - names the reason
    """A compression does not fit this ensemble's networks."""


def _excess(budget: CompressionBudget, point: CompressionPoint) -> float:
    """Return the largest ratio of a value to its bound."""
    values = [(getattr(point, measure), bound) for measure, bound in budget.bounds.items()]
    return max(float("inf") if value is None else value / bound for value, bound in values)


def with_compression(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return the run's configuration with the compression stages of these overrides; nothing else changes."""
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in COMPRESSION_KINDS:
            raise ConfigError(
                f"compression overrides must belong to {', '.join(COMPRESSION_KINDS)}; got {override}; "
                "write for example quantize=int4_weight_only"
            )
    compressed = parse_config(compose([*overrides, f"seed={config.seed}"]))
    if not compression_configs(compressed):
        raise ConfigError("a compression needs at least one stage; write for example quantize=int8_weight_only")
    return change_config(config, {kind: getattr(compressed, kind) for kind in COMPRESSION_KINDS})


def start_from(run: RunFolder, config: RunConfig, ensemble: Path | None) -> RunConfig:
    """Return the configuration that compresses the ensemble in a folder, or the run's own without one."""
    from orchestrator.cli.membership import with_ensemble

    return replace(config, from_ensemble="") if ensemble is None else with_ensemble(run, config, ensemble)


def compress_run(run: RunFolder, config: RunConfig, console: Console) -> RunConfig:
    """Run the configuration with its compression stages, and print every compressed ensemble of the run."""
    config = replace(config, folder=str(run.root))
    if run_pipeline(config, console).stopped:
        raise RunFailed("stopped; run the same command to continue")
    console.print(pareto_table(load_compression_points(run, build_graph(config))))
    return config


def search_run(run: RunFolder, text: str, console: Console) -> RunConfig:
    """Return the configuration of the first compression within a budget; raises `ConfigError` if there is none.

    All tried compressions are kept as artifacts, so the next search reuses them.
    """
    budget, original, configs = CompressionBudget.parse(text), run.load_config(), {}
    candidates = plan_search(budget, run, original, console)

    def compress(overrides: Sequence[str]) -> CompressionPoint:
        config = replace(with_compression(original, overrides), folder=str(run.root))
        try:
            if run_pipeline(config, console).stopped:
                raise ConfigError("stopped; run the same command to continue")
        except RunFailed as error:
            raise UnsuitableCompression(str(error)) from error
        graph = build_graph(config)
        folder = run.artifact([stage for stage in graph if stage.kind in COMPRESSION_KINDS][-1])
        configs[folder] = config
        return next(point for point in load_compression_points(run, graph) if point.folder == folder)

    def print_result(overrides: Sequence[str], point: CompressionPoint, violations: list[str]) -> None:
        console.print(f"{' '.join(overrides)}: {'; '.join(violations) or 'within the budget'}", highlight=False)

    best = search_candidates(budget, compress, print_result, candidates)
    console.print(pareto_table(load_compression_points(run, build_graph(configs[best.folder]))))
    return configs[best.folder]


def describe_compression(run: RunFolder, config: RunConfig) -> str:
    """Return the result of each stage, the folder of the final ensemble, and a warning if this CPU lacks int8 math."""
    from experts.compressed.quantization.int8_linear import NO_INT8_INSTRUCTIONS, computes_in_int8

    stages = [stage for stage in build_graph(config) if stage.kind in COMPRESSION_KINDS]
    lines = [describe(CompressionReport.read(run.verify_file(stage, REPORT_FILE))) for stage in stages]
    folder = run.artifact(stages[-1])
    lines.append(f"ddm sample {run.root} --ensemble {folder}")
    if isinstance(config.quantize, DynamicInt8Config) and not computes_in_int8():
        lines.append(f"Warning: {NO_INT8_INSTRUCTIONS}")
    return "\n".join([str(folder), *(f"  {line}" for line in lines)])
