"""Does an ensemble behave as any model of diffusers? (`make bench-pipeline`) Equality, memory, adapters, folders.

Networks are random; the memory is measured with SD3's class at 143 MB an expert, in processes of their own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.arms.diffusers_pipelines import CASES, build_ensemble, sample_both
from benchmarks.arms.pipeline_folders import measure_folders, measure_hostile, measure_paris, measure_without_us
from benchmarks.record import Claim, Listing, write_result
from ddm_core.artifacts import to_jsonable
from ensemble.ensemble import Ensemble
from ensemble.pipeline import EnsemblePipeline
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.schedulers import check_scheduler, set_times
from ensemble.solvers import make_noise
from experts.codec import PixelCodec
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiffusersConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.lora import add_lora, read_lora, remove_lora
from experts.networks.registry import build_network
from experts.types import Latents
from router.config import RouterConfig
from router.models.registry import build_router
from router.router import Router

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
EULER = diffusers.FlowMatchEulerDiscreteScheduler
ALLOWED = {
    "FlowMatchEuler": EULER(),
    "FlowMatchEuler, shift 3": EULER(shift=3.0),
    "FlowMatchHeun": diffusers.FlowMatchHeunDiscreteScheduler(),
    "FlowMapEuler": diffusers.FlowMapEulerDiscreteScheduler(),
    "UniPC, flow sigmas": diffusers.UniPCMultistepScheduler(**FLOW),
    "DPM++, flow sigmas": diffusers.DPMSolverMultistepScheduler(**FLOW),
}
REFUSED = {
    "EulerDiscrete": diffusers.EulerDiscreteScheduler(),
    "DDIM": diffusers.DDIMScheduler(),
    "DDIM, v": diffusers.DDIMScheduler(prediction_type="v_prediction"),
    "UniPC": diffusers.UniPCMultistepScheduler(),
    "DPM++": diffusers.DPMSolverMultistepScheduler(),
    "DPM++ SDE, flow sigmas": diffusers.DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    "LCM": diffusers.LCMScheduler(original_inference_steps=100),
    "FlowMatchLCM": diffusers.FlowMatchLCMScheduler(),
}
MEANS, DEVIATION, SHARES = torch.tensor([[-2.0, 0.0], [1.0, 1.5], [2.0, -1.0]]), 0.4, torch.tensor([0.5, 0.3, 0.2])
STEPS, LIMIT_STEPS, ROWS = 100, 2000, 64
EXPERTS, IMAGES, MEMORY_STEPS = 8, 16, 10
SD3: dict[str, Any] = {
    "patch_size": 2,
    "num_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "caption_projection_dim": 512,
    "pos_embed_max_size": 8,
}
TEXT = TextEmbedding(torch.zeros(1, 7, 128), torch.ones(1, 7).bool(), torch.zeros(1, 128), torch.ones(1).bool())


def main() -> None:
    """Measure, write docs/benchmarks/pipeline.json and print its claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    started, claims, listings = time.monotonic(), [], []
    for measure in (
        measure_equality,
        measure_folders,
        measure_schedulers,
        measure_memory,
        measure_lora,
        measure_lora_of_one,
        measure_paris,
        measure_without_us,
        measure_hostile,
    ):
        found, listing = measure()
        claims += found
        listings.append(listing)
    note = "Networks are random; nothing here measures the quality of images."
    result = write_result("pipeline", time.monotonic() - started, claims, listings, [note])
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


def measure_equality() -> tuple[list[Claim], Listing]:
    """Compare an ensemble of one with diffusers' own pipeline of each class."""
    differences = {}
    for name in CASES:
        ours, theirs = sample_both(name)
        differences[name] = float((ours - theirs).abs().max())
    claim = Claim(
        name=f"an ensemble of one equals diffusers' own pipeline, {len(CASES)} classes",
        bar="latents differ by at most 1e-5",
        value=f"{max(differences.values()):.1e}",
        spread=f"{min(differences.values()):.1e} to {max(differences.values()):.1e}",
        holds=max(differences.values()) <= 1e-5,
    )
    rows = [(name, type(CASES[name].scheduler).__name__, f"{value:.1e}") for name, value in differences.items()]
    return [claim], Listing(title="Ensemble of one", columns=("network", "scheduler", "largest difference"), rows=rows)


def mixture_velocity(noised: Latents, t: float) -> Latents:
    """Return the exact velocity of rectified flow from noise to a mixture of three Gaussians."""
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    residuals = noised[:, None] - (1 - t) * MEANS
    weights = (SHARES.log() - (residuals**2).sum(-1) / (2 * variance)).softmax(1)
    clean = MEANS + (1 - t) * DEVIATION**2 / variance * residuals
    velocities: Latents = (weights[:, :, None] * (t / variance * residuals - clean)).sum(1)
    return velocities


def measure_schedulers() -> tuple[list[Claim], Listing]:
    """Compare schedulers with the limit of Heun's solver, on a velocity in closed form."""
    limit = _run(diffusers.FlowMatchHeunDiscreteScheduler(), LIMIT_STEPS)
    errors: dict[str, dict[str, float]] = {"allowed": {}, "refused": {}}
    for kind, schedulers in (("allowed", ALLOWED), ("refused", REFUSED)):
        for name, scheduler in schedulers.items():
            torch.manual_seed(0)
            errors[kind][name] = float((_run(scheduler, STEPS) - limit).norm() / limit.norm())
    is_refused = {name: bool(_refusal(scheduler)) for name, scheduler in {**ALLOWED, **REFUSED}.items()}
    largest, smallest = max(errors["allowed"].values()), min(errors["refused"].values())
    claims = [
        Claim(
            name=f"the {len(ALLOWED)} allowed schedulers reach Heun's limit in {STEPS} steps",
            bar="relative error at most 1 %",
            value=f"{100 * largest:.2f} %",
            spread="",
            holds=largest <= 0.01 and not any(is_refused[name] for name in ALLOWED),
        ),
        Claim(
            name=f"the {len(REFUSED)} refused schedulers are wrong",
            bar="relative error above 5 %, and refused",
            value=f"{100 * smallest:.0f} % and more",
            spread="",
            holds=smallest > 0.05 and all(is_refused[name] for name in REFUSED),
        ),
    ]
    rows = [(name, kind, f"{100 * error:.3g} %") for kind, named in errors.items() for name, error in named.items()]
    return claims, Listing(title="Schedulers", columns=("scheduler", "here", "relative error"), rows=rows)


def _refusal(scheduler: Any) -> str:
    try:
        check_scheduler(scheduler)
    except PipelineError as error:
        return str(error)
    return ""


def _run(scheduler: Any, steps: int) -> Latents:
    """Run the loop of diffusers' pipelines; a refused scheduler gets the timesteps that it sets itself."""
    noised = make_noise(range(ROWS), (2,))
    if _refusal(scheduler):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.float() / 1000
    else:
        times = set_times(scheduler, steps, 256, torch.device("cpu"))
    for t, timestep in zip(times.tolist(), scheduler.timesteps, strict=True):
        inputs = scheduler.scale_model_input(noised, timestep) if hasattr(scheduler, "scale_model_input") else noised
        noised = scheduler.step(mixture_velocity(inputs, t), timestep, noised, return_dict=False)[0].float()
    return noised


def measure_memory() -> tuple[list[Claim], Listing]:
    """Sample eight experts with all loaded, and one after the other; and one expert alone."""
    with tempfile.TemporaryDirectory() as parent:
        one, all_experts = (_write_sd3(Path(parent) / str(count), count) for count in (1, EXPERTS))
        size = sum(path.stat().st_size for path in (one / "expert_0").glob("*.safetensors"))
        single = _sample_process(one, "all")
        resident, grouped = (_sample_process(all_experts, budget) for budget in ("all", str(size)))
    memory = grouped["peak_mb"] / single["peak_mb"]
    cpu = grouped["cpu_s"] / resident["cpu_s"]
    difference = max(abs(a - b) for a, b in zip(grouped["latents"], resident["latents"], strict=True))
    claims = [
        Claim(
            name="sticky samples of 8 experts, loaded one after the other: peak memory",
            bar="at most 1.2 × one expert's",
            value=f"{memory:.2f} ×",
            spread=f"all loaded: {resident['peak_mb'] / single['peak_mb']:.2f} ×",
            holds=memory <= 1.2,
        ),
        Claim(
            name="the same: CPU time",
            bar="at most 1.1 × that of all loaded",
            value=f"{cpu:.2f} ×",
            spread="one measurement each",
            holds=cpu <= 1.1,
        ),
        Claim(
            name="the same: samples",
            bar="sums of latents differ by at most 1e-3",
            value=f"{difference:.1e}",
            spread="",
            holds=difference <= 1e-3,
        ),
    ]
    rows = [
        (name, str(result["loads"]), f"{result['peak_mb']:.0f}", f"{result['cpu_s']:.1f}")
        for name, result in (("one expert", single), ("all loaded", resident), (grouped["residency"], grouped))
    ]
    title = f"Residency: {EXPERTS} experts of {size / 1e6:.0f} MB, {IMAGES} images, {MEMORY_STEPS} steps, one thread"
    return claims, Listing(title=title, columns=("experts", "loads", "peak over start, MB", "CPU s"), rows=rows)


def _write_sd3(folder: Path, count: int) -> Path:
    experts = {}
    for k in range(count):
        torch.manual_seed(k)
        network = build_network(DiffusersConfig(class_name="SD3Transformer2DModel", settings=SD3), (4, 8, 8), 0, TEXT)
        experts[k] = _expert(network, k)
    router = Router(
        model=build_router(RouterConfig(kind="prior_table"), (4, 8, 8), count, 0, TEXT),
        noise_schedule=RECTIFIED_FLOW,
        prior_counts=torch.ones(1, count, dtype=torch.float64),
    )
    ensemble = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=router)
    EnsemblePipeline(ensemble=ensemble, codec=PixelCodec(image_shape=(8, 8, 4))).save_pretrained(folder)
    return folder


def _expert(network: nn.Module, cluster_id: int) -> Expert:
    return Expert(
        model=network.eval(),
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=(4, 8, 8),
        num_classes=0,
        cluster_id=cluster_id,
    )


def _sample_process(folder: Path, budget: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.arms.expert_memory",
        str(folder),
        budget,
        str(IMAGES),
        str(MEMORY_STEPS),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own module
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_lora() -> tuple[list[Claim], Listing]:
    """Compare an adapter with the weights that it would be merged into, and what is left after it is unloaded."""
    rows = []
    for name, case in CASES.items():
        torch.manual_seed(0)
        text = TEXT if case.is_pooled else TextEmbedding(TEXT.sequence, TEXT.mask, torch.zeros(1, 0), TEXT.is_null)
        config = DiffusersConfig(class_name=name, settings=dict(case.settings))
        network = build_network(config, (4, 8, 8), 0, text).eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.05)
        expert, noised = _expert(network, 0), make_noise([1, 2], (4, 8, 8))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "lora.safetensors"
            factors = _random_lora(network)
            save_file(factors, file)
            before = {key: value.clone() for key, value in network.state_dict().items()}
            add_lora(network, read_lora(file), "style", 0.5)
            adapted = _velocity(expert, noised)
            remove_lora(network)
        restored = all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
        _merge(network, factors, 0.5)
        merged = _velocity(expert, noised)
        rows.append((name, float((adapted - merged).abs().max() / merged.abs().max()), restored))
    largest = max(error for _, error, _ in rows)
    claims = [
        Claim(
            name=f"an adapter equals its merged weights, {len(rows)} classes",
            bar="relative difference at most 1e-5",
            value=f"{largest:.1e}",
            spread="",
            holds=largest <= 1e-5,
        ),
        Claim(
            name="unloading an adapter restores every byte",
            bar=f"{len(rows)} of {len(rows)} classes",
            value=f"{sum(restored for *_, restored in rows)} of {len(rows)}",
            spread="",
            holds=all(restored for *_, restored in rows),
        ),
    ]
    listing = Listing(
        title="LoRA of rank 4 on all layers of attention",
        columns=("network", "relative difference to merged weights"),
        rows=[(name, f"{error:.1e}") for name, error, _ in rows],
    )
    return claims, listing


def measure_lora_of_one() -> tuple[list[Claim], Listing]:
    """Count the samples that an adapter of one expert changes, among those routed there and the others."""
    rows = []
    for name in CASES:
        pipeline, text = build_ensemble(name, 3)
        inputs = {key: value.repeat(IMAGES, *[1] * (value.ndim - 1)) for key, value in text.items()}
        gates: list[Tensor] = []

        def keep(_pipeline: Any, _step: int, _t: Tensor, tensors: dict[str, Any], found: Any = gates) -> dict[str, Any]:
            found.append(tensors["gates"].argmax(1))
            return {}

        sample: Any = pipeline
        arguments = {"seeds": range(IMAGES), "num_inference_steps": 2, "output_type": "latent", **inputs}
        keeping = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["gates"]}
        plain = sample(**arguments, **keeping).images
        with tempfile.TemporaryDirectory() as folder:
            save_file(_random_lora(pipeline.expert_2), Path(folder) / "lora.safetensors")
            pipeline.load_lora_weights(Path(folder) / "lora.safetensors", experts=[2])
        is_changed = (sample(**arguments).images != plain).flatten(1).any(1)
        is_routed = gates[0] == 2
        rows.append(
            (name, int(is_routed.sum()), int((is_changed & is_routed).sum()), int((is_changed & ~is_routed).sum()))
        )
    routed, inside, outside = (sum(row[column] for row in rows) for column in (1, 2, 3))
    claim = Claim(
        name="an adapter of one expert changes the samples routed to it, and no others",
        bar=f"{routed} of {routed}, 0 of {len(rows) * IMAGES - routed}",
        value=f"{inside} of {routed}, {outside} of {len(rows) * IMAGES - routed}",
        spread=f"{len(rows)} classes, {IMAGES} seeds, 3 experts",
        holds=inside == routed > 0 and outside == 0,
    )
    columns = ("network", "routed to the expert", "of these changed", "others changed")
    return [claim], Listing(
        title="LoRA on one of three experts", columns=columns, rows=[(row[0], *map(str, row[1:])) for row in rows]
    )


def _random_lora(network: nn.Module) -> dict[str, Tensor]:
    factors = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".att" in name:
            factors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(4, module.in_features)
            factors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(module.out_features, 4)
    return factors


@torch.no_grad()
def _merge(network: nn.Module, factors: dict[str, Tensor], weight: float) -> None:
    for name in _layers(factors):
        layer: Any = network.get_submodule(name)
        layer.weight += weight * factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]


def _layers(factors: dict[str, Tensor]) -> Iterator[str]:
    return (key.removesuffix(".lora_A.weight") for key in factors if key.endswith(".lora_A.weight"))


@torch.no_grad()
def _velocity(expert: Expert, noised: Latents) -> Latents:
    return expert.velocity(noised, torch.full((len(noised),), 0.5), Condition.null(len(noised)))


if __name__ == "__main__":
    main()
