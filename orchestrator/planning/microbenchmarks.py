"""How quick the networks of a configuration are on this machine: a few training steps and calls, on random latents.

Everything is timed through the functions that the stages call. Needs nothing but a `Probe`, so that it can run on an
island that has neither the project's data nor its codec.
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor, nn

from ddm_core.artifacts import STRICT, Workspace
from experts.condition import Condition
from experts.config import ExpertConfig, TrainingConfig
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.expert import Expert, network_flops
from experts.networks.registry import build_network
from experts.training.flops import forward_flops, training_flops
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.loss import expert_loss
from experts.training.trainer import fit, usable_device
from orchestrator.planning.calibration import StageSpeed
from orchestrator.run.worker import limited_threads
from router.config import RouterConfig
from router.costs import gradient_rows
from router.models.registry import build_router
from router.router import Router
from router.train import router_loss


@dataclass(frozen=True, slots=True)
class Duration:
    """Wall clock, and CPU time of all threads."""

    wall_s: float
    cpu_s: float


NOTHING = Duration(0.0, 0.0)


def measure(act: Callable[[], object]) -> Duration:
    """How long an action takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    return Duration(time.perf_counter() - wall, time.process_time() - cpu)


def per_unit(short: Duration, long: Duration, units: float) -> Duration:
    """What each of the units takes that the longer of two tries did more.

    No clock on the wall can be ahead of the processors: where noise says so, these are believed.
    """
    cpu_s = max(0.0, long.cpu_s - short.cpu_s) / units
    wall_s = max(0.0, long.wall_s - short.wall_s) / units
    return Duration(max(wall_s, cpu_s / torch.get_num_threads()), cpu_s)


TRAINING_S = 0.7
"""How long the timed steps of a training take together, if that many are as short."""
MOST_STEPS = 200
REPEATS = 2
"""The best of so many turns counts: a busy machine makes everything slower and nothing quicker."""
CALLS_S = 0.3


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class NetworkProbe:
    """What has to be known to time the networks anywhere."""

    expert: ExpertConfig
    """With the global batch, which the monolith takes as it is."""
    router: RouterConfig
    """The router."""
    num_experts: Annotated[int, Field(ge=1)]
    """K."""
    latent_shape: tuple[int, ...]
    """Shape of one latent."""
    num_classes: Annotated[int, Field(ge=0)]
    """0 is unconditional."""
    cpus: dict[str, int]
    """Threads of an `expert`, the `router`, the `monolith` and a `score`."""
    sampling_rows: Annotated[int, Field(ge=1)]
    """Images drawn at once."""
    sampling_device: str
    """Torch device of the sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """Fresh networks of a configuration, and what can be counted in them."""

    expert: nn.Module
    router: Router
    row_flops: dict[str, float]
    """Of the `expert` and the `router`, for one row."""
    parameters: dict[str, int]
    """Numbers in each of them."""


Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]


def build_networks(probe: NetworkProbe) -> Networks:
    """The networks on the CPU; raises `NetworkError` if they do not fit the latents."""
    shape = probe.latent_shape
    expert = build_network(probe.expert.network, shape, probe.num_classes)
    router = Router(
        model=build_router(probe.router, shape, probe.num_experts, probe.num_classes),
        noise_schedule=NOISE_SCHEDULES[probe.router.noise_schedule],
        prior_counts=torch.ones(probe.num_classes + 1, probe.num_experts),
    )
    row, t = torch.zeros(1, *shape), torch.full((1,), 0.5)
    router_flops = forward_flops(lambda: router.logits(row, t, Condition.null(1)))
    return Networks(
        expert=expert,
        router=router,
        row_flops={"expert": network_flops(expert, shape), "router": router_flops},
        parameters={name: count_parameters(model) for name, model in (("expert", expert), ("router", router.model))},
    )


def count_parameters(model: nn.Module) -> int:
    """Numbers in a network."""
    return sum(parameter.numel() for parameter in model.parameters())


def time_networks(networks: Networks, probe: NetworkProbe) -> tuple[dict[str, StageSpeed], float]:
    """Speeds of training and sampling, and seconds to save a checkpoint; raises `DeviceError` without the device."""
    path, recipe, speeds = NOISE_SCHEDULES[probe.expert.noise_schedule], probe.expert.training, {}
    alone = replace(recipe, batch_size=recipe.batch_size // probe.num_experts)

    def loss_of_expert(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return {"loss": expert_loss(model, batch, probe.expert.prediction, path)}

    def loss_of_router(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return router_loss(model, batch, path, probe.num_classes)

    def train(name: str, model: nn.Module, loss: Loss, training: TrainingConfig, unit_flops: float) -> None:
        with limited_threads(probe.cpus[name]):
            speeds[name] = _time_training(model, loss, training, probe, unit_flops)

    flops = {name: training_flops(row, 1, 1) for name, row in networks.row_flops.items()}
    train("expert", networks.expert, loss_of_expert, alone, flops["expert"])
    train("monolith", networks.expert, loss_of_expert, recipe, flops["expert"])
    if gradient_rows(probe.router, probe.num_experts):
        train("router", networks.router.model, loss_of_router, probe.router.training, flops["router"])
    else:
        speeds["router"] = StageSpeed(unit_s=0.0)
    with limited_threads(probe.cpus["expert"]):
        checkpoint_s = _time_checkpoint(networks.expert, loss_of_expert, alone, probe, speeds["expert"])
    with limited_threads(probe.cpus["score"]):
        return speeds | _time_calls(networks, probe), checkpoint_s


def _time_training(
    model: nn.Module, loss: Loss, config: TrainingConfig, probe: NetworkProbe, unit_flops: float
) -> StageSpeed:
    """From trainings of one step and of many."""
    dataset = _random_latents(probe, config.batch_size)

    def train(steps: int) -> Duration:
        return measure(lambda: _fit(model, loss, dataset, replace(config, steps=steps, checkpoint_every=steps)))

    cold, warm = train(1), train(1)
    more = max(2, min(MOST_STEPS, math.ceil(TRAINING_S / REPEATS / warm.wall_s)))
    turns = [per_unit(train(1), train(1 + more), more * config.batch_size) for _ in range(REPEATS)]
    best = min(turns, key=lambda turn: turn.wall_s)
    return StageSpeed(
        unit_s=best.wall_s, cpu_s=best.cpu_s, once_s=max(0.0, cold.wall_s - warm.wall_s), unit_flops=unit_flops
    )


def _time_checkpoint(
    model: nn.Module, loss: Loss, config: TrainingConfig, probe: NetworkProbe, speed: StageSpeed
) -> float:
    """From a training of four steps that saves after each of the first three."""
    dataset = _random_latents(probe, config.batch_size)
    once = measure(lambda: _fit(model, loss, dataset, replace(config, steps=1)))
    saving = measure(lambda: _fit(model, loss, dataset, replace(config, steps=4, checkpoint_every=1)))
    return max(0.0, saving.wall_s - once.wall_s - 3 * config.batch_size * speed.unit_s) / 3


def _fit(model: nn.Module, loss: Loss, dataset: LatentDataset, config: TrainingConfig) -> None:
    with tempfile.TemporaryDirectory(prefix="ddm-speed-") as folder:
        fit(model, loss, dataset, config, Workspace.at(Path(folder)))


def _random_latents(probe: NetworkProbe, count: int) -> LatentDataset:
    generator = torch.Generator().manual_seed(0)
    return LatentDataset(
        clean=torch.randn(count, *probe.latent_shape, generator=generator),
        class_id=torch.arange(count) % probe.num_classes if probe.num_classes else torch.full((count,), -1),
        cluster_id=torch.arange(count) % probe.num_experts,
    )


def _time_calls(networks: Networks, probe: NetworkProbe) -> dict[str, StageSpeed]:
    """Rows through the expert and the router, as in sampling."""
    path, device = NOISE_SCHEDULES[probe.expert.noise_schedule], usable_device(probe.sampling_device)
    expert = Expert(
        model=networks.expert.eval(),
        prediction=probe.expert.prediction,
        noise_schedule=path,
        latent_shape=probe.latent_shape,
        num_classes=probe.num_classes,
        cluster_id=0,
    ).to(device)
    networks.router.model.eval()
    router = networks.router.to(device)
    noised = torch.randn(probe.sampling_rows, *probe.latent_shape, device=device)
    t, null = torch.full((len(noised),), 0.5, device=device), Condition.null(len(noised), device)
    calls: dict[str, Callable[[], Tensor]] = {
        "expert": lambda: expert.velocity(noised, t, null, path),
        "router": lambda: router.logits(noised, t, null),
    }
    return {f"{name}_row": _time_call(call, len(noised), networks.row_flops[name]) for name, call in calls.items()}


@torch.inference_mode()
def _time_call(call: Callable[[], Tensor], rows: int, unit_flops: float) -> StageSpeed:
    cold, warm = measure(lambda: call().sum().item()), measure(lambda: call().sum().item())
    times = max(1, min(MOST_STEPS, math.ceil(CALLS_S / REPEATS / warm.wall_s)))

    def repeat() -> None:
        for _ in range(times):
            said = call()
        said.sum().item()

    best = min((measure(repeat) for _ in range(REPEATS)), key=lambda turn: turn.wall_s)
    units = times * rows
    return StageSpeed(
        unit_s=best.wall_s / units,
        cpu_s=best.cpu_s / units,
        once_s=max(0.0, cold.wall_s - warm.wall_s),
        unit_flops=unit_flops,
    )
