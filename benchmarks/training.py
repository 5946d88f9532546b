"""The trainer and the sampler against plain loops (`make bench-training`; half an hour on one thread).

steps      `fit`, with its batches, loss, average, rows and progress, against `arms/bare_loop.py` and against
           `arms/script_loop.py`, which share nothing with it
waits      operators between two log lines that wait for the device
gradients  of a batch in four parts, with activations computed again, and compiled, against those of the plain step
memory     peak on the host of every class of network, in parts, with checkpointing and with offloading
sharding   two workers that share one network against one, resumed with fewer and more, and killed
sampling   with sticky experts against one dense model in a loop of diffusers, and against such loops of the experts
wanted     what was slow when the trainer was first measured, as it is now: read from the other parts, and measured here

`python -m benchmarks.training steps waits` measures these parts, and keeps what was measured of the others. Ratios of
time are of CPU time, both sides in turns on one thread.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from pathlib import Path

import torch

from benchmarks.arms.trainer.cases import Effort, Measured
from benchmarks.arms.trainer.gradients import measure_gradients
from benchmarks.arms.trainer.memory import measure_memory
from benchmarks.arms.trainer.sampling import measure_sampling
from benchmarks.arms.trainer.sharding import measure_sharding
from benchmarks.arms.trainer.steps import measure_steps, measure_waits
from benchmarks.arms.trainer.wanted import measure_wanted
from benchmarks.record import RESULTS, Claim, Listing, write_result
from ddm_core.artifacts import read_json

PARTS: Mapping[str, Callable[[Effort], Measured]] = {
    "steps": measure_steps,
    "waits": measure_waits,
    "gradients": measure_gradients,
    "memory": measure_memory,
    "sharding": measure_sharding,
    "sampling": measure_sampling,
    "wanted": measure_wanted,
}
"""The names of a part's claims and tables begin with the part's."""

NOTES = [
    "steps: CPU time of whole calls. `fit` includes metrics rows with their speed, progress, and the thread that draws "
    "batches. The plain loop draws with torch's global generator and prints nothing. The script's loop is that of "
    "diffusers' examples with accelerate, its progress bar writes to the null device, and it has no tracker; fused "
    "AdamW and the average by foreach are faster than the scripts' defaults.",
    "memory: what belongs to the process alone, beyond its imports, which returns freed memory to the system "
    "(MALLOC_MMAP_THRESHOLD_=65536). On a CPU the host is the device, so offloading moves nothing there; how much "
    "leaves a device is counted, not measured on a GPU.",
    "sharding: a DiT of two blocks, over gloo on one machine. Differences are relative to the largest value.",
    "sampling: sticky, four Euler steps, null condition, random parameters, batches of at most 64. The dense model "
    "takes all rows together. The same calls: each expert alone, in diffusers' loop, on the rows that it gets. What "
    "these cost beyond the dense model is the price of K networks on one thread: smaller calls, and K times the "
    "parameters to read.",
]


def main() -> None:
    """Measure parts and write docs/benchmarks/training.json; parts that are not measured now are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[*PARTS], help="parts to measure; default: all")
    parser.add_argument("--turns", type=int, default=7, help="pairs of each comparison")
    parser.add_argument("--tiny", action="store_true", help="one pair of a few steps, and write nothing")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"unknown parts: {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    torch.set_num_threads(1)
    effort = Effort(turns=1 if options.tiny else options.turns, is_tiny=options.tiny)
    for name in options.parts:
        started = time.monotonic()
        claims, listings = PARTS[name](effort)
        for claim in claims:
            print(f"{claim.name}: {claim.value} ({claim.spread}), {claim.bar}", flush=True)
        if not options.tiny:
            keep(name, time.monotonic() - started, claims, listings)


def keep(part: str, seconds: float, claims: Sequence[Claim], listings: Sequence[Listing]) -> None:
    """Write what was measured of a part in place of what was known of it."""
    file = RESULTS / "training.json"
    known = read_json(file) if file.is_file() else {"claims": [], "listings": [], "figures": {}}
    spent = dict(known["figures"]) | {part: round(seconds, 1)}
    claims = [*(Claim(**claim) for claim in known["claims"] if part_of(claim["name"]) != part), *claims]
    listings = [*(Listing(**table) for table in known["listings"] if part_of(table["title"]) != part), *listings]
    claims.sort(key=lambda claim: [*PARTS].index(part_of(claim.name)))
    listings.sort(key=lambda table: [*PARTS].index(part_of(table.title)))
    write_result("training", sum(spent.values()), claims, listings, NOTES, spent)


def part_of(name: str) -> str:
    """Return the part of a claim or a table, by its name."""
    return name.partition(":")[0]


if __name__ == "__main__":
    with chdir(Path(__file__).parents[1]):
        main()
