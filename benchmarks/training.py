"""The trainer and the sampler against plain loops (`make bench-training`; a quarter of an hour on one thread).

1. `fit`, with its batches, loss, average, rows and progress, against `arms/bare_loop.py`, which shares nothing with it.
2. Gradients of a batch in four parts, and with activations computed again, against those of the plain step.
3. Sampling with sticky experts against one dense model in a loop of diffusers, and against such loops of the experts.

Both sides run in turns on one thread; the figure is CPU time, and each pair takes at most 90 s.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import chdir
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.arms import bare_loop
from benchmarks.record import Claim, Listing, median_and_range, write_result
from ddm_core.artifacts import Workspace
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.sample import sample
from experts.codec import PixelCodec
from experts.conditions.condition import Condition
from experts.config import DiTConfig, NetworkConfig, ResidualMLPConfig, TrainingConfig, UNetConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network, enable_gradient_checkpointing
from experts.training.latent_dataset import Batch, LatentDataset, make_batch
from experts.training.loss import expert_loss
from experts.training.trainer import fit
from router.config import RouterConfig
from router.models.registry import build_router
from router.router import Router

CLASSES = 10
LOSS = partial(expert_loss, prediction="velocity", noise_schedule=RECTIFIED_FLOW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A network and its training."""

    call: str
    """Its name in `bare_loop.CALLS`."""
    network: NetworkConfig
    shape: tuple[int, int, int]
    batch_size: int
    steps: int


CASES = {
    "MLP, small": Case(
        call="mlp", network=ResidualMLPConfig(width=128, depth=2), shape=(2, 4, 4), batch_size=60, steps=1000
    ),
    "MLP, default": Case(call="mlp", network=ResidualMLPConfig(), shape=(6, 4, 4), batch_size=60, steps=400),
    "U-Net": Case(call="unet", network=UNetConfig(), shape=(4, 16, 16), batch_size=16, steps=30),
    "DiT": Case(call="dit", network=DiTConfig(), shape=(4, 16, 16), batch_size=16, steps=50),
}
SAMPLED = ("MLP, default", "DiT")
EXPERT_COUNTS = {4: 1.2, 8: 1.2, 64: 1.5}
"""Numbers of experts with which these cases are sampled, and the bar of each."""
SEED_COUNTS = (1, 16, 64, 256)
SAMPLED_BATCH = 64


def main() -> None:
    """Measure everything and write docs/benchmarks/training.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="pairs of each comparison")
    parser.add_argument("--tiny", action="store_true", help="one pair of a few steps, and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, turns = time.monotonic(), 1 if options.tiny else options.turns
    cases = {name: replace(case, steps=4) for name, case in CASES.items()} if options.tiny else CASES
    claims = [shown(training_claim(name, compare_training(case, turns))) for name, case in cases.items()]
    differences = {name: compare_gradients(case) for name, case in cases.items()}
    claims.append(shown(gradient_claim(differences)))
    rows = []
    for name, (count, bar) in product(SAMPLED, EXPERT_COUNTS.items()):
        sizes = SEED_COUNTS[:2] if options.tiny else SEED_COUNTS
        measured = [compare_sampling(cases[name], count, size, min(turns, 3) if size > 64 else turns) for size in sizes]
        dense, same = ([pairs[side] for pairs in measured] for side in (0, 1))
        claims += map(shown, sampling_claims(f"{name}, K = {count}", bar, dense, same))
        rows += [
            (name, str(count), str(size), *(f"{median(pair):.2f}" for pair in pairs))
            for size, pairs in zip(sizes, measured, strict=True)
        ]
    if not options.tiny:
        listings = [gradient_listing(differences), sampling_listing(rows)]
        write_result("training", time.monotonic() - started, claims, listings, NOTES)


def shown(claim: Claim) -> Claim:
    """Print a claim and return it."""
    print(f"{claim.name}: {claim.value} ({claim.spread}), {claim.bar}", flush=True)
    return claim


NOTES = [
    "CPU time of whole calls, on one thread, of both sides in turns. `fit` includes metrics "
    "rows with their speed, progress, and the thread that draws batches. The plain loop draws with torch's global "
    "generator and prints nothing.",
    "Sampling: sticky, four Euler steps, null condition, random parameters, batches of at most 64. The dense model "
    "takes all rows together. The same calls: each expert alone, in diffusers' loop, on the rows that it gets. What "
    "these cost beyond the dense model is the price of K networks on one thread: smaller calls, and K times the "
    "parameters to read.",
]


def make_dataset(case: Case, count: int = 2048) -> LatentDataset:
    """Return random latents with classes."""
    generator = torch.Generator().manual_seed(0)
    return LatentDataset(
        clean=torch.randn(count, *case.shape, generator=generator),
        class_id=torch.arange(count) % CLASSES,
        cluster_id=torch.zeros(count, dtype=torch.int64),
    )


def make_network(case: Case) -> nn.Module:
    """Return the network of a case, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_network(case.network, case.shape, CLASSES)


def compare_training(case: Case, turns: int) -> list[float]:
    """Return the CPU time of `fit` over that of the plain loop, one ratio for each turn."""
    dataset = make_dataset(case)
    config = TrainingConfig(
        steps=case.steps, batch_size=case.batch_size, warmup_steps=2, checkpoint_every=10**6, held_out_every=None
    )

    def run_fit() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fit(make_network(case), LOSS, dataset, config, Workspace.at(Path(folder)))

    def run_bare() -> None:
        bare_loop.train(
            make_network(case),
            bare_loop.CALLS[case.call],
            dataset.clean,
            dataset.class_id,
            steps=case.steps,
            batch_size=case.batch_size,
            warmup=config.warmup_steps,
        )

    return ratios(run_fit, run_bare, turns)


def ratios(ours: Callable[[], object], theirs: Callable[[], object], turns: int) -> list[float]:
    """Return the ratios of the CPU times of two functions that run in turns; the first turn warms up."""
    measured = []
    for turn in range(turns + 1):
        order = (ours, theirs) if turn % 2 else (theirs, ours)
        seconds = {function: cpu_seconds(function) for function in order}
        measured.append(seconds[ours] / seconds[theirs])
    return measured[1:]


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the CPU time of one call, summed over all threads of this process."""
    started = time.process_time()
    function()
    return time.process_time() - started


def compare_gradients(case: Case) -> tuple[float, float | None]:
    """Return the largest difference of gradients in four parts, and with checkpointing, relative to the largest.

    None for a network without checkpointing.
    """
    model, dataset = make_network(case), make_dataset(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    model.train()
    batch = make_batch(dataset, TrainingConfig(batch_size=64), 0)
    whole = gradients(model, [batch])
    parts = difference(whole, gradients(model, batch.divide(4)))
    if isinstance(case.network, ResidualMLPConfig):
        return parts, None
    checkpointed = deepcopy(model)
    enable_gradient_checkpointing(checkpointed)
    return parts, difference(whole, gradients(checkpointed, [batch]))


def gradients(model: nn.Module, parts: Sequence[Batch]) -> list[torch.Tensor]:
    """Return the gradients of the mean loss over all rows of the parts."""
    model.zero_grad(set_to_none=True)
    rows = sum(len(part.t) for part in parts)
    for part in parts:
        torch.autograd.backward(LOSS(model, part) * (len(part.t) / rows))
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of two lists of gradients, relative to the largest gradient."""
    largest = max(float(gradient.abs().max()) for gradient in ours)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


def make_ensemble(build: Callable[[], nn.Module], shape: tuple[int, int, int], count: int) -> Ensemble:
    """Return an ensemble of so many equal experts."""
    router = Router(
        model=build_router(RouterConfig(width=32, depth=1), shape, count, CLASSES),
        noise_schedule=RECTIFIED_FLOW,
        prior_counts=torch.ones(CLASSES + 1, count),
    )
    experts = {
        k: Expert(
            model=build().eval(),
            prediction="velocity",
            noise_schedule=RECTIFIED_FLOW,
            latent_shape=shape,
            num_classes=CLASSES,
            cluster_id=k,
        )
        for k in range(count)
    }
    return Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=router)


def compare_sampling(case: Case, count: int, seed_count: int, turns: int) -> tuple[list[float], list[float]]:
    """Return the CPU time of sampling from so many experts over that of plain loops, one ratio for each turn.

    First over that of one dense model, then over that of each expert in a loop of its own, on the same rows.
    """
    ensemble, dense, steps = make_ensemble(lambda: make_network(case), case.shape, count), make_network(case).eval(), 4
    config = SamplingConfig(solver="flow_match_euler", steps=steps, batch_size=SAMPLED_BATCH)
    codec, seeds = PixelCodec(image_shape=(*case.shape[1:], case.shape[0])), range(seed_count)
    gates = ensemble.init_routing(seeds, Condition.null(seed_count), config.selection).gates

    def run_ours() -> None:
        sample(ensemble, codec, seeds, config, decode=False)

    def run_bare(model: nn.Module, rows: int) -> None:
        bare_loop.sample(
            model,
            bare_loop.CALLS[case.call],
            count=rows,
            batch_size=SAMPLED_BATCH,
            shape=case.shape,
            steps=steps,
            null=CLASSES,
        )

    def run_same() -> None:
        for k, rows in Counter(gates.argmax(1).tolist()).items():
            run_bare(next(ensemble.experts[k].networks()), rows)

    return ratios(run_ours, lambda: run_bare(dense, seed_count), turns), ratios(run_ours, run_same, turns)


def ratio_claim(name: str, limit: float, measured: Sequence[float]) -> Claim:
    """Return the claim that the median of measured ratios is at most the limit."""
    value, spread = median_and_range(measured)
    return Claim(name=name, bar=f"≤ {limit:g}", value=value, spread=spread, holds=float(value) <= limit)


def training_claim(name: str, measured: Sequence[float]) -> Claim:
    """Return the claim about one network."""
    return ratio_claim(f"CPU time of `fit` over that of an independent plain loop: {name}", 1.02, measured)


def gradient_claim(differences: dict[str, tuple[float, float | None]]) -> Claim:
    """Return the claim about all gradients."""
    values = [value for pair in differences.values() for value in pair if value is not None]
    return Claim(
        name="difference of the gradients of 4 × 16 samples and of 64, and with checkpointing, relative to the largest",
        bar="≤ 1e-5",
        value=f"{max(values):.1e}",
        spread=f"n = {len(values)}",
        holds=max(values) <= 1e-5,
    )


def gradient_listing(differences: dict[str, tuple[float, float | None]]) -> Listing:
    """Return the differences of every network."""
    rows = [
        (name, f"{parts:.1e}", "–" if checkpointed is None else f"{checkpointed:.1e}")
        for name, (parts, checkpointed) in differences.items()
    ]
    return Listing(
        title="Largest relative difference of gradients", columns=("network", "4 × 16", "checkpointing"), rows=rows
    )


def sampling_claims(
    case: str, bar: float, dense: Sequence[Sequence[float]], same: Sequence[Sequence[float]]
) -> tuple[Claim, Claim]:
    """Return the claims about one network and number of experts, for the number of seeds with the largest ratio."""
    return (
        ratio_claim(f"CPU time of sampling over that of a dense model, at worst: {case}", bar, max(dense, key=median)),
        ratio_claim(f"CPU time of sampling over that of the same calls, at worst: {case}", 1.2, max(same, key=median)),
    )


def sampling_listing(rows: Sequence[tuple[str, ...]]) -> Listing:
    """Return the ratios of every number of seeds."""
    return Listing(
        title="CPU time of sampling, sticky, over that of plain loops of diffusers",
        columns=("network", "experts", "seeds", "one dense model", "the same calls"),
        rows=rows,
    )


if __name__ == "__main__":
    with chdir(Path(__file__).parents[1]):
        main()
