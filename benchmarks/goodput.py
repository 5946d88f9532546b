"""How much of the time is useful work while nodes vanish (`make chaos`).

Two experts on two real Ray clusters are killed with a mean time of ten checkpoint intervals. Goodput is the time that
the steps took that counted, over the time from the first submission to the end: what is lost are steps that are done
again, and the time until the next attempt trains. The same figure of an undisturbed run stands beside it.
"""

import argparse
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bed import Killer, Recipe, Trial
from benchmarks.record import Claim, Listing, write_result
from benchmarks.reliability import NOTES, Bench, strip_to_template, undisturbed
from orchestrator.islands.local.clusters import LocalIslands
from orchestrator.run.attempts import Attempt, all_attempts

INTERVALS = 10
"""Mean time to preemption, in checkpoint intervals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One expert from its first submission to its end, in seconds."""

    stage: str
    wall_s: float
    useful_s: float
    """Of the steps that counted, each at the pace of its attempt."""
    redone_s: float
    """Of steps that were done again."""
    attempts: int

    @property
    def goodput(self) -> float:
        """Share of the time that was useful."""
        return self.useful_s / self.wall_s


def spans(trial: Trial) -> list[Span]:
    """Every expert of a finished run."""
    found = all_attempts(trial.run)
    return [_span(trial, name, [one for one in found if one.stage == name]) for name in _names(trial)]


def _names(trial: Trial) -> list[str]:
    return [stage.name for stage in trial.experts]


def _span(trial: Trial, stage: str, attempts: list[Attempt]) -> Span:
    begun = min(_times(trial, "submitted", stage))
    starts = [one.steps.first if one.steps else None for one in attempts]
    useful = redone = 0.0
    for number, one in enumerate(attempts):
        if one.steps is not None and one.steps.seconds_each is not None:
            kept = next((start for start in starts[number + 1 :] if start is not None), one.steps.last)
            useful += (kept - one.steps.first) * one.steps.seconds_each
            redone += (one.steps.last - kept) * one.steps.seconds_each
    wall = max(_times(trial, "finished", stage)) - begun
    return Span(stage=stage, wall_s=wall, useful_s=useful, redone_s=redone, attempts=len(attempts))


def _times(trial: Trial, event: str, stage: str) -> list[float]:
    return [float(str(one["time"])) for one in trial.events(event) if one["stage"] == stage]


def measure(bench: Bench, recipe: Recipe) -> tuple[list[Claim], Listing]:
    """An undisturbed run, then one that is killed at that run's measure."""
    first = undisturbed(bench, "first", Recipe(steps=100, checkpoint_every=100, num_experts=recipe.num_experts))
    template = strip_to_template(first, bench.folder / "template")
    plain = undisturbed(bench, "plain", recipe, template)
    calm = spans(plain)
    interval_s = sum(one.useful_s for one in calm) / len(calm) * recipe.checkpoint_every / recipe.steps
    draw, trial = random.Random(bench.seed), bench.trial("killed", recipe, template)
    killer = Killer(trial, lambda: draw.expovariate(1 / (INTERVALS * interval_s)))
    killer.follow(trial.controller())
    rough = spans(trial)
    value, beside = (sum(one.useful_s for one in side) / sum(one.wall_s for one in side) for side in (rough, calm))
    claim = Claim(
        name=f"goodput, mean time to preemption {INTERVALS} checkpoint intervals ({killer.killed} SIGKILLs)",
        bar="≥ .90 of undisturbed",
        value=f"{value / beside:.3f}",
        spread=f"{min(one.goodput for one in rough):.3f} to {max(one.goodput for one in rough):.3f} over {len(rough)} "
        f"experts, undisturbed {beside:.3f}; interval {interval_s:.0f} s; models "
        f"{'byte-identical' if trial.models() == plain.models() else 'DIFFERENT'}",
        holds=value / beside >= 0.9 and trial.models() == plain.models() and killer.killed > 0,
    )
    rows = [_row(run, one) for run, side in (("undisturbed", calm), ("killed", rough)) for one in side]
    columns = ("run", "expert", "attempts", "wall s", "useful s", "redone s", "goodput")
    return [claim], Listing(title="Goodput", columns=columns, rows=rows)


def _row(run: str, one: Span) -> tuple[str, ...]:
    seconds = (f"{value:.0f}" for value in (one.wall_s, one.useful_s, one.redone_s))
    return run, one.stage, str(one.attempts), *seconds, f"{one.goodput:.3f}"


def main() -> None:
    """Measure, write docs/benchmarks/goodput.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="of each expert")
    parser.add_argument("--checkpoint-every", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    recipe = Recipe(steps=given.steps, checkpoint_every=given.checkpoint_every, num_experts=2)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddm-goodput-") as temporary:
        folder = Path(temporary)
        with LocalIslands(folder / "islands", count=2, cpus=1) as islands:
            claims, listing = measure(Bench(folder=folder, islands=islands, seed=given.seed), recipe)
    write_result("goodput", time.monotonic() - started, claims, [listing], NOTES)
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value} ({claim.spread})")


if __name__ == "__main__":
    main()
