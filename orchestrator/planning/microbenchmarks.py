"""Speed of a configuration's networks on this machine: a few training steps and calls on random latents.

The timed functions are those that the stages call. A `NetworkProbe` is the only input, so the benchmark also runs on an
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
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import ExpertConfig, TrainingConfig
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.expert import Expert, network_flops
from experts.networks.registry import build_network
from experts.training.flops import count_parameters, forward_flops, training_flops
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.loss import expert_loss
from experts.training.trainer import check_device, fit
from orchestrator.planning.calibration import StageSpeed
from orchestrator.run.worker import limited_threads
from router.config import RouterConfig
from router.costs import count_gradient_rows
from router.models.registry import build_router
from router.router import Router
from router.train import router_loss


@dataclass(frozen=True, slots=True)
class Duration:
    """Wall clock, and CPU time of all threads."""

    wall_s: float
    cpu_s: float


ZERO_DURATION = Duration(0.0, 0.0)


def measure(action: Callable[[], object]) -> Duration:
    """Measure the duration of an action."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return Duration(time.perf_counter() - wall, time.process_time() - cpu)


def duration_per_unit(short: Duration, long: Duration, units: float) -> Duration:
    """Return the duration of one of the `units` that the longer of two measurements contains additionally.

    Wall clock is at least CPU time divided by the number of threads; noise in the measurement is corrected to that.
    """
    cpu_s = max(0.0, long.cpu_s - short.cpu_s) / units
    wall_s = max(0.0, long.wall_s - short.wall_s) / units
    return Duration(max(wall_s, cpu_s / torch.get_num_threads()), cpu_s)


TRAINING_S = 0.7
"""Target time of all timed training steps together."""
MAX_STEPS = 200
REPEATS = 2
"""Repetitions of a measurement; the fastest counts, since a busy machine only slows things down."""
CALLS_S = 0.3
"""Target time of all timed network calls together."""


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class NetworkProbe:
    """All inputs for timing the networks anywhere."""

    expert: ExpertConfig
    """With the global batch, which the monolith uses."""
    router: RouterConfig
    """The router."""
    num_experts: Annotated[int, Field(ge=1)]
    """K."""
    latent_shape: tuple[int, ...]
    """Shape of one latent."""
    num_classes: Annotated[int, Field(ge=0)]
    """0 is unconditional."""
    text_shape: tuple[int, int, int] | None = None
    """Tokens, features of a token, features of the pooled vector; None is no text."""
    cpus: dict[str, int]
    """Threads of an `expert`, the `router`, the `monolith` and a `score`."""
    sampling_rows: Annotated[int, Field(ge=1)]
    """Images sampled at once."""
    sampling_device: str
    """Torch device of the sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """Untrained networks of a configuration, their FLOPs and parameters."""

    expert: nn.Module
    router: Router
    row_flops: dict[str, float]
    """Per row, of the `expert` and the `router`."""
    parameters: dict[str, int]
    """Number of parameters of each."""


Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]


def _as_expert(model: nn.Module, probe: NetworkProbe) -> Expert:
    return Expert(
        model=model,
        prediction=probe.expert.prediction,
        noise_schedule=NOISE_SCHEDULES[probe.expert.noise_schedule],
        latent_shape=probe.latent_shape,
        num_classes=probe.num_classes,
        cluster_id=0,
    )


def build_networks(probe: NetworkProbe) -> Networks:
    """Build the networks on the CPU; raises `NetworkError` if they do not fit the latents."""
    shape = probe.latent_shape
    null_text = None if probe.text_shape is None else TextEmbedding.zeros(*probe.text_shape)
    expert = build_network(probe.expert.network, shape, probe.num_classes, null_text)
    router = Router(
        model=build_router(probe.router, shape, probe.num_experts, probe.num_classes, null_text),
        noise_schedule=NOISE_SCHEDULES[probe.router.noise_schedule],
        prior_counts=torch.ones(probe.num_classes + 1, probe.num_experts),
        experts=dict.fromkeys(range(probe.num_experts), _as_expert(expert, probe)),
    )
    row, t = torch.zeros(1, *shape), torch.full((1,), 0.5)
    router_flops = forward_flops(lambda: router.logits(row, t, Condition.null(1)))
    return Networks(
        expert=expert,
        router=router,
        row_flops={"expert": network_flops(expert, shape), "router": router_flops},
        parameters={name: count_parameters(model) for name, model in (("expert", expert), ("router", router.model))},
    )


def time_networks(networks: Networks, probe: NetworkProbe) -> tuple[dict[str, StageSpeed], float]:
    """Measure speeds of training and sampling, and the seconds to save a checkpoint.

    Raises `DeviceError` without the configured device.
    """
    noise_schedule, speeds = NOISE_SCHEDULES[probe.expert.noise_schedule], {}
    monolith_training = probe.expert.training
    expert_training = replace(monolith_training, batch_size=monolith_training.batch_size // probe.num_experts)

    def compute_expert_loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return {"loss": expert_loss(model, batch, probe.expert.prediction, noise_schedule)}

    def compute_router_loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return router_loss(model, batch, noise_schedule, probe.num_classes)

    def train(name: str, model: nn.Module, loss: Loss, training: TrainingConfig, unit_flops: float) -> None:
        with limited_threads(probe.cpus[name]):
            speeds[name] = _time_training(model, loss, training, probe, unit_flops)

    flops = {name: training_flops(row, 1, 1) for name, row in networks.row_flops.items()}
    train("expert", networks.expert, compute_expert_loss, expert_training, flops["expert"])
    train("monolith", networks.expert, compute_expert_loss, monolith_training, flops["expert"])
    if count_gradient_rows(probe.router, probe.num_experts):
        train("router", networks.router.model, compute_router_loss, probe.router.training, flops["router"])
    else:
        speeds["router"] = StageSpeed(unit_s=0.0)
    with limited_threads(probe.cpus["expert"]):
        checkpoint_s = _time_checkpoint(networks.expert, compute_expert_loss, expert_training, probe, speeds["expert"])
    with limited_threads(probe.cpus["score"]):
        return speeds | _time_calls(networks, probe), checkpoint_s


def _time_training(
    model: nn.Module, loss: Loss, config: TrainingConfig, probe: NetworkProbe, unit_flops: float
) -> StageSpeed:
    """Measure the time per image from trainings of one step and of many."""
    dataset = _random_latents(probe, config.batch_size)

    def train(steps: int) -> Duration:
        return measure(lambda: _fit(model, loss, dataset, replace(config, steps=steps, checkpoint_every=steps)))

    cold, warm = train(1), train(1)
    added_steps = max(2, min(MAX_STEPS, math.ceil(TRAINING_S / REPEATS / warm.wall_s)))
    rows = added_steps * config.batch_size
    repeats = [duration_per_unit(train(1), train(1 + added_steps), rows) for _ in range(REPEATS)]
    best = min(repeats, key=lambda duration: duration.wall_s)
    return StageSpeed(
        unit_s=best.wall_s, cpu_s=best.cpu_s, once_s=max(0.0, cold.wall_s - warm.wall_s), unit_flops=unit_flops
    )


def _time_checkpoint(
    model: nn.Module, loss: Loss, config: TrainingConfig, probe: NetworkProbe, speed: StageSpeed
) -> float:
    """Measure the time of a checkpoint from a training of four steps that saves after each of the first three."""
    dataset = _random_latents(probe, config.batch_size)
    one_step = measure(lambda: _fit(model, loss, dataset, replace(config, steps=1)))
    saving_steps = measure(lambda: _fit(model, loss, dataset, replace(config, steps=4, checkpoint_every=1)))
    return max(0.0, saving_steps.wall_s - one_step.wall_s - 3 * config.batch_size * speed.unit_s) / 3


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
    """Time rows through the expert and the router, as in sampling."""
    noise_schedule, device = NOISE_SCHEDULES[probe.expert.noise_schedule], check_device(probe.sampling_device)
    expert = _as_expert(networks.expert.eval(), probe).to(device)
    networks.router.model.eval()
    router = networks.router.to(device)
    noised = torch.randn(probe.sampling_rows, *probe.latent_shape, device=device)
    t, null_condition = torch.full((len(noised),), 0.5, device=device), Condition.null(len(noised), device)
    calls: dict[str, Callable[[], Tensor]] = {
        "expert": lambda: expert.velocity(noised, t, null_condition, noise_schedule),
        "router": lambda: router.logits(noised, t, null_condition),
    }
    return {f"{name}_row": _time_call(call, len(noised), networks.row_flops[name]) for name, call in calls.items()}


@torch.inference_mode()
def _time_call(call: Callable[[], Tensor], rows: int, unit_flops: float) -> StageSpeed:
    cold, warm = measure(lambda: call().sum().item()), measure(lambda: call().sum().item())
    repeats = max(1, min(MAX_STEPS, math.ceil(CALLS_S / REPEATS / warm.wall_s)))

    def repeat() -> None:
        for _ in range(repeats):
            output = call()
        output.sum().item()

    best = min((measure(repeat) for _ in range(REPEATS)), key=lambda duration: duration.wall_s)
    units = repeats * rows
    return StageSpeed(
        unit_s=best.wall_s / units,
        cpu_s=best.cpu_s / units,
        once_s=max(0.0, cold.wall_s - warm.wall_s),
        unit_flops=unit_flops,
    )
