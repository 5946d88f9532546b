"""The samples that a run's scores keep: pictures by seed, with their conditions."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from data_partition.shards.images import encode_png
from ddm_core.artifacts import CorruptArtifact, read_json
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder
from orchestrator.ui.facts.catalog import require_inside


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFile:
    """The samples of one score."""

    images: UInt8[np.ndarray, "count height width channel"]
    """Mapped from the disk."""
    seeds: list[int]
    """Seed of every sample."""

    def png(self, place: int) -> bytes:
        """Encode one sample; raises `RunFolderError` if there are not so many."""
        if not 0 <= place < len(self.images):
            raise RunFolderError(f"there are {len(self.images)} samples; number {place} does not exist")
        return encode_png(np.ascontiguousarray(self.images[place]))


def open_samples(run: RunFolder, stage: Stage) -> SampleFile:
    """Open the samples of a finished score; raises `RunFolderError` without any, `CorruptArtifact` for other arrays."""
    if stage.kind != "score" or not run.is_finished(stage):
        raise RunFolderError(f"{stage.name} has no samples yet")
    folder = run.artifact(stage)
    images, seeds = (require_inside(run, folder / name) for name in ("images.npy", "seeds.npy"))
    return _open(images, seeds, images.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _open(images: Path, seeds: Path, _changed: int) -> SampleFile:
    pixels = load_array(images)
    numbers = load_array(seeds)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or numbers.ndim != 1:
        raise CorruptArtifact(f"{images.parent} holds no samples: {pixels.dtype} {pixels.shape}, seeds {numbers.shape}")
    return SampleFile(images=pixels, seeds=[int(seed) for seed in numbers])


def load_array(path: Path) -> np.ndarray:
    """Map an array from the disk; raises `CorruptArtifact` for anything else, pickles included."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorruptArtifact(f"{path} is damaged ({error}); delete its folder and run again") from error
    return array


def load_conditions(run: RunFolder, graph: Sequence[Stage], score: Stage) -> dict[int, str]:
    """Return what each sample of a score was generated for, by seed, in their order; empty texts for no condition.

    As `load_held_out_conditions` chose it, without torch: a caption if there is one, else the name of the class.
    """
    seeds, reference = open_samples(run, score).seeds, score.inputs["reference"].stage
    dataset = next((stage for stage in graph if stage.kind == "dataset"), None)
    if not score.config.evaluation.conditional or dataset is None or not run.is_finished(reference):
        return dict.fromkeys(seeds, "")
    labels = load_array(require_inside(run, run.artifact(reference) / "labels.npy")).tolist()
    captions, path = [""] * len(labels), run.artifact(reference) / "captions.json"
    if run.load_config().text.kind != "none" and path.is_file():
        captions = read_json(require_inside(run, path))["held_out"]
    names = read_json(require_inside(run, run.artifact(dataset) / "dataset.json"))["class_names"]
    rows = [row for row in zip(labels, captions, strict=True) if row != (-1, "")]
    texts = [caption or (names[label] if label < len(names) else str(label)) for label, caption in rows] or [""]
    return {seed: texts[number % len(texts)] for number, seed in enumerate(seeds)}
