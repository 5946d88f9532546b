"""Rows of `benchmarks.papers` on networks that divide their work by t: windows of channels, and intervals of t.

Held-out losses are those of the velocity at eight t, distances are Fréchet distances of samples to held-out digits over
pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from benchmarks.arms.paper_networks import (
    CLASSES,
    EXPERTS,
    NETWORKS,
    fit_digits,
    select_digits,
    train_experts,
)
from benchmarks.arms.paper_networks import TRAINING as DIGITS
from benchmarks.arms.paper_row import PaperRow
from ddm_core.artifacts import Workspace
from ensemble.ensemble import Ensemble
from ensemble.evaluation.metrics import frechet_distance
from ensemble.solvers import euler, make_noise, uniform_times
from experts.architectures.task_routing import TaskRouting, attach_routing
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.intervals import WHOLE, Interval
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network, route_tasks
from experts.time_split import TimeSplitExpert
from experts.training.flops import count_parameters
from experts.training.held_out import HELD_OUT, Velocity, measure_held_out
from router.config import RouterConfig, SelectionConfig
from router.router import Router, count_priors
from router.train import fit_router

SEEDS, SAMPLES, STEPS = 3, 500, 25
KIND, TRAINING = "small_dit", replace(DIGITS, steps=300, batch_size=48)
SHARE, POWER = 0.8, 4.0
BINS = 16
"""Intervals of t, each with a random window of its own."""
BOUNDS = (0.25, 0.75)
ROUTER = RouterConfig(training=TrainingConfig(steps=1000, batch_size=256, lr=1e-3, t_std=1.4))


class RandomRouting(TaskRouting):
    """Windows of the same width whose channels are drawn for each interval of t: the control."""

    def window(self, hidden: Shaped[Tensor, "batch *token channel"]) -> Bool[Tensor, "batch *one channel"]:
        """Return which channels are active."""
        active = super().window(hidden)
        orders = torch.rand(BINS, hidden.shape[-1], generator=torch.Generator().manual_seed(0)).argsort(1)
        bins = (torch.zeros(0) if self.t is None else self.t).mul(BINS).long().clamp(max=BINS - 1)
        return active.reshape(len(hidden), -1).gather(1, orders[bins]).reshape(active.shape)


def _route_at_random(model: nn.Module) -> nn.Module:
    routing = route_tasks(deepcopy(model), SHARE, POWER).get_submodule("task_routing")
    if isinstance(routing, TaskRouting):
        attach_routing(model, RandomRouting(**routing.settings()))
    return model


ARMS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "windows": lambda model: route_tasks(model, SHARE, POWER),
    "random": _route_at_random,
}


def measure_task_routing(folder: Path) -> PaperRow:
    """Train a transformer plainly, with windows of channels by t, and with random ones, on three seeds."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
    parameters = set[int]()
    condition = Condition(torch.arange(SAMPLES) % CLASSES)
    for seed in range(SEEDS):
        for name, change in ARMS.items():
            expert = _train(folder / f"{name}_{seed}", CLASSES, replace(TRAINING, seed=seed), change)
            parameters.add(count_parameters(expert.model))
            figures[name].append(_measure(expert.velocity, CLASSES, condition))
            print(seed, name, figures[name][-1], flush=True)
    (loss, distance), (loss_of_random, distance_of_random) = (
        [_mean_ratio(figures[name], figures["plain"], index) for index in (0, 1)] for name in ("windows", "random")
    )
    ratios = ", ".join(f"{a[0] / b[0]:.3f}" for a, b in zip(figures["windows"], figures["plain"], strict=True))
    return PaperRow(
        paper="Denoising Task Routing (2310.07138)",
        says="windows of channels that slide with t train better than none, without parameters",
        file="experts/architectures/task_routing.py",
        command="ddm run expert.task_share=0.8",
        criterion="loss ≤ 1.0 × and distance ≤ 1.0 × (three seeds); random windows ≥ 1.05 × loss; equal parameters",
        ours=(
            f"loss {loss:.3f} × (seeds {ratios}), distance {distance:.2f} ×; random windows {loss_of_random:.3f} ×, "
            f"{distance_of_random:.2f} ×; parameters equal: {len(parameters) == 1}"
        ),
        theirs="better FID on all data sets; with loss weights DiT-L in 2 million steps as good as DiT-XL in 7",
        differs="DiT 64 wide, 2 deep, 300 steps on digits, rectified flow; Fréchet distance over pixels",
        holds=loss <= 1 and distance <= 1 and loss_of_random >= 1.05 and len(parameters) == 1,
    )


def measure_time_bounds(folder: Path) -> PaperRow:
    """Train one network, three of intervals of t in equal steps or FLOPs, three of all t, and four of clusters."""
    condition = Condition(torch.full((SAMPLES,), -1))
    plain = [_train(folder / f"all_t_{seed}", 0, replace(TRAINING, seed=seed)) for seed in range(len(BOUNDS) + 1)]
    figures = {"one": _measure(plain[0].velocity, 0, condition)}
    third = replace(TRAINING, batch_size=TRAINING.batch_size // (len(BOUNDS) + 1))
    for name, training in (("equal steps", TRAINING), ("equal FLOPs", third)):
        networks = [
            _train(folder / f"{name.replace(' ', '_')}_{low}", 0, training, interval=(low, high))
            for low, high in pairwise((0.0, *BOUNDS, 1.0))
        ]
        split = TimeSplitExpert(experts=networks, bounds=BOUNDS)
        figures[name] = _measure(partial(split.velocity, noise_schedule=RECTIFIED_FLOW), 0, condition)
        jumps = [_jump(networks[index : index + 2], bound) for index, bound in enumerate(BOUNDS)]
        print(name, figures[name], jumps, flush=True)
        if name == "equal steps":
            jump = max(jumps)
    figures["mean"] = _measure(partial(_mean_velocity, plain), 0, condition)
    figures["clusters"] = _measure_clusters(folder, condition)
    print(figures, flush=True)
    (loss, distance), ratios = figures["one"], dict[str, tuple[float, float]]()
    for name, (own_loss, own_distance) in figures.items():
        ratios[name] = own_loss / loss, own_distance / distance
    texts = {name: f"{name} {a:.3f} × loss, {b:.2f} × distance" for name, (a, b) in ratios.items()}
    return PaperRow(
        paper="eDiff-I (2211.01324), Terrain Diffusion Network (2308.16725)",
        says="networks of intervals of t are better than one, at the same cost of a sample",
        file="experts/time_split.py",
        command="ddm run expert.time_bounds=[0.25,0.75]",
        criterion="equal steps: distance ≤ .7 × one network's, jump at bounds ≤ .05; mean of three of all t > .7",
        ours=(
            f"{texts['equal steps']}, jump {jump:.3f}; {texts['equal FLOPs']}; {texts['mean']}; four "
            f"{texts['clusters']} (equal FLOPs)"
        ),
        theirs="better text alignment at the same cost of a sample; networks are split from one that is trained first",
        differs="DiT 64 wide, 2 deep, 300 steps on digits without classes; one seed; all from scratch",
        holds=ratios["equal steps"][1] <= 0.7 and jump <= 0.05 and ratios["mean"][1] > 0.7,
    )


def _train(
    folder: Path,
    num_classes: int,
    training: TrainingConfig,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
    interval: Interval = WHOLE,
) -> Expert:
    """Train a changed transformer on digits, on an interval of t; the folder keeps it, unless its routing is random."""
    if (folder / "expert").is_dir():
        return Expert.load(folder / "expert")
    data = select_digits("dit", held_out=False)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        model = change(build_network(NETWORKS[KIND], data.latent_shape, num_classes))
    data = data if num_classes else data.without_conditions()
    expert = fit_digits(model, data, num_classes, training, folder, interval)
    if not any(isinstance(module, RandomRouting) for module in model.modules()):
        expert.save(folder / "expert")
    return expert


def _measure(velocity: Velocity, num_classes: int, condition: Condition) -> tuple[float, float]:
    """Return the held-out loss, and the Fréchet distance of samples to held-out digits."""
    clean = select_digits("dit", held_out=True).clean
    samples = draw_samples(velocity, condition, clean.shape[1:])
    return measure_loss(velocity, num_classes), frechet_distance(samples.flatten(1).numpy(), clean.flatten(1).numpy())


@torch.inference_mode()
def measure_loss(velocity: Velocity, num_classes: int) -> float:
    """Return the loss on held-out digits."""
    held_out = select_digits("dit", held_out=True)
    held_out = held_out if num_classes else held_out.without_conditions()
    return measure_held_out(velocity, held_out, RECTIFIED_FLOW, 512, torch.device("cpu"))[HELD_OUT]


@torch.inference_mode()
def draw_samples(velocity: Velocity, condition: Condition, shape: Sequence[int]) -> Tensor:
    """Return a sample of every condition."""
    noise = make_noise(range(len(condition)), tuple(shape))
    return euler(lambda noised, t: velocity(noised, t, condition), noise, uniform_times(STEPS))


def _measure_clusters(folder: Path, condition: Condition) -> tuple[float, float]:
    """Measure four experts of clusters with their router, sampled by all gates."""
    experts, data, held_out = train_experts(folder, KIND, TRAINING)
    counts = count_priors(data.cluster_id, data.class_id, EXPERTS, 0)
    fit_router(ROUTER, data, held_out, folder / "router", Workspace.at(folder / "router_work"), counts, experts=experts)
    ensemble = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=Router.load(folder / "router"))

    def velocity(noised: Tensor, t: Tensor, rows: Condition) -> Tensor:
        routing = ensemble.init_routing(range(len(t)), rows, SelectionConfig(name="full"))
        return ensemble.velocity(noised, t, rows, routing)

    return _measure(velocity, 0, condition)


def _mean_velocity(experts: Sequence[Expert], noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return torch.stack([expert.velocity(noised, t, condition) for expert in experts]).mean(0)


def _jump(networks: Sequence[Expert], t: float) -> float:
    """Return how far two networks differ at the t between them, relative to their mean velocity."""
    clean = select_digits("dit", held_out=True).clean
    times = torch.full((len(clean),), t)
    noised = RECTIFIED_FLOW.add_noise(clean, make_noise(range(len(clean)), clean.shape[1:]), times)
    with torch.inference_mode():
        first, second = (expert.velocity(noised, times, Condition.null(len(clean))) for expert in networks)
    return float((first - second).norm() / ((first + second) / 2).norm())


def _mean_ratio(figures: Sequence[tuple[float, float]], base: Sequence[tuple[float, float]], index: int) -> float:
    return sum(a[index] for a in figures) / sum(b[index] for b in base)


ROWS: Mapping[str, Callable[[Path], PaperRow]] = {
    "task_routing": measure_task_routing,
    "time_bounds": measure_time_bounds,
}
