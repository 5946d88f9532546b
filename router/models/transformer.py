"""Router kind `transformer`: attention with a CLS token, as in McAllister et al. 2025, arXiv:2501.05450, section 4."""

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from router.models.mlp import ClassIndex, Embedding, Latents, Logits, PooledText, Times, zero_init


class TransformerRouter(ModelMixin, ConfigMixin):
    """Attention over tokens of flattened latents; the CLS token contains t, class and text, its output the logits."""

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
        pooled_width: int = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads; got width {width}, heads {heads}: change one")
        size = math.prod(latent_shape)
        self.tokens = min(tokens, size)
        self.padding = -size % self.tokens
        self.embedding = Embedding(width, num_classes, pooled_width)
        self.input = nn.Linear((size + self.padding) // self.tokens, width)
        self.positions = nn.Parameter(0.02 * torch.randn(self.tokens, width))
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, width // heads, activation_fn="gelu") for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = zero_init(nn.Linear(width, num_experts))

    def forward(
        self, noised: Latents, t: Times, class_index: ClassIndex, pooled_text: PooledText | None = None
    ) -> Logits:
        """Return one logit per expert."""
        padded = functional.pad(noised.flatten(1), (0, self.padding))
        tokens = self.input(padded.reshape(len(noised), self.tokens, -1)) + self.positions
        hidden = torch.cat([self.embedding(t, class_index, pooled_text).unsqueeze(1), tokens], dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden[:, 0]))
        return logits
