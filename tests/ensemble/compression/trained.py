"""A small expert that has been trained for long enough that an error of its output means something."""

import functools
from dataclasses import replace

import torch
from sklearn.datasets import load_digits

from ddm_core.artifacts import Workspace
from experts.config import DiTConfig, ResidualMLPConfig, TrainingConfig, UNetConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from experts.training.latent_dataset import LatentDataset
from experts.training.loss import expert_loss
from experts.training.trainer import fit

NETWORKS = {
    "mlp": ResidualMLPConfig(width=64, depth=2),
    "unet": UNetConfig(channels=(8, 16), layers_per_block=1),
    "dit": DiTConfig(patch_size=2, heads=4, head_width=16, depth=2),
}
TRAINING = TrainingConfig(steps=150, batch_size=32, lr=3e-3, warmup_steps=10)


@functools.cache
def digits() -> LatentDataset:
    """scikit-learn's digits, 8 x 8."""
    found = load_digits()
    return LatentDataset(
        clean=torch.tensor(found.images).float().div(8).sub(1)[:, None],
        class_id=torch.tensor(found.target),
        cluster_id=torch.zeros(len(found.target), dtype=torch.int64),
    )


def trained(kind: str, workspace: Workspace, steps: int = TRAINING.steps) -> Expert:
    """Trained in a few seconds, from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_network(NETWORKS[kind], (1, 8, 8), 10)
    loss = lambda model, batch: {"loss": expert_loss(model, batch, "velocity", RECTIFIED_FLOW)}  # noqa: E731
    model = fit(model, loss, digits(), replace(TRAINING, steps=steps), workspace).model
    return Expert(
        model=model,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=(1, 8, 8),
        num_classes=10,
        cluster_id=0,
    )
