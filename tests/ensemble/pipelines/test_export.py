"""Folders in the hands of plain diffusers, in processes that cannot import this package."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from benchmarks.arms.diffusers_pipelines import CASES, build_ensemble
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.export import export_pipeline
from experts.codec import PixelCodec
from experts.config import ResidualMLPConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from tests.ensemble.pipelines.conftest import SHAPE, make_ensemble
from tests.experts.networks.test_backbones import SHAPE as IMAGE_SHAPE
from tests.experts.networks.test_backbones import config_of, text
from tests.oracles import OracleRouter

OURS = ("ddm", "ddm_core", "data_partition", "experts", "router", "ensemble", "orchestrator")
HEADER = f"import sys\nfor name in {OURS!r}: sys.modules[name] = None\n"
SEEDS = list(range(8))


def run_without_us(code, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", HEADER + code], capture_output=True, text=True, cwd="/", env=environment, check=False
    )


def text_pipeline(case):
    """Three experts of a class with text, and a router without classes."""
    prompts, components = text(1), {}
    for k in range(3):
        torch.manual_seed(k)
        network = build_network(config_of(case), IMAGE_SHAPE, 0, prompts.drop(torch.ones(1).bool()))
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        components[f"expert_{k}"] = network
    means = torch.zeros(3, 2)
    router = OracleRouter(means=means, deviations=(1.0,) * 3, shares=(0.5, 0.3, 0.2))
    return EnsembleDiffusionPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        codec=PixelCodec(image_shape=(8, 8, 4)),
        router=router,
        **components,
    )


def test_exported_folders_sample_equally_without_us(tmp_path, pipe):
    text_pipe, prompts = text_pipeline("FluxTransformer2DModel"), text(1).rows(torch.zeros(8, dtype=torch.int64))
    text_pipe.router.save = lambda folder: folder.mkdir()
    inputs = {"prompt_embeds": prompts.sequence, "pooled_prompt_embeds": prompts.pooled}
    inputs |= {f"negative_{name}": value * 0.5 for name, value in inputs.items()}
    arguments = {"seeds": SEEDS, "num_inference_steps": 3, "guidance_scale": 2.0}
    classes = arguments | {"class_labels": [0, 1] * 4}
    expected = {"classes": pipe(**classes).latents, "texts": text_pipe(**arguments, **inputs).latents}
    export_pipeline(pipe, tmp_path / "classes")
    export_pipeline(text_pipe, tmp_path / "texts")
    np.savez(tmp_path / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    code = f"""
import numpy as np, torch
from diffusers import DiffusionPipeline
inputs = {{name: torch.from_numpy(value) for name, value in np.load({str(tmp_path / "inputs.npz")!r}).items()}}
for name, arguments in (("classes", {classes!r}), ("texts", {arguments!r} | inputs)):
    pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r} + "/" + name, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    np.save({str(tmp_path)!r} + f"/{{name}}.npy", pipe(**arguments, output_type="latent").images.numpy())
"""
    done = run_without_us(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, latents in expected.items():
        assert np.abs(np.load(tmp_path / f"{name}.npy") - latents.numpy()).max() < 1e-5, name


def test_exported_code_runs_only_if_it_is_trusted(pipe, tmp_path):
    pipe.export_pretrained(tmp_path / "exported")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "exported")
    with pytest.raises(PipelineError, match=r"code of a folder is never run.*pipeline\.py"):
        EnsembleDiffusionPipeline.from_pretrained(tmp_path / "exported")


def test_components_load_in_plain_diffusers(folder, pipe, tmp_path):
    code = f"""
import torch
from diffusers import AutoModel, DiTTransformer2DModel
model = DiTTransformer2DModel.from_pretrained({str(folder)!r}, subfolder="expert_1")
again = AutoModel.from_pretrained({str(folder)!r}, subfolder="expert_1")
print(sum(p.double().sum().item() for p in model.parameters()), type(again).__name__)
"""
    done = run_without_us(code, tmp_path)
    total = sum(parameter.double().sum().item() for parameter in pipe.expert_1.parameters())
    assert done.stdout.split() == [str(total), "DiTTransformer2DModel"], done.stderr[-2000:]


def test_what_diffusers_lacks_is_not_exported(pipe, tmp_path):
    pipe.scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(PipelineError, match="its scheduler is DPMSolverMultistepScheduler"):
        export_pipeline(pipe, tmp_path / "exported")
    model = build_network(ResidualMLPConfig(width=8, depth=1), SHAPE, 2).eval()
    settings = {"noise_schedule": RECTIFIED_FLOW, "latent_shape": SHAPE, "num_classes": 2, "cluster_id": 0}
    expert = Expert(model=model, prediction="velocity", **settings)
    ours = make_ensemble()
    single = EnsembleDiffusionPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), codec=ours.codec, expert_0=expert)
    with pytest.raises(PipelineError, match="ResidualMLP is no class of diffusers"):
        export_pipeline(single, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_network_of_an_expert_is_traced_by_torch_export(name):
    pipeline, text = build_ensemble(name, 1)
    expert, network = pipeline.experts[0], pipeline.expert_0
    calls = []
    handle = network.register_forward_pre_hook(lambda _module, _args, kwargs: calls.append(kwargs), with_kwargs=True)
    pipeline(seeds=[1, 2], **{key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in text.items()})
    handle.remove()
    traced = torch.export.export(network, (), calls[0], strict=False).module()
    assert torch.equal(traced(**calls[-1])[0], network(**calls[-1])[0])
    assert expert.model is network
