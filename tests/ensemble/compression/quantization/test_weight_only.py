"""A quantized ensemble: smaller, close to the whole one, which is not touched."""

from dataclasses import replace

import pytest

from ddm_core.artifacts import Preempted, Workspace, checksum, files_in, read_json
from ensemble.compression.config import CompressionConfig, DynamicInt8Config, WeightOnlyConfig
from ensemble.compression.measurement import REPORT_FILE
from ensemble.compression.method import StageError
from ensemble.compression.quantization.weight_only import quantize_weights
from ensemble.compression.run import PLAIN, run_stage
from ensemble.config import SamplingConfig
from ensemble.pipeline import DDMPipeline
from router.config import SelectionConfig
from tests.ensemble.test_pipeline import parts, put_together

__all__ = ["parts"]
SAMPLING = SamplingConfig(steps=3, selection=SelectionConfig(name="full"))


def stage(kind=WeightOnlyConfig, **given) -> CompressionConfig:
    recipe = kind(**({"group_size": 8, "min_elements": 64} | given))
    return CompressionConfig(method=recipe, sampling=SAMPLING, num_samples=8)


def quantize(config, whole, out, workspace):
    run_stage(config, whole, whole, [], out, workspace)


@pytest.fixture
def whole(parts, tmp_path):
    put_together(parts).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def contents(folder):
    return {str(file.relative_to(folder)): checksum(file) for file in files_in(folder)}


def test_fewer_bits_are_fewer_bytes_and_more_distance_and_the_whole_one_is_not_touched(whole, tmp_path):
    before, found = contents(whole), {}
    for bits in (8, 4):
        quantize(stage(bits=bits), whole, tmp_path / f"{bits}", Workspace.at(tmp_path / "work"))
        found[bits] = read_json(tmp_path / f"{bits}" / REPORT_FILE)
    assert contents(whole) == before
    assert found[4]["bytes_after"] < found[8]["bytes_after"] < found[8]["bytes_before"] == found[4]["bytes_before"]
    assert 0 < found[8]["relative_l2"] < found[4]["relative_l2"] < 1


def test_what_is_said_of_the_samples_is_so(whole, tmp_path):
    quantize(stage(bits=4), whole, tmp_path / "small", Workspace.at(tmp_path / "work"))
    images = [DDMPipeline.from_pretrained(path)(range(8), SAMPLING).images for path in (whole, tmp_path / "small")]
    distance = (images[1] - images[0]).double().norm() / images[0].double().norm()
    said = read_json(tmp_path / "small" / REPORT_FILE)["relative_l2"]
    assert said == pytest.approx(float(distance), rel=1e-6)


def test_the_router_is_left_as_it_is_if_so_asked(whole, tmp_path):
    quantize(stage(router=False), whole, tmp_path / "small", Workspace.at(tmp_path / "work"))
    assert contents(tmp_path / "small" / "router") == contents(whole / "router")
    assert contents(tmp_path / "small" / "expert_0") != contents(whole / "expert_0")


def test_a_stage_that_would_do_nothing_is_an_error(whole, tmp_path):
    with pytest.raises(
        StageError, match=r"no matrix of at least 1000000 entries in expert 0.*lower quantize\.min_elements"
    ):
        quantize(stage(min_elements=10**6), whole, tmp_path / "small", Workspace.at(tmp_path / "work"))


def test_eight_bits_of_compute_are_a_stage_too_and_a_second_one_finds_nothing(whole, tmp_path):
    quantize(stage(DynamicInt8Config), whole, tmp_path / "small", Workspace.at(tmp_path / "work"))
    found = read_json(tmp_path / "small" / REPORT_FILE)
    assert found["stages"] == ["int8_dynamic"] and 0 < found["relative_l2"] < 0.1
    assert found["flops_after"] == found["flops_before"]
    with pytest.raises(StageError, match="no linear layer"):
        run_stage(
            stage(DynamicInt8Config), tmp_path / "small", whole, [], tmp_path / "again", Workspace.at(tmp_path / "w")
        )


def test_a_stage_that_was_stopped_keeps_the_experts_it_has_finished(whole, tmp_path, monkeypatch):
    made = []
    workspace = replace(Workspace.at(tmp_path / "work"), stopping=lambda: len(made) == 2)

    def noting(expert, config):
        made.append(expert.cluster_id)
        return quantize_weights(expert, config)

    monkeypatch.setitem(PLAIN, "weight_only", noting)
    with pytest.raises(Preempted, match="2 of 3 experts"):
        quantize(stage(bits=4), whole, tmp_path / "stopped", workspace)
    quantize(stage(bits=4), whole, tmp_path / "small", Workspace.at(tmp_path / "work"))
    assert made == [0, 1, 2]
