"""Weight-only quantization of an ensemble: smaller, close to the original, which stays unchanged."""

from dataclasses import replace

import pytest

from ddm_core.artifacts import Preempted, Workspace, list_files, read_json
from ddm_core.files.checksums import checksum
from ensemble.compression.config import CompressionConfig, DynamicInt8Config, WeightOnlyConfig
from ensemble.compression.method import StageError
from ensemble.compression.quantization.weight_only import quantize_weights
from ensemble.compression.report import REPORT_FILE
from ensemble.compression.run import DATA_FREE_METHODS, run_stage
from ensemble.config import SamplingConfig
from ensemble.pipeline import EnsemblePipeline
from router.config import SelectionConfig
from tests.ensemble.test_pipeline import parts, put_together

__all__ = ["parts"]
SAMPLING = SamplingConfig(steps=3, selection=SelectionConfig(name="full"))


def stage(kind=WeightOnlyConfig, **settings) -> CompressionConfig:
    method = kind(**({"group_size": 8, "min_elements": 64} | settings))
    return CompressionConfig(method=method, sampling=SAMPLING, labelled=False, num_samples=8)


def quantize(config, original, out, workspace):
    run_stage(config, original, original, [], out, workspace)


@pytest.fixture
def original(parts, tmp_path):
    put_together(parts).save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def contents(folder):
    return {str(file.relative_to(folder)): checksum(file) for file in list_files(folder)}


def test_fewer_bits_take_fewer_bytes_and_raise_the_distance(original, tmp_path):
    before, reports = contents(original), {}
    for bits in (8, 4):
        quantize(stage(bits=bits), original, tmp_path / f"{bits}", Workspace.at(tmp_path / "work"))
        reports[bits] = read_json(tmp_path / f"{bits}" / REPORT_FILE)
    assert contents(original) == before
    assert (
        reports[4]["bytes_after"] < reports[8]["bytes_after"] < reports[8]["bytes_before"] == reports[4]["bytes_before"]
    )
    assert 0 < reports[8]["relative_l2"] < reports[4]["relative_l2"] < 1


def test_the_reported_distance_is_that_of_the_samples(original, tmp_path):
    quantize(stage(bits=4), original, tmp_path / "small", Workspace.at(tmp_path / "work"))
    images = [
        EnsemblePipeline.from_pretrained(path)(range(8), SAMPLING).images for path in (original, tmp_path / "small")
    ]
    distance = (images[1] - images[0]).double().norm() / images[0].double().norm()
    reported = read_json(tmp_path / "small" / REPORT_FILE)["relative_l2"]
    assert reported == pytest.approx(float(distance), rel=1e-6)


def test_the_router_stays_unchanged_if_configured(original, tmp_path):
    quantize(stage(router=False), original, tmp_path / "small", Workspace.at(tmp_path / "work"))
    assert contents(tmp_path / "small" / "router") == contents(original / "router")
    assert contents(tmp_path / "small" / "expert_0") != contents(original / "expert_0")


def test_a_stage_that_would_change_nothing_is_an_error(original, tmp_path):
    with pytest.raises(
        StageError, match=r"a matrix of at least 1000000 elements, and expert 0.*lower quantize\.min_elements"
    ):
        quantize(stage(min_elements=10**6), original, tmp_path / "small", Workspace.at(tmp_path / "work"))


def test_dynamic_int8_is_a_stage_and_cannot_be_repeated(original, tmp_path):
    quantize(stage(DynamicInt8Config), original, tmp_path / "small", Workspace.at(tmp_path / "work"))
    report = read_json(tmp_path / "small" / REPORT_FILE)
    assert report["stages"] == ["int8_dynamic"] and 0 < report["relative_l2"] < 0.1
    assert report["flops_after"] == report["flops_before"]
    with pytest.raises(StageError, match="no linear layer"):
        run_stage(
            stage(DynamicInt8Config), tmp_path / "small", original, [], tmp_path / "again", Workspace.at(tmp_path / "w")
        )


def test_a_stopped_stage_keeps_finished_experts(original, tmp_path, monkeypatch):
    quantized = []
    workspace = replace(Workspace.at(tmp_path / "work"), stopping=lambda: len(quantized) == 2)

    def record(expert, config):
        quantized.append(expert.cluster_id)
        return quantize_weights(expert, config)

    monkeypatch.setitem(DATA_FREE_METHODS, "weight_only", record)
    with pytest.raises(Preempted, match="2 of 3 experts"):
        quantize(stage(bits=4), original, tmp_path / "stopped", workspace)
    quantize(stage(bits=4), original, tmp_path / "small", Workspace.at(tmp_path / "work"))
    assert quantized == [0, 1, 2]
