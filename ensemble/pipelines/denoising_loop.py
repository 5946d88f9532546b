"""The loop of a pipeline's call: batches of images, from noise to clean latents, with progress and a callback."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ensemble.ensemble import Ensemble
from ensemble.pipelines.call import Noise, StepCallback
from ensemble.pipelines.guided_field import Guidance, GuidedField
from ensemble.pipelines.optimizations import with_caches
from ensemble.pipelines.schedulers import check_scheduler, set_times
from ensemble.routing import CallCounts, RoutingState
from ensemble.sampling.batches import plan_batches
from ensemble.solvers import few_step_update
from experts.conditions.condition import Condition
from experts.types import Latents, RowIds
from router.config import SelectionConfig

TIMESTEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of a pipeline, for all its images."""

    condition: Condition
    negative: Condition
    noise: Noise
    selection: SelectionConfig
    guidance: Guidance
    steps: int
    sigmas: Sequence[float] | None
    tokens: int
    """Tokens of one latent, on which a dynamic shift of t depends."""
    callback: StepCallback | None
    callback_inputs: Sequence[str]


def sample_latents(pipeline: Any, request: Request) -> tuple[Latents, CallCounts]:
    """Return the clean latents of all images of a request, and the network calls."""
    ensemble, seeds, device = pipeline.ensemble, request.noise.seeds, pipeline._execution_device
    if ensemble.few_step is None:
        check_scheduler(pipeline.scheduler, ensemble.noise_schedule.name)
    routing = ensemble.init_routing(seeds, request.condition, request.selection)
    gates = routing.state.gates if request.selection.name == "sticky" else None
    calls, clean = CallCounts(), []
    one_expert = pipeline.pager is not None or ensemble.shares_weights(gates)
    batches = plan_batches(len(seeds), pipeline.sampling.batch_size, gates, one_expert=one_expert)
    with pipeline.progress_bar(total=len(seeds)) as bar:
        for rows in batches:
            clean.append(_denoise(pipeline, ensemble, request, rows, calls, bar))
    order = torch.cat(list(batches)).argsort().to(device)
    return torch.cat(clean)[order], calls


def _denoise(pipeline: Any, ensemble: Ensemble, request: Request, rows: RowIds, calls: CallCounts, bar: Any) -> Latents:
    """Integrate the trajectories of one batch from noise to clean latents."""
    device, dtype, few_step = pipeline._execution_device, pipeline.dtype, ensemble.few_step

    def noise(index: int) -> Latents:
        return request.noise.draw(rows, index).to(device, dtype)

    if few_step is None:
        times = set_times(pipeline.scheduler, request.steps, request.tokens, device, request.sigmas).tolist()
        timesteps = pipeline.scheduler.timesteps
    else:
        times, timesteps = list(few_step.times), TIMESTEPS * torch.tensor(few_step.times)
    ensemble = with_caches(ensemble, pipeline.cache_hooks, times)
    field, routing = _start_field(ensemble, request, rows, device)
    latents = ensemble.initial_latents(noise, field.condition, routing)
    field.steps = pipeline._num_timesteps = len(times)
    for step, t in enumerate(times):
        if pipeline.interrupt:
            break
        velocity = field.velocity(latents, t, step)
        if few_step is None:
            latents = pipeline.scheduler.step(velocity, timesteps[step], latents, return_dict=False)[0]
        else:
            latents = few_step_update(
                velocity, latents, step, few_step, ensemble.noise_schedule, lambda index: noise(1 + index)
            )
        latents = _call_back(pipeline, request, step, timesteps[step], latents, field)
        bar.update(len(rows) / len(times))
    calls.add(field.routing.calls)
    return latents


def _start_field(
    ensemble: Ensemble, request: Request, rows: RowIds, device: torch.device
) -> tuple[GuidedField, RoutingState]:
    """Return the velocity field of a batch, and the state of its branch with the condition."""
    positions = rows.to(device)
    condition = request.condition.rows(positions)
    seeds = [request.noise.seeds[row] for row in rows.tolist()]
    routing = ensemble.init_routing(seeds, condition, request.selection)
    return GuidedField.start(ensemble, condition, request.negative.rows(positions), routing, request.guidance), routing


def _call_back(
    pipeline: Any, request: Request, step: int, timestep: Tensor, latents: Latents, field: GuidedField
) -> Latents:
    """Call the callback of a request, and return the latents to continue with."""
    if request.callback is None:
        return latents
    text = field.condition.text
    tensors = {"latents": latents, "prompt_embeds": None if text is None else text.sequence, "gates": field.gates}
    requested = {name: tensors[name] for name in request.callback_inputs}
    changed = dict(request.callback(pipeline, step, timestep, requested) or {})
    if text is not None and "prompt_embeds" in changed:
        field.condition = Condition(field.condition.class_id, replace(text, sequence=changed["prompt_embeds"]))
    if "gates" in changed:
        field.routing.state.gates = changed["gates"].repeat(field.routing.branches, 1)
    replaced: Latents = changed.get("latents", latents)
    return replaced
