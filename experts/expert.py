"""Experts: a network, its prediction type and its noise schedule; trained from shards and a configuration."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ddm_core.artifacts import CorruptArtifact, Workspace, read_json, to_jsonable, write_json
from ddm_core.json_values import from_json
from experts.codecs.registry import load_codec
from experts.compressed.caching.feature_cache import ExpertCache
from experts.compressed.caching.plan import CacheSchedule
from experts.compressed.distillation.guidance_branch import guidance_branches, guiding
from experts.compressed.distillation.interval_embedding import jumping, takes_guidance
from experts.conditions.condition import Condition
from experts.conditions.null_text import get_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.conditions.text_encoder import TextEncoder
from experts.config import ExpertConfig, NoiseScheduleName, Prediction, TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.intervals import WHOLE, Interval, restrict_loss
from experts.diffusion.loss_weights import build_loss_weight
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, RECTIFIED_FLOW, NoiseSchedule, to_schedule
from experts.diffusion.predictions import clamp_noise_level, clean_and_noise_at
from experts.expert_model import ExpertModel
from experts.networks.class_settings import NetworkError
from experts.networks.model_io import move_model, save_model
from experts.networks.pretrained import InitialModel, build_initial_model
from experts.networks.pretrained_files import check_unchanged
from experts.networks.registry import call_network, load_network, resolve_call
from experts.training.alignment import AlignedNetwork, align
from experts.training.flops import count_parameters, forward_flops, training_flops
from experts.training.held_out import TIMES, Measure, TrainingData, count_held_out, measure_held_out, take_evenly
from experts.training.latents.caption_costs import text_flops
from experts.training.latents.folder import read_class_names
from experts.training.loss import converted_loss, expert_loss
from experts.training.memory import part_rows
from experts.training.optimizers.ema import SNAPSHOTS
from experts.training.parallel.distributed import DataParallelGroup
from experts.training.trainer import LossFn, Watch, fit, write_rows
from experts.types import Latents, RowIds, RowTimes, Times

METADATA_FILE, CACHE_FILE = "expert.json", "cache.json"
EARLY = "early"
"""Folder within an expert's own, of its earlier checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert(ExpertModel):
    """A trained network with its prediction type and noise schedule."""

    model: nn.Module
    prediction: Prediction
    noise_schedule: NoiseSchedule
    """The noise schedule that the network was trained on."""
    latent_shape: tuple[int, ...]
    num_classes: int
    """0 is unconditional."""
    cluster_id: int
    few_step: FewStepSchedule | None = None
    """The few t at which it may be evaluated; None is any t."""
    t_shift: float = 1.0
    """`training.t_shift` of its training, for the times of its sampling."""
    cache: CacheSchedule | None = None
    """The modules that are skipped on some steps of a trajectory; None skips none."""

    def velocity(
        self, noised: Latents, t: Times, condition: Condition, noise_schedule: NoiseSchedule | None = None
    ) -> Latents:
        """Return the velocity on `noise_schedule` (default: the expert's), matched at equal noise-to-signal ratio.

        The output of a velocity network on its own noise schedule is returned bit for bit.
        """
        noise_schedule = noise_schedule or self.noise_schedule
        sample = to_schedule(noised, t, noise_schedule, self.noise_schedule)
        network_input = clamp_noise_level(self.prediction, sample, self.noise_schedule)
        call, row_times = resolve_call(self.model, network_input.noised, network_input.t)
        lengths = None if self.few_step is None else self.few_step.jump_lengths(sample.t.expand(len(noised)))
        scale = self._input_scale(condition)
        condition = condition.filled(get_null_text(self.model))
        with jumping(self.model, lengths, scale), guiding(self.model, condition, sample.t):
            predicted = call(self.model, network_input.noised, row_times, condition)
        if self.prediction == "velocity" and noise_schedule.name == self.noise_schedule.name:
            return predicted
        parts = clean_and_noise_at(self.prediction, predicted, network_input, sample, self.noise_schedule)
        return noise_schedule.velocity(parts.clean, parts.noise, t)

    def _input_scale(self, condition: Condition) -> RowTimes | None:
        """Return the guidance scale of every row for a network that takes it: 1 for rows without a condition."""
        if condition.guidance is None or not takes_guidance(self.model):
            return None
        scale, negative = condition.guidance
        if not bool(negative.is_null.all()):
            raise ValueError(
                f"expert {self.cluster_id} was distilled with guidance away from the null condition alone; leave the "
                "negative prompt out"
            )
        return torch.where(condition.is_null, 1.0, scale)

    def cached_velocity(
        self,
        noised: Latents,
        t: Times,
        condition: Condition,
        noise_schedule: NoiseSchedule,
        rows: RowIds,
        cache: ExpertCache,
    ) -> Latents:
        """Return the velocity of these rows of a trajectory, with the outputs that the cache holds for them.

        With a cache schedule all rows must be at the same t, one of the schedule's; raises `ValueError` otherwise.
        """
        if self.cache is None:
            cache.count(float(len(rows)))
            return self.velocity(noised, t, condition, noise_schedule)
        if t.ndim != 1 or (t != t[0]).any():
            raise ValueError(
                "an expert with a cache needs the same t for all rows; remove the cache to sample rows at different t"
            )

        def evaluate(positions: RowIds, model: nn.Module = self.model) -> Latents:
            return replace(self, model=model).velocity(
                noised[positions], t[positions], condition.rows(positions), noise_schedule
            )

        if (hook := self.cache.hook) is not None:
            index = self.cache.index(float(t[0]))
            cache.count(len(rows) * self.cache.relative_flops[index])
            return cache.hooked_models.run(self.model, hook, index, rows, evaluate)
        velocity, calls = cache.features.run(self.model, self.cache, float(t[0]), rows, evaluate)
        cache.count(calls)
        return velocity

    @property
    def is_conditional(self) -> bool:
        """Return whether the network reads classes or text."""
        return self.num_classes > 0 or get_null_text(self.model) is not None

    @property
    def guides_in_one_call(self) -> bool:
        """Return whether its network has branches for the guidance of a condition, or takes the scale as an input."""
        return bool(guidance_branches(self.model)) or takes_guidance(self.model)

    @property
    def needs_cache(self) -> bool:
        """Return whether it skips modules on some steps."""
        return self.cache is not None

    def networks(self, *, with_cache: bool = True) -> Iterator[nn.Module]:
        """Yield its network."""
        if with_cache or self.cache is None:
            yield self.model

    def to(self, device: torch.device | str) -> "Expert":
        """Move the network to a device, in place."""
        move_model(self.model, device)
        return self

    def save(self, folder: Path) -> None:
        """Write the network as diffusers does, plus `expert.json` and, with a cache, `cache.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, folder)
        metadata = ExpertMetadata(
            prediction=self.prediction,
            noise_schedule=self.noise_schedule.name,
            latent_shape=self.latent_shape,
            num_classes=self.num_classes,
            cluster_id=self.cluster_id,
            few_step=self.few_step,
            t_shift=self.t_shift,
        )
        content = to_jsonable(metadata)
        if self.t_shift == 1:
            del content["t_shift"]
        write_json(folder / METADATA_FILE, content)
        if self.cache is not None:
            write_json(folder / CACHE_FILE, self.cache)

    @classmethod
    def load(cls, folder: Path) -> "Expert":
        """Read a folder that `save` wrote; raise an `ArtifactError` if a file is missing or invalid."""
        content, model = read_json(folder / METADATA_FILE), load_network(folder)
        try:
            metadata = from_json(ExpertMetadata, content)
            has_cache = (folder / CACHE_FILE).exists()
            cache = from_json(CacheSchedule, read_json(folder / CACHE_FILE)) if has_cache else None
        except ValueError as error:
            raise CorruptArtifact(f"{folder} does not hold a valid expert: {error}; train it again") from error
        return cls(
            model=model,
            prediction=metadata.prediction,
            noise_schedule=NOISE_SCHEDULES[metadata.noise_schedule],
            latent_shape=metadata.latent_shape,
            num_classes=metadata.num_classes,
            cluster_id=metadata.cluster_id,
            few_step=metadata.few_step,
            t_shift=metadata.t_shift,
            cache=cache,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMetadata:
    """The content of `expert.json`: the fields of an `Expert` without its network and its cache."""

    prediction: Prediction
    noise_schedule: NoiseScheduleName
    latent_shape: tuple[int, ...]
    num_classes: int
    cluster_id: int
    few_step: FewStepSchedule | None = None
    t_shift: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSummary:
    """Size and cost of a finished training."""

    flops: float
    steps: int
    epochs: float
    """Passes over all samples."""
    images: int
    """Samples in the shards."""
    parameters: int
    final_loss: float
    """Mean loss of the last metrics row."""


def train_expert(  # noqa: PLR0913 - one for each input of a training
    config: ExpertConfig,
    shards: Sequence[Path],
    codec: Path,
    out: Path,
    workspace: Workspace,
    num_classes: int | None = None,
    cluster_id: int = 0,
    text: TextEncoder | None = None,
    on_checkpoint: Callable[[Callable[[], Expert]], None] | None = None,
    held_out: Sequence[Path] = (),
    interval: Interval = WHOLE,
) -> ExpertSummary:
    """Train one expert on the samples of the shard folders and write it to `out`, with metrics and a summary.

    `config.training.batch_size` is the batch of this expert alone; `num_classes` defaults to the classes of the shards.
    `text` encodes the captions of shards; latents have their own.
    `on_checkpoint` is called after every checkpoint, with a function that copies the expert as it is by then.
    `held_out` are folders of samples on which its error is measured while it trains. It trains on `interval` of t;
    raises `NetworkError` with `time_bounds`, which are several networks.
    """
    if config.time_bounds:
        raise NetworkError(
            "this trains one network, and time_bounds are for several; use experts.time_split.train_intervals"
        )
    data = TrainingData.open(shards, held_out, load_codec(codec), codec, workspace, text)
    if num_classes is None:
        num_classes = len(read_class_names(shards[0]))
    data.check_classes(num_classes)
    check_unchanged(config)
    initial_model = build_initial_model(config, data.samples.latent_shape, num_classes, data.samples.null_text)
    loss: LossFn = _create_loss(config, initial_model)
    extra_flops = text_flops(shards)
    if interval != WHOLE:
        _check_schedule(config, initial_model)
        loss = restrict_loss(loss, interval, config.training)
        data = replace(data, times=[t for t in TIMES if interval[0] <= t < interval[1]])
    if config.align_weight:
        aligned, loss = align(config, initial_model.model, loss, load_codec(codec))
        initial_model = replace(initial_model, model=aligned)
        extra_flops += loss.sample_flops * config.training.batch_size * loss.last_step
    summary = train_network(
        config.training, data, initial_model, loss, out, workspace, num_classes, cluster_id, on_checkpoint
    )
    if extra_flops:
        summary = replace(summary, flops=summary.flops + extra_flops)
        write_json(out / "training.json", summary)
    return summary


def _create_loss(config: ExpertConfig, initial_model: InitialModel) -> LossFn:
    """Return the loss on the network's own prediction, or for `init_loss=converted` on the configured one."""
    source = (initial_model.prediction, initial_model.noise_schedule)
    target, weight = (config.prediction, NOISE_SCHEDULES[config.noise_schedule]), build_loss_weight(config)
    if config.init is not None and config.init_loss == "converted":
        return partial(converted_loss, source=source, target=target, weight=weight)
    return partial(expert_loss, prediction=source[0], noise_schedule=source[1], weight=weight)


def _check_schedule(config: ExpertConfig, initial_model: InitialModel) -> None:
    """Raise `NetworkError` for a checkpoint whose t is not that of the ensemble."""
    if initial_model.noise_schedule.name != config.noise_schedule:
        raise NetworkError(
            f"time_bounds divide the t of noise_schedule={config.noise_schedule}, and the checkpoint has "
            f"{initial_model.noise_schedule.name}; choose one of the same, or leave time_bounds empty"
        )


def train_network(
    training: TrainingConfig,
    data: TrainingData,
    initial_model: InitialModel,
    loss: LossFn,
    out: Path,
    workspace: Workspace,
    num_classes: int,
    cluster_id: int = 0,
    on_checkpoint: Callable[[Callable[[], Expert]], None] | None = None,
) -> ExpertSummary:
    """Train a network on latents by a loss, and write it to `out` as an expert, with metrics and a summary.

    The FLOPs of the measurements on held-out samples are not part of the summary.
    """
    dataset = data.samples

    def as_expert(model: nn.Module) -> Expert:
        return Expert(
            model=model.network if isinstance(model, AlignedNetwork) else model,
            prediction=initial_model.prediction,
            noise_schedule=initial_model.noise_schedule,
            latent_shape=dataset.latent_shape,
            num_classes=num_classes,
            cluster_id=cluster_id,
            t_shift=training.t_shift,
        )

    def report_checkpoint(copy_model: Callable[[], nn.Module], report: Callable[..., None]) -> None:
        report(lambda: as_expert(copy_model()))

    forward = network_flops(as_expert(initial_model.model).model, dataset.latent_shape)
    measure = _measure_by(lambda model: as_expert(model).velocity, data, training)
    watch = Watch(measure=measure, sample_flops=training_flops(forward, 1, 1), stops_spikes=True)
    on_model = None if on_checkpoint is None else partial(report_checkpoint, report=on_checkpoint)
    trained = fit(initial_model.model, loss, dataset, training, workspace, on_model, watch)
    as_expert(trained.model).save(out)
    if training.ema_snapshots:
        shutil.copytree(workspace.scratch / SNAPSHOTS, out / SNAPSHOTS, dirs_exist_ok=True)
    if trained.early is not None:
        as_expert(trained.early).save(out / EARLY)
    steps = int(trained.rows[-1]["step"])
    summary = ExpertSummary(
        flops=training_flops(forward, training.batch_size, steps),
        steps=steps,
        epochs=steps * training.batch_size / len(dataset),
        images=len(dataset),
        parameters=count_parameters(as_expert(trained.model).model),
        final_loss=trained.rows[-1]["loss"],
    )
    write_rows(out / "metrics.jsonl", trained.rows)
    write_json(out / "training.json", summary)
    return summary


def _measure_by(
    velocity_of: Callable[[nn.Module], Callable[..., Latents]],
    data: TrainingData,
    training: TrainingConfig,
) -> Measure | None:
    """Return how a network is measured while it trains; None without held-out samples, or if it is not to be."""
    if data.held_out is None or training.held_out_every is None:
        return None
    samples, device = take_evenly(data.held_out, count_held_out(training)), torch.device(training.device)

    def measure(model: nn.Module) -> dict[str, float]:
        velocity = partial(velocity_of(model), noise_schedule=RECTIFIED_FLOW)
        group = DataParallelGroup.join()
        return measure_held_out(velocity, samples, RECTIFIED_FLOW, part_rows(training), device, group, data.times)

    return measure


def expert_flops(
    config: ExpertConfig, latent_shape: tuple[int, ...], num_classes: int, null_text: TextEmbedding | None = None
) -> float:
    """Return the FLOPs of a full training with this config, without training; `null_text` as in `build_network`."""
    model = build_initial_model(config, latent_shape, num_classes, null_text).model
    return training_flops(network_flops(model, latent_shape), config.training.batch_size, config.training.steps)


def network_flops(model: nn.Module, latent_shape: tuple[int, ...]) -> float:
    """Return the FLOPs of the network on one row."""
    row, t = torch.zeros(1, *latent_shape), torch.full((1,), 0.5)
    return forward_flops(lambda: call_network(model, row, t, Condition.null(1)))
