"""diffusers' schedulers that integrate a velocity from t = 1 to t = 0, and the reasons to refuse the others.

Most schedulers accept any output of a network without complaint: they read a velocity as noise, at the sigmas of a
table of betas, and return wrong samples.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from jaxtyping import Float
from torch import Tensor

from ddm_core.artifacts import read_json
from ensemble.config import Solver
from ensemble.pipeline_folder import PipelineError
from experts.config import NoiseScheduleName

EvaluationTimes = Float[Tensor, " evaluation"]
SAFE = "FlowMatchEulerDiscreteScheduler()"

ODE_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMapEulerDiscreteScheduler)
"""They add velocity times a step of t, on any noise schedule."""
FLOW_SIGMA_SCHEDULERS = (UniPCMultistepScheduler, DPMSolverMultistepScheduler)
"""They convert a velocity to clean latents with alpha = 1 - sigma if they are configured to."""
FLOW_SIGMA_CONFIG = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "zero"}

SOLVER_SCHEDULERS: dict[Solver, Any] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "flow_match_euler": FlowMatchEulerDiscreteScheduler,
    "flow_match_heun": FlowMatchHeunDiscreteScheduler,
}
"""The scheduler with the steps of each of our solvers."""


def check_scheduler(scheduler: Any, noise_schedule: NoiseScheduleName = "rectified_flow") -> None:
    """Raise `PipelineError` with the reason unless a scheduler samples a velocity of this noise schedule correctly."""
    if reason := _refusal(scheduler, noise_schedule):
        name = type(scheduler).__name__
        raise PipelineError(f"{name} does not sample this ensemble correctly: {reason}; use {SAFE}")


def _refusal(scheduler: Any, noise_schedule: NoiseScheduleName) -> str:
    """Return why a scheduler is wrong, or nothing for a right one."""
    config = scheduler.config
    if isinstance(scheduler, FlowMatchLCMScheduler):
        return "it is made for distilled networks, and adds noise to the estimates of all others"
    if isinstance(scheduler, ODE_SCHEDULERS):
        if config.get("stochastic_sampling"):
            return "stochastic_sampling draws noise for the whole batch, and an image must depend on its own seed alone"
        return "invert_sigmas runs from t = 0 to t = 1" if config.get("invert_sigmas") else ""
    if not isinstance(scheduler, FLOW_SIGMA_SCHEDULERS):
        return "it reads the velocity as noise, clean latents or v of a variance-preserving table of betas"
    wrong = {key: config.get(key) for key, value in FLOW_SIGMA_CONFIG.items() if config.get(key) != value}
    if wrong:
        return f"it has {wrong} and needs { ({key: FLOW_SIGMA_CONFIG[key] for key in wrong}) }"
    if str(config.get("algorithm_type", "")).startswith("sde"):
        return "an sde algorithm draws noise for the whole batch, and an image must depend on its own seed alone"
    if noise_schedule != "rectified_flow":
        return f"it assumes alpha = 1 - t, and the noise schedule of the ensemble is {noise_schedule}"
    return ""


def set_times(
    scheduler: Any, steps: int, tokens: int, device: torch.device, sigmas: Sequence[float] | None = None
) -> EvaluationTimes:
    """Set a scheduler to its first step, and return the t at which it evaluates the velocity.

    `sigmas` are the t of the steps without the last one, 0, before the scheduler's shift. The default are equal steps,
    and for multistep schedulers their own. `tokens` is the number of tokens that a dynamic shift depends on. Raises
    `PipelineError` for `sigmas` that do not fall from at most 1 to above 0, or that the scheduler does not take.
    """
    shift = {"mu": dynamic_shift(scheduler.config, tokens)} if scheduler.config.get("use_dynamic_shifting") else {}
    grid = [1 - step / steps for step in range(steps)] if sigmas is None else list(sigmas)
    if not grid or any(t <= after for t, after in pairwise([1 + 1e-6, *grid, 0])):
        raise PipelineError(f"sigmas must fall from at most 1 to above 0; got {grid}")
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        _set_heun_times(scheduler, np.array(grid), device)
    elif isinstance(scheduler, ODE_SCHEDULERS) or (
        sigmas is not None and isinstance(scheduler, UniPCMultistepScheduler)
    ):
        scheduler.set_timesteps(sigmas=grid, device=device, **shift)
    elif sigmas is None:
        scheduler.set_timesteps(steps, device=device, **shift)
    else:
        raise PipelineError(f"{type(scheduler).__name__} takes no sigmas; leave them out, or use {SAFE}")
    scheduler.set_begin_index(0)
    times: EvaluationTimes = scheduler.timesteps.float().to(device) / scheduler.config.num_train_timesteps
    return times


def _set_heun_times(scheduler: Any, grid: np.ndarray, device: torch.device) -> None:
    """Set the times of a scheduler that takes none: it evaluates the velocity at both ends of every step but the last.

    With its own times it would spend a step between t = .001 and 0.
    """
    shift = scheduler.config.shift
    first, *others = (shift * grid / (1 + (shift - 1) * grid)).tolist()
    evaluated = torch.tensor([first, *np.repeat(others, 2).tolist()], dtype=torch.float32, device=device)
    scheduler.set_timesteps(len(grid), device=device)
    scheduler.sigmas = torch.cat([evaluated, evaluated.new_zeros(1)])
    scheduler.timesteps = evaluated * scheduler.config.num_train_timesteps


def dynamic_shift(config: Any, tokens: int) -> float:
    """Return the logarithm of the shift of t for latents of so many tokens: linear between two resolutions."""
    # Esser et al. 2024, arXiv:2403.03206, section 5.3.2: more tokens need more noise to hide the same content.
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(base + (top - base) * (tokens - low) / (high - low))


def load_scheduler(folder: Path) -> Any:
    """Read a scheduler's folder; raise `PipelineError` for one that does not integrate a velocity."""
    config = read_json(folder / "scheduler_config.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    classes = {cls.__name__: cls for cls in (*ODE_SCHEDULERS, *FLOW_SIGMA_SCHEDULERS)}
    if name not in classes:
        raise PipelineError(f"{folder} must hold one of {', '.join(classes)}; got {name!r}; replace it with {SAFE}")
    return classes[name].from_config(config)
