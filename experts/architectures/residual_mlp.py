"""A residual MLP on flattened latents, modulated by t, class and pooled text; fast on a CPU."""

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from experts.types import ClassIndex, Latents, RowTimes

TIME_FEATURES = 64
EMBEDDING_WIDTH = 128


def time_features(t: RowTimes, count: int) -> Float[Tensor, "batch feature"]:
    """Return cosines and sines of t at `count` / 2 frequencies, evenly spaced on a log scale from 1 to 1000."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), count // 2, device=t.device, dtype=t.dtype))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResidualBlock(nn.Module):
    """Two linear layers with a skip connection; shift, scale and gate are inputs (adaLN-Zero).

    Peebles & Xie 2023, arXiv:2212.09748, section 3.2. With a zero gate the block is the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(
        self, hidden: Float[Tensor, "batch width"], modulation: Float[Tensor, "batch 3*width"]
    ) -> Float[Tensor, "batch width"]:
        """Return the hidden features plus the block's gated residual."""
        shift, scale, gate = modulation.chunk(3, dim=1)
        modulated = torch.addcmul(shift, self.norm(hidden), 1 + scale)
        return torch.addcmul(hidden, gate, self.outer(functional.silu(self.inner(modulated))))


class ResidualMLP(ModelMixin, ConfigMixin):
    """The demo's network, for latents of any shape; it returns zero at initialization.

    It embeds `num_classes` classes followed by the null class, and with a `pooled_width` the pooled vector of a text.
    With `input_skip` it adds each number of the latent times a factor that follows from t and the condition: for
    independent Gaussian numbers that is the exact velocity, so the blocks only learn what they say about each other.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_shape: Sequence[int],
        num_classes: int = 0,
        width: int = 448,
        depth: int = 4,
        pooled_width: int = 0,
        input_skip: bool = False,
    ) -> None:
        super().__init__()
        size = math.prod(latent_shape)
        self.time_embedding = nn.Sequential(
            nn.Linear(TIME_FEATURES, EMBEDDING_WIDTH), nn.SiLU(), nn.Linear(EMBEDDING_WIDTH, EMBEDDING_WIDTH)
        )
        self.class_embedding = nn.Embedding(num_classes + 1, EMBEDDING_WIDTH)
        if pooled_width:
            self.text_embedding = nn.Sequential(
                nn.LayerNorm(pooled_width, elementwise_affine=False),
                nn.Linear(pooled_width, EMBEDDING_WIDTH),
                nn.SiLU(),
                nn.Linear(EMBEDDING_WIDTH, EMBEDDING_WIDTH),
            )
        self.entry = nn.Linear(size, width)
        self.modulation = nn.Linear(EMBEDDING_WIDTH, depth * 3 * width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.exit = nn.Linear(width, size)
        self.skip = nn.Linear(EMBEDDING_WIDTH, size) if input_skip else None
        for layer in (self.modulation, self.exit, *([self.skip] if self.skip else [])):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        noised: Latents,
        t: RowTimes,
        class_index: ClassIndex,
        pooled_text: Float[Tensor, "batch pooled_width"] | None = None,
    ) -> Latents:
        """Return the prediction for a noised sample; `class_index` is `num_classes` for null."""
        embedding = self.time_embedding(time_features(t, TIME_FEATURES)) + self.class_embedding(class_index)
        if pooled_text is not None:
            embedding = embedding + self.text_embedding(pooled_text)
        embedding, flat = functional.silu(embedding), noised.flatten(1)
        modulations = self.modulation(embedding).chunk(len(self.blocks), dim=1)
        hidden = self.entry(flat)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            hidden = block(hidden, modulation)
        predicted: Tensor = self.exit(self.norm(hidden))
        if self.skip is not None:
            predicted = torch.addcmul(predicted, flat, self.skip(embedding))
        return predicted.reshape(noised.shape)
