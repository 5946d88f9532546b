"""Experts that leave, come back to or join the ensemble of a finished run; each change is an artifact of its own."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddm_core.artifacts import Workspace, checksum, files_in, fingerprint, is_finished, publish, read_manifest, verify
from ensemble.membership import with_expert_back, with_new_expert, without_experts
from ensemble.pipeline import INDEX, DDMPipeline
from experts.expert import Expert
from orchestrator.cli.sample import pipeline_folder
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.pipeline.flop_matching import by_cluster
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.results import current_graph
from orchestrator.run.run_folder import RunFolder
from router.add_remove import RouterChangeError, add_expert
from router.router import Router


@dataclass(frozen=True, slots=True)
class BaseEnsemble:
    """The ensemble that a change starts from."""

    run: RunFolder
    folder: Path

    @classmethod
    def of(cls, run: RunFolder, ensemble: Path | None) -> "BaseEnsemble":
        """The run's own ensemble, or one that was made of it earlier; compared with its checksums."""
        if ensemble is None:
            return cls(run, pipeline_folder(run, monolith=False))
        if not (ensemble / INDEX).is_file():
            raise RunFolderError(f"{ensemble} is not an ensemble's folder: it has no {INDEX}")
        if is_finished(ensemble):
            verify(ensemble)
        return cls(run, ensemble)

    def load(self) -> DDMPipeline:
        """The ensemble."""
        return DDMPipeline.from_pretrained(self.folder)


def remove(base: BaseEnsemble, ids: Sequence[int], out: Path | None) -> Path:
    """The ensemble without these experts, as a folder of its own."""
    changed = without_experts(base.load(), ids)
    name = "ensemble_without_" + "_".join(map(str, sorted(set(ids))))
    return _published(base, name, {"removed": sorted(set(ids))}, changed, out)


def bring_back(base: BaseEnsemble, folder: Path, place: int, out: Path | None) -> Path:
    """The ensemble with an expert in the place of a missing one, as a folder of its own."""
    changed = with_expert_back(base.load(), _checked_expert(base.run, folder), place)
    facts = {"place": place, "expert": content_of(folder)}
    return _published(base, f"ensemble_with_{place}", facts, changed, out)


def join(base: BaseEnsemble, folder: Path, shards: Path, out: Path | None) -> Path:
    """The ensemble with one expert more, and a head for it in the router, trained on its samples in `shards`."""
    pipeline, expert = base.load(), _checked_expert(base.run, folder)
    place = pipeline.ensemble.num_experts
    if pipeline.ensemble.router is None:
        raise RunFolderError(f"{base.folder} has no router, so nothing can say when a second expert speaks")
    with tempfile.TemporaryDirectory() as scratch:
        router = _grown_router(base, shards, Path(scratch))
    changed = with_new_expert(pipeline, expert, router)
    facts = {"place": place, "expert": content_of(folder), "shards": content_of(shards)}
    return _published(base, f"ensemble_with_{place}", facts, changed, out)


def codec_is_known(folder: Path) -> bool:
    """Whether an expert's folder says with which codec it was trained."""
    return is_finished(folder) and "codec" in read_manifest(folder).inputs


def content_of(folder: Path) -> str:
    """One number for all files of a folder, the one by which `python -m experts` names its codec."""
    return fingerprint("codec", {str(file.relative_to(folder)): checksum(file) for file in files_in(folder)}, {})


def _checked_expert(run: RunFolder, folder: Path) -> Expert:
    """The expert in a folder; raises `ConfigError` if its manifest names another codec than the run's."""
    if codec_is_known(folder):
        verify(folder)
        codec = _stage(run, "codec")
        ours, theirs = {codec.fingerprint, content_of(run.artifact(codec))}, read_manifest(folder).inputs["codec"]
        if theirs not in ours:
            raise ConfigError(
                f"an expert of this ensemble must be trained with its codec; {folder} was trained with another one "
                f"({theirs[:12]}): train it with --codec {run.artifact(codec)}"
            )
    return Expert.load(folder)


def _grown_router(base: BaseEnsemble, shards: Path, scratch: Path) -> Router:
    """The router with a head for the samples in `shards`, whose reference are the clusters of the run."""
    run, config = base.run, base.run.load_config()
    if config.router.data != "real":
        raise ConfigError(
            "a new head is trained against the data that the router was first trained on, and router.data is "
            f"{config.router.data}: train the whole router again"
        )
    reference = by_cluster(run.artifact(_stage(run, "partition")) / "clusters")
    codec = run.artifact(_stage(run, "codec"))
    folders = (base.folder / "router", shards, reference, codec)
    try:
        add_expert(*folders, config.router.training, scratch / "router", Workspace.at(scratch / "work"))
    except RouterChangeError as error:
        raise RunFolderError(f"{error}; an expert may also take the --place of a missing one") from error
    return Router.load(scratch / "router")


def _stage(run: RunFolder, name: str) -> Stage:
    return next(stage for stage in current_graph(run, run.load_config()) if stage.name == name)


def _published(base: BaseEnsemble, name: str, facts: dict[str, Any], changed: DDMPipeline, out: Path | None) -> Path:
    """Write the changed ensemble to `out`, or beside the run's artifacts; raises `ConfigError` if `out` is taken."""
    inputs = {"ensemble": content_of(base.folder)}
    folder = out or base.run.root / "artifacts" / f"{name}-{fingerprint(name, facts, inputs)[:12]}"

    def fill(temporary: Path) -> float:
        changed.save_pretrained(temporary)
        return 0.0

    if folder.exists() and not is_finished(folder):
        raise ConfigError(f"{folder} is there already and no ensemble of ours; choose another --out")
    if publish(folder, fill, stage=name, config=facts, inputs=inputs).fingerprint != fingerprint(name, facts, inputs):
        raise ConfigError(f"{folder} holds another ensemble; choose another --out")
    return folder
