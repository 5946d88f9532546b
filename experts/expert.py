"""An expert: a network, what it predicts and on which noise path; trained from shards and a configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_partition.shards.shards import read_index
from ddm_core.artifacts import CorruptArtifact, Workspace, read_json, write_json
from experts.codecs.registry import load_codec
from experts.compressed.caching.feature_cache import ExpertCache, Rows
from experts.compressed.caching.plan import CacheSchedule
from experts.condition import Condition
from experts.config import ExpertConfig, Prediction, TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, Latents, NoiseSchedule, Times, to_schedule
from experts.diffusion.predictions import clamp_noise_level, clean_and_noise_at
from experts.networks.model_io import save_model
from experts.networks.pretrained import InitialModel, build_initial_model
from experts.networks.pretrained_files import check_unchanged
from experts.networks.registry import call_network, load_network
from experts.training.flops import forward_flops, training_flops
from experts.training.latent_dataset import Batch, LatentDataset, LatentError, encode_latents
from experts.training.loss import converted_loss, expert_loss
from experts.training.trainer import LossFn, fit, write_rows

CACHE = "cache.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """A trained network and what its predictions mean."""

    model: nn.Module
    prediction: Prediction
    noise_schedule: NoiseSchedule
    """The noise path that the network was trained on."""
    latent_shape: tuple[int, ...]
    num_classes: int
    """0 is unconditional."""
    cluster_id: int
    few_step: FewStepSchedule | None = None
    """The few t at which it is to be asked; None is any t."""
    cache: CacheSchedule | None = None
    """Which of its modules a trajectory need not call at every evaluation; None is none."""

    def velocity(self, noised: Latents, t: Times, condition: Condition, path: NoiseSchedule | None = None) -> Latents:
        """The velocity on `path` (default: the expert's own), matched at equal noise-to-signal ratio.

        A velocity network on its own path is passed on bit for bit.
        """
        path = path or self.noise_schedule
        sample = to_schedule(noised, t, path, self.noise_schedule)
        seen = clamp_noise_level(self.prediction, sample, self.noise_schedule)
        predicted = call_network(self.model, seen.noised, seen.t, condition)
        if self.prediction == "velocity" and path.name == self.noise_schedule.name:
            return predicted
        parts = clean_and_noise_at(self.prediction, predicted, seen, sample, self.noise_schedule)
        return path.velocity(parts.clean, parts.noise, t)

    def create_cache(
        self, noised: Latents, t: Times, condition: Condition, path: NoiseSchedule, rows: Rows, kept: ExpertCache
    ) -> Latents:
        """The velocity with what these rows of the trajectory have kept; with a cache, all of them are at one t.

        Raises `ValueError` if they are not, or if the cache was not made for it.
        """
        if self.cache is None:
            kept.count(float(len(rows)))
            return self.velocity(noised, t, condition, path)
        if t.ndim != 1 or (t != t[0]).any():
            raise ValueError("an expert with a cache is sampled at one t for all rows; take the cache away for others")

        def said(places: Rows, model: nn.Module = self.model) -> Latents:
            return replace(self, model=model).velocity(noised[places], t[places], condition.rows(places), path)

        if (hook := self.cache.hook) is not None:
            index = self.cache.index(float(t[0]))
            kept.count(len(rows) * self.cache.relative_flops[index])
            return kept.hooked.run(self.model, hook, index, rows, said)
        velocity, work = kept.features.run(self.model, self.cache, float(t[0]), rows, said)
        kept.count(work)
        return velocity

    def to(self, device: torch.device | str) -> "Expert":
        """Move the network to a device, in place."""
        self.model.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write the network as diffusers does, and `expert.json` beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, folder)
        described: dict[str, Any] = {
            "prediction": self.prediction,
            "noise_schedule": self.noise_schedule.name,
            "latent_shape": self.latent_shape,
            "num_classes": self.num_classes,
            "cluster_id": self.cluster_id,
        }
        if self.few_step is not None:
            described["few_step"] = self.few_step.described()
        write_json(folder / "expert.json", described)
        if self.cache is not None:
            write_json(folder / CACHE, self.cache.described())

    @classmethod
    def load(cls, folder: Path) -> "Expert":
        """Read what `save` wrote; raises an `ArtifactError` if a file is missing or broken."""
        described, model = read_json(folder / "expert.json"), load_network(folder)
        try:
            if described["prediction"] not in get_args(Prediction):
                raise ValueError(f"prediction {described['prediction']!r}")
            return cls(
                model=model,
                prediction=described["prediction"],
                noise_schedule=NOISE_SCHEDULES[described["noise_schedule"]],
                latent_shape=tuple(described["latent_shape"]),
                num_classes=described["num_classes"],
                cluster_id=described["cluster_id"],
                few_step=FewStepSchedule.parsed(described["few_step"]) if "few_step" in described else None,
                cache=CacheSchedule.parsed(read_json(folder / CACHE)) if (folder / CACHE).exists() else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(f"{folder / 'expert.json'} lacks or does not know {error}; train it again") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSummary:
    """What a training amounted to."""

    flops: float
    steps: int
    epochs: float
    """How often every sample was seen."""
    images: int
    """Samples in the shards."""
    parameters: int
    final_loss: float
    """Mean loss of the last metrics row."""


def train_expert(
    config: ExpertConfig,
    shards: Sequence[Path],
    codec: Path,
    out: Path,
    workspace: Workspace,
    num_classes: int | None = None,
    cluster_id: int = 0,
) -> ExpertSummary:
    """Train one expert on the samples of the shard folders and write it to `out`, with metrics and a summary.

    `config.training.batch_size` is this expert's own batch; `num_classes` None takes the shards' own.
    """
    loaded = load_codec(codec)
    dataset = encode_latents(shards, loaded, codec, workspace)
    if num_classes is None:
        num_classes = len(read_index(shards[0]).class_names)
    check_classes(dataset, num_classes)
    check_unchanged(config)
    start = build_initial_model(config, dataset.latent_shape, num_classes)

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return {"loss": _loss(model, batch, config, start)}

    return train_network(config.training, dataset, start, loss, out, workspace, num_classes, cluster_id)


def _loss(model: nn.Module, batch: Batch, config: ExpertConfig, start: InitialModel) -> Float[Tensor, ""]:
    if config.init is None or config.init_loss == "own":
        return expert_loss(model, batch, start.prediction, start.noise_schedule)
    own, wanted = (start.prediction, start.noise_schedule), (config.prediction, NOISE_SCHEDULES[config.noise_schedule])
    return converted_loss(model, batch, own, wanted)


def train_network(
    training: TrainingConfig,
    dataset: LatentDataset,
    start: InitialModel,
    loss: LossFn,
    out: Path,
    workspace: Workspace,
    num_classes: int,
    cluster_id: int = 0,
) -> ExpertSummary:
    """Train a network on latents by a loss, and write it to `out` as an expert, with metrics and a summary."""
    forward = network_flops(start.model, dataset.latent_shape)
    fitted = fit(start.model, loss, dataset, training, workspace)
    Expert(
        model=fitted.model,
        prediction=start.prediction,
        noise_schedule=start.noise_schedule,
        latent_shape=dataset.latent_shape,
        num_classes=num_classes,
        cluster_id=cluster_id,
    ).save(out)
    summary = ExpertSummary(
        flops=training_flops(forward, training.batch_size, training.steps),
        steps=training.steps,
        epochs=training.steps * training.batch_size / len(dataset),
        images=len(dataset),
        parameters=sum(parameter.numel() for parameter in fitted.model.parameters()),
        final_loss=fitted.rows[-1]["loss"],
    )
    write_rows(out / "metrics.jsonl", fitted.rows)
    write_json(out / "training.json", summary)
    return summary


def check_classes(dataset: LatentDataset, num_classes: int) -> None:
    """Raise `LatentError` if a sample has a class that the network would not know."""
    if dataset.class_id.amax() >= num_classes:
        raise LatentError(
            f"a sample has class {int(dataset.class_id.amax())}, but there are only {num_classes} classes "
            "(counted from 0); pass the number of classes of the whole data set"
        )


def expert_flops(config: ExpertConfig, latent_shape: tuple[int, ...], num_classes: int) -> float:
    """FLOPs of a whole training by this recipe, without doing it."""
    model = build_initial_model(config, latent_shape, num_classes).model
    return training_flops(network_flops(model, latent_shape), config.training.batch_size, config.training.steps)


def network_flops(model: nn.Module, latent_shape: tuple[int, ...]) -> float:
    """FLOPs of the network on one row."""
    row, t = torch.zeros(1, *latent_shape), torch.full((1,), 0.5)
    return forward_flops(lambda: call_network(model, row, t, Condition.null(1)))
