"""An ensemble as a folder: saved, loaded, called like one model.

model_index.json    ids of the experts, of the missing ones, classes
expert_0/ …         one folder an expert, as `experts` wrote it
told/               in place of those: one network that is told the cluster
shared/             what the experts share, if they share weights
router/             absent for a monolith
codec/              latents to images
scheduler/          a diffusers scheduler for tools that look for one; ours are chosen by `SamplingConfig`
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from ddm_core.artifacts import (
    MANIFEST,
    ArtifactError,
    CorruptArtifact,
    atomic_folder,
    files_in,
    read_json,
    write_json,
)
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.multi_network_experts import TimeSplitExpert, TruncatedExpert, is_time_split, is_truncated
from ensemble.sampling.sample import Progress, SampleResult, sample
from experts.baselines.cluster_conditioned import ClusterConditionedExpert, is_cluster_conditioned
from experts.codec import Codec
from experts.codecs.registry import load_codec
from experts.compressed.quantization.shared_weight_io import SHARED, bases_of, link, load_bases, save_bases
from experts.config import NoiseScheduleName
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.expert import Expert
from router.router import Router

AnyExpert = Expert | TimeSplitExpert | TruncatedExpert | ClusterConditionedExpert

INDEX, CLUSTER_CONDITIONED = "model_index.json", "cluster_conditioned"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
NOT_COPIED = (MANIFEST, "metrics.jsonl")


class PipelineError(ArtifactError):
    """A folder is not a pipeline that can be loaded, or a call asks it for what it does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DDMPipeline:
    """An ensemble with its codec; seeds in, images out."""

    ensemble: Ensemble
    codec: Codec
    num_classes: int = 0
    """0 is unconditional."""
    class_names: tuple[str, ...] = ()

    def __call__(
        self,
        seeds: Sequence[int],
        config: SamplingConfig,
        class_ids: Sequence[int] | None = None,
        on_progress: Progress | None = None,
        weak: Ensemble | None = None,
    ) -> SampleResult:
        """Draw one image for every seed; without `class_ids`, or where one is -1, unconditionally.

        `weak` None: if the configuration reflects, what it names is loaded anew.
        """
        unknown = sorted({k for k in class_ids or () if not -1 <= k < self.num_classes})
        if unknown:
            raise PipelineError(
                f"classes go from 0 to {self.num_classes - 1}, and -1 is none; got {unknown[:5]}"
                if self.num_classes
                else "these experts were trained without labels; leave the classes out"
            )
        weak = weak or self.weak(config)
        return sample(self.ensemble, self.codec, seeds, config, class_ids, on_progress, weak)

    def weak(self, config: SamplingConfig) -> Ensemble | None:
        """What samples are reflected against, if they are; `PipelineError` if it is not there, or does not fit."""
        reflection, present = config.reflection, self.ensemble.experts
        if reflection is None:
            return None
        if reflection.weak == "folder":
            return self._weak_in(Path(reflection.path).expanduser())
        if reflection.expert_id not in present:
            raise PipelineError(
                f"reflection.expert_id must be one of {sorted(present)}, the experts of this ensemble; "
                f"got {reflection.expert_id}"
            )
        return Ensemble(experts={0: present[reflection.expert_id]}, noise_schedule=self.ensemble.noise_schedule)

    def _weak_in(self, folder: Path) -> Ensemble:
        """The ensemble of a pipeline's folder, or an expert's folder as an ensemble of one."""
        if not (folder / INDEX).is_file():
            expert, path = Expert.load(folder), self.ensemble.noise_schedule
            _check_shapes({0: expert}, self.codec, self.num_classes)
            return Ensemble(experts={0: expert}, noise_schedule=path)
        other = DDMPipeline.from_pretrained(folder)
        ours, theirs = (
            (one.codec.latent_shape, one.num_classes, one.ensemble.noise_schedule.name) for one in (self, other)
        )
        if ours != theirs:
            raise PipelineError(
                f"{folder} has (latents, classes, noise path) {theirs}, this pipeline {ours}; reflection needs the same"
            )
        return other.ensemble

    def save_pretrained(self, folder: Path) -> None:
        """Write the pipeline's folder, whole or not at all; one that is there is replaced."""
        with atomic_folder(folder) as temporary:
            for k, expert in self.ensemble.experts.items():
                expert.save(
                    temporary / (CLUSTER_CONDITIONED if isinstance(expert, ClusterConditionedExpert) else f"expert_{k}")
                )
            if bases := bases_of(_models(self.ensemble.experts.values())):
                save_bases(bases, temporary / SHARED)
            if self.ensemble.router is not None:
                self.ensemble.router.save(temporary / "router")
            self.codec.save(_make_pipeline(temporary / "codec"))
            index = _Index(
                noise_schedule=self.ensemble.noise_schedule.name,
                expert_ids=tuple(sorted(self.ensemble.experts)),
                missing_ids=self.ensemble.missing,
                has_router=self.ensemble.router is not None,
                num_classes=self.num_classes,
                class_names=self.class_names,
            )
            index.write(temporary)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "DDMPipeline":
        """Read a pipeline's folder; experts that its index lists as missing are left out.

        Raises `PipelineError` for a folder with pickles, with an expert that is neither there nor listed as
        missing, or with parts that do not fit; an `ArtifactError` for broken files.
        """
        _refuse_pickles(folder)
        index = _Index.read(folder)
        ids = [k for k in index.expert_ids if k not in index.missing_ids]
        experts = (
            _load_cluster_conditioned(folder, ids)
            if is_cluster_conditioned(folder / CLUSTER_CONDITIONED)
            else _experts(folder, ids)
        )
        codec = load_codec(folder / "codec")
        _check_shapes(experts, codec, index.num_classes)
        router = Router.load(folder / "router") if index.has_router else None
        ensemble = Ensemble(experts=experts, noise_schedule=NOISE_SCHEDULES[index.noise_schedule], router=router)
        if ensemble.missing != index.missing_ids:
            raise PipelineError(
                f"{folder / INDEX} lists {list(index.missing_ids)} as missing, but the router knows "
                f"{ensemble.num_experts} experts and {list(ensemble.missing)} are not there; assemble it again"
            )
        return cls(ensemble=ensemble, codec=codec, num_classes=index.num_classes, class_names=index.class_names)


def assemble(
    expert_folders: Mapping[int, Path],
    router: Path | None,
    codec: Path,
    out: Path,
    missing_ids: Sequence[int] = (),
    class_names: Sequence[str] = (),
) -> DDMPipeline:
    """Copy finished parts into one pipeline folder `out`, and load it, which checks that they fit.

    Files are copied byte for byte. Raises what `DDMPipeline.from_pretrained` raises.
    """
    if not expert_folders:
        raise PipelineError("there is no expert to assemble, all are missing; finish at least one")
    parts = {
        CLUSTER_CONDITIONED if is_cluster_conditioned(folder) else f"expert_{k}": folder
        for k, folder in expert_folders.items()
    }
    parts["codec"] = codec
    if router is not None:
        parts["router"] = router
    folder = next(iter(expert_folders.values()))
    first = ClusterConditionedExpert.load_all(folder)[0] if is_cluster_conditioned(folder) else Expert.load(folder)
    path = first.noise_schedule.name if router is None else Router.load(router).noise_schedule.name
    index = _Index(
        noise_schedule=path,
        expert_ids=tuple(sorted(expert_folders)),
        missing_ids=tuple(sorted(missing_ids)),
        has_router=router is not None,
        num_classes=first.num_classes,
        class_names=tuple(class_names),
    )
    with atomic_folder(out) as temporary:
        for name, folder in parts.items():
            _copy(folder, temporary / name)
        index.write(temporary)
        return DDMPipeline.from_pretrained(temporary)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """What `model_index.json` says."""

    noise_schedule: NoiseScheduleName
    expert_ids: tuple[int, ...]
    missing_ids: tuple[int, ...]
    has_router: bool
    num_classes: int
    class_names: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Write the index and the scheduler's folder."""
        FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
        index = {
            "_class_name": DDMPipeline.__name__,
            "_diffusers_version": version("diffusers"),
            "scheduler": ["diffusers", FlowMatchEulerDiscreteScheduler.__name__],
            "noise_schedule": self.noise_schedule,
            "experts": self.expert_ids,
            "missing": self.missing_ids,
            "has_router": self.has_router,
            "num_classes": self.num_classes,
            "class_names": self.class_names,
        }
        write_json(folder / INDEX, index)

    @classmethod
    def read(cls, folder: Path) -> "_Index":
        """Raises `CorruptArtifact` if the index is not one of ours."""
        found = read_json(folder / INDEX)
        try:
            if found["noise_schedule"] not in NOISE_SCHEDULES or found["_class_name"] != DDMPipeline.__name__:
                raise ValueError(f"class {found['_class_name']} on noise schedule {found['noise_schedule']}")
            return cls(
                noise_schedule=found["noise_schedule"],
                expert_ids=tuple(int(k) for k in found["experts"]),
                missing_ids=tuple(sorted(int(k) for k in found["missing"])),
                has_router=bool(found["has_router"]),
                num_classes=int(found["num_classes"]),
                class_names=tuple(str(name) for name in found["class_names"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(
                f"{folder / INDEX} is not the index of a {DDMPipeline.__name__}: {error}; assemble it again"
            ) from error


def _copy(folder: Path, target: Path) -> None:
    """Copy a part's files; `CorruptArtifact` for a link, which could bring in any file of this machine."""
    for file in files_in(folder):
        if file.name not in NOT_COPIED:
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _make_pipeline(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _refuse_pickles(folder: Path) -> None:
    """Loading a pickle runs whatever code is in it, so its presence is reason enough to stop."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICKLES)
    if found:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:5])
        raise PipelineError(
            f"{folder} holds files that may be pickles, and those are never loaded: {names}; "
            "convert them to safetensors, or delete them"
        )


def _models(experts: Iterable[object]) -> Iterator[nn.Module]:
    """The networks that may share weights."""
    for expert in experts:
        if isinstance(expert, TimeSplitExpert):
            yield from _models(expert.networks)
        elif isinstance(expert, TruncatedExpert):
            yield from _models([expert.draft, expert.refiner])
        elif isinstance(expert, Expert):
            yield expert.model


def _experts(folder: Path, ids: Sequence[int]) -> dict[int, AnyExpert]:
    """Each from its own folder, linked to what they share."""
    experts = {k: _expert(_expert_folder(folder, k)) for k in ids}
    bases = load_bases(folder / SHARED) if (folder / SHARED).is_dir() else {}
    for expert in experts.values():
        for model in _models([expert]):
            link(model, bases)
    return {**experts}


def _expert(folder: Path) -> Expert | TimeSplitExpert | TruncatedExpert:
    if is_time_split(folder):
        return TimeSplitExpert.load(folder)
    return TruncatedExpert.load(folder) if is_truncated(folder) else Expert.load(folder)


def _load_cluster_conditioned(folder: Path, ids: Sequence[int]) -> dict[int, AnyExpert]:
    """The one network for each of its clusters; `PipelineError` if there are others."""
    found = ClusterConditionedExpert.load_all(folder / CLUSTER_CONDITIONED)
    if unknown := sorted(set(ids) - set(found)):
        raise PipelineError(
            f"{folder / CLUSTER_CONDITIONED} was not told of the clusters {unknown} of {INDEX}; assemble it again"
        )
    return {k: found[k] for k in ids}


def _expert_folder(folder: Path, expert_id: int) -> Path:
    found = folder / f"expert_{expert_id}"
    if not found.is_dir():
        raise PipelineError(
            f"{found} does not exist, though {INDEX} lists expert {expert_id}; bring it back, or add "
            f"{expert_id} to the index's missing list to sample without it"
        )
    return found


def _check_shapes(experts: Mapping[int, AnyExpert], codec: Codec, num_classes: int) -> None:
    """All parts must speak of the same latents and classes."""
    for k, expert in experts.items():
        if expert.latent_shape != codec.latent_shape or expert.num_classes != num_classes:
            raise PipelineError(
                f"expert {k} knows latents of shape {expert.latent_shape} and {expert.num_classes} classes, the "
                f"pipeline {codec.latent_shape} and {num_classes}; all parts must come from one data set and codec"
            )
