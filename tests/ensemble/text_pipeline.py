"""A pipeline of random experts that read text, with a text encoder of a few kilobytes."""

from pathlib import Path

import torch

from ensemble.pipeline import EnsemblePipeline, assemble
from experts.codec import PixelCodec
from experts.conditions.text_encoder import TextEncoder
from experts.config import ResidualMLPConfig, TextConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from router.calibration.text_prior import TextPrior
from router.config import RouterConfig
from router.models.registry import build_router
from router.router import Router
from tests.text_encoders import save_tiny_encoder

SHAPE = (1, 4, 4)
LENGTH = 8


def assemble_text_pipeline(root: Path, num_classes: int = 2) -> EnsemblePipeline:
    """Write two experts, their router and the encoder to `root`, and the pipeline to `root/pipeline`."""
    encoder = TextEncoder.from_config(
        TextConfig(kind="transformers", path=str(save_tiny_encoder(root / "encoder", "transformers")), length=LENGTH)
    )
    torch.manual_seed(0)
    for k in range(2):
        model = build_network(ResidualMLPConfig(width=8, depth=1), SHAPE, num_classes, encoder.null_text).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        Expert(
            model=model,
            prediction="velocity",
            noise_schedule=RECTIFIED_FLOW,
            latent_shape=SHAPE,
            num_classes=num_classes,
            cluster_id=k,
        ).save(root / f"trained_{k}")
    counts = torch.ones(num_classes + 1, 2, dtype=torch.float64)
    width = encoder.null_text.shape[2] + num_classes
    Router(
        model=build_router(RouterConfig(width=8, depth=1), SHAPE, 2, num_classes, encoder.null_text),
        noise_schedule=RECTIFIED_FLOW,
        prior_counts=counts,
        text_prior=TextPrior(
            slopes=torch.randn(2, width, dtype=torch.float64), offsets=torch.zeros(2, dtype=torch.float64)
        ),
    ).save(root / "router")
    (root / "codec").mkdir()
    PixelCodec(image_shape=(4, 4, 1)).save(root / "codec")
    folders, names = {k: root / f"trained_{k}" for k in range(2)}, ("boot", "shirt")[:num_classes]
    return assemble(folders, root / "router", root / "codec", root / "pipeline", (), names, encoder.config)
