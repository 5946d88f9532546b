"""Check configuration, data and machine before anything starts, from names and counts alone; imports no torch, no Ray.

Every mistake comes with the overrides that mend it. The later checks see the earlier mends, so all of them together
are a configuration that passes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_partition.config import MAX_FEATURES
from data_partition.datasets.survey import Survey, survey_source
from data_partition.errors import DataError
from ddm_core.artifacts import ArtifactError
from ddm_core.name_lists import join_names
from ensemble.config import MIN_HELD_OUT
from experts.conditions.text_files import TextError, read_text_shape
from experts.config import ExpertConfig
from experts.errors import CodecError
from experts.networks.adapters.adapter import DataShape
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.alignment_settings import check_alignment
from experts.networks.class_settings import NetworkError, SettingsError, class_settings
from experts.networks.latent_shapes import (
    IMAGE_COMPONENTS,
    check_blocks,
    check_condition,
    check_latent_shape,
    count_pca_values,
    latent_shape_of,
)
from experts.networks.pretrained_files import InitError, check_init_settings
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.pipeline.graph import build_graph
from orchestrator.planning.checks.machine import check_folder, check_machine
from orchestrator.planning.checks.sources import check_deliveries, check_own_images, read_survey
from orchestrator.run.run_folder import RunFolder

MIN_CLUSTER = 20
"""Fewest training samples of an expert: the clustering gives each of its fine centroids as many."""

HOLDOUTS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
"""Shares to advise when too few samples are held out."""


def check_run(config: RunConfig, run: RunFolder) -> Survey | None:
    """Return the counts of the source, None if they are not known before the run.

    Raises `ConfigError` with every reason why a run cannot succeed, and the overrides with which it would.

    A finished data set is taken from the run, so its source may be gone; a finished ensemble is not checked again.
    """
    check_folder(run.root)
    stages = {stage.name: stage for stage in build_graph(config)}
    mistakes = [*check_machine(config), *check_text(config), *check_own_images(run, stages)]
    mistakes += check_deliveries(run, stages)
    mend, survey = "", None
    if not run.is_finished(stages["ensemble"]):
        try:
            dataset = stages["dataset"]
            survey = read_survey(run.verify_file(dataset, "dataset.json")) if run.is_finished(dataset) else None
            survey = survey or survey_source(config.data)
            check = DataCheck(config, survey)
        except DataError as error:
            mistakes.append(str(error))
        else:
            check.run()
            if check.advice and check.is_mendable and not mistakes:
                mend = "\nAdd: " + " ".join(f"{key}={value}" for key, value in check.advice.items())
            mistakes += check.mistakes
            mistakes += [] if mistakes else check_calls(config, survey)
    if mistakes:
        title = f"this run cannot succeed, for {len(mistakes)} reason{'s' * (len(mistakes) > 1)}; nothing has started:"
        raise ConfigError("\n  ".join([title, *mistakes]) + mend)
    return survey


def check_text(config: RunConfig) -> Iterator[str]:
    """Yield why experts cannot read the text or the classes of a configuration, or checkpoints its latents."""
    try:
        text_shape = read_text_shape(config.text)
    except (TextError, ArtifactError) as error:
        yield str(error)
        return
    has_classes = config.data.labels and (text_shape is None or config.text.classes)
    mistakes, read = [], set[str]()
    for expert in (config.expert, *config.experts.values()):
        try:
            if expert.init is None:
                check_condition(expert.network, int(has_classes), text_shape)
                if expert.task_share < 1:
                    check_blocks(class_settings(expert.network).class_name)
            else:
                shape = latent_shape_of(config.codec, config.data.image_size, config.data.channels)
                check_init_settings(Path(expert.init), DataShape(latent_shape=shape, text_shape=text_shape))
                if expert.init not in read:
                    read.add(expert.init)
                    _check_tensors(Path(expert.init))
        except (NetworkError, InitError) as error:
            mistakes.append(str(error))
        except CodecError:  # the check of the data says so, with what would fit
            continue
    yield from dict.fromkeys(mistakes)


def _check_tensors(folder: Path) -> None:
    from experts.networks.registry import check_network_files  # imports torch and diffusers: seconds

    try:
        check_network_files(folder)
    except ArtifactError as error:
        raise InitError(f"expert.init: {error}") from error


def check_calls(config: RunConfig, survey: Survey | None) -> Iterator[str]:
    """Yield why a class of diffusers with these settings cannot be built and called; imports torch only for those."""
    experts = {"expert": config.expert} | {f"experts.{k}": item for k, item in config.experts.items()}
    networks = {repr(item.network): key for key, item in reversed(experts.items()) if _is_of_diffusers(item)}
    if not networks:
        return
    from orchestrator.planning.checks.trial_call import try_network  # imports torch and diffusers: seconds

    text_shape = read_text_shape(config.text)
    num_classes = max(len(survey.class_counts) if survey else 0, 1) if config.data.labels else 0
    data = DataShape(
        latent_shape=latent_shape_of(config.codec, config.data.image_size, config.data.channels),
        num_classes=num_classes if text_shape is None or config.text.classes else 0,
        text_shape=text_shape,
    )
    for key in networks.values():
        try:
            try_network(experts[key].network, data)
        except NetworkError as error:
            yield f"{key}.network: {error}"


def _is_of_diffusers(expert: ExpertConfig) -> bool:
    return expert.init is None and expert.network.kind == "diffusers"


@dataclass
class DataCheck:
    """Compares a configuration with its data; `config` and `survey` change with the advice so far."""

    config: RunConfig
    survey: Survey | None
    """None: only reading the source shows its counts."""
    mistakes: list[str] = field(default_factory=list)
    advice: dict[str, Any] = field(default_factory=dict)

    is_mendable: bool = True
    """Whether the advice mends every mistake."""

    def __post_init__(self) -> None:
        self.num_experts = self.config.partition.num_experts

    def run(self) -> None:
        """Run every check, each on what the earlier ones advise."""
        if self.survey is not None and self.config.data.labels:
            self.check_labels(self.survey)
        if not self.config.data.labels:
            self.check_without_labels()
        if self.survey is not None and self.survey.held_out < MIN_HELD_OUT:
            self.check_held_out(self.survey)
        self.check_codec()
        self.check_networks()
        self.check_classes()
        self.check_prompts()
        self.check_buckets()
        self.check_pixels()
        if self.survey is not None and self.survey.is_complete:
            self.check_components(self.survey.train)
            self.check_experts(self.survey.train)
            self.check_batches(self.survey.train)

    def check_labels(self, survey: Survey) -> None:
        """Check that every sample has a class, and every class samples to train on."""
        counts = survey.class_counts
        if survey.unlabelled:
            total = survey.train + survey.held_out
            is_tar = self.config.data.source == "webdataset"
            place = "put x.cls or x.json beside each" if is_tar else "put each into a folder of its class"
            self.mistakes.append(
                f"data.labels=true needs a class for every sample, and {len(survey.unlabelled)} of {total} have none "
                f"({join_names(survey.unlabelled)}); {place}, or train without classes"
            )
            self.change("data", labels=False)
        elif empty := [name for name, count in counts.items() if count == 0 and survey.is_complete]:
            limit = self.config.data.limit
            self.mistakes.append(
                f"classes without a training image: {join_names(empty)}; "
                + (
                    f"data.limit={limit} ends before them, since images are read in the order of their names: raise it"
                    if limit and limit == survey.train
                    else "remove their folders, or add images"
                )
            )
            self.is_mendable = False
        elif len(counts) == 1 and survey.is_complete:
            self.mistakes.append(f"all images have one class, {next(iter(counts))}: train without classes")
            self.change("data", labels=False)
        elif counts and self.config.partition.by == "labels" and self.config.partition.num_experts > len(counts):
            self.mistakes.append(
                f"partition.by=labels makes at most one cluster of each of the {len(counts)} classes; "
                f"got partition.num_experts={self.config.partition.num_experts}"
            )
            self.num_experts = len(counts)

    def check_without_labels(self) -> None:
        """Check that nothing needs the classes that the data do not have."""
        if self.config.partition.by == "labels":
            self.mistakes.append("partition.by=labels needs data.labels=true; cluster by features")
            self.change("partition", by="features")
        if self.config.scores.conditional and self.config.text.kind == "none":
            self.mistakes.append(
                "scores.conditional=true needs data.labels=true, or captions and a text encoder; score without it"
            )
            self.change("scores", conditional=False)

    def check_held_out(self, survey: Survey) -> None:
        """Check that enough samples are held out for the scores."""
        self.mistakes.append(
            f"scores need {MIN_HELD_OUT} held-out images, and of {survey.train + survey.held_out} images "
            f"data.holdout={self.config.data.holdout} holds out {survey.held_out}; raise it, or add images"
        )
        is_mended = False
        for share in HOLDOUTS:
            other = survey_source(replace(self.config.data, holdout=share))
            has_all_classes = other is not None and all(other.class_counts.values())
            if (
                other is not None
                and other.held_out >= MIN_HELD_OUT
                and (has_all_classes or not self.config.data.labels)
            ):
                self.survey, is_mended = other, True
                self.change("data", holdout=share)
                break
        self.is_mendable &= is_mended

    def check_codec(self) -> None:
        """Check that the codec's patches fit the images."""
        data, codec = self.config.data, self.config.codec
        try:
            latent_shape_of(codec, data.image_size, data.channels)
        except CodecError as error:
            self.mistakes.append(str(error))
            size, channels = math.gcd(codec.patch_size, data.image_size), codec.latent_channels
            if codec.kind.startswith("patch_pca"):
                channels = min(channels, size**2 * data.channels)
            else:
                size &= -size
            self.change("codec", patch_size=size, latent_channels=channels)
            self.is_mendable &= codec.kind != "autoencoder" and codec.path is None

    def check_networks(self) -> None:
        """Check that every network accepts the codec's latents."""
        experts = {"expert": self.config.expert} | {f"experts.{k}": item for k, item in self.config.experts.items()}
        data = self.config.data
        for key, expert in experts.items():
            shape = latent_shape_of(self.config.codec, data.image_size, data.channels)
            try:
                if expert.init is None:
                    check_latent_shape(expert.network, shape)
            except SettingsError:  # `check_text` says so
                self.is_mendable = False
            except NetworkError as error:
                self.mistakes.append(f"{key}.network does not fit codec.kind={self.config.codec.kind}: {error}")
                self.is_mendable &= len(shape) == 1
                if len(shape) == 1:
                    self.config = replace(self.config, codec=replace(self.config.codec, kind="pixels"))
                    self.advice["codec"] = "pixels"
            try:
                if expert.init is None and expert.align_weight:
                    check_alignment(expert)
            except NetworkError as error:
                self.mistakes.append(f"{key}: {error}")
                self.is_mendable = False

    def check_classes(self) -> None:
        """Leave the classes out where a network reads the text alone; without the advice `check_text` says so."""
        experts = (self.config.expert, *self.config.experts.values())
        networks = [class_settings(expert.network) for expert in experts if expert.init is None]
        has_both = self.config.data.labels and self.config.text.kind != "none" and self.config.text.classes
        known = [ADAPTERS[network.class_name] for network in networks if network.class_name in ADAPTERS]
        if has_both and not all(adapter.reads_classes for adapter in known):
            self.change("text", classes=False)

    def check_prompts(self) -> None:
        """Check that prompts of experts without text are classes of the data, as far as their names are known."""
        known = {} if self.survey is None or self.config.text.kind != "none" else self.survey.class_counts
        if known and (unknown := [prompt for prompt in self.config.validation.prompts if prompt not in known]):
            self.mistakes.append(
                f"validation.prompts has no class {join_names(unknown)}, and these experts read no text; known: "
                f"{join_names([*known])}"
            )
            self.is_mendable = False

    def check_buckets(self) -> None:
        """Check that codec and networks accept images of all sizes."""
        data, codec = self.config.data, self.config.codec
        if not data.aspect_buckets:
            return
        if codec.kind in IMAGE_COMPONENTS:
            self.mistakes.append(
                f"codec.kind={codec.kind} takes images of one size, and data.aspect_buckets makes several; use "
                "codec=patch_pca, pixels or an autoencoder, or leave the buckets out"
            )
            self.is_mendable = False
            return
        experts = (self.config.expert, *self.config.experts.values())
        if codec.kind == "patch_pca" and any(expert.align_weight for expert in experts):
            self.mistakes.append(
                "expert.align_weight decodes images of one size with codec=patch_pca, and data.aspect_buckets makes "
                "several; use codec=pixels, or leave one of the two out"
            )
            self.is_mendable = False
        networks = [expert.network for expert in experts]
        try:
            for size in data.sizes:
                channels, height, width = (latent_shape_of(codec, side, data.channels) for side in (size[0], *size))
                for network in networks:
                    check_latent_shape(network, (channels[0], height[1], width[2]), many_shapes=True)
        except (CodecError, NetworkError) as error:
            self.mistakes.append(f"data.aspect_buckets: {error}")
            self.is_mendable = False

    def check_pixels(self) -> None:
        """Check that a codec of principal components can take all values of an image."""
        data, codec = self.config.data, self.config.codec
        if count_pca_values(codec, data.image_size, data.channels) <= MAX_FEATURES:
            return
        self.mistakes.append(
            f"codec.kind={codec.kind} takes at most {MAX_FEATURES} values an image, and "
            f"{data.image_size}x{data.image_size}x{data.channels} has {data.image_size**2 * data.channels}"
        )
        self.change("data", image_size=2 ** int(math.log2(MAX_FEATURES / data.channels) / 2), fit="crop")

    def check_components(self, train: int) -> None:
        """Check that the images have as many principal components as the codec takes."""
        data, codec = self.config.data, self.config.codec
        limit = min(data.image_size**2 * data.channels, train - 1)
        if codec.kind in IMAGE_COMPONENTS and codec.components > limit:
            self.mistakes.append(
                f"{train} training images of {data.image_size}x{data.image_size} pixels have at most {limit} principal "
                f"components; got codec.components={codec.components}"
            )
            self.change("codec", components=max(limit, 2))

    def check_experts(self, train: int) -> None:
        """Check that every expert gets enough samples."""
        count, most = self.num_experts, max(1, train // MIN_CLUSTER)
        if count > most:
            self.mistakes.append(
                f"{train} training images are {train / count:.3g} for each of {count} experts, and an expert needs "
                f"{MIN_CLUSTER}; set partition.num_experts to at most {most}, or add images"
            )
            self.num_experts = most
        if self.num_experts != self.config.partition.num_experts:
            self.advice["partition.num_experts"] = self.num_experts

    def check_batches(self, train: int) -> None:
        """Check that an expert's share of the batch is no larger than its cluster."""
        count = self.num_experts
        multiple = count * self.config.compute.stages.expert.workers
        experts = {"expert": self.config.expert} | {f"experts.{k}": item for k, item in self.config.experts.items()}
        for key, expert in experts.items():
            batch = expert.training.batch_size
            if batch > train:
                self.mistakes.append(
                    f"{key}.training.batch_size={batch} is {batch / count:.3g} images a step for each of {count} "
                    f"experts, and a cluster has about {train / count:.3g}; lower it"
                )
            if batch > train or batch % multiple:
                self.advice[f"{key}.training.batch_size"] = max(min(batch, train) // multiple, 1) * multiple

    def change(self, section: str, **values: Any) -> None:
        """Advise other values of a section, and continue with them."""
        self.advice |= {f"{section}.{key}": str(value).lower() for key, value in values.items()}
        self.config = replace(self.config, **{section: replace(getattr(self.config, section), **values)})
