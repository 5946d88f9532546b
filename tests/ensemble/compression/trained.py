"""Small experts, trained long enough that errors of their outputs are meaningful."""

import functools
from copy import deepcopy
from dataclasses import replace

import torch
from sklearn.datasets import load_digits
from torch import nn

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


TRAINED: dict[tuple[str, int], nn.Module] = {}
"""What this process has trained, by kind and steps."""


@functools.cache
def digits() -> LatentDataset:
    """Return scikit-learn's digits as latents of shape (1, 8, 8)."""
    data = load_digits()
    return LatentDataset(
        clean=torch.tensor(data.images).float().div(8).sub(1)[:, None],
        class_id=torch.tensor(data.target),
        cluster_id=torch.zeros(len(data.target), dtype=torch.int64),
    )


def trained(kind: str, workspace: Workspace, steps: int = TRAINING.steps) -> Expert:
    """Return an expert that is trained in a few seconds from a fixed seed, once a process; the copy may be changed."""
    if (kind, steps) not in TRAINED:
        TRAINED[kind, steps] = _train(kind, workspace, steps)
    return Expert(
        model=deepcopy(TRAINED[kind, steps]),
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=(1, 8, 8),
        num_classes=10,
        cluster_id=0,
    )


def _train(kind: str, workspace: Workspace, steps: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_network(NETWORKS[kind], (1, 8, 8), 10)
    loss = lambda model, batch: {"loss": expert_loss(model, batch, "velocity", RECTIFIED_FLOW)}  # noqa: E731
    return fit(model, loss, digits(), replace(TRAINING, steps=steps), workspace).model
