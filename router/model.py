"""The router's networks: noised latents, t and a class in, one logit per expert out.

`mlp` reads flattened latents; `transformer` reads tokens of them and a CLS token, as the router of
McAllister et al. 2025 (arXiv:2501.05450, section 4) does. To add a network, write the class and add it to
`ROUTERS`.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from router.config import RouterConfig

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
ClassIndex = Int[Tensor, " batch"]
"""Row of the class embedding; the null class is row `num_classes`."""
Logits = Float[Tensor, "batch expert"]
Hidden = Float[Tensor, "batch width"]


class _Embedding(nn.Module):
    """t and class as one vector."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.width = width
        self.of_t = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.of_class = nn.Embedding(num_classes + 1, width)

    def forward(self, t: Times, class_index: ClassIndex) -> Hidden:
        """The sum of both embeddings."""
        waves = get_timestep_embedding(1000 * t, self.width).to(self.of_class.weight.dtype)
        embedding: Tensor = self.of_t(waves) + self.of_class(class_index)
        return functional.silu(embedding)


class _Block(nn.Module):
    """A residual layer, scaled and shifted by t and class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Hidden, embedding: Hidden) -> Hidden:
        """The hidden state after this layer."""
        scale, shift = self.modulation(embedding).chunk(2, dim=-1)
        change: Tensor = self.layers(self.norm(hidden) * (1 + scale) + shift)
        return hidden + change


class RouterMLP(ModelMixin, ConfigMixin):
    """Residual layers on flattened latents."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latent_shape: Sequence[int], num_experts: int, num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = _Embedding(width, num_classes)
        self.input = nn.Linear(math.prod(latent_shape), width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = _silent(nn.Linear(width, num_experts))

    def forward(self, noised: Latents, t: Times, class_index: ClassIndex) -> Logits:
        """One logit per expert."""
        embedding = self.embedding(t, class_index)
        hidden = self.input(noised.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class RouterTransformer(ModelMixin, ConfigMixin):
    """Attention over tokens of flattened latents; the CLS token carries t and class, and gives the logits."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_shape: Sequence[int],
        num_experts: int,
        num_classes: int,
        width: int,
        depth: int,
        heads: int,
        tokens: int,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads; {width} is not one of {heads}: change one")
        size = math.prod(latent_shape)
        self.tokens = min(tokens, size)
        self.padding = -size % self.tokens
        self.embedding = _Embedding(width, num_classes)
        self.input = nn.Linear((size + self.padding) // self.tokens, width)
        self.positions = nn.Parameter(0.02 * torch.randn(self.tokens, width))
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, width // heads, activation_fn="gelu") for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = _silent(nn.Linear(width, num_experts))

    def forward(self, noised: Latents, t: Times, class_index: ClassIndex) -> Logits:
        """One logit per expert."""
        padded = functional.pad(noised.flatten(1), (0, self.padding))
        tokens = self.input(padded.reshape(len(noised), self.tokens, -1)) + self.positions
        hidden = torch.cat([self.embedding(t, class_index).unsqueeze(1), tokens], dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden[:, 0]))
        return logits


def _silent(head: nn.Linear) -> nn.Linear:
    """A layer that puts out zeros until it is trained, so that all experts begin equally probable."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


ROUTERS: dict[str, type[RouterMLP] | type[RouterTransformer]] = {
    "mlp": RouterMLP,
    "transformer": RouterTransformer,
}


def build_router(config: RouterConfig, latent_shape: Sequence[int], num_experts: int, num_classes: int) -> nn.Module:
    """An untrained network; `num_classes` is 0 for data without labels."""
    sizes = (list(latent_shape), num_experts, num_classes, config.width, config.depth)
    is_mlp = config.kind == "mlp"
    model: nn.Module = RouterMLP(*sizes) if is_mlp else RouterTransformer(*sizes, config.heads, config.tokens)
    return model
