"""A small ensemble with classes, as a folder and as a pipeline."""

import pytest
import torch

from ensemble.ensemble import Ensemble
from ensemble.pipeline import EnsemblePipeline
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from experts.codec import PixelCodec
from experts.config import DiTConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from router.config import RouterConfig
from router.models.registry import build_router
from router.router import Router

SHAPE = (1, 4, 4)
PRIOR = [[3, 2, 1], [1, 2, 3], [4, 4, 4]]


def make_expert(cluster_id: int) -> Expert:
    torch.manual_seed(cluster_id)
    model = build_network(DiTConfig(patch_size=2, heads=2, head_width=4, depth=1), SHAPE, 2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Expert(
        model=model,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=SHAPE,
        num_classes=2,
        cluster_id=cluster_id,
    )


def make_ensemble() -> EnsemblePipeline:
    """Three experts on pixels, their router, and two classes."""
    torch.manual_seed(7)
    model = build_router(RouterConfig(width=8, depth=1), SHAPE, 3, 2)
    torch.nn.init.normal_(model.head.weight)
    router = Router(model=model, noise_schedule=RECTIFIED_FLOW, prior_counts=torch.tensor(PRIOR, dtype=torch.float64))
    ensemble = Ensemble(experts={k: make_expert(k) for k in range(3)}, noise_schedule=RECTIFIED_FLOW, router=router)
    return EnsemblePipeline(
        ensemble=ensemble, codec=PixelCodec(image_shape=(4, 4, 1)), num_classes=2, class_names=("a", "b")
    )


@pytest.fixture
def pipe() -> EnsembleDiffusionPipeline:
    pipeline = EnsembleDiffusionPipeline.from_ensemble(make_ensemble())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def folder(tmp_path):
    make_ensemble().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"
