"""From seeds to images; image i depends on seed i alone, not on the batch.

`sample` loops over batches and calls the solver itself, so that a network is five calls away: solver, guidance,
ensemble, expert, network.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.routing import CallCounts, RoutingState, called_experts
from ensemble.sampling.batches import plan_batches
from ensemble.sampling.guidance import GuidedVelocity, guided_velocity, reflected_solver
from ensemble.solvers import SOLVERS, TimeGrid, VelocityField, make_noise, sample_few_step, uniform_times
from experts.codec import Codec
from experts.compressed.quantization.int8_linear import Int8Linear
from experts.conditions.condition import Condition
from experts.expert_model import ExpertModel
from experts.types import RowIds

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
Progress = Callable[[int, int], None]
"""(images done, images in total); an unfinished image counts as the fraction 1 - t."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """Images of one call of `sample`, and its cost."""

    images: Float[Tensor, "batch height width channel"]
    """From 0 to 1, on the CPU."""
    latents: Latents
    calls: CallCounts
    """Rows on which each expert and the router were called."""
    calls_per_step: float
    """`CallCounts.per_evaluation`: 1 for sticky, K for full, twice that with guidance."""
    seconds: float


def sample(
    ensemble: Ensemble,
    codec: Codec,
    seeds: Sequence[int],
    config: SamplingConfig,
    condition: Condition | None = None,
    on_progress: Progress | None = None,
    weak: Ensemble | None = None,
    negative: Condition | None = None,
    *,
    decode: bool = True,
) -> SampleResult:
    """Sample one image per seed; without a `condition`, the null condition, and no guidance; without `decode` latents.

    A few-step schedule replaces `config`'s solver and steps; a distilled one includes guidance. `weak` is the ensemble
    of `config.reflection`, `negative` the condition of the unconditional branch of guidance. Raises `ValueError`
    without seeds, for unpaired conditions, for a `negative` without guidance, and to reflect few-step experts.
    """
    _check_request(ensemble, weak, seeds, condition, negative, config)
    start_s, calls, latents, images = time.monotonic(), CallCounts(), [], []
    ensemble, weak = ensemble.to(config.device, ()), weak and weak.to(config.device)
    kept = _kept_routing(ensemble, seeds, condition, config)
    gates = None if kept is None else kept.gates
    ensemble = ensemble.to(config.device, None if gates is None else called_experts(gates))
    if config.compile:
        compile_networks(ensemble.experts.values())
    batches = plan_batches(len(seeds), config.batch_size, gates, one_expert=ensemble.shares_weights(gates))
    for number, rows in enumerate(batches):
        given = _device_rows(condition, rows, config), _device_rows(negative, rows, config)
        report = _reporter(on_progress, sum(map(len, batches[:number])), len(rows), len(seeds))
        with torch.inference_mode():
            routing = kept and kept.rows(rows)
            run = _start(ensemble, weak, codec, [seeds[row] for row in rows.tolist()], *given, config, report, routing)
            if (few_step := ensemble.few_step) is None:
                clean = run.solver(run.velocity, run.initial, uniform_times(config.steps, ensemble.t_shift))
            else:
                clean = sample_few_step(run.velocity, run.initial, few_step, ensemble.noise_schedule, run.fresh_noise)
        report(0.0)
        calls.add(run.calls)
        latents.append(clean.cpu())
        if decode:
            images.append(codec.decode(clean).float().cpu())
    order = torch.cat(list(batches)).argsort()
    return SampleResult(
        images=torch.cat(images)[order] if decode else torch.empty(len(seeds), 0, 0, 0),
        latents=torch.cat(latents)[order],
        calls=calls,
        calls_per_step=calls.per_evaluation,
        seconds=time.monotonic() - start_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trajectories:
    """Everything that the integration of one batch needs."""

    initial: Latents
    velocity: GuidedVelocity
    solver: Callable[[VelocityField, Latents, TimeGrid], Latents]
    fresh_noise: Callable[[int], Latents]
    """Noise of each step of a few-step schedule; index 0 is the noise that a trajectory starts from."""
    calls: CallCounts


def _start(
    ensemble: Ensemble,
    weak: Ensemble | None,
    codec: Codec,
    seeds: Sequence[int],
    condition: Condition | None,
    negative: Condition | None,
    config: SamplingConfig,
    report: Callable[[float], None],
    routing: RoutingState | None,
) -> _Trajectories:
    """Build the trajectories of one batch: their noise, routing state if there is none yet, velocity field, solver."""
    solver = SOLVERS[config.solver]
    guidance_scale = 1.0 if condition is None else guidance_scale_of(ensemble, config)
    condition = condition or Condition.null(len(seeds), config.device)
    routing = routing or ensemble.init_routing(seeds, condition, config.selection)

    def on_evaluation(noised: Latents, t: Times) -> None:
        report(float(t[0]))
        routing.calls.evaluations += len(noised)

    def noise(index: int) -> Latents:
        return make_noise(seeds, codec.latent_shape, index).to(config.device)

    velocity = guided_velocity(ensemble, condition, routing, guidance_scale, on_evaluation, negative)
    initial = ensemble.initial_latents(noise, condition, routing)
    if config.reflection is not None and weak is not None:
        weak_routing = weak.init_routing(seeds, condition, config.selection)
        routing.calls.weak = weak_routing.calls
        weak_velocity = guided_velocity(weak, condition, weak_routing, guidance_scale, negative=negative)
        strong_velocity = replace(velocity, on_evaluation=None)
        solver = reflected_solver(config.solver, strong_velocity, weak_velocity, config.reflection.steps)
    return _Trajectories(
        initial=initial, velocity=velocity, solver=solver, fresh_noise=lambda step: noise(1 + step), calls=routing.calls
    )


def _kept_routing(
    ensemble: Ensemble, seeds: Sequence[int], condition: Condition | None, config: SamplingConfig
) -> RoutingState | None:
    """Return the state of all images if each keeps its first expert to its end; None if gates change on the way."""
    if config.selection.name != "sticky":
        return None
    given = Condition.null(len(seeds)) if condition is None else condition
    with torch.inference_mode():
        return ensemble.init_routing(seeds, given.to(config.device), config.selection)


def _device_rows(condition: Condition | None, rows: RowIds, config: SamplingConfig) -> Condition | None:
    return None if condition is None else condition.rows(rows).to(config.device)


def guidance_scale_of(ensemble: Ensemble, config: SamplingConfig) -> float:
    """Return the guidance scale of conditional samples; 1 for students that were distilled with guidance."""
    return 1.0 if ensemble.includes_guidance else config.guidance_scale


def _reporter(on_progress: Progress | None, start: int, size: int, total: int) -> Callable[[float], None]:
    """Return a function of t that reports the progress of a batch of `size` images after `start` finished ones."""

    def report(t: float) -> None:
        if on_progress is not None:
            on_progress(start + int(size * (1 - t)), total)

    return report


def _check_request(
    ensemble: Ensemble,
    weak: Ensemble | None,
    seeds: Sequence[int],
    condition: Condition | None,
    negative: Condition | None,
    config: SamplingConfig,
) -> None:
    counts = [len(part) for part in (condition, negative) if part is not None]
    if not seeds or any(count != len(seeds) for count in counts):
        raise ValueError(
            "give at least one seed, and a condition for every seed or none; got "
            f"{len(seeds)} seeds and {' and '.join(map(str, counts)) or 'no'} conditions"
        )
    if negative is not None and (condition is None or guidance_scale_of(ensemble, config) == 1):
        raise ValueError("a negative prompt is a branch of guidance, which is off; set guidance_scale above 1")
    if (weak is None) != (config.reflection is None):
        raise ValueError("reflection needs a weak ensemble, and nothing else does; give both, or neither")
    has_few_step = ensemble.few_step is not None or (weak is not None and weak.few_step is not None)
    if config.reflection is not None and has_few_step:
        raise ValueError(
            "reflection needs the steps of a solver, and these are few-step experts; remove the reflection"
        )


def compile_networks(experts: Iterable[ExpertModel]) -> None:
    """Compile the experts' networks in place; networks with a cache schedule, or compiled already, stay as they are."""
    for expert in experts:
        for model in expert.networks(with_cache=False):
            if model._compiled_call_impl is None:
                _compile(model)


def _compile(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.prepare()
    model.compile(dynamic=True)
