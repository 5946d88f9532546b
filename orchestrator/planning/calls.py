"""How often networks are called to draw one image; imports no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ensemble.config import SamplingConfig
from router.config import SelectionConfig, SelectionName


@dataclass(frozen=True, slots=True, kw_only=True)
class CallsPerImage:
    """Rows that one image puts through the networks, from noise to clean."""

    expert: int
    router: int
    is_upper_bound: bool


def calls_per_image(
    sampling: SamplingConfig, num_experts: int, *, has_router: bool, is_conditional: bool
) -> CallsPerImage:
    """Of a solver, a selection and guidance; a threshold and a nucleus are counted at their worst."""
    selection, K = sampling.selection, num_experts
    moments = _moments(sampling)
    branches = 2 if is_conditional and sampling.guidance_scale != 1 else 1
    experts: dict[SelectionName, Callable[[float], int]] = {
        "full": lambda t: K,
        "top_k": lambda t: min(selection.k, K),
        "threshold": lambda t: min(K, max(1, math.floor(1 / selection.probability))),
        "nucleus": lambda t: K,
        "sample": lambda t: min(selection.draws, K),
        "sticky": lambda t: 1,
        "anneal": lambda t: K if t > selection.t_switch else 1,
    }
    routed = 0 if selection.name == "sticky" or not has_router else len(moments)
    return CallsPerImage(
        expert=branches * sum(experts[selection.name](t) for t in moments),
        router=branches * routed,
        is_upper_bound=K > 1 and _depends_on_data(selection),
    )


def _depends_on_data(selection: SelectionConfig) -> bool:
    return selection.name in ("threshold", "nucleus") or (selection.name == "sample" and selection.draws > 1)


def _moments(sampling: SamplingConfig) -> list[float]:
    """The values of t at which a velocity is asked for; Heun looks ahead in every step but the last."""
    steps = sampling.steps
    begins = [1 - step / steps for step in range(steps)]
    ahead = [1 - step / steps for step in range(1, steps)] if sampling.solver in ("heun", "flow_match_heun") else []
    return begins + ahead
