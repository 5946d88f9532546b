"""The folder as a modular pipeline: experts are loaded and unloaded by name, and samples do not depend on it."""

import pytest
import torch
from diffusers import ModularPipeline

from ddm_core.artifacts import ArtifactError
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.modular import EnsembleModularPipeline
from ensemble.pipelines.paging import weight_bytes

ARGUMENTS = {"seeds": range(10), "class_labels": ["a", "b"] * 5, "num_inference_steps": 3, "guidance_scale": 2.0}


def largest(folder):
    return max(weight_bytes(folder / f"expert_{k}") for k in range(3))


def test_components_are_loaded_and_unloaded_by_name(folder, pipe):
    modular = EnsembleModularPipeline.from_pretrained(folder, max_memory=2 * largest(folder))
    assert isinstance(modular, ModularPipeline)
    assert modular.null_component_names == ["expert_0", "expert_1", "expert_2"]
    modular.load_components(["expert_1", "expert_2"])
    assert modular.null_component_names == ["expert_0"]
    parameters, expected = modular.expert_1.state_dict(), pipe.expert_1.state_dict()
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())
    modular.load_components("expert_0")
    assert modular.null_component_names == ["expert_1"]
    modular.unload_components(["expert_2", "expert_1"])
    assert modular.null_component_names == ["expert_1", "expert_2"]


@pytest.mark.parametrize("in_memory", [1, 3])
@pytest.mark.parametrize("selection", ["sticky", "full"])
def test_call_loads_what_it_needs(folder, in_memory, selection):
    modular = EnsembleModularPipeline.from_pretrained(folder, max_memory=in_memory * largest(folder))
    whole = EnsembleDiffusionPipeline.from_pretrained(folder)
    for each in (modular.ensemble_pipeline, whole):
        each.set_progress_bar_config(disable=True)
    state = modular(**ARGUMENTS, selection=selection, output_type="np")
    assert (state.get("latents") - whole(**ARGUMENTS, selection=selection).latents).abs().max() < 1e-6
    assert state.get("images").shape == (10, 4, 4, 1)
    assert len(modular.null_component_names) == 3 - in_memory


def test_unknown_components_and_broken_folders_are_refused(folder):
    with pytest.raises(PipelineError, match=r"no model_index\.json; a run has one in artifacts/ensemble"):
        EnsembleModularPipeline.from_pretrained(folder.parent)
    (folder / "pipeline.py").touch()
    with pytest.raises(PipelineError, match="code of a folder is never run"):
        EnsembleModularPipeline.from_pretrained(folder)
    (folder / "pipeline.py").unlink()
    modular = EnsembleModularPipeline.from_pretrained(folder)
    with pytest.raises(PipelineError, match="no component 'expert_7'"):
        modular.load_components(["expert_7"])
    with pytest.raises(PipelineError, match="'router' is no expert"):
        modular.unload_components("router")
    (folder / "expert_1" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ArtifactError):
        modular.load_components("expert_1")
    assert "expert_1" in modular.null_component_names
