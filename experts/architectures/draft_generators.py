"""Cheap generators of clean latents, with which a truncated trajectory may begin; each makes one latent of one noise.

`Anchors` are centroids of a cluster, drawn by their shares (Liao et al. 2024, DiffusionDrive, arXiv:2411.15139).
`Autoregressive` says one part of a latent after the other (Huang et al. 2024, Trajectory Diffuser, arXiv:2407.16142).
"""

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

Latents = Float[Tensor, "batch *latent"]
Tokens = Float[Tensor, "batch token part"]
ClassIndex = Int[Tensor, " batch"]
Shares = Float[Tensor, "condition anchor"]

LEAST_SCALE = 1e-2
"""No part of a latent is drawn with a smaller standard deviation."""


class Anchors(ModelMixin, ConfigMixin):
    """Looks up one of a few latents."""

    means: Tensor
    shares: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latent_shape: Sequence[int], count: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(count, *latent_shape))
        self.register_buffer("shares", torch.full((num_classes + 1, count), 1 / count))

    @classmethod
    def of(cls, means: Latents, shares: Shares) -> "Anchors":
        """`shares` are p(anchor | class), the null class in the last row."""
        made: Anchors = cls(list(means.shape[1:]), len(means), len(shares) - 1)
        made.means, made.shares = means.float(), shares.float()
        made.eval()
        return made

    def forward(self, noise: Latents, class_index: ClassIndex) -> Latents:
        """The anchor that the first entry of the noise falls on."""
        uniform = torch.special.ndtr(noise.flatten(1)[:, :1].double())
        edges = self.shares[class_index].double().cumsum(1)
        chosen = (uniform * edges[:, -1:] > edges).sum(1).clamp(max=len(self.means) - 1)
        said: Latents = self.means[chosen]
        return said


class Autoregressive(ModelMixin, ConfigMixin):
    """A recurrent network that draws each row of a picture, or each part of a vector, from a Gaussian.

    p(x) = prod_i N(x_i; m(x_1 ... x_{i-1}), s(x_1 ... x_{i-1})^2)
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latent_shape: Sequence[int], num_classes: int, width: int, part: int) -> None:
        super().__init__()
        self.part, self.tokens = part, math.ceil(math.prod(latent_shape) / part)
        self.told = nn.Embedding(num_classes + 1, width)
        self.cell = nn.GRUCell(part, width)
        self.out = nn.Linear(width, 2 * part)

    def forward(self, noise: Latents, class_index: ClassIndex) -> Latents:
        """What it draws with this noise."""
        said, hidden, drawn = torch.zeros_like(self._tokens(noise)[:, 0]), self.told(class_index), []
        for own in self._tokens(noise).unbind(1):
            hidden = self.cell(said, hidden)
            mean, scale = self._gaussian(hidden)
            said = mean + scale * own
            drawn.append(said)
        return self._latents(torch.stack(drawn, 1), noise)

    def loss(self, clean: Latents, class_index: ClassIndex) -> Float[Tensor, ""]:
        """Negative log-likelihood an entry, up to a constant."""
        tokens, hidden = self._tokens(clean), self.told(class_index)
        before = functional.pad(tokens, (0, 0, 1, -1))
        terms = []
        for given, own in zip(before.unbind(1), tokens.unbind(1), strict=True):
            hidden = self.cell(given, hidden)
            mean, scale = self._gaussian(hidden)
            terms.append((((own - mean) / scale).square() / 2 + scale.log()).mean())
        return torch.stack(terms).mean()

    def _gaussian(self, hidden: Float[Tensor, "batch width"]) -> tuple[Tensor, Tensor]:
        mean, raw = self.out(hidden).chunk(2, dim=1)
        return mean, functional.softplus(raw) + LEAST_SCALE

    def _tokens(self, latents: Latents) -> Tokens:
        """Rows of all channels of a picture, parts of a vector; the last is filled up with zeros."""
        flat = latents.transpose(1, 2).flatten(1) if latents.ndim == 4 else latents.flatten(1)
        return functional.pad(flat, (0, self.tokens * self.part - flat.shape[1])).reshape(-1, self.tokens, self.part)

    def _latents(self, tokens: Tokens, like: Latents) -> Latents:
        flat = tokens.flatten(1)[:, : math.prod(like.shape[1:])]
        if like.ndim != 4:
            return flat.reshape(like.shape)
        channels, height, width = like.shape[1:]
        return flat.reshape(-1, height, channels, width).transpose(1, 2)


DRAFTS: tuple[type[nn.Module], ...] = (Anchors, Autoregressive)
"""Those that a folder may hold; an expert is one too, if it is asked at few t."""
