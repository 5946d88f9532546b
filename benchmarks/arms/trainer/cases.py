"""The networks that the trainer's benchmark trains and samples, and CPU times of two sides in turns."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from benchmarks.arms import bare_loop
from benchmarks.record import Claim, Listing, median_and_range
from experts.conditions.captions import EncodedCaptions
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiffusersConfig, DiTConfig, NetworkConfig, ResidualMLPConfig, UNetConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.networks.registry import build_network
from experts.training.latent_dataset import LatentDataset
from experts.training.loss import expert_loss

CLASSES = 10
TEXT = (16, 64, 64)
"""Tokens, width and pooled width of the texts, of which there is one for each class."""
SD3 = DiffusersConfig(
    class_name="SD3Transformer2DModel",
    settings={
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "num_layers": 2,
        "patch_size": 2,
        "caption_projection_dim": 128,
        "pos_embed_max_size": 32,
        "qk_norm": "rms_norm",
    },
)
LOSS = partial(expert_loss, prediction="velocity", noise_schedule=RECTIFIED_FLOW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A network and its training."""

    call: str
    """Its name in `bare_loop.CALLS`; `sd3` reads texts, the others classes."""
    network: NetworkConfig
    shape: tuple[int, int, int]
    batch_size: int
    steps: int

    def bare_call(self) -> bare_loop.Call:
        """Return how plain loops call the network."""
        if self.call != "sd3":
            return bare_loop.CALLS[self.call]
        texts, null = make_texts(), TextEmbedding.zeros(*TEXT)
        return bare_loop.calling_with_text(
            torch.cat([texts.sequence, null.sequence]), torch.cat([texts.pooled, null.pooled])
        )


CASES = {
    "MLP, small": Case(
        call="mlp", network=ResidualMLPConfig(width=128, depth=2), shape=(2, 4, 4), batch_size=60, steps=1000
    ),
    "MLP, default": Case(call="mlp", network=ResidualMLPConfig(), shape=(6, 4, 4), batch_size=60, steps=400),
    "U-Net": Case(call="unet", network=UNetConfig(), shape=(4, 16, 16), batch_size=16, steps=30),
    "DiT": Case(call="dit", network=DiTConfig(), shape=(4, 16, 16), batch_size=16, steps=50),
    "SD3": Case(call="sd3", network=SD3, shape=(4, 16, 16), batch_size=16, steps=40),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured."""

    turns: int
    """Pairs of each comparison."""
    is_tiny: bool
    """Whether all is as small as can be, to see that it runs."""

    def cases(self) -> dict[str, Case]:
        """Return the networks by name."""
        return {name: replace(case, steps=4) for name, case in CASES.items()} if self.is_tiny else CASES


Measured = tuple[list[Claim], list[Listing]]
"""The claims and the tables of one part of the benchmark."""


def make_texts() -> TextEmbedding:
    """Return a text for each class, of numbers of 16 bits."""
    (tokens, width, pooled), generator = TEXT, torch.Generator().manual_seed(1)
    return TextEmbedding(
        torch.randn(CLASSES, tokens, width, generator=generator).half().float(),
        torch.ones(CLASSES, tokens, dtype=torch.bool),
        torch.randn(CLASSES, pooled, generator=generator).half().float(),
        torch.zeros(CLASSES, dtype=torch.bool),
    )


def make_dataset(case: Case, count: int = 2048) -> LatentDataset:
    """Return random latents with classes, or with a text for each class."""
    generator, class_id = torch.Generator().manual_seed(0), torch.arange(count) % CLASSES
    ones = torch.ones(count, dtype=torch.int64)
    captions = None
    if case.call == "sd3":
        captions = EncodedCaptions.from_rows(
            make_texts().rows(class_id), TextEmbedding.zeros(*TEXT), ones, torch.ones(count)
        )
    return LatentDataset(
        clean=torch.randn(count, *case.shape, generator=generator),
        class_id=class_id if captions is None else -ones,
        cluster_id=torch.zeros(count, dtype=torch.int64),
        captions=captions,
    )


def make_network(case: Case) -> nn.Module:
    """Return the network of a case, the same at every call."""
    reads_text = case.call == "sd3"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        null_text = TextEmbedding.zeros(*TEXT) if reads_text else None
        return build_network(case.network, case.shape, 0 if reads_text else CLASSES, null_text)


def ratios(ours: Callable[[], object], theirs: Callable[[], object], turns: int) -> list[float]:
    """Return the ratios of the CPU times of two functions that run in turns; the first turn warms up."""
    measured = take_turns({"ours": ours, "theirs": theirs}, turns)
    return [ours_s / theirs_s for ours_s, theirs_s in zip(measured["ours"], measured["theirs"], strict=True)]


def take_turns(sides: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Return the CPU seconds of functions that run in turns, each turn in the opposite order; the first warms up."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name in list(sides) if turn % 2 else reversed(list(sides)):
            seconds = cpu_seconds(sides[name])
            if turn:
                measured[name].append(seconds)
    return measured


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the CPU time of one call, summed over all threads of this process."""
    started = time.process_time()
    function()
    return time.process_time() - started


def ratio_claim(name: str, limit: float, measured: Sequence[float]) -> Claim:
    """Return the claim that the median of measured ratios is at most the limit."""
    value, spread = median_and_range(measured)
    return Claim(name=name, bar=f"≤ {limit:g}", value=value, spread=spread, holds=float(value) <= limit)
