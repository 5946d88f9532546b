"""The networks that say which expert speaks: noised latents, t and a class in, one logit per expert out.

               learns from                                   knows of (noised, t)
mlp            cross-entropy                                 flattened latents
transformer    cross-entropy                                 tokens of them
density_ratio  each expert against all data, one by one      a small network per expert
centroids      moments of the data, in closed form           distance to the clusters' centroids
table          counting                                      nothing

To add one, write its class and add it to `ROUTERS` and `BUILDERS`; how it is trained is in `train.py`.
"""

from collections.abc import Callable, Sequence
from typing import Final

from torch import nn

from router.config import RouterConfig, RouterKind
from router.models.density_ratio import RouterRatios
from router.models.mlp import RouterMLP
from router.models.nearest_centroid import RouterCentroids
from router.models.prior_table import RouterTable
from router.models.transformer import RouterTransformer

ROUTERS: Final[dict[RouterKind, type[nn.Module]]] = {
    "mlp": RouterMLP,
    "transformer": RouterTransformer,
    "table": RouterTable,
    "centroids": RouterCentroids,
    "density_ratio": RouterRatios,
}

Builder = Callable[[RouterConfig, list[int], int, int], nn.Module]
"""(config, latent shape, experts, classes) -> a network that knows nothing yet."""

BUILDERS: Final[dict[RouterKind, Builder]] = {
    "mlp": lambda config, shape, experts, classes: RouterMLP(shape, experts, classes, config.width, config.depth),
    "transformer": lambda config, shape, experts, classes: RouterTransformer(
        shape, experts, classes, config.width, config.depth, config.heads, config.tokens
    ),
    "table": lambda _config, _shape, experts, classes: RouterTable(experts, classes),
    "centroids": lambda config, shape, experts, classes: RouterCentroids(shape, experts, classes, config.path),
    "density_ratio": lambda config, shape, experts, classes: RouterRatios(
        shape, experts, classes, config.width, config.depth
    ),
}


def build_router(config: RouterConfig, latent_shape: Sequence[int], num_experts: int, num_classes: int) -> nn.Module:
    """An untrained network; `num_classes` is 0 for data without labels."""
    return BUILDERS[config.kind](config, list(latent_shape), num_experts, num_classes)
