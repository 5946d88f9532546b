"""Train a LoRA adapter of one expert on images of its own; the expert's weights stay as they are."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ddm_core.artifacts import Workspace, write_json
from experts.codec import Codec
from experts.config import TrainingConfig
from experts.expert import Expert, ExpertSummary, network_flops
from experts.networks.lora import add_new_lora, extract_lora, save_lora
from experts.training.flops import training_flops
from experts.training.held_out import check_classes
from experts.training.latents.training_set import encode_latents
from experts.training.loss import expert_loss
from experts.training.trainer import fit, write_rows

ATTENTION = ".att"
"""Part of the names of the layers of attention."""


def train_lora(
    expert: Path,
    folders: Sequence[Path],
    codec: Codec,
    codec_folder: Path,
    training: TrainingConfig,
    rank: int,
    out: Path,
    workspace: Workspace,
) -> ExpertSummary:
    """Train an adapter of this rank on the samples of folders of shards or latents; write it to `out` with metrics.

    It changes the linear layers of attention, or all linear layers of a network without attention. A later call with
    the same workspace continues. Raises `LatentError`, `AdapterError`, `Preempted` and what `fit` raises.
    """
    trained = Expert.load(expert)
    dataset = encode_latents(folders, codec, codec_folder, workspace)
    check_classes(dataset, trained.num_classes)
    forward = network_flops(trained.model, dataset.latent_shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        add_new_lora(trained.model, choose_layers(trained.model), rank)
    loss = partial(expert_loss, prediction=trained.prediction, noise_schedule=trained.noise_schedule)
    result = fit(trained.model, loss, dataset, training, workspace)
    factors = extract_lora(result.model)
    save_lora(factors, out)
    summary = ExpertSummary(
        flops=training_flops(forward, training.batch_size, training.steps),
        steps=training.steps,
        epochs=training.steps * training.batch_size / len(dataset),
        images=len(dataset),
        parameters=sum(layer.down.numel() + layer.up.numel() for layer in factors.values()),
        final_loss=result.rows[-1]["loss"],
    )
    write_rows(out / "metrics.jsonl", result.rows)
    write_json(out / "training.json", summary)
    return summary


def choose_layers(network: nn.Module) -> list[str]:
    """Return the names of the linear layers of attention; of all linear layers without attention."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if ATTENTION in f".{name}"] or linear
