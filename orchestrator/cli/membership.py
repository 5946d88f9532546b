"""Remove, restore or add experts of a finished run's ensemble; every change writes a new artifact."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddm_core.artifacts import (
    MANIFEST,
    Workspace,
    fingerprint,
    is_finished,
    list_files,
    publish,
    read_manifest,
    verify,
)
from ddm_core.files.checksums import checksum
from ensemble import membership
from ensemble.pipeline import EnsemblePipeline
from ensemble.pipeline_folder import INDEX
from experts.conditions.text_encoder import TextEncoder
from experts.expert import Expert
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.pipeline.graph import FROM_ENSEMBLE, build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.pipeline.stage_inputs import cluster_folders
from orchestrator.reporting.results import current_graph, find_pipeline, verify_pipeline
from orchestrator.run.disk_errors import disk_errors_as_messages
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.trust import require_plain_files
from router.add_remove import RouterChangeError
from router.add_remove import add_expert as train_new_head
from router.router import Router


@dataclass(frozen=True, slots=True)
class BaseEnsemble:
    """The ensemble that a change is based on."""

    run: RunFolder
    folder: Path

    @classmethod
    def open(cls, run: RunFolder, ensemble: Path | None) -> "BaseEnsemble":
        """Return the run's own ensemble, or one of an earlier change, after its checksums are verified."""
        if ensemble is None:
            return cls(run, find_pipeline(run, monolith=False))
        if not (ensemble / INDEX).is_file():
            raise RunFolderError(f"{ensemble} is not the folder of an ensemble: it has no {INDEX}; pass one that has")
        if is_finished(ensemble):
            verify(ensemble)
        return cls(run, ensemble)

    def load(self) -> EnsemblePipeline:
        """Load the ensemble."""
        return EnsemblePipeline.from_pretrained(self.folder)


def write_without_experts(base: BaseEnsemble, ids: Sequence[int], out: Path | None) -> Path:
    """Write the ensemble without these experts and return its folder."""
    changed = membership.remove_experts(base.load(), ids)
    name = "ensemble_without_" + "_".join(map(str, sorted(set(ids))))
    return _publish_ensemble(base, name, {"removed": sorted(set(ids))}, changed, out)


def write_with_restored_expert(base: BaseEnsemble, folder: Path, place: int, out: Path | None) -> Path:
    """Write the ensemble with an expert as the missing id `place` and return its folder."""
    changed = membership.restore_expert(base.load(), _load_expert(base.run, folder), place)
    facts = {"place": place, "expert": content_fingerprint(folder)}
    return _publish_ensemble(base, f"ensemble_with_{place}", facts, changed, out)


def write_with_new_expert(base: BaseEnsemble, folder: Path, shards: Path, out: Path | None) -> Path:
    """Write the ensemble with a new expert and a router head trained on `shards`, its samples; return its folder."""
    pipeline, expert = base.load(), _load_expert(base.run, folder)
    place = pipeline.ensemble.num_experts
    if pipeline.ensemble.router is None:
        raise RunFolderError(
            f"{base.folder} has no router, so it cannot weight a second expert; use an ensemble with a router"
        )
    text = None if pipeline.text is None else TextEncoder.from_config(pipeline.text)
    with tempfile.TemporaryDirectory() as scratch:
        router = _train_new_head(base, shards, text, Path(scratch))
    changed = membership.add_expert(pipeline, expert, router)
    facts = {"place": place, "expert": content_fingerprint(folder), "shards": content_fingerprint(shards)}
    return _publish_ensemble(base, f"ensemble_with_{place}", facts, changed, out)


def with_ensemble(run: RunFolder, config: RunConfig, folder: Path) -> RunConfig:
    """Copy any ensemble's folder into the run, once, and return the configuration that starts from it.

    Raises `RunFolderError` if it is none, and what `EnsemblePipeline.from_pretrained` raises.
    """
    EnsemblePipeline.from_pretrained(verify_pipeline(folder))
    config = replace(config, folder=str(run.root), from_ensemble=content_fingerprint(folder))
    stage = next(stage for stage in build_graph(config) if stage.name == FROM_ENSEMBLE)

    def fill(temporary: Path) -> float:
        shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        return 0.0

    with disk_errors_as_messages(run.root):
        publish(run.artifact(stage), fill, stage=stage.name, config=stage.config, inputs={})
    return config


def records_codec(folder: Path) -> bool:
    """Return whether an expert's manifest records the codec with which it was trained."""
    return is_finished(folder) and "codec" in read_manifest(folder).inputs


def content_fingerprint(folder: Path) -> str:
    """Return one fingerprint of all files in a folder, as `python -m experts` records for its codec."""
    return fingerprint("codec", {str(file.relative_to(folder)): checksum(file) for file in list_files(folder)}, {})


def _load_expert(run: RunFolder, folder: Path) -> Expert:
    """Load the expert in a folder; raises `ConfigError` if it was trained with another codec than the run's."""
    if records_codec(folder):
        verify(folder)
        codec = _find_stage(run, "codec")
        accepted = {codec.fingerprint, content_fingerprint(run.artifact(codec))}
        recorded = read_manifest(folder).inputs["codec"]
        if recorded not in accepted:
            raise ConfigError(
                f"an expert of this ensemble must be trained with its codec; {folder} was trained with another one "
                f"({recorded[:12]}): train it with --codec {run.artifact(codec)}"
            )
    return Expert.load(folder)


def _train_new_head(base: BaseEnsemble, shards: Path, text: TextEncoder | None, scratch: Path) -> Router:
    """Return the router with a new head for the samples in `shards`, trained against the run's clusters."""
    run, config = base.run, base.run.load_config()
    if config.router.data != "real":
        raise ConfigError(
            "a new head needs the data on which the router was trained (router.data=real); got "
            f"router.data={config.router.data}: train the router again"
        )
    reference = cluster_folders(run.artifact(_find_stage(run, "partition")) / "latents")
    codec = run.artifact(_find_stage(run, "codec"))
    folders = (base.folder / "router", shards, reference, codec)
    try:
        train_new_head(*folders, config.router.training, scratch / "router", Workspace.at(scratch / "work"), text)
    except RouterChangeError as error:
        raise RunFolderError(f"{error}; or replace a missing expert with --place") from error
    return Router.load(scratch / "router")


def _find_stage(run: RunFolder, name: str) -> Stage:
    return next(stage for stage in current_graph(run, run.load_config()) if stage.name == name)


def _publish_ensemble(
    base: BaseEnsemble, name: str, facts: dict[str, Any], changed: EnsemblePipeline, out: Path | None
) -> Path:
    """Write the changed ensemble to `out`, or next to the run's artifacts; raises `ConfigError` if `out` is in use."""
    inputs = {"ensemble": content_fingerprint(base.folder)}
    if out is None:
        require_plain_files(base.run)
    folder = out or base.run.root / "artifacts" / f"{name}-{fingerprint(name, facts, inputs)[:12]}"

    def fill(temporary: Path) -> float:
        changed.save_pretrained(temporary)
        return 0.0

    if folder.exists() and not is_finished(folder):
        raise ConfigError(f"{folder} exists and is not an ensemble of ddm; choose another --out")
    if publish(folder, fill, stage=name, config=facts, inputs=inputs).fingerprint != fingerprint(name, facts, inputs):
        raise ConfigError(f"{folder} holds another ensemble; choose another --out")
    return folder
