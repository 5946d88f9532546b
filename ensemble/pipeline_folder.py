"""What lies in a pipeline's folder: the index, and the experts that it lists."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ddm_core.artifacts import ArtifactError, CorruptArtifact, read_json, write_json
from ensemble.expert_registry import load_expert
from experts.baselines.cluster_conditioned import (
    CLUSTER_CONDITIONED,
    ClusterConditionedExpert,
    is_cluster_conditioned,
)
from experts.codec import Codec
from experts.compressed.quantization.shared_weight_io import SHARED, link_bases, load_bases
from experts.config import NoiseScheduleName
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.expert_model import ExpertModel

INDEX = "model_index.json"
CLASS_NAME = "DDMPipeline"
"""The class of the index, as diffusers writes it."""
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
"""Written with its defaults, by name: its module imports scipy.stats."""
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class PipelineError(ArtifactError):
    """A folder is not a loadable pipeline, or a call requests what the pipeline lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineIndex:
    """The content of `model_index.json`."""

    noise_schedule: NoiseScheduleName
    expert_ids: tuple[int, ...]
    missing_ids: tuple[int, ...]
    has_router: bool
    num_classes: int
    class_names: tuple[str, ...]
    t_shift: float = 1.0
    """The scheduler's shift."""

    def write(self, folder: Path) -> None:
        """Write the index and the scheduler's folder."""
        origin = {"_diffusers_version": version("diffusers")}
        (folder / "scheduler").mkdir()
        shift = {} if self.t_shift == 1 else {"shift": self.t_shift}
        write_json(folder / SCHEDULER_FILE, {"_class_name": SCHEDULER, **origin, **shift})
        index = {
            "_class_name": CLASS_NAME,
            **origin,
            "scheduler": ["diffusers", SCHEDULER],
            "noise_schedule": self.noise_schedule,
            "experts": self.expert_ids,
            "missing": self.missing_ids,
            "has_router": self.has_router,
            "num_classes": self.num_classes,
            "class_names": self.class_names,
        }
        write_json(folder / INDEX, index)

    @classmethod
    def read(cls, folder: Path) -> "PipelineIndex":
        """Read the index; raise `CorruptArtifact` if it was not written by this class."""
        index = read_json(folder / INDEX)
        try:
            if index["noise_schedule"] not in NOISE_SCHEDULES or index["_class_name"] != CLASS_NAME:
                raise ValueError(f"class {index['_class_name']} with noise schedule {index['noise_schedule']}")
            return cls(
                noise_schedule=index["noise_schedule"],
                expert_ids=tuple(int(k) for k in index["experts"]),
                missing_ids=tuple(sorted(int(k) for k in index["missing"])),
                has_router=bool(index["has_router"]),
                num_classes=int(index["num_classes"]),
                class_names=tuple(str(name) for name in index["class_names"]),
                t_shift=_read_shift(folder / SCHEDULER_FILE),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(
                f"{folder / INDEX} is not the index of a {CLASS_NAME}: {error}; assemble it again"
            ) from error


def _read_shift(file: Path) -> float:
    """Return the shift of a scheduler's configuration; 1 without one."""
    return float(read_json(file).get("shift", 1.0)) if file.is_file() else 1.0


def refuse_pickles(folder: Path) -> None:
    """Raise `PipelineError` if a file may be a pickle: loading one runs any code in it."""
    pickles = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        names = ", ".join(str(path.relative_to(folder)) for path in pickles[:5])
        raise PipelineError(
            f"files that may be pickles are never loaded, and {folder} holds {names}; "
            "convert them to safetensors, or delete them"
        )


def load_experts(
    folder: Path, expert_ids: Sequence[int], load: Callable[[Path], ExpertModel | None] | None
) -> dict[int, ExpertModel]:
    """Load these experts, and link them to the weights that they share; raise `PipelineError` if one is absent."""
    if is_cluster_conditioned(folder / CLUSTER_CONDITIONED):
        return _load_cluster_conditioned(folder / CLUSTER_CONDITIONED, expert_ids)
    folders = {k: find_expert_folder(folder, k) for k in expert_ids}
    experts = {k: (load and load(path)) or load_expert(path) for k, path in folders.items()}
    bases = load_bases(folder / SHARED) if (folder / SHARED).is_dir() else {}
    for expert in experts.values():
        for model in expert.networks():
            link_bases(model, bases)
    return experts


def _load_cluster_conditioned(folder: Path, expert_ids: Sequence[int]) -> dict[int, ExpertModel]:
    """Load the shared network for each of these clusters; raise `PipelineError` if it has fewer clusters."""
    clusters = ClusterConditionedExpert.load_all(folder)
    if unknown := sorted(set(expert_ids) - set(clusters)):
        raise PipelineError(
            f"{folder} was trained on {len(clusters)} clusters, and {INDEX} lists experts {unknown}; assemble it again"
        )
    return {k: clusters[k] for k in expert_ids}


def find_expert_folder(folder: Path, expert_id: int) -> Path:
    """Return the folder of an expert; raise `PipelineError` if it is absent."""
    expert_folder = folder / f"expert_{expert_id}"
    if not expert_folder.is_dir():
        raise PipelineError(
            f"{expert_folder} does not exist, though {INDEX} lists expert {expert_id}; bring it back, or add "
            f"{expert_id} to the index's missing list to sample without it"
        )
    return expert_folder


def check_shapes(experts: Mapping[int, ExpertModel], codec: Codec, num_classes: int) -> None:
    """Raise `PipelineError` if an expert has other latents or classes than the pipeline."""
    for k, expert in experts.items():
        if expert.latent_shape != codec.latent_shape or expert.num_classes != num_classes:
            raise PipelineError(
                f"expert {k} has latents of shape {expert.latent_shape} and {expert.num_classes} classes, the "
                f"pipeline {codec.latent_shape} and {num_classes}; use parts of one data set and codec"
            )
