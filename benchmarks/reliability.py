"""What survives what (`make chaos`): runs on two real Ray clusters, with everything that can be killed being killed.

Every claim is made true by doing it: SIGKILL for experts, controllers and whole islands, SIGTERM as a spot notice,
links that are taken down, networks without a route, files with flipped bits, tokens that are wrong.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGTERM
from statistics import median

from benchmarks.bed import Killer, Recipe, Trial, end, last_step, lost_steps, restart_seconds, run_config
from benchmarks.faults import faults_claims
from benchmarks.network_island import S3_PORT
from benchmarks.networks import Host, forwarded, separate_networks
from benchmarks.record import Claim, Listing, write_result
from ddm_core.artifacts import read_json
from orchestrator.config.compute import ComputeConfig
from orchestrator.islands.local.clusters import LocalIslands
from orchestrator.run.attempts import resumed_from_step

LONGEST_LIFE_S = 14.0
"""A training is killed at a random time up to so long after it was first seen."""

POLICY = ComputeConfig(retries=10_000, backoff_s=0.2, lease_s=12.0, grace_s=30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where the trials run."""

    folder: Path
    islands: LocalIslands
    seed: int
    restarts_s: list[float] = field(default_factory=list)
    """From the submission of an attempt until its training went on, for all that went on."""

    def trial(self, name: str, recipe: Recipe, template: Path | None = None, policy: ComputeConfig = POLICY) -> Trial:
        """A prepared run folder."""
        trial = Trial(run_config(self.folder / name, recipe, self.islands.configs, policy))
        trial.prepare(template)
        return trial


def undisturbed(bench: Bench, name: str, recipe: Recipe, template: Path | None = None) -> Trial:
    """A run that nobody disturbs: the reference for all bytes."""
    trial = bench.trial(name, recipe, template)
    controller = trial.controller()
    if controller.wait(timeout=900) != 0:
        raise RuntimeError(f"the undisturbed run failed: {trial.run.root}/controller.log")
    return trial


def strip_to_template(trial: Trial, folder: Path) -> Path:
    """A copy of a finished run without its experts and what follows them."""
    copy = Trial(replace(trial.config, folder=str(folder)))
    copy.prepare(trial.run.root)
    for pattern in ("expert_*", "ensemble-*", "score_*"):
        for kind in ("artifacts", "work"):
            for path in (folder / kind).glob(pattern):
                shutil.rmtree(path)
    return folder


def experts_killed(bench: Bench, template: Path, reference: Trial, recipe: Recipe, kills: int) -> list[Claim]:
    """SIGKILL for experts at random instants, in as many runs as it takes."""
    draw, killed, runs, finished, same, doubled = random.Random(bench.seed), 0, 0, 0, 0, 0
    lost: list[int] = []
    started = time.monotonic()
    while killed < kills:
        trial = bench.trial(f"killed_{runs}", recipe, template)
        killer = Killer(trial, lambda: draw.uniform(0.0, LONGEST_LIFE_S), most=min(30, kills - killed))
        code = killer.follow(trial.controller())
        runs, killed = runs + 1, killed + killer.killed
        finished += trial.is_finished()
        same += trial.models() == reference.models()
        for stage in trial.experts:
            lost += lost_steps(trial.run.attempts(stage))
            bench.restarts_s.extend(restart_seconds(trial.run.attempts(stage)))
        doubled += _doubled(trial)
        print(f"  run {runs}: {killed} of {kills} kills, exit code {code}", flush=True)
    seconds = time.monotonic() - started
    return [
        Claim(
            name=f"experts killed with SIGKILL at random instants: {killed} kills on two islands, {runs} runs",
            bar="all runs finish; models byte-identical to the undisturbed run's",
            value=f"{finished} of {runs} finish, {same} of {runs} byte-identical",
            spread=f"{seconds:.0f} s; steps done again: median {median(lost or [0]):.0f}, most {max(lost or [0])}"
            f" (a checkpoint every {recipe.checkpoint_every})",
            holds=finished == same == runs and killed >= kills and not doubled,
        )
    ]


def _doubled(trial: Trial) -> int:
    """Attempts that two processes ran."""
    submitted = [(event["stage"], event["attempt"]) for event in trial.events("submitted")]
    return len(submitted) - len(set(submitted))


def controllers_killed(bench: Bench, template: Path, recipe: Recipe, kills: int) -> list[Claim]:
    """SIGKILL for the controller and all that it started at home, again and again, while experts train."""
    draw, killed, runs, finished, twice, redone = random.Random(bench.seed + 1), 0, 0, 0, 0, 0
    started = time.monotonic()
    while killed < kills:
        trial = bench.trial(f"headless_{runs}", recipe, template)
        done: dict[str, float] = {}
        while True:
            lives, starts = len(trial.events("run_started")), killed % 4 != 0
            controller = trial.controller()
            deadline = time.monotonic() + (draw.uniform(0.0, 6.0) if killed < kills else 900.0)
            while controller.poll() is None and time.monotonic() < deadline:
                trial.victims()
                time.sleep(0.05)
                if starts and killed < kills and len(trial.events("run_started")) > lives:
                    deadline, starts = time.monotonic() + draw.uniform(0.0, 8.0), False
                elif starts and killed < kills:
                    deadline = time.monotonic() + 1.0
            if controller.poll() is not None:
                break
            end(controller)
            killed += 1
            redone += _redone(trial, done)
        runs, finished = runs + 1, finished + trial.is_finished()
        twice += len(trial.seen) - len(trial.experts)
        print(f"  run {runs}: {killed} of {kills} controllers killed, {len(trial.seen)} trainings seen", flush=True)
    return [
        Claim(
            name=f"controller killed at random instants: {killed} kills, {runs} runs",
            bar="all resume; nothing runs twice; nothing finished is redone",
            value=f"{finished} of {runs} finish; {twice} trainings too many, {redone} artifacts redone",
            spread=f"{time.monotonic() - started:.0f} s; a training is a process on an island, each counted by its pid",
            holds=finished == runs and not twice and not redone and killed >= kills,
        )
    ]


def _redone(trial: Trial, done: dict[str, float]) -> int:
    """How many manifests have changed since they were first seen."""
    changed = 0
    for path in trial.run.root.glob("artifacts/*/manifest.json"):
        written = path.stat().st_mtime
        changed += done.setdefault(path.parent.name, written) != written
    return changed


def island_killed(bench: Bench, template: Path, reference: Trial, recipe: Recipe, times: int) -> list[Claim]:
    """Every process of one island, mid-training; then it stays away until the run is over."""
    finished, same, lost = 0, 0, []
    started = time.monotonic()
    for number in range(times):
        trial = bench.trial(f"island_{number}", recipe, template)
        controller = trial.controller()
        _until(lambda trial=trial: _on(trial, "island_1", recipe.checkpoint_every), 120)
        bench.islands.kill("island_1")
        finished += controller.wait(timeout=600) == 0 and trial.is_finished()
        same += trial.models() == reference.models()
        for stage in trial.experts:
            lost += lost_steps(trial.run.attempts(stage))
        bench.islands.start("island_1")
        print(f"  {number + 1} of {times}: steps done again {lost}", flush=True)
    return [
        Claim(
            name=f"whole island killed mid-training, {times} times",
            bar="the run finishes on the other; lost work ≤ one checkpoint interval",
            value=f"{finished} of {times} finish, {same} byte-identical; most steps done again {max(lost)} "
            f"= {max(lost) / recipe.checkpoint_every:.2f} intervals",
            spread=f"{time.monotonic() - started:.0f} s; lease {POLICY.lease_s:g} s; n = {len(lost)}",
            holds=finished == same == times and max(lost) <= recipe.checkpoint_every,
        )
    ]


def _on(trial: Trial, island: str, steps: int) -> bool:
    """Whether an expert on the island has done more than so many steps."""
    for stage in trial.experts:
        attempts = trial.run.attempts(stage)
        written = attempts[-1] / "job.json" if attempts else None
        if written and written.is_file() and read_json(written)["island"] == island and last_step(attempts[-1]) > steps:
            return True
    return False


def _until(question: Callable[[], bool], limit_s: float) -> None:
    give_up = time.monotonic() + limit_s
    while not question():
        if time.monotonic() > give_up:
            raise TimeoutError(f"not within {limit_s:g} s")
        time.sleep(0.1)


def notices(bench: Bench, template: Path, reference: Trial, recipe: Recipe, count: int) -> list[Claim]:
    """SIGTERM for trainings at random instants: a spot notice of 30 s."""
    draw, sent, preempted, lost, finished, same, runs = random.Random(bench.seed + 2), 0, 0, [], 0, 0, 0
    failures = 0
    while sent < count:
        trial = bench.trial(f"notice_{runs}", recipe, template)
        killer = Killer(
            trial,
            lambda: draw.uniform(0.0, LONGEST_LIFE_S),
            most=count - sent,
            signal=SIGTERM,
            is_ripe=lambda stage, trial=trial: 0 < trial.progress(stage) < recipe.steps - recipe.checkpoint_every,
        )
        killer.follow(trial.controller())
        runs, sent = runs + 1, sent + killer.killed
        finished, same = finished + trial.is_finished(), same + (trial.models() == reference.models())
        for stage in trial.experts:
            attempts = trial.run.attempts(stage)
            preempted += sum(read_json(one / "outcome.json")["state"] == "preempted" for one in attempts)
            lost += [_lost_to_notice(before, after) for before, after in zip(attempts, attempts[1:], strict=False)]
        failures += len(trial.events("failed", "lost"))
        print(f"  run {runs}: {sent} notices, {preempted} preempted, lost steps {max(lost or [0])}", flush=True)
    return [
        Claim(
            name=f"SIGTERM with 30 s notice, {sent} times",
            bar="zero steps lost",
            value=f"{max(lost or [0])} steps lost at most; {preempted} of {sent} preempted; "
            f"{same} of {runs} byte-identical",
            spread=f"{finished} of {runs} runs finish; {failures} retries used",
            holds=not any(lost) and finished == same == runs and preempted == sent,
        )
    ]


def _lost_to_notice(before: Path, after: Path) -> int:
    """Steps between where an attempt says that it stopped and where the next one went on."""
    words = read_json(before / "outcome.json")["error"]
    stopped = int(words.split("stopped at step ")[1].split()[0]) if "stopped at step" in words else last_step(before)
    return max(0, stopped - resumed_from_step(after)) if (after / "log.txt").is_file() else 0


def networks(folder: Path, recipe: Recipe, cut_s: float) -> tuple[list[Claim], Listing]:
    """Two islands on networks without a route to each other; the link of one of them is down for a while."""
    started = time.monotonic()
    with separate_networks(folder / "networks", 2) as (hosts, configs):
        policy = replace(POLICY, lease_s=180.0)
        trial = Trial(run_config(folder / "separate", recipe, configs, policy))
        trial.prepare()
        before = forwarded()
        controller = trial.controller()
        _until(lambda: min(trial.progress(stage.name) for stage in trial.experts) > 0, 240)
        calm = _carried(hosts, 20.0)
        there, at_cut = _steps_on(trial, "island_1"), time.monotonic()
        hosts[0].cut()
        _until(lambda: bool(trial.events("unreachable")), cut_s)
        noticed = time.monotonic() - at_cut
        said = _status(trial)
        time.sleep(max(0.0, cut_s - noticed))
        hosts[0].mend()
        healed = time.monotonic()
        _until(lambda: bool(trial.events("recovered")), 60)
        recovered = time.monotonic() - healed
        time.sleep(3.0)
        after = _steps_on(trial, "island_1")
        code = controller.wait(timeout=900)
        passed = forwarded() - before
        met = [one.reaches(other, S3_PORT) for one, other in (hosts, hosts[::-1])]
    attempts = sum(len(trial.run.attempts(stage)) for stage in trial.experts)
    cut = Claim(
        name=f"link between controller and an island down for {cut_s:.0f} s",
        bar="training goes on; nothing is resubmitted; status says unreachable, then recovers",
        value=f"{after - there:,} steps meanwhile; {attempts} attempts for {len(trial.experts)} experts; status said "
        f"{'unreachable' if 'unreachable' in said else 'NOTHING'}; recovered {recovered:.1f} s after the link",
        spread=f"noticed after {noticed:.1f} s; the run {'finished' if code == 0 else 'FAILED'}",
        holds=code == 0 and attempts == len(trial.experts) and after - there > 0 and "unreachable" in said,
    )
    apart = Claim(
        name="bytes between islands during a whole run",
        bar="0",
        value=f"{passed} packets forwarded; island to island: {'connected' if any(met) else 'no route'}",
        spread=f"{time.monotonic() - started:.0f} s; the links to the controller carried {sum(calm) / 20e3:.1f} kB/s "
        "while both trained (checkpoints and signs of life)",
        holds=passed == 0 and not any(met),
    )
    rows = [(host.namespace, f"{carried:,}") for host, carried in zip(hosts, calm, strict=True)]
    return [cut, apart], Listing(title="Bytes on the links in 20 s of training", columns=("island", "bytes"), rows=rows)


def _carried(hosts: Sequence[Host], seconds: float) -> list[int]:
    before = [host.carried() for host in hosts]
    time.sleep(seconds)
    return [host.carried() - earlier for host, earlier in zip(hosts, before, strict=True)]


def _steps_on(trial: Trial, island: str) -> int:
    """The last step that the expert on an island has told of."""
    for stage in trial.experts:
        if read_json(trial.run.attempts(stage)[-1] / "job.json")["island"] == island:
            return trial.progress(stage.name)
    raise RuntimeError(f"no expert is on {island}")


def _status(trial: Trial) -> str:
    """What `ddm status` says."""
    command = [sys.executable, "-m", "orchestrator", "status", str(trial.run.root)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"}
    ).stdout


def main() -> None:
    """Run the claims that are asked for, write docs/benchmarks/reliability.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="claims to check; all without it")
    parser.add_argument("--kills", type=int, default=104, help="experts that are killed")
    parser.add_argument("--controllers", type=int, default=52, help="controllers that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the runs; a temporary one without it")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddm-chaos-") as temporary:
        folder = given.keep or Path(temporary)
        claims, listings, restarts_s = measure(folder, given)
    figures = {"restart_s": median(restarts_s)} if restarts_s else {}
    write_result("reliability", time.monotonic() - started, claims, listings, NOTES, figures)
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value} ({claim.spread})")


def measure(folder: Path, given: argparse.Namespace) -> tuple[list[Claim], list[Listing], list[float]]:
    """All claims, on one pair of islands; and how long the restarts took, in seconds."""
    short = Recipe(steps=4000, checkpoint_every=400)
    long = Recipe(steps=60_000, checkpoint_every=2000, num_experts=2)
    wanted: Sequence[str] = given.only or ("experts", "controllers", "island", "notice", "network", "faults")
    claims: list[Claim] = []
    listings: list[Listing] = []
    with LocalIslands(folder / "islands", count=2, cpus=1) as islands:
        bench = Bench(folder=folder, islands=islands, seed=given.seed)
        reference = undisturbed(bench, "undisturbed", short)
        template = strip_to_template(reference, folder / "template")
        steps: dict[str, Callable[[], list[Claim]]] = {
            "experts": lambda: experts_killed(bench, template, reference, short, given.kills),
            "notice": lambda: notices(bench, template, reference, short, 30),
            "island": lambda: island_killed(bench, template, reference, short, 3),
            "controllers": lambda: controllers_killed(bench, template, long, given.controllers),
        }
        for name, step in steps.items():
            if name in wanted:
                print(name, flush=True)
                claims += step()
    if "network" in wanted:
        made, listing = networks(folder, long, 60.0)
        claims, listings = claims + made, [*listings, listing]
    if "faults" in wanted:
        claims += faults_claims()
    return claims, listings, bench.restarts_s


NOTES = (
    "Both islands, their storage and the controller are on one machine with two cores; an island is a Ray cluster of "
    "its own with one CPU, its own ports and its own token.",
)


if __name__ == "__main__":
    main()
