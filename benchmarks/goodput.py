"""Share of useful work while nodes vanish (`make chaos`).

Two experts on two real Ray clusters are killed with a mean time of ten checkpoint intervals. Goodput is the time of the
steps that counted, over the time from the first submission to the end. The lost time consists of repeated steps and of
waiting until the next attempt trains. The goodput of an undisturbed run is reported next to it.
"""

import argparse
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.record import Claim, Listing, write_result
from benchmarks.reliability import NOTES, Bench, run_undisturbed, strip_to_template
from benchmarks.testbed.ray_clusters import Killer, Trial, TrialConfig, restart_seconds
from orchestrator.islands.local.clusters import LocalIslands
from orchestrator.run.attempts import Attempt, load_all_attempts

INTERVALS = 10
"""Mean time to preemption, in checkpoint intervals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTime:
    """Time of one expert from its first submission to its end, in seconds."""

    stage: str
    wall_s: float
    useful_s: float
    """Time of the steps that counted, each at the pace of its attempt."""
    repeated_s: float
    """Time of the steps that a later attempt repeated."""
    attempts: int

    @property
    def goodput(self) -> float:
        """Return the useful share of the time."""
        return self.useful_s / self.wall_s


def expert_times(trial: Trial) -> list[ExpertTime]:
    """Return the times of every expert of a finished run."""
    attempts = load_all_attempts(trial.run)
    names = [stage.name for stage in trial.experts]
    return [_expert_time(trial, name, [attempt for attempt in attempts if attempt.stage == name]) for name in names]


def _expert_time(trial: Trial, stage: str, attempts: list[Attempt]) -> ExpertTime:
    submitted = min(_event_times(trial, "submitted", stage))
    first_steps = [attempt.steps.first if attempt.steps else None for attempt in attempts]
    useful = repeated = 0.0
    for number, attempt in enumerate(attempts):
        steps = attempt.steps
        if steps is not None and steps.seconds_per_step is not None:
            last_useful = next((first for first in first_steps[number + 1 :] if first is not None), steps.last)
            useful += (last_useful - steps.first) * steps.seconds_per_step
            repeated += (steps.last - last_useful) * steps.seconds_per_step
    wall = max(_event_times(trial, "finished", stage)) - submitted
    return ExpertTime(stage=stage, wall_s=wall, useful_s=useful, repeated_s=repeated, attempts=len(attempts))


def _event_times(trial: Trial, name: str, stage: str) -> list[float]:
    return [float(str(event["time"])) for event in trial.events(name) if event["stage"] == stage]


def measure(bench: Bench, config: TrialConfig) -> tuple[list[Claim], Listing]:
    """Measure an undisturbed run, then one whose experts are killed at a rate derived from it."""
    first = run_undisturbed(
        bench, "first", TrialConfig(steps=100, checkpoint_every=100, num_experts=config.num_experts)
    )
    template = strip_to_template(first, bench.folder / "template")
    undisturbed = run_undisturbed(bench, "plain", config, template)
    undisturbed_times = expert_times(undisturbed)
    interval_s = _total_useful_s(undisturbed_times) / len(undisturbed_times) * config.checkpoint_every / config.steps
    rng, trial = random.Random(bench.seed), bench.prepare_trial("killed", config, template)
    killer = Killer(trial, lambda: rng.expovariate(1 / (INTERVALS * interval_s)))
    killer.follow(trial.start_controller())
    killed_times = expert_times(trial)
    goodput, undisturbed_goodput = (
        _total_useful_s(times) / sum(expert.wall_s for expert in times) for times in (killed_times, undisturbed_times)
    )
    is_identical = trial.model_checksums() == undisturbed.model_checksums()
    relative = goodput / undisturbed_goodput
    claims = [
        Claim(
            name=f"goodput, mean time to preemption {INTERVALS} checkpoint intervals ({killer.num_killed} SIGKILLs)",
            bar="≥ .90 of undisturbed",
            value=f"{relative:.3f}",
            spread=f"{min(expert.goodput for expert in killed_times):.3f} to "
            f"{max(expert.goodput for expert in killed_times):.3f} over {len(killed_times)} experts, undisturbed "
            f"{undisturbed_goodput:.3f}; interval {interval_s:.0f} s; models "
            f"{'byte-identical' if is_identical else 'DIFFERENT'}",
            holds=relative >= 0.9 and is_identical and killer.num_killed > 0,
        ),
        _compare_with_young(trial, relative, sum(expert.wall_s for expert in killed_times), interval_s),
    ]
    rows = [
        _row(run, expert)
        for run, times in (("undisturbed", undisturbed_times), ("killed", killed_times))
        for expert in times
    ]
    columns = ("run", "expert", "attempts", "wall s", "useful s", "repeated s", "goodput")
    return claims, Listing(title="Goodput", columns=columns, rows=rows)


def _compare_with_young(trial: Trial, relative: float, wall_s: float, interval_s: float) -> Claim:
    """Compare with the first-order prediction of Young (1974), at the rate of losses that occurred.

    A loss costs half an interval T and a restart R, so with n losses in the time W the useful share of the time is
    1 - n (T / 2 + R) / W. The cost of the checkpoints themselves is in both runs.
    """
    restarts_s = [seconds for stage in trial.experts for seconds in restart_seconds(trial.run.attempts(stage))]
    restart_s = median(restarts_s) if restarts_s else 0.0
    predicted = 1.0 - len(restarts_s) * (interval_s / 2 + restart_s) / wall_s
    return Claim(
        name="the same goodput, against Young's formula at the observed number of losses",
        bar="≥ .97 of the prediction",
        value=f"{relative / predicted:.3f}",
        spread=f"predicted {predicted:.3f}; {len(restarts_s)} restarts of {restart_s:.1f} s in the median",
        holds=relative / predicted >= 0.97,
    )


def _total_useful_s(times: list[ExpertTime]) -> float:
    return sum(expert.useful_s for expert in times)


def _row(run: str, expert: ExpertTime) -> tuple[str, ...]:
    seconds = (f"{value:.0f}" for value in (expert.wall_s, expert.useful_s, expert.repeated_s))
    return run, expert.stage, str(expert.attempts), *seconds, f"{expert.goodput:.3f}"


def main() -> None:
    """Measure, write docs/benchmarks/goodput.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="training steps of each expert")
    parser.add_argument("--checkpoint-every", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = TrialConfig(steps=options.steps, checkpoint_every=options.checkpoint_every, num_experts=2)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddm-goodput-") as temporary:
        folder = Path(temporary)
        with LocalIslands(folder / "islands", count=2, cpus=1) as islands:
            claims, listing = measure(Bench(folder=folder, islands=islands, seed=options.seed), config)
    write_result("goodput", time.monotonic() - started, claims, [listing], NOTES)
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value} ({claim.spread})")


if __name__ == "__main__":
    main()
