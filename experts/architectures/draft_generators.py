"""Draft generators: cheap generators of clean latents that a truncated trajectory starts from.

Each maps one noise latent to one clean latent. `Anchors` returns centroids of a cluster, drawn by their shares (Liao et
al. 2024, DiffusionDrive, arXiv:2411.15139). `Autoregressive` generates the parts of a latent one after the other (Huang
et al. 2024, Trajectory Diffuser, arXiv:2407.16142).
"""

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from experts.conditions.text_embedding import TextEmbedding
from experts.types import ClassIndex, Latents

Tokens = Float[Tensor, "batch token part"]
Shares = Float[Tensor, "condition anchor"]

MIN_SHARE = 1e-4
"""Lower bound of the confidence in an anchor at the start of training."""
MIN_SCALE = 1e-2
"""Lower bound of the standard deviation of a part of a latent."""


class Anchors(ModelMixin, ConfigMixin):
    """Returns one of a few stored latents."""

    means: Tensor
    shares: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latent_shape: Sequence[int], count: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(count, *latent_shape))
        self.register_buffer("shares", torch.full((num_classes + 1, count), 1 / count))

    @classmethod
    def from_means(cls, means: Latents, shares: Shares) -> "Anchors":
        """Create a generator from anchors and p(anchor | class), the null class in the last row."""
        anchors: Anchors = cls(list(means.shape[1:]), len(means), len(shares) - 1)
        anchors.means, anchors.shares = means.float(), shares.float()
        anchors.eval()
        return anchors

    def forward(self, noise: Latents, class_index: ClassIndex) -> Latents:
        """Return the anchor that the first entry of the noise selects by the inverse distribution function."""
        return self.select(noise, self.shares[class_index])

    def select(self, noise: Latents, shares: Shares) -> Latents:
        """Return the anchor of every row, by its shares up to a factor."""
        uniform = torch.special.ndtr(noise.flatten(1)[:, :1].double())
        edges = shares.double().cumsum(1)
        anchor_index = (uniform * edges[:, -1:] > edges).sum(1).clamp(max=len(self.means) - 1)
        drafts: Latents = self.means[anchor_index]
        return drafts


class PromptedAnchors(Anchors):
    """Anchors whose shares a head predicts from a text, as no table can hold those of every text.

    The confidence of anchor k is s_k = sigmoid(head(condition)_k), trained as DiffusionDrive's (Liao et al. 2024,
    arXiv:2411.15139): sum_k BCE(s_k, y_k), y_k = 1 for the anchor nearest to the sample. Its minimum is
    p(k | condition), so drafts are drawn by s_k.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, latent_shape: Sequence[int], count: int, num_classes: int, text_shape: Sequence[int], width: int
    ) -> None:
        """Take the features of a token and of the pooled text, and the hidden width of the head."""
        super().__init__(latent_shape, count, num_classes)
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.head = nn.Sequential(
            nn.Linear(sum(text_shape) + width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.out = nn.Linear(width, count)

    @classmethod
    def from_anchors(cls, anchors: Anchors, text_shape: Sequence[int], width: int) -> "PromptedAnchors":
        """Create a generator with the shares of these anchors over all conditions, whatever the text."""
        shape, classes = list(anchors.means.shape[1:]), len(anchors.shares) - 1
        prompted: PromptedAnchors = cls(shape, len(anchors.means), classes, list(text_shape), width)
        prompted.means, prompted.shares = anchors.means, anchors.shares
        nn.init.zeros_(prompted.out.weight)
        with torch.no_grad():
            prompted.out.bias.copy_(torch.logit(anchors.shares[-1], eps=MIN_SHARE))
        prompted.eval()
        return prompted

    def logits(self, class_index: ClassIndex, text: TextEmbedding | None) -> Shares:
        """Return the logit of the confidence in every anchor; rows of the null text, and None, have no text."""
        classes = self.class_embedding(class_index)
        features = classes.new_zeros(len(classes), self.head[0].in_features - classes.shape[1])
        if text is not None:
            weight = (text.mask & ~text.is_null[:, None]).to(classes)
            mean = torch.einsum("btw,bt->bw", text.sequence.to(classes), weight) / weight.sum(1, keepdim=True).clamp(1)
            features = torch.cat([mean, text.pooled.to(classes).masked_fill(text.is_null[:, None], 0)], dim=1)
        logits: Shares = self.out(self.head(torch.cat([features, classes], dim=1)))
        return logits

    def forward(self, noise: Latents, class_index: ClassIndex, text: TextEmbedding | None = None) -> Latents:
        """Return the anchor that the first entry of the noise selects by the confidences."""
        return self.select(noise, self.logits(class_index, text).sigmoid())

    def loss(self, clean: Latents, class_index: ClassIndex, text: TextEmbedding | None) -> Float[Tensor, ""]:
        """Return the sum over anchors of the cross-entropy of the confidences, in the mean of the rows."""
        logits = self.logits(class_index, text)
        nearest = torch.cdist(clean.flatten(1), self.means.to(clean).flatten(1)).argmin(1)
        target = functional.one_hot(nearest, logits.shape[1]).to(logits)
        return functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean()


class Autoregressive(ModelMixin, ConfigMixin):
    """A recurrent network that samples each row of an image, or each part of a vector, from a Gaussian.

    p(x) = prod_i N(x_i; m(x_1 ... x_{i-1}), s(x_1 ... x_{i-1})^2)
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latent_shape: Sequence[int], num_classes: int, width: int, part: int) -> None:
        super().__init__()
        self.part, self.tokens = part, math.ceil(math.prod(latent_shape) / part)
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.cell = nn.GRUCell(part, width)
        self.out = nn.Linear(width, 2 * part)

    def forward(self, noise: Latents, class_index: ClassIndex) -> Latents:
        """Return the latents that this noise generates."""
        noise_tokens, tokens = self._to_tokens(noise), []
        token, hidden = torch.zeros_like(noise_tokens[:, 0]), self.class_embedding(class_index)
        for token_noise in noise_tokens.unbind(1):
            hidden = self.cell(token, hidden)
            mean, scale = self._predict_gaussian(hidden)
            token = mean + scale * token_noise
            tokens.append(token)
        return self._to_latents(torch.stack(tokens, 1), noise)

    def loss(self, clean: Latents, class_index: ClassIndex) -> Float[Tensor, ""]:
        """Return the negative log-likelihood per entry, up to a constant."""
        tokens, hidden = self._to_tokens(clean), self.class_embedding(class_index)
        previous_tokens = functional.pad(tokens, (0, 0, 1, -1))
        terms = []
        for previous_token, token in zip(previous_tokens.unbind(1), tokens.unbind(1), strict=True):
            hidden = self.cell(previous_token, hidden)
            mean, scale = self._predict_gaussian(hidden)
            terms.append((((token - mean) / scale).square() / 2 + scale.log()).mean())
        return torch.stack(terms).mean()

    def _predict_gaussian(self, hidden: Float[Tensor, "batch width"]) -> tuple[Tensor, Tensor]:
        mean, raw = self.out(hidden).chunk(2, dim=1)
        return mean, functional.softplus(raw) + MIN_SCALE

    def _to_tokens(self, latents: Latents) -> Tokens:
        """Split images into rows of all channels, and vectors into parts; the last token is padded with zeros."""
        flat = latents.transpose(1, 2).flatten(1) if latents.ndim == 4 else latents.flatten(1)
        return functional.pad(flat, (0, self.tokens * self.part - flat.shape[1])).reshape(-1, self.tokens, self.part)

    def _to_latents(self, tokens: Tokens, like: Latents) -> Latents:
        flat = tokens.flatten(1)[:, : math.prod(like.shape[1:])]
        if like.ndim != 4:
            return flat.reshape(like.shape)
        channels, height, width = like.shape[1:]
        return flat.reshape(-1, height, channels, width).transpose(1, 2)


DRAFT_GENERATORS: tuple[type[nn.Module], ...] = (Anchors, PromptedAnchors, Autoregressive)
"""Classes that a draft folder may hold; it may also hold an expert with a few-step schedule."""
