"""Selections: rules from logits to gates, the mixing coefficients of the experts.

                         expert calls per step   with exact experts and an exact router
    full                 K                       exact
    top_k                k                       biased towards large clusters near t = 1
    threshold            1 to 1 / probability    nearly exact: only improbable experts are dropped
    nucleus              1 to K                  nearly exact
    sample               1 to `draws`            exact in the limit of many steps: draws again at every step
    sticky               1                       exact: one draw from the prior, kept to the end
    full_then_top1       K, then 1               biased below `t_switch`, less for a lower `t_switch`
    threshold_then_top1  a few, then 1           as full_then_top1, with `threshold` above `t_switch`
    full_then_sticky     K, then 1               exact: full, then one draw from the posterior at `t_switch`, kept
    sticky_resample      1                       exact: sticky, with a second draw from the posterior at `t_switch`
    coupled_resample     1                       biased: exact for fixed posteriors, but they depend on the drawn expert

Why sticky, full_then_sticky and sticky_resample are exact: the density of cluster k changes by its own velocity alone,
d p_k / d t = - div(u_k p_k). A pair (x, k) drawn with probability p(x, t) p(k | x, t) that follows u_k therefore keeps
this distribution. A draw from p(k | x, t) at any fixed t does not change it. A rule that draws more often where
p(k | x, t) falls along its own trajectory, such as `coupled_resample`, does change it; the numbers are in
`tests/laws/test_selection_laws.py`.

The gates of the kept experts are always renormalized. To add a selection, write the function and add it to
`SELECTIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from router.config import AUTO, SelectionConfig, SelectionName

Logits = Float[Tensor, "batch expert"]
Gates = Float[Tensor, "batch expert"]
"""Mixing coefficients: rows sum to one, a dropped expert has exactly zero."""
Times = Float[Tensor, " batch"]
Uniforms = Float[Tensor, "batch draw"]
"""Numbers in [0, 1), from which experts are drawn; deterministic selections ignore them."""
Rows = Bool[Tensor, " batch"]


def never(t: Times, _config: SelectionConfig) -> Rows:
    """Return False for every row."""
    return torch.zeros_like(t, dtype=torch.bool)


def always(t: Times, _config: SelectionConfig) -> Rows:
    """Return True for every row."""
    return torch.ones_like(t, dtype=torch.bool)


def below_switch(t: Times, config: SelectionConfig) -> Rows:
    """Return where t is at most `config.t_switch`."""
    return t <= config.t_switch


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """One rule from logits to gates; its state along a trajectory is in `ensemble/routing.py`."""

    gates: Callable[[Logits, Times, Uniforms, SelectionConfig], Gates]
    draws: Callable[[SelectionConfig], int] = lambda _config: 0
    """Number of uniform numbers per row."""
    draw_key: Literal["t", "trajectory", "evaluation"] = "t"
    """Dependence of those numbers besides the seed: on t, on nothing else, or on the number of earlier evaluations."""
    draws_from_prior: bool = False
    """Whether one expert is drawn from the prior before the first evaluation, and used until the first router query."""
    queries_router: Callable[[Times, SelectionConfig], Rows] = always
    """Rows for which the router is evaluated; the gates of other rows do not change."""
    freezes_gates: Callable[[Times, SelectionConfig], Rows] = never
    """Rows whose gates are fixed for the rest of the trajectory, even if t rises again."""
    is_chain: bool = False
    """Whether each draw depends on the previous one, by `maximal_coupling`."""

    def shares_expert_across_guidance(self, t: Times, config: SelectionConfig) -> Rows:
        """Return where both branches of guidance use the expert that was drawn for the condition."""
        return always(t, config) if self.draws_from_prior else self.freezes_gates(t, config)


def full(logits: Logits, _t: Times, _uniforms: Uniforms, _config: SelectionConfig) -> Gates:
    """Weight every expert by the softmax of the logits: equation (7) of McAllister et al. 2025, arXiv:2501.05450."""
    return logits.softmax(-1)


def top_k(logits: Logits, _t: Times, _uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """Keep the `config.k` most probable experts; all of them if there are fewer."""
    best = logits.topk(min(config.k, logits.shape[-1]), dim=-1).indices
    return _masked_softmax(logits, torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, value=True))


def threshold(logits: Logits, _t: Times, _uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """Keep every expert at least as probable as `config.probability`, and always the most probable one."""
    return _masked_softmax(logits, (logits.softmax(-1) >= config.probability) | _argmax_mask(logits))


def nucleus(logits: Logits, _t: Times, _uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """Keep the fewest experts that reach `config.total` together (Holtzman et al. 2020, arXiv:1904.09751)."""
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    previous_total = ordered.cumsum(-1) - ordered
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, previous_total < config.total)
    return _masked_softmax(logits, keep | _argmax_mask(logits))


def sample(logits: Logits, _t: Times, uniforms: Uniforms, _config: SelectionConfig) -> Gates:
    """Draw from the softmax once for each column of `uniforms`; gates are the shares of the draws."""
    probability = logits.softmax(-1).double()
    cumulative = probability.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms.double() * cumulative[:, -1:], right=True)
    positions = torch.arange(logits.shape[-1], device=logits.device)
    last_possible = torch.where(probability > 0, positions, 0).amax(-1, keepdim=True)
    votes = torch.zeros_like(logits).scatter_add(
        -1, torch.minimum(drawn, last_possible), torch.ones_like(uniforms, dtype=logits.dtype)
    )
    return votes / uniforms.shape[-1]


def full_then_top1(logits: Logits, t: Times, uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """Use all experts while t is above `config.t_switch`, the most probable one below."""
    is_early = (t > config.t_switch).unsqueeze(-1)
    return torch.where(is_early, full(logits, t, uniforms, config), _masked_softmax(logits, _argmax_mask(logits)))


def threshold_then_top1(logits: Logits, t: Times, uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """Apply `threshold` while t is above `config.t_switch`, keep the most probable expert below."""
    is_early = (t > config.t_switch).unsqueeze(-1)
    return torch.where(is_early, threshold(logits, t, uniforms, config), _masked_softmax(logits, _argmax_mask(logits)))


def full_then_sticky(logits: Logits, t: Times, uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """Use all experts while t is above `config.t_switch`; below, one draw by `sample`, which is then fixed."""
    is_early = (t > config.t_switch).unsqueeze(-1)
    return torch.where(is_early, full(logits, t, uniforms, config), sample(logits, t, uniforms, config))


def maximal_coupling(before: Gates, drawn: Gates, now: Gates) -> Gates:
    """Return probabilities of the next expert, given the one `drawn` (one-hot rows) from the probabilities `before`.

    The next expert then has the distribution `now`, and changes as rarely as possible: with probability
    TV(before, now), the total variation distance.
    """
    # Maximal coupling (Lindvall 2002, Lectures on the Coupling Method, theorem I.5.2), given its first half:
    # stay at i with probability min(1, now_i / before_i), else move to j with probability (now_j - before_j)+ / TV.
    stay = ((now * drawn).sum(-1, keepdim=True) / (before * drawn).sum(-1, keepdim=True)).clamp(max=1)
    gained = (now - before).clamp(min=0)
    total = gained.sum(-1, keepdim=True)
    return torch.where(total > 0, stay * drawn + (1 - stay) * gained / total, drawn)


def _argmax_mask(logits: Logits) -> Bool[Tensor, "batch expert"]:
    """Return a mask of the most probable expert of every row."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.argmax(-1, keepdim=True), value=True)


def _masked_softmax(logits: Logits, keep: Bool[Tensor, "batch expert"]) -> Gates:
    """Return the softmax over the kept experts alone; all others are exactly zero."""
    return logits.masked_fill(~keep, -torch.inf).softmax(-1)


SELECTIONS: dict[SelectionName, Selection] = {
    "full": Selection(gates=full),
    "top_k": Selection(gates=top_k),
    "threshold": Selection(gates=threshold),
    "nucleus": Selection(gates=nucleus),
    "sample": Selection(gates=sample, draws=lambda config: config.draws),
    "sticky": Selection(gates=sample, draws=lambda _config: 1, draws_from_prior=True, queries_router=never),
    "full_then_top1": Selection(gates=full_then_top1),
    "threshold_then_top1": Selection(gates=threshold_then_top1),
    "full_then_sticky": Selection(
        gates=full_then_sticky, draws=lambda _config: 1, draw_key="trajectory", freezes_gates=below_switch
    ),
    "sticky_resample": Selection(
        gates=sample,
        draws=lambda _config: 1,
        draw_key="trajectory",
        draws_from_prior=True,
        queries_router=below_switch,
        freezes_gates=below_switch,
    ),
    "coupled_resample": Selection(
        gates=sample, draws=lambda _config: 1, draw_key="evaluation", draws_from_prior=True, is_chain=True
    ),
}


def get_selection(config: SelectionConfig) -> Selection:
    """Return the selection of a configuration; raises `ValueError` for `auto`, which has no rule."""
    if config.name == AUTO:
        raise ValueError(
            "selection `auto` is a placeholder for the result of a run's stage `selection_search`, in its "
            f"selection_choice.json; sample with that one, or with one of {', '.join(SELECTIONS)}"
        )
    return SELECTIONS[config.name]
