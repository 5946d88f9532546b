"""Networks of the router: (noised, t, class index, pooled text) -> one logit per expert.

kind              training                                    dependence on (noised, t)
mlp               cross-entropy                               a network on flattened latents
transformer       cross-entropy                               a network on tokens of flattened latents
density_ratio     each cluster against all data, separately   a small network per expert
nearest_centroid  moments of the data, in closed form         distance to the centroids of the clusters
density           counting                                    the losses of the experts
prior_table       counting                                    none

To add one, write its class and add it to `ROUTERS` and `BUILDERS`, and its training to `FIT_FUNCTIONS` in
`train.py`.
"""

from collections.abc import Callable, Sequence
from typing import Final

from torch import nn

from experts.conditions.condition import Condition
from experts.conditions.null_text import get_null_text, set_null_text
from experts.conditions.text_embedding import TextEmbedding
from router.config import RouterConfig, RouterKind
from router.models.density import DensityRouter
from router.models.density_ratio import DensityRatioRouter
from router.models.dit import DiTRouter
from router.models.mlp import Latents, Logits, MLPRouter, Times
from router.models.nearest_centroid import NearestCentroidRouter
from router.models.prior_table import PriorTableRouter
from router.models.transformer import TransformerRouter

ROUTERS: Final[dict[RouterKind, type[nn.Module]]] = {
    "mlp": MLPRouter,
    "transformer": TransformerRouter,
    "prior_table": PriorTableRouter,
    "nearest_centroid": NearestCentroidRouter,
    "density_ratio": DensityRatioRouter,
    "density": DensityRouter,
}

IMPORTED_ROUTERS: Final[dict[str, type[nn.Module]]] = {"paris": DiTRouter}
"""Networks of published ensembles, which are loaded and saved, and not trained here."""

Builder = Callable[[RouterConfig, list[int], int, int, int], nn.Module]
"""(config, latent shape, experts, classes, features of the pooled text or 0) -> an untrained network."""

BUILDERS: Final[dict[RouterKind, Builder]] = {
    "mlp": lambda config, shape, experts, classes, pooled: MLPRouter(
        shape, experts, classes, config.width, config.depth, pooled
    ),
    "transformer": lambda config, shape, experts, classes, pooled: TransformerRouter(
        shape, experts, classes, config.width, config.depth, config.heads, config.tokens, pooled
    ),
    "prior_table": lambda _config, _shape, experts, classes, _pooled: PriorTableRouter(experts, classes),
    "nearest_centroid": lambda config, shape, experts, classes, _pooled: NearestCentroidRouter(
        shape, experts, classes, config.noise_schedule
    ),
    "density_ratio": lambda config, shape, experts, classes, _pooled: DensityRatioRouter(
        shape, experts, classes, config.width, config.depth
    ),
    "density": lambda config, _shape, experts, classes, _pooled: DensityRouter(experts, classes, config.draws),
}
READS_TEXT: Final = (MLPRouter, TransformerRouter)
"""Networks that take the pooled text; the others have a table of the prior by class, which `Router` replaces for rows
with text."""


def build_router(
    config: RouterConfig,
    latent_shape: Sequence[int],
    num_experts: int,
    num_classes: int,
    null_text: TextEmbedding | None = None,
) -> nn.Module:
    """Build an untrained network; 0 classes are data without labels, no null text is data without text."""
    pooled_width = 0 if null_text is None else null_text.shape[2]
    model = BUILDERS[config.kind](config, list(latent_shape), num_experts, num_classes, pooled_width)
    return set_null_text(model, null_text)


def call_router(model: nn.Module, noised: Latents, t: Times, condition: Condition, num_classes: int) -> Logits:
    """Return the logits of a network under a condition; its null text stands for a missing one."""
    index, text = condition.embedding_index(num_classes), condition.filled(get_null_text(model)).text
    logits: Logits = (
        model(noised, t, index)
        if text is None or not isinstance(model, READS_TEXT)
        else model(noised, t, index, text.pooled)
    )
    return logits
