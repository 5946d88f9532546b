"""Router kind `mlp`: a small network of residual layers on flattened latents."""

import math
from collections.abc import Sequence

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
ClassIndex = Int[Tensor, " batch"]
"""Row of the class embedding; the null class is row `num_classes`."""
Logits = Float[Tensor, "batch expert"]
PooledText = Float[Tensor, "batch pooled_width"]
Hidden = Float[Tensor, "batch width"]


class Embedding(nn.Module):
    """Embedding of t, class and pooled text as one vector."""

    def __init__(self, width: int, num_classes: int, pooled_width: int) -> None:
        super().__init__()
        self.width = width
        self.of_t = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.of_class = nn.Embedding(num_classes + 1, width)
        if pooled_width:
            norm = nn.LayerNorm(pooled_width, elementwise_affine=False)
            self.of_text = nn.Sequential(norm, nn.Linear(pooled_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Times, class_index: ClassIndex, pooled_text: PooledText | None) -> Hidden:
        """Return the SiLU of the sum of the embeddings."""
        frequencies = get_timestep_embedding(1000 * t, self.width).to(self.of_class.weight.dtype)
        embedding: Tensor = self.of_t(frequencies) + self.of_class(class_index)
        if pooled_text is not None:
            embedding = embedding + self.of_text(pooled_text)
        return functional.silu(embedding)


class _Block(nn.Module):
    """A residual layer, scaled and shifted by t, class and text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Hidden, embedding: Hidden) -> Hidden:
        """Return the hidden state after this layer."""
        scale, shift = self.modulation(embedding).chunk(2, dim=-1)
        residual: Tensor = self.layers(self.norm(hidden) * (1 + scale) + shift)
        return hidden + residual


class MLPRouter(ModelMixin, ConfigMixin):
    """Residual layers on flattened latents."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_shape: Sequence[int],
        num_experts: int,
        num_classes: int,
        width: int,
        depth: int,
        pooled_width: int = 0,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(width, num_classes, pooled_width)
        self.input = nn.Linear(math.prod(latent_shape), width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = zero_init(nn.Linear(width, num_experts))

    def forward(
        self, noised: Latents, t: Times, class_index: ClassIndex, pooled_text: PooledText | None = None
    ) -> Logits:
        """Return one logit per expert."""
        embedding = self.embedding(t, class_index, pooled_text)
        hidden = self.input(noised.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def zero_init(head: nn.Linear) -> nn.Linear:
    """Set a layer to zero and return it, so that all experts are equally probable before training."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
