"""The router of Paris: a transformer on patches of latents, modulated by t, whose CLS token gives the logits.

Bagel Labs 2025, arXiv:2510.03434: as the router of McAllister et al. 2025, arXiv:2501.05450, without the condition.
Its parameters have the names of the published weights. It is imported, and not trained here.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

from router.models.mlp import ClassIndex, Latents, Logits, Times

TIME_FEATURES, TIMESTEPS = 256, 1000


class ModulatedBlock(nn.Module):
    """Self-attention and an MLP; t gives shift, scale and gate of both (adaLN-Zero; arXiv:2212.09748)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """Return the tokens plus the gated outputs of both parts."""
        chunks = self.adaLN_modulation(time).unsqueeze(1).chunk(6, dim=-1)
        for part, (shift, scale, gate) in ((self._attend, chunks[:3]), (self.mlp, chunks[3:])):
            normed = functional.layer_norm(tokens, tokens.shape[-1:])
            tokens = tokens + gate * part(normed * (1 + scale) + shift)
        return tokens

    def _attend(self, tokens: Tensor) -> Tensor:
        attended: Tensor = self.attn(tokens, tokens, tokens, need_weights=False)[0]
        return attended


class DiTRouter(ModelMixin, ConfigMixin):
    """Logits from (noised, t); the class is ignored."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, latent_shape: Sequence[int], num_experts: int, width: int, depth: int, heads: int, patch_size: int
    ) -> None:
        super().__init__()
        patches = math.prod(latent_shape[1:]) // patch_size**2
        self.patch_embed = nn.Conv2d(latent_shape[0], width, patch_size, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.time_embed = nn.ModuleDict({"mlp": time})
        self.layers = nn.ModuleList(ModulatedBlock(width, heads) for _ in range(depth))
        self.head = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(approximate="tanh"),
            nn.LayerNorm(width),
            nn.GELU(approximate="tanh"),
            nn.Linear(width, num_experts),
        )

    def forward(self, noised: Latents, t: Times, class_index: ClassIndex) -> Logits:  # noqa: ARG002 - the call of routers
        """Return one logit per expert."""
        features = get_timestep_embedding(TIMESTEPS * t, TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
        time = self.time_embed["mlp"](features.to(noised.dtype))
        patches = self.patch_embed(noised).flatten(2).transpose(1, 2) + self.pos_embed
        tokens = torch.cat([self.cls_token.expand(len(noised), -1, -1), patches], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, time)
        logits: Tensor = self.head(tokens[:, 0])
        return logits
