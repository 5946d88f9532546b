"""Networks of the router: (noised, t, class index) -> one logit per expert.

kind              training                                    dependence on (noised, t)
mlp               cross-entropy                               a network on flattened latents
transformer       cross-entropy                               a network on tokens of flattened latents
density_ratio     each cluster against all data, separately   a small network per expert
nearest_centroid  moments of the data, in closed form         distance to the centroids of the clusters
prior_table       counting                                    none

To add one, write its class and add it to `ROUTERS` and `BUILDERS`, and its training to `FIT_FUNCTIONS` in
`train.py`.
"""

from collections.abc import Callable, Sequence
from typing import Final

from torch import nn

from router.config import RouterConfig, RouterKind
from router.models.density_ratio import DensityRatioRouter
from router.models.mlp import MLPRouter
from router.models.nearest_centroid import NearestCentroidRouter
from router.models.prior_table import PriorTableRouter
from router.models.transformer import TransformerRouter

ROUTERS: Final[dict[RouterKind, type[nn.Module]]] = {
    "mlp": MLPRouter,
    "transformer": TransformerRouter,
    "prior_table": PriorTableRouter,
    "nearest_centroid": NearestCentroidRouter,
    "density_ratio": DensityRatioRouter,
}

Builder = Callable[[RouterConfig, list[int], int, int], nn.Module]
"""(config, latent shape, experts, classes) -> an untrained network."""

BUILDERS: Final[dict[RouterKind, Builder]] = {
    "mlp": lambda config, shape, experts, classes: MLPRouter(shape, experts, classes, config.width, config.depth),
    "transformer": lambda config, shape, experts, classes: TransformerRouter(
        shape, experts, classes, config.width, config.depth, config.heads, config.tokens
    ),
    "prior_table": lambda _config, _shape, experts, classes: PriorTableRouter(experts, classes),
    "nearest_centroid": lambda config, shape, experts, classes: NearestCentroidRouter(
        shape, experts, classes, config.noise_schedule
    ),
    "density_ratio": lambda config, shape, experts, classes: DensityRatioRouter(
        shape, experts, classes, config.width, config.depth
    ),
}


def build_router(config: RouterConfig, latent_shape: Sequence[int], num_experts: int, num_classes: int) -> nn.Module:
    """Build an untrained network; `num_classes` is 0 for data without labels."""
    return BUILDERS[config.kind](config, list(latent_shape), num_experts, num_classes)
