"""`ddm compress`: the configuration of a finished run with the stages that make its ensemble smaller."""

from collections.abc import Sequence
from dataclasses import replace

from ensemble.stages.comparison import COMPRESSION, Comparison, describe
from orchestrator.compose import compose
from orchestrator.config import RunConfig, parse_config
from orchestrator.errors import ConfigError
from orchestrator.graph import build_graph
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
    asked = parse_config(compose(overrides))
    if not recipes_of(asked):
        raise ConfigError("no stage is named, so nothing would be compressed; try quantize=int8")
    return replace(config, prune=asked.prune, quantize=asked.quantize, switch=asked.switch)


def describe_compression(run: RunFolder, config: RunConfig) -> str:
    """What each stage did, and where the smallest ensemble is."""
    stages = [stage for stage in build_graph(config) if stage.kind in SMALLER]
    lines = [describe(Comparison.read(run.checked(stage, COMPRESSION))) for stage in stages]
    folder = run.artifact(stages[-1])
    return "\n".join([str(folder), *(f"  {line}" for line in lines), f"  ddm sample {run.root} --ensemble {folder}"])
