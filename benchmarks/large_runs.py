"""CPU time of `ddm status` and `ddm report` on run folders with many experts and long metrics files.

The folders are synthetic: every stage before the ensemble has an attempt with all its files, and an artifact unless it
still runs, as the router and one expert in ten do. Each command is measured as a subprocess, with its start and all
imports.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import Claim, median_and_range
from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import publish, write_json
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.run.backend import Job
from orchestrator.run.lease import this_process
from orchestrator.run.run_folder import RunFolder

RUNS = {"300 experts, 10^4 rows each": (300, 10_000), "64 experts, 10^7 rows in total": (64, 156_250)}
REPEATS = 5
STATUS_CPU_S, REPORT_CPU_S, REPORT_BYTES = 0.5, 10.0, 10e6
IMAGES_PER_CLUSTER = 24
DURATION_S = 12 * 3600


def large_run_claims() -> list[Claim]:
    """Build both folders, measure both commands on each, and return one claim per figure."""
    claims = []
    for name, (experts, rows) in RUNS.items():
        with tempfile.TemporaryDirectory(prefix="ddm-large-") as folder:
            run = build_run(Path(folder) / "run", experts, rows)
            claims += [
                _cpu_claim(f"ddm status, {name}", "status", run, STATUS_CPU_S),
                _cpu_claim(f"ddm report, {name}", "report", run, REPORT_CPU_S),
            ]
            size = run.report.stat().st_size
            claims.append(
                Claim(
                    name=f"report.html, {name}",
                    bar=f"≤ {REPORT_BYTES / 1e6:.0f} MB",
                    value=f"{size / 1e6:.2f} MB",
                    spread="",
                    holds=size <= REPORT_BYTES,
                )
            )
    return claims


def build_run(folder: Path, experts: int, rows: int) -> RunFolder:
    """Write a run folder of so many experts with so many metrics rows each; one in ten still runs."""
    config = parse_config(
        compose([
            "experiment=demo", f"folder={folder}", f"partition.num_experts={experts}",
            f"expert.training.batch_size={experts}", f"expert.training.steps={10 * rows}",
        ])
    )  # fmt: skip
    run = RunFolder(folder)
    run.root.mkdir(parents=True)
    run.save_config(config)
    events, ended = [], time.time()
    for number, stage in enumerate(build_graph(config)):
        if stage.kind in ("ensemble", "score"):
            continue
        is_running = stage.kind == "router" or (stage.kind == "expert" and number % 10 == 0)
        started = ended - DURATION_S + 30 * number
        attempt = _write_attempt(run, stage, started, rows)
        facts = {"stage": stage.name, "fingerprint": stage.fingerprint, "attempt": 1}
        events.append({"time": started - 5, "event": "submitted", "island": "", **facts})
        if not is_running:
            _publish(run, stage, attempt, experts)
            outcome = {"stage": stage.name, "attempt": 1, "state": "finished", "started": started, "ended": ended}
            write_json(attempt / "outcome.json", outcome)
            events.append({"time": ended, "event": "finished", "started": started, "error": "", **facts})
    run.journal.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return run


def _write_attempt(run: RunFolder, stage: Stage, started: float, rows: int) -> Path:
    """Write the files of a stage's attempt, by this process, and return its folder."""
    attempt = run.attempt(stage, 1)
    attempt.mkdir(parents=True)
    job = Job(
        stage=stage.name,
        kind=stage.kind,
        config={},
        inputs={},
        input_fingerprints=stage.input_fingerprints,
        artifact=str(run.artifact(stage)),
        scratch=str(run.scratch(stage)),
        attempt=1,
        stop_files=(),
        resources=stage.resources,
    )
    write_json(attempt / "job.json", job)
    write_json(attempt / "worker.json", this_process() | {"time": started})
    (attempt / "log.txt").write_text("INFO experts.training.latent_dataset: encoding 663 samples\n", encoding="utf-8")
    if stage.kind in ("expert", "router", "monolith"):
        progress = {"done": 10 * rows, "total": 20 * rows, "unit": "steps", "left_s": 60.0, "pace": 10.0}
        write_json(attempt / "progress.json", progress | {"time": time.time(), "figures": {"loss": 1.0}})
        (attempt / "metrics.jsonl").write_text(_metrics(stage, rows), encoding="utf-8")
    return attempt


def _metrics(stage: Stage, rows: int) -> str:
    """Return rows of a loss that falls, by powers of the step that differ from stage to stage."""
    random = np.random.default_rng(int(stage.fingerprint[:8], 16))
    steps = np.arange(10, 10 * rows + 1, 10)
    losses = random.uniform(0.8, 1.2) * steps ** -random.uniform(0.05, 0.12) + random.normal(0, 0.01, rows)
    row = '{{"grad_norm": 0.9960082244873046, "loss": {:.16f}, "lr": 0.00025, "step": {}}}\n'.format
    return "".join(map(row, losses.tolist(), steps.tolist()))


def _publish(run: RunFolder, stage: Stage, attempt: Path, experts: int) -> None:
    def fill(out: Path) -> float:
        if (attempt / "metrics.jsonl").exists():
            os.link(attempt / "metrics.jsonl", out / "metrics.jsonl")
            write_json(out / "training.json", {"epochs": 12.5})
        if stage.kind == "partition":
            _write_clusters(out, experts)
        write_json(out / "content.json", {"stage": stage.name})
        return 1e15

    publish(run.artifact(stage), fill, stage=stage.name, config=stage.config, inputs=stage.input_fingerprints)


def _write_clusters(out: Path, experts: int) -> None:
    random = np.random.default_rng(0)
    for k in range(experts):
        with ShardWriter(out / "clusters" / str(k)) as writer:
            for number in range(IMAGES_PER_CLUSTER + k % 7):
                image = random.integers(0, 256, (16, 16, 1), dtype=np.uint8)
                writer.add(Sample(key=f"{k}-{number}", image=image, label=k % 10))
            writer.close()
    write_json(out / "balance.json", {"shares": [1 / experts] * experts})


def _cpu_claim(name: str, command: str, run: RunFolder, bar_s: float) -> Claim:
    """Measure the CPU time of a command; the claim holds if the smallest of several repeats meets the bar.

    Other processes on the machine make every repeat longer and none shorter.
    """
    seconds = [_cpu_seconds(command, run) for _ in range(REPEATS)]
    value, spread = median_and_range(seconds, 2)
    return Claim(
        name=name,
        bar=f"≤ {bar_s:g} s of CPU time",
        value=f"{min(seconds):.2f} s at best, median {value} s",
        spread=spread,
        holds=min(seconds) <= bar_s,
    )


def _cpu_seconds(command: str, run: RunFolder) -> float:
    def used() -> float:
        usage: Any = resource.getrusage(resource.RUSAGE_CHILDREN)
        return float(usage.ru_utime + usage.ru_stime)

    before = used()
    script = "from orchestrator.cli.app import main; main()"
    subprocess.run([sys.executable, "-c", script, command, str(run.root)], check=True, stdout=subprocess.DEVNULL)
    return used() - before


def main() -> None:
    """Print every claim."""
    for claim in large_run_claims():
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value} ({claim.spread}); {claim.bar}")


if __name__ == "__main__":
    main()
