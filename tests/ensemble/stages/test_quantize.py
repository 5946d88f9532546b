"""A quantized ensemble: smaller, close to the whole one, which is not touched."""

import pytest

from artifacts import Workspace, checksum, files_in, read_json
from ensemble.config import SamplingConfig
from ensemble.pipeline import DDMPipeline
from ensemble.stages.comparison import StageError
from ensemble.stages.config import QuantizeConfig, QuantizeStageConfig
from ensemble.stages.quantize import COMPRESSION, quantize
from router.config import SelectionConfig
from tests.ensemble.test_pipeline import parts, put_together

__all__ = ["parts"]
SAMPLING = SamplingConfig(steps=3, selection=SelectionConfig(name="full"))


def stage(**given) -> QuantizeStageConfig:
    quantized = QuantizeConfig(**({"group": 8, "least": 64} | given))
    return QuantizeStageConfig(quantize=quantized, sampling=SAMPLING, num_samples=8)


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
        found[bits] = read_json(tmp_path / f"{bits}" / COMPRESSION)
    assert contents(whole) == before
    assert found[4]["bytes_after"] < found[8]["bytes_after"] < found[8]["bytes_before"] == found[4]["bytes_before"]
    assert 0 < found[8]["relative_l2"] < found[4]["relative_l2"] < 1


def test_what_is_said_of_the_samples_is_so(whole, tmp_path):
    quantize(stage(bits=4), whole, tmp_path / "small", Workspace.at(tmp_path / "work"))
    images = [DDMPipeline.from_pretrained(path)(range(8), SAMPLING).images for path in (whole, tmp_path / "small")]
    distance = (images[1] - images[0]).double().norm() / images[0].double().norm()
    said = read_json(tmp_path / "small" / COMPRESSION)["relative_l2"]
    assert said == pytest.approx(float(distance), rel=1e-6)


def test_the_router_is_left_as_it_is_if_so_asked(whole, tmp_path):
    quantize(stage(router=False), whole, tmp_path / "small", Workspace.at(tmp_path / "work"))
    assert contents(tmp_path / "small" / "router") == contents(whole / "router")
    assert contents(tmp_path / "small" / "expert_0") != contents(whole / "expert_0")


def test_a_stage_that_would_do_nothing_is_an_error(whole, tmp_path):
    with pytest.raises(StageError, match=r"no matrix of at least 1000000 entries in expert_0.*lower quantize\.least"):
        quantize(stage(least=10**6), whole, tmp_path / "small", Workspace.at(tmp_path / "work"))
