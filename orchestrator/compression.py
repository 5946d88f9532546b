"""`ddm compress`: the configuration of a finished run with the stages that make its ensemble smaller."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from ensemble.stages.comparison import COMPRESSION, Comparison, describe
from ensemble.stages.config import ComputeConfig
from orchestrator.budget import Budget, Unsuitable, search
from orchestrator.compose import compose
from orchestrator.config import RunConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import ConfigError, RunFailed
from orchestrator.graph import build_graph
from orchestrator.pareto import Point, pareto_table, points_of
from orchestrator.recipes import SMALLER, recipes_of
from orchestrator.run_folder import RunFolder


def with_compression(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run's configuration with the stages of these overrides, and nothing else of it changed."""
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in SMALLER:
            raise ConfigError(
                f"{override}: a compression consists of {', '.join(SMALLER)}, such as quantize=int4; nothing else of a "
                "finished run changes"
            )
    asked = parse_config(compose([*overrides, f"seed={config.seed}"]))
    if not recipes_of(asked):
        raise ConfigError("no stage is named, so nothing would be compressed; try quantize=int8")
    return replace(config, **{kind: getattr(asked, kind) for kind in SMALLER})


def compress_run(run: RunFolder, config: RunConfig, console: Console) -> RunConfig:
    """Bring the run with these stages to its end, and show every compressed ensemble that it has."""
    config = replace(config, folder=str(run.root))
    if run_pipeline(config, console).stopped:
        raise RunFailed("stopped; the same command goes on from there")
    console.print(pareto_table(points_of(run, build_graph(config))))
    return config


def search_run(run: RunFolder, text: str, console: Console) -> RunConfig:
    """The configuration of the first compression within a budget; raises `ConfigError` if there is none.

    Everything that was tried is kept, and found again by the next search.
    """
    budget, whole, configs = Budget.parsed(text), run.load_config(), {}

    def make(overrides: Sequence[str]) -> Point:
        config = replace(with_compression(whole, overrides), folder=str(run.root))
        try:
            if run_pipeline(config, console).stopped:
                raise ConfigError("stopped; the same command goes on from there")
        except RunFailed as error:
            raise Unsuitable(str(error)) from error
        graph = build_graph(config)
        folder = run.artifact([stage for stage in graph if stage.kind in SMALLER][-1])
        configs[folder] = config
        return next(point for point in points_of(run, graph) if point.folder == folder)

    def say(overrides: Sequence[str], point: Point, broken: list[str]) -> None:
        console.print(f"{' '.join(overrides)}: {'; '.join(broken) or 'within the budget'}", highlight=False)

    found = search(budget, make, say)
    console.print(pareto_table(points_of(run, build_graph(configs[found.folder]))))
    return configs[found.folder]


def describe_compression(run: RunFolder, config: RunConfig) -> str:
    """What each stage did, where the smallest ensemble is, and whether this processor can make use of it."""
    from experts.int8_linear import NO_INSTRUCTIONS, computes_in_int8

    stages = [stage for stage in build_graph(config) if stage.kind in SMALLER]
    lines = [describe(Comparison.read(run.checked(stage, COMPRESSION))) for stage in stages]
    folder = run.artifact(stages[-1])
    lines.append(f"ddm sample {run.root} --ensemble {folder}")
    if isinstance(config.quantize, ComputeConfig) and not computes_in_int8():
        lines.append(f"Warning: {NO_INSTRUCTIONS}")
    return "\n".join([str(folder), *(f"  {line}" for line in lines)])
