"""How often networks are called to draw one image; imports no torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ensemble.config import SamplingConfig
from router.config import SelectionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CallsPerImage:
    """Rows that one image puts through the networks, from noise to clean."""

    expert: int
    router: int
    is_upper_bound: bool


def calls_per_image(
    sampling: SamplingConfig, num_experts: int, *, has_router: bool, is_conditional: bool
) -> CallsPerImage:
    """Of a solver, a selection other than auto, and guidance; what depends on the data is counted at its worst."""
    selection, K = sampling.selection, num_experts
    moments = _moments(sampling)
    branches = 2 if is_conditional and sampling.guidance_scale != 1 else 1
    most = min(K, max(1, math.floor(1 / selection.probability)))
    experts: dict[str, Callable[[float], int]] = {
        "full": lambda t: K,
        "top_k": lambda t: min(selection.k, K),
        "threshold": lambda t: most,
        "nucleus": lambda t: K,
        "sample": lambda t: min(selection.draws, K),
        "sticky": lambda t: 1,
        "anneal": lambda t: K if t > selection.t_switch else 1,
        "switch": lambda t: most if t > selection.t_switch else 1,
        "sticky_at": lambda t: K if t > selection.t_switch else 1,
        "redraw": lambda t: 1,
        "coupled": lambda t: 1,
    }
    return CallsPerImage(
        expert=branches * sum(experts[selection.name](t) for t in moments),
        router=branches * _routed(selection, moments) if has_router else 0,
        is_upper_bound=K > 1 and _depends_on_data(selection),
    )


def dearest(candidates: Sequence[CallsPerImage], most_calls: float) -> CallsPerImage:
    """What the choice among candidates costs at worst, if `most_calls` times the fewest calls are allowed."""
    allowed = math.floor(most_calls * min(calls.expert for calls in candidates))
    return CallsPerImage(
        expert=min(allowed, max(calls.expert for calls in candidates)),
        router=max(calls.router for calls in candidates),
        is_upper_bound=len(candidates) > 1,
    )


def _routed(selection: SelectionConfig, moments: Sequence[float]) -> int:
    """How often the router is asked; a draw that is settled needs it no more."""
    early = sum(t > selection.t_switch for t in moments)
    settling = min(1, len(moments) - early)
    return {"sticky": 0, "redraw": settling, "sticky_at": early + settling}.get(selection.name, len(moments))


def _depends_on_data(selection: SelectionConfig) -> bool:
    return selection.name in ("threshold", "nucleus", "switch") or (selection.name == "sample" and selection.draws > 1)


def _moments(sampling: SamplingConfig) -> list[float]:
    """The values of t at which a velocity is asked for; Heun looks ahead in every step but the last."""
    steps = sampling.steps
    begins = [1 - step / steps for step in range(steps)]
    ahead = [1 - step / steps for step in range(1, steps)] if sampling.solver in ("heun", "flow_match_heun") else []
    return begins + ahead
