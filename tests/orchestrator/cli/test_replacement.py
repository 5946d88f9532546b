"""A finished run is not replaced by other settings unless the user says so, and then its ensemble is still found."""

from dataclasses import replace

import pytest

from data_partition.config import PartitionConfig
from ddm_core.artifacts import publish
from orchestrator.cli.replacement import check_replacement, list_differences
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.pipeline.graph import build_graph
from orchestrator.reporting.results import find_pipeline
from orchestrator.run.run_folder import RunFolder

OTHER = PartitionConfig(seed=1)


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def config_of(run, **settings) -> RunConfig:
    return RunConfig(folder=str(run.root), **settings)


def finish_ensemble(run, config):
    """Save the configuration and publish an ensemble for it."""
    run.save_config(config)
    stage = next(stage for stage in build_graph(config) if stage.name == "ensemble")
    publish(run.artifact(stage), lambda folder: write_index(folder), stage="ensemble", config={}, inputs={})
    return run.artifact(stage)


def write_index(folder) -> float:
    (folder / "model_index.json").write_text("{}")
    return 0.0


def test_new_folder_and_same_settings_are_accepted(run):
    check_replacement(run, config_of(run), replace=False)
    finish_ensemble(run, config_of(run))
    check_replacement(run, config_of(run), replace=False)


def test_other_settings_are_refused_with_the_difference(run):
    finish_ensemble(run, config_of(run))
    before = run.config_file.read_bytes()
    with pytest.raises(ConfigError, match=r"partition.seed: 0 -> 1(.|\n)*--replace"):
        check_replacement(run, config_of(run, partition=OTHER), replace=False)
    assert run.config_file.read_bytes() == before


def test_unfinished_run_takes_other_settings(run):
    run.save_config(config_of(run))
    check_replacement(run, config_of(run, partition=OTHER), replace=False)


def test_settings_with_the_same_ensemble_are_accepted(run):
    config = config_of(run)
    finish_ensemble(run, config)
    more_scores = replace(config, scores=replace(config.scores, num_samples=17))
    check_replacement(run, more_scores, replace=False)


def test_replaced_run_is_archived_and_still_sampled(run):
    first = finish_ensemble(run, config_of(run))
    check_replacement(run, config_of(run, partition=OTHER), replace=True)
    run.save_config(config_of(run, partition=OTHER))
    assert run.load_config().partition.seed == 1
    assert run.load_config(run.archived_configs()[0]).partition.seed == 0
    assert find_pipeline(run, monolith=False) == first
    second = finish_ensemble(run, config_of(run, partition=OTHER))
    assert find_pipeline(run, monolith=False) == second != first


def test_run_without_an_ensemble_is_named(run):
    run.save_config(config_of(run))
    with pytest.raises(RunFolderError, match="no finished ensemble"):
        find_pipeline(run, monolith=False)


def test_differences_name_nested_keys():
    old, new = {"a": 1, "b": {"c": 2, "d": 3}, "folder": "x"}, {"a": 1, "b": {"c": 4, "d": 3}, "e": 5, "folder": "y"}
    assert list(list_differences(old, new)) == ["b.c: 2 -> 4", "e: None -> 5"]
