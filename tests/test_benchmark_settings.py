"""The overrides of benchmarks are settings that exist: a benchmark runs rarely, and rots unseen."""

import pytest

from benchmarks import mixed, recipes
from benchmarks.arms import compress, quality
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.pipeline.graph import build_graph

ARMS = {
    **{f"quality, {name}": (*quality.BASE, *overrides) for name, overrides in quality.ARMS.items()},
    **{f"recipes, {name}": (*recipes.BASE, *overrides) for name, overrides in recipes.ARMS.items()},
    "mixed": (*mixed.BASE, *(f"+experts.3.{setting}" for setting in mixed.SETTINGS["mixed, cosine"])),
    **{
        f"compress, {name}": (*compress.BASE, *size.network, *size.expert_training, *size.pretraining)
        for name, size in compress.ARCHITECTURES.items()
    },
}
"""Overrides by benchmark and arm."""


@pytest.mark.parametrize("name", ARMS)
def test_arm_is_a_pipeline(name):
    stages = {stage.name for stage in build_graph(parse_config(compose(ARMS[name])))}
    baselines = {word for words in ARMS[name] if words.startswith("baselines=") for word in words[11:-1].split(",")}
    assert {"score_sticky", *baselines} <= stages
