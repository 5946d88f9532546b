"""Train one expert or one router from folders, without an orchestrator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ddm_core.artifacts import Workspace
from experts.codecs.registry import fit_codec
from experts.config import CodecConfig, ExpertConfig
from experts.expert import Expert
from experts.expert import train_expert as train_expert_folder
from router.config import RouterConfig
from router.router import Router
from router.train import train_router as train_router_folder

__all__ = ["train_expert", "train_router"]

PathLike = str | os.PathLike[str]


def train_expert(
    config: ExpertConfig,
    shards: PathLike | Sequence[PathLike],
    codec: PathLike,
    out: PathLike,
    *,
    cluster_id: int = 0,
    num_classes: int | None = None,
) -> Expert:
    """Train one expert on shard folders, write its folder to `out`, and return it.

    A codec that does not exist is fitted on the first shard folder. `config.training.batch_size` is this expert's own
    batch. Checkpoints are in `<out>.work`: the same call continues a training that was interrupted. `num_classes` None
    takes the classes that the shards name.
    """
    folders = _paths(shards)
    target, workspace = _workspace(out)
    if not (Path(codec) / "codec.json").exists():
        fit_codec(CodecConfig(), folders[0], Path(codec), workspace)
    target.mkdir(parents=True, exist_ok=True)
    train_expert_folder(config, folders, Path(codec), target, workspace, num_classes, cluster_id)
    return Expert.load(target)


def train_router(
    config: RouterConfig, clusters: Sequence[PathLike], holdouts: Sequence[PathLike], codec: PathLike, out: PathLike
) -> Router:
    """Train a router on the shard folders of all clusters, write its folder to `out`, and return it.

    Cluster k is the k-th of `clusters`; `holdouts` has its held-out samples, on which temperatures are fitted and
    quality is measured.
    """
    target, workspace = _workspace(out)
    target.mkdir(parents=True, exist_ok=True)
    train_router_folder(config, _paths(clusters), Path(codec), _paths(holdouts), target, workspace)
    return Router.load(target)


def _paths(folders: PathLike | Sequence[PathLike]) -> list[Path]:
    return [Path(folders)] if isinstance(folders, str | os.PathLike) else [Path(folder) for folder in folders]


def _workspace(out: PathLike) -> tuple[Path, Workspace]:
    target = Path(out).expanduser()
    return target, Workspace.at(target.with_name(f"{target.name}.work"))
