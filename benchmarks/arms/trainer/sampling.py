"""Sampling with sticky experts against one dense model in a loop of diffusers, and such loops of the experts."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from statistics import median

import torch
from torch import nn

from benchmarks.arms import bare_loop
from benchmarks.arms.trainer.cases import CLASSES, Case, Effort, Measured, make_network, ratio_claim, ratios
from benchmarks.record import Claim, Listing
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.sample import sample
from experts.codec import PixelCodec
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from router.config import RouterConfig
from router.models.registry import build_router
from router.router import Router

SAMPLED = ("MLP, default", "DiT")
EXPERT_COUNTS = {4: 1.2, 8: 1.2, 64: 1.5}
"""Numbers of experts with which these cases are sampled, and the bar of each."""
SEED_COUNTS = (1, 16, 64, 256)
SAMPLED_BATCH = 64
PREFIX = "sampling: CPU time over that of"


def measure_sampling(effort: Effort) -> Measured:
    """Compare every network, number of experts and number of seeds; claims are about the largest ratio."""
    sizes = SEED_COUNTS[:2] if effort.is_tiny else SEED_COUNTS
    claims, rows = list[Claim](), list[tuple[str, ...]]()
    for name, (count, bar) in product(SAMPLED, EXPERT_COUNTS.items()):
        measured = [
            compare_sampling(effort.cases()[name], count, size, min(effort.turns, 3) if size > 64 else effort.turns)
            for size in sizes
        ]
        dense, same = ([pairs[side] for pairs in measured] for side in (0, 1))
        case = f"at worst: {name}, K = {count}"
        claims.append(ratio_claim(f"{PREFIX} a dense model, {case}", bar, max(dense, key=median)))
        claims.append(ratio_claim(f"{PREFIX} the same calls, {case}", 1.2, max(same, key=median)))
        rows += [
            (name, str(count), str(size), *(f"{median(pair):.2f}" for pair in pairs))
            for size, pairs in zip(sizes, measured, strict=True)
        ]
    listing = Listing(
        title="sampling: CPU time, sticky, over that of plain loops of diffusers",
        columns=("network", "experts", "seeds", "one dense model", "the same calls"),
        rows=rows,
    )
    return claims, [listing]


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
