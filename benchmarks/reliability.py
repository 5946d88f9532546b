"""Fault tolerance (`make chaos`): runs on two real Ray clusters while their processes are killed.

Every claim is tested with real faults: SIGKILL for experts, controllers and complete islands; SIGTERM as a spot notice;
links that are taken down; networks without a route; files with flipped bits; wrong tokens.
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

from benchmarks.record import Claim, Listing, write_result
from benchmarks.testbed.network_island import S3_PORT
from benchmarks.testbed.networks import Host, count_forwarded_packets, separate_networks
from benchmarks.testbed.ray_clusters import (
    Killer,
    Trial,
    TrialConfig,
    kill_controller,
    last_step,
    make_run_config,
    repeated_steps,
    restart_seconds,
)
from ddm_core.artifacts import read_json
from orchestrator.config.compute import ComputeConfig
from orchestrator.islands.local.clusters import LocalIslands
from orchestrator.run.attempts import read_resume_step

MAX_DELAY_S = 14.0
"""A training is killed at a random time up to this delay after its first observation."""

POLICY = ComputeConfig(retries=10_000, backoff_s=0.2, lease_s=12.0, grace_s=30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Folder, islands and seed of the trials."""

    folder: Path
    islands: LocalIslands
    seed: int
    restarts_s: list[float] = field(default_factory=list)
    """Time from submission to resumed training, for all attempts that resumed."""

    def prepare_trial(
        self, name: str, config: TrialConfig, template: Path | None = None, policy: ComputeConfig = POLICY
    ) -> Trial:
        """Prepare a run folder."""
        trial = Trial(make_run_config(self.folder / name, config, self.islands.configs, policy))
        trial.prepare(template)
        return trial


def run_undisturbed(bench: Bench, name: str, config: TrialConfig, template: Path | None = None) -> Trial:
    """Run a trial without faults: the reference for byte-identity."""
    trial = bench.prepare_trial(name, config, template)
    exit_code = trial.start_controller().wait(timeout=900)
    if exit_code != 0:
        raise RuntimeError(
            f"the undisturbed run must exit with 0; got {exit_code}; read {trial.run.root}/controller.log"
        )
    return trial


def strip_to_template(trial: Trial, folder: Path) -> Path:
    """Copy a finished run without its experts and the stages after them."""
    copy = Trial(replace(trial.config, folder=str(folder)))
    copy.prepare(trial.run.root)
    for pattern in ("expert_*", "ensemble-*", "score_*"):
        for kind in ("artifacts", "work"):
            for path in (folder / kind).glob(pattern):
                shutil.rmtree(path)
    return folder


def kill_experts(bench: Bench, template: Path, reference: Trial, config: TrialConfig, kills: int) -> list[Claim]:
    """Kill experts with SIGKILL at random instants, in as many runs as necessary."""
    rng, killed, runs, finished, identical, duplicates = random.Random(bench.seed), 0, 0, 0, 0, 0
    repeated: list[int] = []
    started = time.monotonic()
    while killed < kills:
        trial = bench.prepare_trial(f"killed_{runs}", config, template)
        killer = Killer(trial, lambda: rng.uniform(0.0, MAX_DELAY_S), max_kills=min(30, kills - killed))
        exit_code = killer.follow(trial.start_controller())
        runs, killed = runs + 1, killed + killer.num_killed
        finished += trial.is_finished()
        identical += trial.model_checksums() == reference.model_checksums()
        for stage in trial.experts:
            repeated += repeated_steps(trial.run.attempts(stage))
            bench.restarts_s.extend(restart_seconds(trial.run.attempts(stage)))
        duplicates += _count_duplicate_attempts(trial)
        print(f"  run {runs}: {killed} of {kills} kills, exit code {exit_code}", flush=True)
    seconds = time.monotonic() - started
    return [
        Claim(
            name=f"experts killed with SIGKILL at random instants: {killed} kills on two islands, {runs} runs",
            bar="all runs finish; models byte-identical to the undisturbed run's",
            value=f"{finished} of {runs} finish, {identical} of {runs} byte-identical",
            spread=f"{seconds:.0f} s; repeated steps: median {median(repeated or [0]):.0f}, "
            f"maximum {max(repeated or [0])} (a checkpoint every {config.checkpoint_every})",
            holds=finished == identical == runs and killed >= kills and not duplicates,
        )
    ]


def _count_duplicate_attempts(trial: Trial) -> int:
    """Return the number of attempts that were submitted twice."""
    submitted = [(event["stage"], event["attempt"]) for event in trial.events("submitted")]
    return len(submitted) - len(set(submitted))


def kill_controllers(bench: Bench, template: Path, config: TrialConfig, kills: int) -> list[Claim]:
    """Kill the controller and its local processes with SIGKILL, repeatedly, while experts train.

    One kill in four comes at a random time after the start of the process, the others after the start of its run.
    """
    rng, killed, runs, finished, surplus, rewritten = random.Random(bench.seed + 1), 0, 0, 0, 0, 0
    started = time.monotonic()
    while killed < kills:
        trial = bench.prepare_trial(f"headless_{runs}", config, template)
        manifest_times: dict[str, float] = {}
        while True:
            num_starts, waits_for_start = len(trial.events("run_started")), killed % 4 != 0
            controller = trial.start_controller()
            deadline = time.monotonic() + (rng.uniform(0.0, 6.0) if killed < kills else 900.0)
            while controller.poll() is None and time.monotonic() < deadline:
                trial.find_victims()
                time.sleep(0.05)
                if waits_for_start and killed < kills and len(trial.events("run_started")) > num_starts:
                    deadline, waits_for_start = time.monotonic() + rng.uniform(0.0, 8.0), False
                elif waits_for_start and killed < kills:
                    deadline = time.monotonic() + 1.0
            if controller.poll() is not None:
                break
            kill_controller(controller)
            killed += 1
            rewritten += _count_rewritten_manifests(trial, manifest_times)
        runs, finished = runs + 1, finished + trial.is_finished()
        surplus += len(trial.stages_by_pid) - len(trial.experts)
        trainings = len(trial.stages_by_pid)
        print(f"  run {runs}: {killed} of {kills} controllers killed, {trainings} trainings observed", flush=True)
    return [
        Claim(
            name=f"controller killed at random instants: {killed} kills, {runs} runs",
            bar="all resume; no training runs twice; no finished artifact is rewritten",
            value=f"{finished} of {runs} finish; {surplus} duplicate trainings, {rewritten} artifacts rewritten",
            spread=f"{time.monotonic() - started:.0f} s; a training is a process on an island, counted by pid",
            holds=finished == runs and not surplus and not rewritten and killed >= kills,
        )
    ]


def _count_rewritten_manifests(trial: Trial, manifest_times: dict[str, float]) -> int:
    """Return the number of manifests that have changed since their first observation; record new ones."""
    changed = 0
    for path in trial.run.root.glob("artifacts/*/manifest.json"):
        modified = path.stat().st_mtime
        changed += manifest_times.setdefault(path.parent.name, modified) != modified
    return changed


def kill_island(bench: Bench, template: Path, reference: Trial, config: TrialConfig, times: int) -> list[Claim]:
    """Kill every process of one island in mid-training; the island stays down until the run ends."""
    finished, identical, repeated = 0, 0, []
    started = time.monotonic()
    for number in range(times):
        trial = bench.prepare_trial(f"island_{number}", config, template)
        controller = trial.start_controller()
        _wait_until(lambda trial=trial: _has_progress_on(trial, "island_1", config.checkpoint_every), 120)
        bench.islands.kill("island_1")
        finished += controller.wait(timeout=600) == 0 and trial.is_finished()
        identical += trial.model_checksums() == reference.model_checksums()
        for stage in trial.experts:
            repeated += repeated_steps(trial.run.attempts(stage))
        bench.islands.start("island_1")
        print(f"  {number + 1} of {times}: repeated steps {repeated}", flush=True)
    return [
        Claim(
            name=f"complete island killed in mid-training, {times} times",
            bar="the run finishes on the other island; lost work ≤ one checkpoint interval",
            value=f"{finished} of {times} finish, {identical} byte-identical; at most {max(repeated)} repeated steps "
            f"= {max(repeated) / config.checkpoint_every:.2f} intervals",
            spread=f"{time.monotonic() - started:.0f} s; lease {POLICY.lease_s:g} s; n = {len(repeated)}",
            holds=finished == identical == times and max(repeated) <= config.checkpoint_every,
        )
    ]


def _has_progress_on(trial: Trial, island: str, steps: int) -> bool:
    """Return whether an expert on the island has trained for more than `steps` steps."""
    for stage in trial.experts:
        attempts = trial.run.attempts(stage)
        job = attempts[-1] / "job.json" if attempts else None
        if job and job.is_file() and read_json(job)["island"] == island and last_step(attempts[-1]) > steps:
            return True
    return False


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition must hold within {timeout_s:g} s; read controller.log of the trial")
        time.sleep(0.1)


def send_notices(bench: Bench, template: Path, reference: Trial, config: TrialConfig, count: int) -> list[Claim]:
    """Send SIGTERM to trainings at random instants: a spot notice of 30 s."""
    rng, sent, preempted, lost, finished, identical, runs = random.Random(bench.seed + 2), 0, 0, [], 0, 0, 0
    failures = 0
    while sent < count:
        trial = bench.prepare_trial(f"notice_{runs}", config, template)
        killer = Killer(
            trial,
            lambda: rng.uniform(0.0, MAX_DELAY_S),
            max_kills=count - sent,
            signal=SIGTERM,
            may_kill=lambda stage, trial=trial: 0 < trial.progress(stage) < config.steps - config.checkpoint_every,
        )
        killer.follow(trial.start_controller())
        runs, sent = runs + 1, sent + killer.num_killed
        finished += trial.is_finished()
        identical += trial.model_checksums() == reference.model_checksums()
        for stage in trial.experts:
            attempts = trial.run.attempts(stage)
            preempted += sum(read_json(attempt / "outcome.json")["state"] == "preempted" for attempt in attempts)
            lost += [
                _steps_lost_to_notice(before, after) for before, after in zip(attempts, attempts[1:], strict=False)
            ]
        failures += len(trial.events("failed", "lost"))
        print(f"  run {runs}: {sent} notices, {preempted} preempted, lost steps {max(lost or [0])}", flush=True)
    return [
        Claim(
            name=f"SIGTERM with 30 s notice, {sent} times",
            bar="zero steps lost",
            value=f"{max(lost or [0])} steps lost at most; {preempted} of {sent} preempted; "
            f"{identical} of {runs} byte-identical",
            spread=f"{finished} of {runs} runs finish; {failures} retries used",
            holds=not any(lost) and finished == identical == runs and preempted == sent,
        )
    ]


def _steps_lost_to_notice(before: Path, after: Path) -> int:
    """Return the steps between the end of one attempt, by its error message, and the start of the next."""
    error = read_json(before / "outcome.json")["error"]
    stopped = int(error.split("stopped at step ")[1].split()[0]) if "stopped at step" in error else last_step(before)
    return max(0, stopped - read_resume_step(after)) if (after / "log.txt").is_file() else 0


def disconnect_island(folder: Path, config: TrialConfig, down_s: float) -> tuple[list[Claim], Listing]:
    """Run two islands on networks without a route to each other, and disconnect one for `down_s` seconds."""
    started = time.monotonic()
    with separate_networks(folder / "networks", 2) as (hosts, configs):
        policy = replace(POLICY, lease_s=180.0)
        trial = Trial(make_run_config(folder / "separate", config, configs, policy))
        trial.prepare()
        packets_before = count_forwarded_packets()
        controller = trial.start_controller()
        _wait_until(lambda: min(trial.progress(stage.name) for stage in trial.experts) > 0, 240)
        link_bytes = _measure_link_bytes(hosts, 20.0)
        steps_before, disconnected = _steps_on(trial, "island_1"), time.monotonic()
        hosts[0].disconnect()
        _wait_until(lambda: bool(trial.events("unreachable")), down_s)
        noticed_s = time.monotonic() - disconnected
        is_shown = "unreachable" in _status(trial)
        time.sleep(max(0.0, down_s - noticed_s))
        hosts[0].reconnect()
        reconnected = time.monotonic()
        _wait_until(lambda: bool(trial.events("recovered")), 60)
        recovered_s = time.monotonic() - reconnected
        time.sleep(3.0)
        new_steps = _steps_on(trial, "island_1") - steps_before
        exit_code = controller.wait(timeout=900)
        packets = count_forwarded_packets() - packets_before
        is_connected = any([host.can_reach(other, S3_PORT) for host, other in (hosts, hosts[::-1])])
    attempts = sum(len(trial.run.attempts(stage)) for stage in trial.experts)
    link_claim = Claim(
        name=f"link between controller and an island down for {down_s:.0f} s",
        bar="training continues; no resubmission; status shows unreachable, then recovers",
        value=f"{new_steps:,} steps during that time; {attempts} attempts for {len(trial.experts)} experts; status "
        f"showed {'unreachable' if is_shown else 'NO FAULT'}; recovered {recovered_s:.1f} s after the link",
        spread=f"noticed after {noticed_s:.1f} s; the run {'finished' if exit_code == 0 else 'FAILED'}",
        holds=exit_code == 0 and attempts == len(trial.experts) and new_steps > 0 and is_shown,
    )
    traffic_claim = Claim(
        name="bytes between islands during a complete run",
        bar="0",
        value=f"{packets} packets forwarded; island to island: {'connected' if is_connected else 'no route'}",
        spread=f"{time.monotonic() - started:.0f} s; the links to the controller carried "
        f"{sum(link_bytes) / 20e3:.1f} kB/s while both trained (checkpoints and heartbeats)",
        holds=packets == 0 and not is_connected,
    )
    rows = [(host.namespace, f"{transferred:,}") for host, transferred in zip(hosts, link_bytes, strict=True)]
    listing = Listing(title="Bytes on the links in 20 s of training", columns=("island", "bytes"), rows=rows)
    return [link_claim, traffic_claim], listing


def _measure_link_bytes(hosts: Sequence[Host], seconds: float) -> list[int]:
    before = [host.transferred_bytes() for host in hosts]
    time.sleep(seconds)
    return [host.transferred_bytes() - earlier for host, earlier in zip(hosts, before, strict=True)]


def _steps_on(trial: Trial, island: str) -> int:
    """Return the last step that the expert on an island has reported."""
    for stage in trial.experts:
        if read_json(trial.run.attempts(stage)[-1] / "job.json")["island"] == island:
            return trial.progress(stage.name)
    raise RuntimeError(f"an expert must be on {island}; got none; read controller.log of the trial")


def _status(trial: Trial) -> str:
    """Return the output of `ddm status`."""
    command = [sys.executable, "-m", "orchestrator", "status", str(trial.run.root)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"}
    ).stdout


def main() -> None:
    """Test the selected claims, write docs/benchmarks/reliability.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="claims to test (default: all)")
    parser.add_argument("--kills", type=int, default=104, help="number of killed experts")
    parser.add_argument("--controllers", type=int, default=52, help="number of killed controllers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", dest="folder", type=Path, help="folder for the runs (default: a temporary folder)")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddm-chaos-") as temporary:
        folder = options.folder or Path(temporary)
        claims, listings, restarts_s = measure(folder, options)
    figures = {"restart_s": median(restarts_s)} if restarts_s else {}
    write_result("reliability", time.monotonic() - started, claims, listings, NOTES, figures)
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value} ({claim.spread})")


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[Claim], list[Listing], list[float]]:
    """Test the selected claims on one pair of islands; return claims, tables and restart durations (s)."""
    short = TrialConfig(steps=4000, checkpoint_every=400)
    long = TrialConfig(steps=60_000, checkpoint_every=2000, num_experts=2)
    selected: Sequence[str] = options.only or ("experts", "controllers", "island", "notice", "network")
    claims: list[Claim] = []
    listings: list[Listing] = []
    with LocalIslands(folder / "islands", count=2, cpus=1) as islands:
        bench = Bench(folder=folder, islands=islands, seed=options.seed)
        reference = run_undisturbed(bench, "undisturbed", short)
        template = strip_to_template(reference, folder / "template")
        tests: dict[str, Callable[[], list[Claim]]] = {
            "experts": lambda: kill_experts(bench, template, reference, short, options.kills),
            "notice": lambda: send_notices(bench, template, reference, short, 30),
            "island": lambda: kill_island(bench, template, reference, short, 3),
            "controllers": lambda: kill_controllers(bench, template, long, options.controllers),
        }
        for name, test in tests.items():
            if name in selected:
                print(name, flush=True)
                claims += test()
    if "network" in selected:
        network_claims, listing = disconnect_island(folder, long, 60.0)
        claims, listings = claims + network_claims, [*listings, listing]
    return claims, listings, bench.restarts_s


NOTES = (
    "Both islands, their storage and the controller run on one machine with two cores. Each island is a separate Ray "
    "cluster with one CPU, separate ports and a separate token.",
)


if __name__ == "__main__":
    main()
