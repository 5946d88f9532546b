"""How often the networks are called to sample one image: closed forms of solver, selection and guidance."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ensemble.config import SamplingConfig
from router.config import SelectionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CallsPerImage:
    """Rows that one image sends through the networks, from noise to clean."""

    expert: int
    router: int
    is_upper_bound: bool
    """Whether the number depends on the data and this is its maximum."""


def calls_per_image(
    sampling: SamplingConfig, num_experts: int, *, has_router: bool, is_conditional: bool
) -> CallsPerImage:
    """Count the calls of a solver, a selection other than auto, and guidance; data-dependent counts are bounded."""
    selection, K = sampling.selection, num_experts
    times = _evaluation_times(sampling)
    branches = 2 if is_conditional and sampling.guidance_scale != 1 else 1
    above_threshold = min(K, max(1, math.floor(1 / selection.probability)))
    experts_at: dict[str, Callable[[float], int]] = {
        "full": lambda t: K,
        "top_k": lambda t: min(selection.k, K),
        "threshold": lambda t: above_threshold,
        "nucleus": lambda t: K,
        "sample": lambda t: min(selection.draws, K),
        "sticky": lambda t: 1,
        "full_then_top1": lambda t: K if t > selection.t_switch else 1,
        "threshold_then_top1": lambda t: above_threshold if t > selection.t_switch else 1,
        "full_then_sticky": lambda t: K if t > selection.t_switch else 1,
        "sticky_resample": lambda t: 1,
        "coupled_resample": lambda t: 1,
    }
    return CallsPerImage(
        expert=branches * sum(experts_at[selection.name](t) for t in times),
        router=branches * _router_calls(selection, times) if has_router else 0,
        is_upper_bound=K > 1 and _depends_on_data(selection),
    )


def most_expensive(candidates: Sequence[CallsPerImage], max_calls: float) -> CallsPerImage:
    """Return an upper bound for the selection that a search chooses.

    The search allows `max_calls` times the expert calls of the cheapest candidate.
    """
    allowed = math.floor(max_calls * min(calls.expert for calls in candidates))
    return CallsPerImage(
        expert=min(allowed, max(calls.expert for calls in candidates)),
        router=max(calls.router for calls in candidates),
        is_upper_bound=len(candidates) > 1,
    )


def _router_calls(selection: SelectionConfig, times: Sequence[float]) -> int:
    """Count the router's calls; a sample whose expert is fixed needs no more of them."""
    early = sum(t > selection.t_switch for t in times)
    fixing = min(1, len(times) - early)
    return {"sticky": 0, "sticky_resample": fixing, "full_then_sticky": early + fixing}.get(selection.name, len(times))


def _depends_on_data(selection: SelectionConfig) -> bool:
    return selection.name in ("threshold", "nucleus", "threshold_then_top1") or (
        selection.name == "sample" and selection.draws > 1
    )


def _evaluation_times(sampling: SamplingConfig) -> list[float]:
    """Return each t at which the solver evaluates the velocity; Heun evaluates twice in every step but the last."""
    steps = sampling.steps
    starts = [1 - step / steps for step in range(steps)]
    has_two_stages = sampling.solver in ("heun", "flow_match_heun")
    return starts + ([1 - step / steps for step in range(1, steps)] if has_two_stages else [])
