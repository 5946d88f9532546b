"""The prior p(k | text): multinomial logistic regression on the pooled vector of a text.

The strength of its regularization is chosen on captions that the fit has not seen. So its probabilities are calibrated:
a `sticky` selection draws experts from them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ddm_core.artifacts import CorruptArtifact
from experts.conditions.condition import NULL_CLASS, Condition
from experts.training.latent_dataset import LatentDataset

MAX_CAPTIONS: Final = 16_384
"""Most samples of the fit, spread over all clusters."""
STRENGTHS: Final = (1.0, 0.1, 0.01, 1e-3, 1e-4)
"""Weights of the squared slopes, from the strongest."""
HELD_OUT_SHARE: Final = 0.2
MAX_ITERATIONS: Final = 100
MAX_EVALUATIONS: Final = 125
"""Of the loss and its gradient in one fit."""
SEED: Final = 20_060_815

Logits = Float[Tensor, "batch expert"]
Features = Float[Tensor, "batch feature"]
Counts = Float[Tensor, "text expert"]
"""Samples of every text in every cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrior:
    """A linear map from the pooled vector of a text, followed by the one-hot class, to one logit per expert."""

    slopes: Float[Tensor, "expert feature"]
    offsets: Float[Tensor, " expert"]
    """-inf for a cluster without samples."""

    def logits(self, condition: Condition) -> Logits:
        """Return log p(k | text, class) up to a constant per row; rows without text have no meaning."""
        features = _features(condition, self.slopes.shape[1])
        return features @ self.slopes.to(features.device).T + self.offsets.to(features.device)

    def without(self, expert_id: int) -> "TextPrior":
        """Return the prior of the other experts."""
        remaining = torch.arange(len(self.offsets)) != expert_id
        return TextPrior(slopes=self.slopes[remaining], offsets=self.offsets[remaining])

    def save(self, file: Path) -> None:
        """Write the prior as safetensors."""
        save_file({"slopes": self.slopes.contiguous(), "offsets": self.offsets.contiguous()}, file)

    @classmethod
    def load(cls, file: Path) -> "TextPrior":
        """Read what `save` wrote; raise `CorruptArtifact` for an invalid file."""
        try:
            tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
            prior = cls(**tensors)
            if prior.slopes.ndim != 2 or prior.offsets.shape != prior.slopes.shape[:1]:
                raise ValueError(f"slopes of shape {tuple(prior.slopes.shape)}")
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise CorruptArtifact(f"{file} is not a prior of texts ({error}); train the router again") from error
        return prior


def fit_text_prior(
    dataset: LatentDataset, num_experts: int, num_classes: int, added: LatentDataset | None = None
) -> TextPrior | None:
    """Fit the prior to the captions of a data set; return None for one without captions. Deterministic.

    `added` are the samples of the last cluster, if they are not part of the data set.
    """
    if dataset.captions is None:
        return None
    generator = torch.Generator().manual_seed(SEED)
    parts = [(dataset, dataset.cluster_id)]
    if added is not None:
        parts.append((added, torch.full_like(added.cluster_id, num_experts - 1)))
    stride, conditions, ids = -(-sum(len(part) for part, _ in parts) // MAX_CAPTIONS), [], []
    for part, cluster_ids in parts:
        rows = torch.arange(0, len(part), stride)
        conditions.append(part.condition(rows, torch.rand(len(rows), generator=generator)))
        ids.append(cluster_ids[rows])
    condition, cluster_id = Condition.concatenate(conditions), torch.cat(ids)
    has_text = ~condition.has_null_text
    condition, cluster_id = condition.rows(has_text), cluster_id[has_text]
    if not len(condition):
        return None
    if num_classes:
        condition = Condition.concatenate(
            [condition, replace(condition, class_id=torch.full_like(condition.class_id, NULL_CLASS))]
        )
        cluster_id = cluster_id.repeat(2)
    width = dataset.captions.null_text.shape[2]
    features = _features(condition, width + num_classes)
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    texts, text_id = _unique((features - mean) / scale)
    counts = torch.zeros(len(texts), num_experts, dtype=texts.dtype)
    counts.index_put_((text_id, cluster_id), torch.ones(()).to(counts), accumulate=True)
    captions, caption_id = _unique(texts[:, :width])
    is_held_out = torch.rand(len(captions), generator=generator) < HELD_OUT_SHARE
    fitted = _fit_calibrated(texts, counts, is_held_out[caption_id])
    slopes = fitted.slopes / scale
    offsets = (fitted.offsets - slopes @ mean).masked_fill(counts.sum(0) == 0, -torch.inf)
    return TextPrior(slopes=slopes, offsets=offsets)


def _unique(rows: Features) -> tuple[Float[Tensor, "text feature"], Int[Tensor, " batch"]]:
    """Return the different rows, and which of them each row is."""
    return torch.unique(rows, dim=0, return_inverse=True)  # type: ignore[no-any-return]


def _fit_calibrated(texts: Features, counts: Counts, is_held_out: Bool[Tensor, " text"]) -> TextPrior:
    """Fit to all texts, with the strength of least cross-entropy on the held-out ones in a fit to the others."""
    if not is_held_out.any() or is_held_out.all():
        return _fit(texts, counts, STRENGTHS[0])
    losses: list[float] = []
    for strength in STRENGTHS:
        fitted = _fit(texts[~is_held_out], counts[~is_held_out], strength)
        losses.append(float(_cross_entropy(fitted.slopes, fitted.offsets, texts[is_held_out], counts[is_held_out])))
        if losses[-1] > min(losses):
            break
    return _fit(texts, counts, STRENGTHS[losses.index(min(losses))])


def _fit(texts: Features, counts: Counts, strength: float) -> TextPrior:
    """Minimize the cross-entropy plus `strength` / 2 times the squared slopes."""
    slopes = torch.zeros(counts.shape[1], texts.shape[1], dtype=texts.dtype, requires_grad=True)
    offsets = torch.zeros(counts.shape[1], dtype=texts.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [slopes, offsets], max_iter=MAX_ITERATIONS, max_eval=MAX_EVALUATIONS, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _cross_entropy(slopes, offsets, texts, counts) + strength / 2 * slopes.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return TextPrior(slopes=slopes.detach(), offsets=offsets.detach())


def _cross_entropy(slopes: Tensor, offsets: Tensor, texts: Features, counts: Counts) -> Float[Tensor, ""]:
    log_probability = (texts @ slopes.T + offsets).log_softmax(-1)
    return -(counts * log_probability).sum() / counts.sum()


def _features(condition: Condition, width: int) -> Float[Tensor, "batch {width}"]:
    """Return pooled vectors in double precision, and after them the one-hot classes, 0 for none."""
    if condition.text is None:
        raise ValueError("a prior of texts needs a text in the condition")
    pooled = condition.text.pooled.double()
    classes = width - pooled.shape[1]
    return torch.cat([pooled, functional.one_hot(condition.class_id + 1, classes + 1)[:, 1:].to(pooled)], dim=1)
