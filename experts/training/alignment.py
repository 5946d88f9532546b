"""Alignment of a transformer's tokens with features of the clean image (REPA, Yu et al. 2025, arXiv:2410.06940).

    loss = expert_loss + weight * (1 - mean over tokens of cos(project(hidden), teacher))

`hidden` are the tokens after one block, the teacher is a network that clusters the data, and the projection is trained
with the expert and not kept. Equation 8 has the cosine alone; 1 minus it has the same gradient and is at least 0.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from data_partition.features.tokens import TOKEN_NETWORKS, TokenNetwork, compute_tokens
from experts.codec import Codec
from experts.conditions.condition import Condition
from experts.config import ExpertConfig
from experts.networks.class_settings import NetworkError
from experts.networks.registry import call_network
from experts.training.flops import forward_flops, training_flops
from experts.training.latent_dataset import Batch

BLOCK_LISTS = ("transformer_blocks", "joint_transformer_blocks", "blocks", "layers")
"""Names that the classes give their list of blocks."""

PROJECTION_WIDTH = 256
"""Hidden features of the projection."""

Loss = Tensor | dict[str, Tensor]
Tokens = Float[Tensor, "batch token feature"]


class AlignedNetwork(nn.Module):
    """A network, and the projection of the tokens after one of its blocks to the features of a teacher."""

    def __init__(self, network: nn.Module, latent_shape: tuple[int, ...], block: int, features: int) -> None:
        """Take blocks counted from 1; raise `NetworkError` for a network without such tokens."""
        super().__init__()
        self.network, self.block = network, block
        lists = (getattr(network, name, None) for name in BLOCK_LISTS)
        blocks: list[nn.Module] = next((list(found) for found in lists if isinstance(found, nn.ModuleList)), [])
        if not 1 <= block <= len(blocks):
            raise NetworkError(
                f"{type(network).__name__} has {len(blocks)} transformer blocks in a list, and expert.align_block is "
                f"{block}; choose one of them, or set expert.align_weight=0"
            )
        self._watched = [blocks[block - 1]]  # a list, so that it is no second submodule
        with torch.no_grad(), self.watching() as seen:
            call_network(network, torch.zeros(1, *latent_shape), torch.full((1,), 0.5), Condition.null(1))
        tokens, _ = find_tokens(seen, latent_shape)
        self.projection = nn.Sequential(
            nn.Linear(tokens.shape[-1], PROJECTION_WIDTH), nn.SiLU(), nn.Linear(PROJECTION_WIDTH, features)
        )
        self.projection_flops = forward_flops(lambda: self.projection(tokens))

    @contextmanager
    def watching(self) -> Iterator[list[Any]]:
        """Yield a list to which every call of the block within the context adds what it returned."""
        seen: list[Any] = []
        handle = self._watched[0].register_forward_hook(lambda _block, _inputs, output: seen.append(output))
        try:
            yield seen
        finally:
            handle.remove()


def find_tokens(seen: list[Any], latent_shape: tuple[int, ...]) -> tuple[Tokens, tuple[int, int]]:
    """Return the tokens of the image that a block returned, and their rows and columns; raises `NetworkError`."""
    outputs = seen[0] if seen and isinstance(seen[0], tuple) else seen[:1]
    for output in reversed(outputs):
        if isinstance(output, Tensor) and output.ndim == 3 and len(latent_shape) == 3:
            patch = math.isqrt(latent_shape[1] * latent_shape[2] // output.shape[1])
            rows, columns = (side // max(patch, 1) for side in latent_shape[1:])
            if rows * columns == output.shape[1]:
                return output, (rows, columns)
    shapes = ", ".join(str(tuple(output.shape)) for output in outputs if isinstance(output, Tensor)) or "nothing"
    raise NetworkError(
        f"an alignment needs the tokens of a grid of patches after a block; of latents {latent_shape} it returned "
        f"{shapes}; choose a transformer such as expert=dit, or set expert.align_weight=0"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedLoss:
    """The loss of an `AlignedNetwork`."""

    loss: Callable[[nn.Module, Batch], Loss]
    """Of the network alone."""
    teacher: TokenNetwork
    codec: Codec
    """Makes the images of which the teacher computes its features."""
    weight: float
    last_step: float
    """From this step on, counted from 0, the loss is that of the network alone."""
    sample_flops: float
    """Of the teacher, and of the projection forward and backward."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss and, while it counts, the mean cosine as `alignment`."""
        if not isinstance(model, AlignedNetwork):
            raise TypeError(f"expected an AlignedNetwork, got {type(model).__name__}")
        with model.watching() as seen:
            loss = self.loss(model.network, batch)
        if batch.step >= self.last_step:
            return loss
        terms = {"loss": loss} if isinstance(loss, Tensor) else loss
        tokens, grid = find_tokens(seen, tuple(batch.clean.shape[1:]))
        images = self.codec.decode(batch.clean).permute(0, 3, 1, 2).to(tokens.device)
        target = compute_tokens(self.teacher, images, *grid)
        cosine = functional.cosine_similarity(model.projection(tokens).float(), target, dim=-1).mean()
        return terms | {"loss": terms["loss"] + self.weight * (1 - cosine), "alignment": cosine}


def align(
    config: ExpertConfig, network: nn.Module, loss: Callable[[nn.Module, Batch], Loss], codec: Codec
) -> tuple[AlignedNetwork, AlignedLoss]:
    """Return the network with a projection, initialized from the training's seed, and its loss."""
    teacher = TOKEN_NETWORKS[config.align_teacher](None if config.align_path is None else Path(config.align_path))
    height, width, channels = codec.image_shape
    image = torch.zeros(1, channels, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model = AlignedNetwork(network, codec.latent_shape, config.align_block, teacher(image).shape[1])
    return model, AlignedLoss(
        loss=loss,
        teacher=teacher,
        codec=codec,
        weight=config.align_weight,
        last_step=config.align_until * config.training.steps,
        sample_flops=forward_flops(lambda: teacher(image)) + training_flops(model.projection_flops, 1, 1),
    )
