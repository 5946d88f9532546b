"""An ensemble as a folder: saved, loaded, called like one model.

model_index.json       ids of the experts and of the missing ones, classes
expert_0/ ...          one folder per expert, as `experts` wrote it
cluster_conditioned/   in place of those: one cluster-conditioned network
shared/                weights that the experts share, if they do
router/                absent for a monolith
codec/                 latents to images
text_encoder.json      the encoder of prompts, and the checksum of its files; absent without text
scheduler/             a diffusers scheduler for tools that look for one; `SamplingConfig` selects ours
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ddm_core.artifacts import (
    MANIFEST,
    atomic_folder,
    list_files,
    read_json,
    write_json,
)
from ddm_core.files.links import link_or_copy
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.expert_registry import load_single_network
from ensemble.pipeline_folder import (
    INDEX,
    PipelineError,
    PipelineIndex,
    check_shapes,
    find_expert_folder,
    load_experts,
    refuse_pickles,
)
from ensemble.sampling.prompts import PromptError, Prompts
from ensemble.sampling.sample import Progress, SampleResult, sample
from experts.baselines.cluster_conditioned import (
    CLUSTER_CONDITIONED,
    is_cluster_conditioned,
)
from experts.codec import Codec
from experts.codecs.registry import load_codec
from experts.compressed.quantization.shared_weight_io import SHARED, collect_bases, save_bases
from experts.conditions.condition import Condition
from experts.conditions.text_encoder import SETTINGS as TEXT_SETTINGS
from experts.conditions.text_encoder import TextEncoder, read_text_config
from experts.config import TextConfig
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.errors import CodecError
from experts.expert import EARLY, METADATA_FILE, Expert
from experts.expert_model import ExpertModel
from experts.networks.adapters.registry import ADAPTERS
from experts.time_split import TIME_SPLIT
from experts.training.flops import forward_flops
from experts.training.latents.caption_costs import caption_flops
from router.router import Router

NOT_COPIED = (MANIFEST, "metrics.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsemblePipeline:
    """An ensemble with its codec; seeds in, images out."""

    ensemble: Ensemble
    codec: Codec
    num_classes: int = 0
    """0 is unconditional."""
    class_names: tuple[str, ...] = ()
    text: TextConfig | None = None
    """The encoder of captions; None for experts without text."""
    folder: Path | None = None
    """Where it was loaded from; an early checkpoint of its experts is found there."""

    def __call__(
        self,
        seeds: Sequence[int],
        config: SamplingConfig,
        prompts: Prompts | None = None,
        on_progress: Progress | None = None,
        weak: Ensemble | None = None,
        negative: Prompts | None = None,
        size: tuple[int, int] | None = None,
    ) -> SampleResult:
        """Sample one image per seed; without `prompts` unconditionally; `size` is another height and width.

        `negative` is what the unconditional branch of guidance is asked for, in place of nothing. If `weak` is None and
        the configuration reflects, the weak ensemble is loaded for this call. Raises like `condition` and `sample`.
        """
        weak = weak or self.load_weak(config)
        condition, negated = (None if part is None else self.condition(part) for part in (prompts, negative))
        codec = self.codec
        if size is not None:
            network = next(next(iter(self.ensemble.experts.values())).networks())
            needs_router = self.ensemble.router is not None and config.selection.name != "sticky"
            codec = size_codec(codec, network, size, needs_router=needs_router)
        return sample(self.ensemble, codec, seeds, config, condition, on_progress, weak, negated)

    def condition(self, prompts: Prompts) -> Condition:
        """Encode prompts; raise `PromptError` for a class or a caption that the experts were not trained on.

        The text encoder is loaded by the first call with a caption, and kept; it cuts captions that are too long, and
        logs how many. Raises `TextError` if it is not there.
        """
        unknown = sorted({k for k in prompts.class_ids if not -1 <= k < self.num_classes})
        if unknown:
            raise PromptError(
                f"classes go from 0 to {self.num_classes - 1}, and -1 is none; got {unknown[:5]}"
                if self.num_classes
                else "these experts were trained without labels; leave the classes out"
            )
        if not any(prompts.captions):
            return Condition.of_classes(prompts.class_ids)
        encoder = None if self.text is None else _load_text_encoder(self.text)
        if encoder is None:
            raise PromptError(
                "these experts were trained without text, so they cannot follow a prompt; leave it out, or train with "
                "text=minilm on data with captions (data.captions=true)"
            )
        return replace(Condition.of_classes(prompts.class_ids), text=encoder.encode(prompts.captions))

    def text_flops(self) -> float:
        """Return the FLOPs of encoding a caption, and of p(k | text); 0 without text."""
        encoder = None if self.text is None else _load_text_encoder(self.text)
        if encoder is None:
            return 0.0
        text, router = replace(encoder.null_text, is_null=torch.zeros(1, dtype=torch.bool)), self.ensemble.router
        condition = replace(Condition.null(1), text=text)
        return caption_flops(encoder) + (forward_flops(lambda: router.prior_logits(condition)) if router else 0.0)

    def load_weak(self, config: SamplingConfig) -> Ensemble | None:
        """Load the weak ensemble of a reflection, or return None; raise `PipelineError` if it is absent or unfit."""
        reflection, present = config.reflection, self.ensemble.experts
        if reflection is None:
            return None
        if reflection.weak == "folder":
            return self._load_weak_folder(Path(reflection.path).expanduser())
        if reflection.weak == "early":
            return self._load_early()
        if reflection.weak == "monolith":
            raise PipelineError(
                "reflection.weak=monolith is that of a run, and this call has none; set weak=folder and path to the "
                "monolith's folder"
            )
        if reflection.expert_id not in present:
            raise PipelineError(
                f"reflection.expert_id must be one of {sorted(present)}, the experts of this ensemble; "
                f"got {reflection.expert_id}; choose one of them"
            )
        return Ensemble(experts={0: present[reflection.expert_id]}, noise_schedule=self.ensemble.noise_schedule)

    def _load_early(self) -> Ensemble:
        """Load the earlier checkpoint of every expert, in an ensemble of the same router."""
        if absent := [k for k in self.ensemble.experts if not self.has_early(k)]:
            raise PipelineError(
                f"reflection.weak=early needs the earlier checkpoint of every expert, and experts {absent} of "
                f"{self.folder or 'this ensemble'} have none; train with expert.training.early_checkpoint=0.5, or "
                "set reflection.weak=monolith"
            )
        experts = {k: Expert.load(self._early_folder(k)) for k in self.ensemble.experts}
        return replace(self.ensemble, experts=experts)

    def has_early(self, k: int) -> bool:
        """Return whether an earlier checkpoint of an expert was kept."""
        return self.folder is not None and self._early_folder(k).is_dir()

    def _early_folder(self, k: int) -> Path:
        return find_expert_folder(self.folder or Path(), k) / EARLY

    def _load_weak_folder(self, folder: Path) -> Ensemble:
        """Load the ensemble of a pipeline's folder, or an expert's folder as an ensemble of one."""
        if not (folder / INDEX).is_file():
            expert = Expert.load(folder)
            check_shapes({0: expert}, self.codec, self.num_classes)
            return Ensemble(experts={0: expert}, noise_schedule=self.ensemble.noise_schedule)
        other = EnsemblePipeline.from_pretrained(folder)
        ours, theirs = (
            (pipeline.codec.latent_shape, pipeline.num_classes, pipeline.ensemble.noise_schedule.name)
            for pipeline in (self, other)
        )
        if ours != theirs:
            raise PipelineError(
                "reflection needs two pipelines with the same (latents, classes, noise schedule); "
                f"{folder} has {theirs}, this pipeline {ours}; choose another folder"
            )
        return other.ensemble

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the pipeline's folder, complete or not at all; an existing folder is replaced."""
        with atomic_folder(Path(folder)) as temporary:
            experts = self.ensemble.experts
            for k, expert in experts.items():
                expert.save(temporary / expert.folder_name(k))
            if bases := collect_bases(model for expert in experts.values() for model in expert.networks()):
                save_bases(bases, temporary / SHARED)
            if self.ensemble.router is not None:
                self.ensemble.router.save(temporary / "router")
            (temporary / "codec").mkdir(parents=True)
            self.codec.save(temporary / "codec")
            index = PipelineIndex(
                noise_schedule=self.ensemble.noise_schedule.name,
                expert_ids=tuple(sorted(experts)),
                missing_ids=self.ensemble.missing,
                has_router=self.ensemble.router is not None,
                num_classes=self.num_classes,
                class_names=self.class_names,
                t_shift=self.ensemble.t_shift,
            )
            index.write(temporary)
            if self.text is not None:
                write_json(temporary / TEXT_SETTINGS, self.text)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], load: Callable[[Path], ExpertModel | None] | None = None
    ) -> "EnsemblePipeline":
        """Load a pipeline's folder without the experts that its index lists as missing.

        `load` is another function that loads an expert's folder, or returns None for one that is loaded as usual.

        Raises `PipelineError` for a folder with pickles, with an expert that is neither present nor listed as
        missing, or with parts that do not fit; an `ArtifactError` for broken files.
        """
        folder = Path(folder)
        refuse_pickles(folder)
        index = PipelineIndex.read(folder)
        experts = load_experts(folder, [k for k in index.expert_ids if k not in index.missing_ids], load)
        codec = load_codec(folder / "codec")
        check_shapes(experts, codec, index.num_classes)
        router = Router.load(folder / "router") if index.has_router else None
        schedule = NOISE_SCHEDULES[index.noise_schedule]
        ensemble = Ensemble(experts=experts, noise_schedule=schedule, router=router, t_shift=index.t_shift)
        if ensemble.missing != index.missing_ids:
            raise PipelineError(
                f"{folder / INDEX} lists {list(index.missing_ids)} as missing, but of the router's "
                f"{ensemble.num_experts} experts {list(ensemble.missing)} are absent; assemble it again"
            )
        return cls(
            ensemble=ensemble,
            codec=codec,
            num_classes=index.num_classes,
            class_names=index.class_names,
            text=read_text_config(folder),
            folder=folder,
        )


def size_codec(codec: Codec, network: nn.Module, size: tuple[int | None, int | None], *, needs_router: bool) -> Codec:
    """Return the codec of images of this height and width, None for its own.

    Raises `PipelineError` if codec, network or router have one size, or the codec's grid does not divide it.
    """
    default = codec.image_shape
    height, width = size[0] or default[0], size[1] or default[1]
    if (height, width) == default[:2]:
        return codec
    adapter = ADAPTERS[type(network).__name__]
    reason = (
        "its codec has no grid"
        if len(codec.latent_shape) != 3
        else f"{adapter.class_name} takes one size"
        if adapter.is_flat or adapter.is_square
        else "the router takes one size, and only selection=sticky does without it"
        if needs_router
        else ""
    )
    if reason:
        raise PipelineError(f"images must be {default[0]} x {default[1]}, not {height} x {width}: {reason}")
    try:
        return codec.with_size(height, width)
    except CodecError as error:
        raise PipelineError(f"images must be {default[0]} x {default[1]}, not {height} x {width}: {error}") from error


def assemble(
    expert_folders: Mapping[int, Path],
    router: Path | None,
    codec: Path,
    out: Path,
    missing_ids: Sequence[int] = (),
    class_names: Sequence[str] = (),
    text: TextConfig | None = None,
) -> EnsemblePipeline:
    """Put finished parts into one pipeline folder `out`, and load it, which checks that they fit.

    `text` is the encoder of the captions that the parts were trained on. Files are linked, or copied to another disk.
    Raises what `EnsemblePipeline.from_pretrained` raises.
    """
    if not expert_folders:
        raise PipelineError("a pipeline needs an expert, and all are missing; finish at least one")
    parts = {
        CLUSTER_CONDITIONED if is_cluster_conditioned(folder) else f"expert_{k}": folder
        for k, folder in expert_folders.items()
    }
    parts["codec"] = codec
    if router is not None:
        parts["router"] = router
    first = load_single_network(next(iter(expert_folders.values())))
    schedule = first.noise_schedule if router is None else Router.load(router).noise_schedule
    index = PipelineIndex(
        noise_schedule=schedule.name,
        expert_ids=tuple(sorted(expert_folders)),
        missing_ids=tuple(sorted(missing_ids)),
        has_router=router is not None,
        num_classes=first.num_classes,
        class_names=tuple(class_names),
        t_shift=_common_shift(expert_folders),
    )
    with atomic_folder(out) as temporary:
        for name, folder in parts.items():
            _copy(folder, temporary / name)
        index.write(temporary)
        if text is not None:
            write_json(temporary / TEXT_SETTINGS, text)
        pipeline = EnsemblePipeline.from_pretrained(temporary)
    return replace(pipeline, folder=out)


def _common_shift(expert_folders: Mapping[int, Path]) -> float:
    """Return the experts' shift of t; raise `PipelineError` if they differ."""
    folders = [folder / "0" if (folder / TIME_SPLIT).is_file() else folder for folder in expert_folders.values()]
    files = [folder / METADATA_FILE for folder in folders]
    shifts = {float(read_json(file).get("t_shift", 1.0)) if file.is_file() else 1.0 for file in files}
    if len(shifts) > 1:
        raise PipelineError(
            f"experts of one pipeline must share training.t_shift; got {sorted(shifts)}; train them with one value"
        )
    return shifts.pop()


@functools.lru_cache(maxsize=1)
def _load_text_encoder(config: TextConfig) -> TextEncoder | None:
    return TextEncoder.from_config(config)


def _copy(folder: Path, target: Path) -> None:
    """Link a part's files; raise `CorruptArtifact` for a symbolic link, which could bring in any file."""
    for file in list_files(folder):
        if file.name not in NOT_COPIED:
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, copy)
