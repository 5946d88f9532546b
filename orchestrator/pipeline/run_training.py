"""The stages that train networks or run codecs: codec, decoder, latents, experts, router, baselines."""

import logging
import shutil
from functools import partial
from pathlib import Path

from ddm_core.artifacts import Workspace
from ddm_core.engine import LocalEngine
from experts.baselines.cluster_conditioned import train_cluster_conditioned
from experts.baselines.distilled_monolith import train_distilled_monolith
from experts.codecs.refined import fit_decoder
from experts.codecs.registry import fit_codec, load_codec, stored_type
from experts.conditions.text_encoder import TextEncoder
from experts.config import CodecConfig, ExpertConfig, TextConfig
from experts.expert import Expert, train_expert
from experts.networks.pretrained_files import check_unchanged, init_files
from experts.time_split import train_intervals
from experts.training.latents.encode import encode_dataset
from experts.training.latents.shard_encoder import FrozenCodec
from experts.training.trainer import check_device
from orchestrator.pipeline.flop_matching import flop_matched_config
from orchestrator.pipeline.stage_configs import (
    DistilledMonolithStageConfig,
    ExpertStageConfig,
    InitStageConfig,
    LatentsStageConfig,
    MonolithStageConfig,
)
from orchestrator.pipeline.stage_inputs import Inputs, cluster_folders, experts_by_id, with_init_checkpoint
from router.config import RouterConfig
from router.train import train_router

log = logging.getLogger(__name__)


def run_codec(config: CodecConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Fit the codec that maps images to latents."""
    return fit_codec(config, inputs["shards"], out, workspace)


def run_decoder(config: CodecConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the decoder of the codec in `encoder`, and write both as one codec."""
    return fit_decoder(config, inputs["encoder"], inputs["shards"], out, workspace)


def run_latents(config: LatentsStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Encode all images, and their captions if the models read text; the text encoder's FLOPs are counted."""
    is_here = isinstance(workspace.engine, LocalEngine)
    codec, text = _open_models(config.text, inputs["codec"], config.device if is_here else "cpu")
    return encode_dataset(
        inputs["dataset"],
        codec,
        text,
        out,
        workspace,
        flip=config.flip,
        stores_latents=config.store,
        open_models=None if is_here else partial(_open_models, config.text, inputs["codec"], config.device),
    )


def _open_models(text: TextConfig, folder: Path, device: str) -> tuple[FrozenCodec, TextEncoder | None]:
    """Load the codec in `folder` and a text encoder."""
    encoder, place = TextEncoder.from_config(text), check_device(device)
    return FrozenCodec.open(folder, load_codec(folder), place, stored_type(folder)), encoder and encoder.to(place)


def run_init(config: InitStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Copy a pretrained checkpoint into the run; raises if it changed after the run was composed."""
    folder = Path(config.folder)
    check_unchanged(ExpertConfig(init=config.folder, init_checksum=config.checksum))
    for file in init_files(folder):
        target = out / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return 0.0


def run_expert(config: ExpertStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train one expert on the latents of its cluster, and validate it alone at some checkpoints."""
    from orchestrator.pipeline.validation import Validator

    expert = with_init_checkpoint(config.expert, inputs)
    train = partial(
        train_expert,
        shards=[inputs["latents"]],
        codec=inputs["codec"],
        cluster_id=config.cluster_id,
        held_out=[inputs["holdout"]] if "holdout" in inputs else [],
    )
    if expert.time_bounds:
        return train_intervals(expert, out, workspace, train).flops
    validator = Validator(config=config.validation, training=expert.training, inputs=inputs, workspace=workspace)
    try:
        summary = train(config=expert, out=out, workspace=workspace, on_checkpoint=validator.on_checkpoint)
        validator.finish(lambda: Expert.load(out))
    finally:
        validator.stop()
    return summary.flops


def run_router(config: RouterConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the router on the latents of all clusters, or on latents that the experts generated."""
    clusters = cluster_folders(inputs["clusters"]) if "clusters" in inputs else []
    holdouts, samples = cluster_folders(inputs["holdouts"]), inputs.get("expert_samples")
    experts = {k: Expert.load(folder) for k, folder in experts_by_id(inputs).items()}
    return train_router(
        config, clusters, inputs["codec"], holdouts, out, workspace, expert_samples=samples, experts=experts
    ).flops


def run_monolith(config: MonolithStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the monolith on all clusters, with extra steps for the router's and the clustering's FLOPs."""
    clusters = cluster_folders(inputs["partition"] / "latents")
    held_out = cluster_folders(inputs["partition"] / "holdout_latents")
    return train_expert(
        flop_matched_config(config, inputs), clusters, inputs["codec"], out, workspace, held_out=held_out
    ).flops


def run_cluster_conditioned(config: MonolithStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the cluster-conditioned monolith with as many FLOPs as the monolith."""
    clusters = cluster_folders(inputs["partition"] / "latents")
    held_out = cluster_folders(inputs["partition"] / "holdout_latents")
    return train_cluster_conditioned(
        flop_matched_config(config, inputs), clusters, inputs["codec"], out, workspace, held_out
    ).flops


def run_distilled_monolith(
    config: DistilledMonolithStageConfig, inputs: Inputs, out: Path, workspace: Workspace
) -> float:
    """Distill the experts into one network; its FLOPs include the teachers' calls."""
    if config.from_expert is not None and "init" not in inputs:
        log.warning("expert %d is missing; the student starts from random weights", config.from_expert)
    clusters, expert = cluster_folders(inputs["partition"] / "latents"), with_init_checkpoint(config.expert, inputs)
    held_out = cluster_folders(inputs["partition"] / "holdout_latents")
    return train_distilled_monolith(
        expert,
        experts_by_id(inputs),
        clusters,
        inputs["codec"],
        out,
        workspace,
        held_out,
        from_mean=config.from_mean,
    ).flops
