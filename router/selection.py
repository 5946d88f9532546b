"""From logits to gates: which experts speak, and how loudly.

               expert calls a step    with exact experts and an exact router
    full       K                      exact
    top_k      k                      biased towards large clusters near t = 1
    threshold  1 to 1 / probability   nearly exact: what is left out is improbable
    nucleus    1 to K                 nearly exact
    sample     1 to `draws`           exact in the limit of many steps: it is drawn anew at each
    sticky     1                      exact: one draw from the prior, kept to the end
    anneal     K, then 1              biased below `t_switch`, less so the lower that is
    switch     a few, then 1          as anneal; `threshold` instead of `full` above `t_switch`
    sticky_at  K, then 1              exact: full, then one draw from the posterior at `t_switch`, kept to the end
    redraw     1                      exact: sticky, drawn once more from the posterior at `t_switch`
    coupled    1                      biased: exact for given posteriors, but these follow the expert that was drawn

Why sticky, sticky_at and redraw are exact: cluster k's own density is moved by its own velocity alone, d p_k / d t =
- div(u_k p_k), so who starts at (x, k) with probability p(x, t) p(k | x, t) and follows u_k stays so distributed, and a
draw from p(k | x, t) at any fixed t changes nothing about it. Whatever draws more often where p(k | x, t) falls along
its own path, as `coupled_resample` does, does change it (`tests/laws/test_selection_laws.py` has the numbers).

Kept gates are always renormalised. To add a selection, write the function and add it to `SELECTIONS`.
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
"""Mixing coefficients: rows sum to one, a silent expert has exactly zero."""
Times = Float[Tensor, " batch"]
Uniforms = Float[Tensor, "batch draw"]
"""Numbers in [0, 1), from which experts are drawn; what draws none reads none."""
Rows = Bool[Tensor, " batch"]


def at_no_t(t: Times, _config: SelectionConfig) -> Rows:
    """At no t."""
    return torch.zeros_like(t, dtype=torch.bool)


def at_all_t(t: Times, _config: SelectionConfig) -> Rows:
    """At every t."""
    return torch.ones_like(t, dtype=torch.bool)


def below_switch(t: Times, config: SelectionConfig) -> Rows:
    """At `config.t_switch` and below."""
    return t <= config.t_switch


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """One rule from logits to gates; what it remembers of a trajectory is in `ensemble/routing.py`."""

    gates: Callable[[Logits, Times, Uniforms, SelectionConfig], Gates]
    draws: Callable[[SelectionConfig], int] = lambda _config: 0
    """How many uniform numbers a row needs."""
    draw_key: Literal["t", "trajectory", "evaluation"] = "t"
    """What those depend on besides the seed: on t, on nothing, or on how many evaluations came before."""
    draws_from_prior: bool = False
    """Whether one expert is drawn from the prior before the first evaluation, and speaks until the router is asked."""
    queries_router: Callable[[Times, SelectionConfig], Rows] = at_all_t
    """Where the router is asked; elsewhere the gates stay as they are."""
    freezes_gates: Callable[[Times, SelectionConfig], Rows] = at_no_t
    """Where the gates are settled for the rest of the trajectory, even if t should rise again."""
    is_chain: bool = False
    """Whether what is drawn follows from the draw before by `coupling`."""

    def shares_expert_across_guidance(self, t: Times, config: SelectionConfig) -> Rows:
        """Where both branches of guidance have the expert that was drawn for the condition."""
        return at_all_t(t, config) if self.draws_from_prior else self.freezes_gates(t, config)


def full(logits: Logits, _t: Times, _uniforms: Uniforms, _config: SelectionConfig) -> Gates:
    """Every expert, by the softmax of the logits: equation (7) of McAllister et al. 2025, arXiv:2501.05450."""
    return logits.softmax(-1)


def top_k(logits: Logits, _t: Times, _uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """The `config.k` most probable experts; all of them when there are fewer."""
    best = logits.topk(min(config.k, logits.shape[-1]), dim=-1).indices
    return _kept(logits, torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, value=True))


def threshold(logits: Logits, _t: Times, _uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """Every expert at least as probable as `config.probability`, and always the most probable one."""
    return _kept(logits, (logits.softmax(-1) >= config.probability) | _best(logits))


def nucleus(logits: Logits, _t: Times, _uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """The fewest experts that reach `config.total` together (Holtzman et al. 2020, arXiv:1904.09751)."""
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    reached_before = ordered.cumsum(-1) - ordered
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, reached_before < config.total)
    return _kept(logits, keep | _best(logits))


def sample(logits: Logits, _t: Times, uniforms: Uniforms, _config: SelectionConfig) -> Gates:
    """One draw from the softmax for each column of `uniforms`; gates are the shares of the draws."""
    probability = logits.softmax(-1).double()
    reached = probability.cumsum(-1)
    drawn = torch.searchsorted(reached, uniforms.double() * reached[:, -1:], right=True)
    positions = torch.arange(logits.shape[-1], device=logits.device)
    last_possible = torch.where(probability > 0, positions, 0).amax(-1, keepdim=True)
    votes = torch.zeros_like(logits).scatter_add(
        -1, torch.minimum(drawn, last_possible), torch.ones_like(uniforms, dtype=logits.dtype)
    )
    return votes / uniforms.shape[-1]


def full_then_top1(logits: Logits, t: Times, uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """All experts while t is above `config.t_switch`, the most probable one below."""
    is_early = (t > config.t_switch).unsqueeze(-1)
    return torch.where(is_early, full(logits, t, uniforms, config), _kept(logits, _best(logits)))


def threshold_then_top1(logits: Logits, t: Times, uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """`threshold` while t is above `config.t_switch`, the most probable expert below."""
    is_early = (t > config.t_switch).unsqueeze(-1)
    return torch.where(is_early, threshold(logits, t, uniforms, config), _kept(logits, _best(logits)))


def full_then_sticky(logits: Logits, t: Times, uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """All experts while t is above `config.t_switch`; below, the draw of `sample`, which is then settled."""
    is_early = (t > config.t_switch).unsqueeze(-1)
    return torch.where(is_early, full(logits, t, uniforms, config), sample(logits, t, uniforms, config))


def sticky_resample(before: Gates, drawn: Gates, now: Gates) -> Gates:
    """The law of the next expert, given the one `drawn` (one-hot rows) from the probabilities `before`.

    Whoever was drawn from `before` is by this law distributed as `now`, and changes as seldom as can be: with the
    probability TV(before, now).
    """
    # Maximal coupling (Lindvall 2002, Lectures on the Coupling Method, theorem I.5.2), given its first half:
    # stay at i with probability min(1, now_i / before_i), else go to j with probability (now_j - before_j)+ / TV.
    stay = ((now * drawn).sum(-1, keepdim=True) / (before * drawn).sum(-1, keepdim=True)).clamp(max=1)
    gained = (now - before).clamp(min=0)
    total = gained.sum(-1, keepdim=True)
    return torch.where(total > 0, stay * drawn + (1 - stay) * gained / total, drawn)


def _best(logits: Logits) -> Bool[Tensor, "batch expert"]:
    """True at the most probable expert of every row."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.argmax(-1, keepdim=True), value=True)


def _kept(logits: Logits, keep: Bool[Tensor, "batch expert"]) -> Gates:
    """The softmax over the kept experts alone; all others are exactly zero."""
    return logits.masked_fill(~keep, -torch.inf).softmax(-1)


SELECTIONS: dict[SelectionName, Selection] = {
    "full": Selection(gates=full),
    "top_k": Selection(gates=top_k),
    "threshold": Selection(gates=threshold),
    "nucleus": Selection(gates=nucleus),
    "sample": Selection(gates=sample, draws=lambda config: config.draws),
    "sticky": Selection(gates=sample, draws=lambda _config: 1, draws_from_prior=True, queries_router=at_no_t),
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
    """The rule that a configuration names; raises `ValueError` for `auto`, which is none."""
    if config.name == AUTO:
        raise ValueError(
            "selection `auto` is no rule: a run's stage `selection_search` finds one, and its selection_choice.json names it; "
            f"sample with that, or with one of {', '.join(SELECTIONS)}"
        )
    return SELECTIONS[config.name]
