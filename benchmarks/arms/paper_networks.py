"""Small trained networks and exact mixtures for `benchmarks.papers`."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor

from ddm_core.artifacts import Workspace
from ensemble.compression.distillation.mmd import FINE, median_kernel, squared_mmd
from ensemble.sampling.guidance import reflected_solver
from ensemble.solvers import euler as solve_euler
from ensemble.solvers import make_noise, sample_few_step, uniform_times
from experts.conditions.captions import EncodedCaptions
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.conditions.text_encoder import TextEncoder
from experts.config import DiffusersConfig, DiTConfig, NetworkConfig, ResidualMLPConfig, TrainingConfig, UNetConfig
from experts.diffusion.intervals import WHOLE, Interval, restrict_loss
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from experts.training.latent_dataset import LatentDataset
from experts.training.loss import expert_loss
from experts.training.trainer import fit

COUNT = 4000
"""Samples of a mixture."""
CLASSES, EXPERTS = 10, 4
HELD_OUT = 6
"""Every so-manieth digit is held out."""
NETWORKS: dict[str, NetworkConfig] = {
    "dit": DiTConfig(patch_size=2, heads=4, head_width=16, depth=5),
    "small_dit": DiTConfig(patch_size=2, heads=4, head_width=16, depth=2),
    "wide_dit": DiTConfig(patch_size=2, heads=6, head_width=64, depth=2),
    "unet": UNetConfig(channels=(32, 64, 64), layers_per_block=1),
    "mmdit": DiffusersConfig(
        class_name="SD3Transformer2DModel",
        settings={"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 5, "caption_projection_dim": 64},
    ),
}
TRAINING = TrainingConfig(steps=600, batch_size=64, lr=2e-3, warmup_steps=30, checkpoint_every=10**6)
CAPTIONED_STEPS = 1500
"""Training steps of an MLP on captioned latents, each a tenth of a transformer's."""
WIDE_STEPS = 50
"""Training steps of the wide network, whose bytes are counted."""


@functools.cache
def train_digits(kind: str, folder: Path) -> tuple[Expert, LatentDataset]:
    """Train a network on digits that are not held out, by class, or for an MMDiT by a text of one token a class.

    The folder keeps it.
    """
    dataset, saved = select_digits(kind, held_out=False), folder / kind / "expert"
    if saved.is_dir():
        return Expert.load(saved), dataset
    num_classes = CLASSES if dataset.null_text is None else 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_network(NETWORKS[kind], (1, 8, 8), num_classes, dataset.null_text)
    steps = WIDE_STEPS if kind == "wide_dit" else TRAINING.steps
    expert = fit_digits(model, dataset, num_classes, replace(TRAINING, steps=steps), folder / kind)
    expert.save(saved)
    return expert, dataset


def select_digits(kind: str, *, held_out: bool) -> LatentDataset:
    """Return every sixth of scikit-learn's digits, which no network here is trained on, or all others."""
    data, null_text = load_digits(), TextEmbedding.zeros(1, CLASSES, CLASSES)
    has_text, count = kind == "mmdit", len(data.target)
    class_id = torch.tensor(data.target)
    token = torch.nn.functional.one_hot(class_id, CLASSES).float()
    captions = EncodedCaptions(
        token_features=token,
        first_token=torch.arange(count + 1),
        pooled=token,
        weight=torch.ones(count),
        first_caption=torch.arange(count + 1),
        null_text=null_text,
    )
    dataset = LatentDataset(
        clean=torch.tensor(data.images).float().div(8).sub(1)[:, None],
        class_id=torch.full((count,), -1) if has_text else class_id,
        cluster_id=torch.zeros(count, dtype=torch.int64),
        captions=captions if has_text else None,
    )
    return dataset.select(((torch.arange(count) % HELD_OUT == 0) == held_out).nonzero().squeeze(1))


def train_experts(
    folder: Path, kind: str = "dit", training: TrainingConfig = TRAINING
) -> tuple[dict[int, Expert], LatentDataset, LatentDataset]:
    """Train four experts on digits clustered by k-means on pixels; return them, the data and the held-out data.

    The batch is divided by the number of experts, and the classes are not a condition. The folder keeps them.
    """
    parts = [select_digits("dit", held_out=held_out) for held_out in (False, True)]
    means = KMeans(EXPERTS, n_init=4, random_state=0).fit(parts[0].clean.flatten(1))
    data, held_out = (
        replace(
            part,
            class_id=torch.full_like(part.class_id, -1),
            cluster_id=torch.tensor(means.predict(part.clean.flatten(1))).long(),
        )
        for part in parts
    )
    batch_size, experts = training.batch_size // EXPERTS, dict[int, Expert]()
    for k in range(EXPERTS):
        cluster, saved = select_cluster(data, k), folder / f"{kind}_{k}" / "expert"
        if not saved.is_dir():
            train_velocity(NETWORKS[kind], cluster, training, batch_size, saved.parent).save(saved)
        experts[k] = Expert.load(saved)
    return experts, data, held_out


def select_cluster(data: LatentDataset, k: int) -> LatentDataset:
    """Return the samples of one cluster."""
    return data.select((data.cluster_id == k).nonzero().squeeze(1))


def fit_digits(
    model: torch.nn.Module,
    dataset: LatentDataset,
    num_classes: int,
    training: TrainingConfig,
    folder: Path,
    interval: Interval = WHOLE,
) -> Expert:
    """Train a network on the error of the velocity, on an interval of t."""

    def loss(network: torch.nn.Module, batch: object) -> dict[str, Tensor]:
        return {"loss": expert_loss(network, batch, "velocity", RECTIFIED_FLOW)}  # type: ignore[arg-type]

    if interval != WHOLE:
        loss = restrict_loss(loss, interval, training)
    trained = fit(model, loss, dataset, training, Workspace.at(folder)).model
    return Expert(
        model=trained,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=dataset.latent_shape,
        num_classes=num_classes,
        cluster_id=0,
    )


def train_captioned(clean: Tensor, captions: Sequence[str], encoder: TextEncoder, folder: Path) -> Expert:
    """Train an MLP on flat latents under their encoded captions."""
    texts, count, nothing = encoder.encode(captions), len(clean), torch.full((len(clean),), -1)
    encoded = EncodedCaptions(
        token_features=texts.sequence.flatten(0, 1),
        first_token=torch.arange(count + 1) * texts.shape[0],
        pooled=texts.pooled,
        weight=torch.ones(count),
        first_caption=torch.arange(count + 1),
        null_text=encoder.null_text,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_network(ResidualMLPConfig(width=128, depth=3), tuple(clean.shape[1:]), 0, encoder.null_text)
    dataset = LatentDataset(clean=clean, class_id=nothing, cluster_id=0 * nothing, captions=encoded)
    return fit_digits(model, dataset, 0, replace(TRAINING, steps=CAPTIONED_STEPS), folder)


def train_velocity(
    network: NetworkConfig, dataset: LatentDataset, training: TrainingConfig, batch_size: int, folder: Path
) -> Expert:
    """Train a network without condition from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_network(network, dataset.latent_shape, 0)
    return fit_digits(model, dataset, 0, replace(training, batch_size=batch_size), folder)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Two Gaussians at -2 and 2 of deviation 1/4, whose velocity is exact; `share` is that of the first."""

    share: float

    def velocity(self, noised: Tensor, t: Tensor) -> Tensor:
        """Return E[noise - clean | noised] at t of noised = (1 - t) clean + t noise."""
        t, means, deviation = t[:, None], torch.tensor([-2.0, 2.0], dtype=noised.dtype), 0.25
        variance = (1 - t) ** 2 * deviation**2 + t**2
        residual = noised[:, :1] - (1 - t) * means
        shares = torch.tensor([self.share, 1 - self.share], dtype=noised.dtype)
        posterior = (shares.log() - residual**2 / (2 * variance)).softmax(1)
        clean, noise = means + (1 - t) * deviation**2 / variance * residual, t / variance * residual
        return (posterior * (noise - clean)).sum(1, keepdim=True)


def two_gaussians(strong: float, weak: float | None, steps: int, reflected: int | None = None) -> float:
    """Return the share of samples at the first Gaussian, in Euler steps of which some are reflected (None: all)."""
    noise = make_noise(range(COUNT), (1,)).double()
    velocity, times = Mixture(strong).velocity, uniform_times(steps)
    if weak is None:
        samples = solve_euler(velocity, noise, times)
    else:
        samples = reflected_solver("euler", velocity, Mixture(weak).velocity, reflected)(velocity, noise, times)
    return float((samples < 0).double().mean())


def ring_of_gaussians(outliers: float) -> tuple[Expert, LatentDataset, Tensor]:
    """Return an untrained MLP, latents on a ring of eight Gaussians with a share of outliers, and clean latents."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.randint(8, (2 * COUNT,), generator=generator) * (math.pi / 4)
    rows = torch.stack([angles.cos(), angles.sin()], 1) + 0.08 * torch.randn(2 * COUNT, 2, generator=generator)
    clean, real = rows[:COUNT].clone(), rows[COUNT:]
    wrong = torch.rand(COUNT, generator=generator) < outliers
    clean[wrong] += 8 * torch.randn(int(wrong.sum()), 2, generator=generator)
    nothing = torch.full((COUNT,), -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_network(ResidualMLPConfig(width=128, depth=3), (2,), 0)
    expert = Expert(
        model=model,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=(2,),
        num_classes=0,
        cluster_id=0,
    )
    return expert, LatentDataset(clean=clean, class_id=nothing, cluster_id=0 * nothing), real


@torch.inference_mode()
def squared_mmd_of(student: Expert, real: Tensor) -> float:
    """Return the squared MMD of a student's samples to real latents."""
    seeds: Sequence[int] = range(2000)
    if student.few_step is None:
        raise ValueError("a student has a few-step schedule; this expert has none")
    condition = Condition.null(len(seeds))
    samples = sample_few_step(
        lambda noised, t: student.velocity(noised, t, condition),
        make_noise(seeds, (2,)),
        student.few_step,
        RECTIFIED_FLOW,
        lambda step: make_noise(seeds, (2,), 1 + step),
    )
    return float(squared_mmd(samples, real[:2000], median_kernel("rbf", real[:2000], FINE)))
