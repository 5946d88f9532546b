"""From logits to gates: which experts speak, and how loudly.

    full       every expert, by the softmax of the logits       exact, K expert calls
    top_k      the k most probable                              k calls; biased towards large clusters near t = 1
    threshold  all at least so probable, or the best one        between the two
    nucleus    the fewest that reach a total probability        between the two
    sample     draws from the softmax, anew at every t          1 to `draws` calls, unbiased
    sticky     one draw from the prior, kept to the end         1 call, exact in distribution
    anneal     full above a chosen t, the best one below        K calls, then 1

Kept gates are always renormalised. To add a selection, write the function and add it to `SELECTIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from router.config import SelectionConfig, SelectionName

Logits = Float[Tensor, "batch expert"]
Gates = Float[Tensor, "batch expert"]
"""Mixing coefficients: rows sum to one, a silent expert has exactly zero."""
Times = Float[Tensor, " batch"]
Uniforms = Float[Tensor, "batch draw"]
"""Numbers in [0, 1), from which `sample` and `sticky` make their draws; the others read none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """One rule from logits to gates."""

    gates: Callable[[Logits, Times, Uniforms, SelectionConfig], Gates]
    pinned: bool = False
    """Whether the gates are chosen once, from the prior's logits, and kept for the whole trajectory."""
    draws: Callable[[SelectionConfig], int] = lambda _config: 0
    """How many uniform numbers a row needs."""


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


def anneal(logits: Logits, t: Times, uniforms: Uniforms, config: SelectionConfig) -> Gates:
    """All experts while t is above `config.t_switch`, the most probable one below."""
    is_early = (t > config.t_switch).unsqueeze(-1)
    return torch.where(is_early, full(logits, t, uniforms, config), _kept(logits, _best(logits)))


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
    "sticky": Selection(gates=sample, pinned=True, draws=lambda _config: 1),
    "anneal": Selection(gates=anneal),
}
