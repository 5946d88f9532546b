"""The plan's bounds of disk hold for the folders of a finished run."""

from ddm_core.artifacts import list_files
from orchestrator.pipeline.graph import build_graph
from orchestrator.planning.checks.data_sizes import measure_data
from orchestrator.run.run_folder import RunFolder
from tests.laws.conftest import tiny_config

FIXED = 2**19
"""Bytes of records, extractors and tables that do not grow with the images."""


def test_stages_take_no_more_disk_than_planned(tiny_run):
    config, run = tiny_config(tiny_run), RunFolder(tiny_run)
    artifacts = {stage.name: run.artifact(stage) for stage in build_graph(config)}
    for size in measure_data(config)[:-1]:
        taken = sum(path.stat().st_size for path in list_files(artifacts[size.kind]))
        assert taken <= 2 * 160 * size.image_bytes + FIXED, size.kind


def test_a_fit_of_components_is_counted(tiny_run):
    config = tiny_config(tiny_run)
    sizes = {size.kind: size.memory_bytes for size in measure_data(config)}
    matrix = 8 * (config.data.image_size**2 * config.data.channels) ** 2
    assert sizes["features"] >= 4 * matrix and sizes["codec"] >= 4 * matrix
