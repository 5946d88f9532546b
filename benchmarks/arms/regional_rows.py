"""Rows of `benchmarks.papers` on A-SDM's attention: regions and summaries instead of all tokens of a map.

Errors are relative to the original's output on held-out digits, after equal distillation.
"""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.arms.paper_networks import CLASSES, TRAINING, fit_digits, select_digits
from benchmarks.arms.paper_row import PaperRow
from ddm_core.artifacts import Workspace
from ensemble.compression.common.calibration_data import calibration_batches, output_error
from ensemble.compression.pruning.config import RegionalConfig
from ensemble.compression.pruning.feature_distillation import finetune_pruned
from ensemble.compression.pruning.regional import prune_regional
from experts.compressed.attention.regional import NAME, Query, RegionalSummary, Regions, add_regional_summary
from experts.compressed.pruning.layers import remove_layers
from experts.config import DiffusersConfig, DiTConfig, NetworkConfig, SettingValue, TrainingConfig
from experts.expert import Expert, network_flops
from experts.networks.registry import build_network
from experts.training.latent_dataset import Batch, LatentDataset

NAMES = {"unet": "U-Net", "dit": "DiT", "mmdit": "MMDiT"}
UNET: dict[str, SettingValue] = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}
MMDIT: dict[str, SettingValue] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 3,
    "caption_projection_dim": 64,
}
NETWORKS: dict[str, NetworkConfig] = {
    "unet": DiffusersConfig(class_name="UNet2DModel", settings=UNET),
    "dit": DiTConfig(patch_size=1, heads=4, head_width=16, depth=3),
    "mmdit": DiffusersConfig(class_name="SD3Transformer2DModel", settings=MMDIT | {"patch_size": 1}),
}
"""Networks with attention over all 64 pixels of a digit."""
STEPS, TUNING_STEPS, NEW_SEED = 300, 150, 10**3
CONFIG = RegionalConfig(
    min_tokens=64,
    rows=64,
    finetune=TrainingConfig(steps=TUNING_STEPS, batch_size=32, lr=1e-3, warmup_steps=5, checkpoint_every=10**6),
)


class RegionsAlone(RegionalSummary):
    """The control without summaries."""

    def bias(self, keys: int) -> Float[Tensor, "region one key"]:
        """Return the same, but minus infinity for every summary."""
        return super().bias(keys).masked_fill(super().bias(keys) > 0, -math.inf)


class RandomRegions(RegionalSummary):
    """The control whose regions are tokens from anywhere."""

    def to_regions(self, tokens: Query) -> Regions:
        """Return the tokens of a map by their regions."""
        return super().to_regions(tokens[:, :, self._order()])

    def to_map(self, regions: Regions) -> Query:
        """Return the tokens of regions in the order of the map."""
        return super().to_map(regions)[:, :, self._order().argsort()]

    def _order(self) -> Tensor:
        return torch.randperm(self.shape[1] * self.shape[2], generator=torch.Generator().manual_seed(0))


def measure_regional(folder: Path, kind: str) -> PaperRow:
    """Divide every attention over all pixels, and compare with random regions, regions alone, and no attention."""
    expert, dataset = train_attentive(kind, folder)
    result = prune_regional(expert, dataset, CONFIG, Workspace.at(folder / f"regional {kind}"))
    layers = result.details["layers"]
    models = {"regions and summaries": result.network.model}
    for name, summary_class in (("random regions", RandomRegions), ("regions alone", RegionsAlone)):
        models[name] = deepcopy(expert.model)
        for path, entry in layers.items():
            add_regional_summary(models[name], f"{path}.{NAME}", entry)
            models[name].set_submodule(f"{path}.{NAME}", summary_class(**entry))
    models["no attention"] = deepcopy(expert.model)
    remove_layers(models["no attention"], list(layers))
    batch = calibration_batches(dataset, CONFIG.rows, CONFIG.seed, 1)[0]
    held_out = calibration_batches(select_digits(_data_of(kind), held_out=True), 64, NEW_SEED, 4)
    errors, whole = dict[str, float](), network_flops(expert.model, expert.latent_shape)
    for name, model in models.items():
        if name != "regions and summaries":
            workspace = Workspace.at(folder / f"{name} {kind}")
            model = _distilled(model, expert, dataset, batch, list(layers), workspace)
        errors[name] = output_error(model, expert, held_out)
    share = network_flops(models["no attention"], expert.latent_shape) / whole
    keys = max(result.details["keys"].values())
    return PaperRow(
        paper=f"A-SDM (2312.15516), attention by regions, {NAMES[kind]}",
        says="attention that interacts globally and in regions is faster in layers of large maps",
        file="experts/compressed/attention/regional.py",
        command="ddm compress RUN prune=regional prune.min_tokens=64",
        criterion="≤ .35 of the keys; error after equal distillation < random regions', regions' alone, no attention's",
        ours=(
            f"{keys:.3f} of the keys in {len(layers)} layers, {result.details['flops']:.3f} of the FLOPs (no attention "
            f"{share:.3f}); error before {result.details['error_divided']:.4f}, after "
            f"{'; '.join(f'{name} {error:.4f}' for name, error in errors.items())}"
        ),
        theirs="part of a 22 % faster U-Net; no figure of its own in the abstract",
        differs=f"an equation of our own; maps of 8 x 8 tokens, {TUNING_STEPS} steps",
        holds=keys <= 0.35 and min(errors, key=lambda name: errors[name]) == "regions and summaries",
    )


def train_attentive(kind: str, folder: Path) -> tuple[Expert, LatentDataset]:
    """Train a network with attention over all pixels; the folder keeps it."""
    dataset, saved = select_digits(_data_of(kind), held_out=False), folder / f"attentive_{kind}" / "expert"
    if not saved.is_dir():
        num_classes = 0 if kind == "mmdit" else CLASSES
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build_network(NETWORKS[kind], (1, 8, 8), num_classes, dataset.null_text)
        fit_digits(model, dataset, num_classes, replace(TRAINING, steps=STEPS), saved.parent).save(saved)
    return Expert.load(saved), dataset


def _distilled(
    model: nn.Module, expert: Expert, dataset: LatentDataset, batch: Batch, paths: list[str], workspace: Workspace
) -> nn.Module:
    return finetune_pruned(replace(expert, model=model), expert, dataset, batch, paths, CONFIG, workspace)


def _data_of(kind: str) -> str:
    return "mmdit" if kind == "mmdit" else "dit"


ROWS = {f"regional_{kind}": lambda folder, kind=kind: measure_regional(folder, kind) for kind in NETWORKS}
"""Measurements, by the names of their rows."""
