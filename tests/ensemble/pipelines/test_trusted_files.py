"""Folders of strangers: what is refused, before memory is allocated."""

import tracemalloc

import pytest
import torch

from benchmarks.testbed.hostile_pipelines import list_attacks
from ddm_core.artifacts import ArtifactError
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline

ATTACKS = list_attacks(1)


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_folder_is_refused_without_memory(attack, folder):
    ATTACKS[attack](folder)
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError) as error:
            EnsembleDiffusionPipeline.from_pretrained(folder)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert "Traceback" not in str(error.value)


def test_message_names_the_file_and_the_way_out(folder):
    torch.save({}, folder / "expert_0" / "pytorch_model.bin")
    with pytest.raises(PipelineError, match=r"expert_0/pytorch_model\.bin.*convert it to safetensors"):
        EnsembleDiffusionPipeline.from_pretrained(folder)
