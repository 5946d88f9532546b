"""`ddm compress`: the configuration of a finished run with the stages that make its ensemble smaller."""

from collections.abc import Sequence
from dataclasses import replace

from artifacts import read_json
from ensemble.stages.comparison import Comparison
from ensemble.stages.quantize import COMPRESSION, describe
from orchestrator.compose import compose
from orchestrator.config import RunConfig, parse_config
from orchestrator.errors import ConfigError
from orchestrator.graph import build_graph
from orchestrator.run_folder import RunFolder

STAGES = ("quantize",)
"""Groups of the configuration that a compression consists of."""


def with_compression(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run's configuration with the stages of these overrides, and nothing else of it changed."""
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in STAGES:
            raise ConfigError(
                f"{override}: a compression consists of {', '.join(STAGES)}, such as quantize=int4; nothing else of a "
                "finished run changes"
            )
    asked = parse_config(compose(overrides))
    if asked.quantize is None:
        raise ConfigError("no stage is named, so nothing would be compressed; try quantize=int8")
    return replace(config, quantize=asked.quantize)


def describe_compression(run: RunFolder, config: RunConfig) -> str:
    """What the stages did, and where the smaller ensemble is."""
    stage = next(stage for stage in build_graph(config) if stage.kind == "quantize")
    found = Comparison(**read_json(run.checked(stage, COMPRESSION)))
    folder = run.artifact(stage)
    return f"{folder}\n  {describe(found)}\n  ddm sample {run.root} --ensemble {folder}"
