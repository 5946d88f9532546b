"""From seeds to images; image i depends on seed i alone, whatever the batch."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.multi_network_experts import TimeSplitExpert, TruncatedExpert
from ensemble.routing import CallCounts
from ensemble.sampling.guidance import guided_velocity, reflected_solver
from ensemble.solvers import SOLVERS, noise_for, sample_few_step, uniform_times
from experts.codec import Codec
from experts.compressed.quantization.int8_linear import Int8Linear
from experts.condition import Condition
from experts.expert import Expert


def compile_networks(experts: Iterable[object]) -> None:
    """In place; what is no network of our own, has a cache, or is compiled already, stays."""
    for expert in experts:
        if isinstance(expert, TimeSplitExpert):
            compile_networks(expert.networks)
        elif isinstance(expert, TruncatedExpert):
            compile_networks([expert.draft, expert.refiner])
        elif isinstance(expert, Expert) and expert.cache is None:
            _compile(expert.model)


def _compile(model: nn.Module) -> None:
    if model._compiled_call_impl is not None:
        return
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.prepare()
    model.compile(dynamic=True)


Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
Progress = Callable[[int, int], None]
"""(images done, images in all); unfinished images count by how far their t has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """What one sample call gave, and what it took."""

    images: Float[Tensor, "batch height width channel"]
    """From 0 to 1, on the CPU."""
    latents: Latents
    calls: CallCounts
    """Rows that each expert and the router were called on."""
    calls_per_step: float
    """`Calls.per_evaluation`: 1 for sticky, K for full, twice that with guidance."""
    seconds: float


def sample(
    ensemble: Ensemble,
    codec: Codec,
    seeds: Sequence[int],
    config: SamplingConfig,
    class_ids: Sequence[int] | None = None,
    on_progress: Progress | None = None,
    weak: Ensemble | None = None,
) -> SampleResult:
    """Draw one image for every seed; without `class_ids`, or where one is -1, unconditionally.

    Experts with a course go through that instead of `config`'s solver and steps; where it was distilled, guidance is
    within them. `weak` is what `config.reflection` asks for. Raises `ValueError` without seeds, if seeds and classes do
    not pair, or if experts with a course are to be reflected.
    """
    if not seeds or (class_ids is not None and len(class_ids) != len(seeds)):
        classes = "no classes" if class_ids is None else f"{len(class_ids)} classes"
        raise ValueError(f"give at least one seed, and a class for every seed or none; got {len(seeds)} and {classes}")
    if (weak is None) != (config.reflection is None):
        raise ValueError("reflection needs a weak ensemble, and nothing else does; give both, or neither")
    course = ensemble.few_step
    if config.reflection is not None and (course is not None or (weak is not None and weak.few_step is not None)):
        raise ValueError("reflection goes between steps of a solver, and these experts have a course; leave it out")
    started, calls, latents = time.monotonic(), CallCounts(), []
    ensembles = ensemble.to(config.device), weak and weak.to(config.device)
    if config.compile:
        compile_networks(ensembles[0].experts.values())
    for start in range(0, len(seeds), config.batch_size):
        rows = slice(start, start + config.batch_size)
        condition = _condition(seeds[rows], None if class_ids is None else class_ids[rows]).to(config.device)

        def report(t: float, start: int = start, size: int = len(condition)) -> None:
            if on_progress is not None:
                on_progress(start + int(size * (1 - t)), len(seeds))

        is_guided = class_ids is not None and not (course and course.is_distilled)
        scale = config.guidance_scale if is_guided else 1.0
        latents.append(_trajectory(*ensembles, codec, seeds[rows], config, condition, scale, calls, report))
    images = torch.cat([codec.decode(batch).float().cpu() for batch in latents])
    return SampleResult(
        images=images,
        latents=torch.cat(latents),
        calls=calls,
        calls_per_step=calls.per_evaluation,
        seconds=time.monotonic() - started,
    )


@torch.inference_mode()
def _trajectory(
    ensemble: Ensemble,
    weak: Ensemble | None,
    codec: Codec,
    seeds: Sequence[int],
    config: SamplingConfig,
    condition: Condition,
    guidance_scale: float,
    calls: CallCounts,
    report: Callable[[float], None],
) -> Latents:
    """The clean latents of one batch, on the CPU."""
    routing = ensemble.init_routing(seeds, condition, config.selection)
    field = guided_velocity(ensemble, condition, routing, guidance_scale)

    def velocity(noised: Latents, t: Times) -> Latents:
        report(float(t[0]))
        calls.evaluations += len(noised)
        return field(noised, t)

    def noise(occasion: int) -> Latents:
        return noise_for(seeds, codec.latent_shape, occasion).to(config.device)

    begun, solver = ensemble.initial_latents(noise, condition, routing), SOLVERS[config.solver]
    if config.reflection is not None and weak is not None:
        other = weak.init_routing(seeds, condition, config.selection)
        routing.calls.weak = other.calls
        weak_field = guided_velocity(weak, condition, other, guidance_scale)
        solver = reflected_solver(config.solver, field, weak_field, config.reflection.steps)
    course = ensemble.few_step
    if course is None:
        clean = solver(velocity, begun, uniform_times(config.steps))
    else:
        clean = sample_few_step(velocity, begun, course, ensemble.noise_schedule, lambda step: noise(1 + step))
    report(0.0)
    calls.add(routing.calls)
    return clean.cpu()


def _condition(seeds: Sequence[int], class_ids: Sequence[int] | None) -> Condition:
    return Condition.null(len(seeds)) if class_ids is None else Condition(torch.tensor(list(class_ids)))
