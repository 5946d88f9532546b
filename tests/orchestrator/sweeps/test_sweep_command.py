"""`ddm run -m` as a person uses it: real runs on digits, killed and started again."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.controller import LOOPBACK_ONLY
from tests.orchestrator.sweeps.test_trial_pool import wait_until

TINY = (
    "experiment=digits",
    "data.limit=400",
    "monolith=false",
    "partition.num_experts=1",
    "scores.num_samples=64",
    "scores.spaces=[pixels]",
    "scores.selections=[]",
    "ensemble.steps=2",
    "wandb.mode=disabled",
)

SHIELD = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", LOOPBACK_ONLY)
OURS = {name: value for name, value in os.environ.items() if name not in SHIELD}
"""The environment without what the tests have set for Ray, so that a sweep has to set it."""


def start(*words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", "-m", *TINY, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=OURS | environment,
    )


def sweep(*words: str, code: int = 0) -> str:
    running = start(*words)
    said, _ = running.communicate(timeout=280)
    assert running.returncode == code, said
    assert "Traceback" not in said, said
    return said


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


def finished(run: Path) -> list[str]:
    return [event["stage"] for event in events(run) if event["event"] == "finished"]


def attempts(run: Path) -> list[int]:
    return [
        event["attempt"] for event in events(run) if (event["event"], event.get("stage")) == ("submitted", "expert_0")
    ]


def environment_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["partition.num_expert=1,2"], "did you mean partition.num_experts"),
        (["experiment=digits,nope", "hydra/launcher=ddm_ray"], "known: demo, digits"),
        (["seed=1,2", "hydra/launcher=ddm_rays"], "basic ddm_ray"),
        (["seed=1,2", "hydra/launcher=ddm_ray", "hydra.launcher.parallel=0"], "hydra.launcher.parallel"),
        (["hydra/sweeper=ddm_optuna"], "nothing to choose"),
        (["seed=1,2", "hydra/sweeper=ddm_optuna", "hydra/launcher=basic"], "ddm_ray"),
        (["seed=1,2", "hydra/sweeper=ddm_optuna", "hydra.sweeper.metric=full.pixels.fd"], "sticky.pixels.fd"),
        (["seed=1,2", "hydra/sweeper=ddm_optuna", "hydra.sweeper.direction=up"], "hydra.sweeper.direction"),
        (["expert.training.lr=interval(1,0)", "hydra/sweeper=ddm_optuna"], "expert.training.lr"),
    ],
)
def test_a_mistake_is_one_clear_error_and_runs_nothing(tmp_path, words, message):
    assert message in sweep(f"folder={tmp_path}", *words, code=1)
    assert not list(tmp_path.glob("*/journal.jsonl"))


def test_a_launcher_without_a_sweep_is_refused():
    command = [sys.executable, "-m", "orchestrator", "run", "hydra/launcher=ddm_ray"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "add -m" in done.stdout


@pytest.mark.slow
def test_a_grid_on_one_ray_cluster_killed_in_a_training_goes_on_in_it(swept):
    first = swept.killed
    assert attempts(first) == [1, 2]
    assert "continuing from step" in next(first.glob("work/expert_0-*/attempt_2/log.txt")).read_text()
    for run in (first, swept.other):
        assert len(finished(run)) == len(set(finished(run)))
        assert len(list(run.glob("artifacts/*/manifest.json"))) == 8


@pytest.mark.slow
def test_trials_join_one_ray_cluster_and_are_told_so_by_their_environment_alone(swept):
    added, others = swept.added
    assert added == others and added.keys() == {"DDM_RAY_ADDRESS", *SHIELD}
    token = added["RAY_AUTH_TOKEN"].encode()
    assert not [path for path in swept.folder.rglob("*") if path.is_file() and token in path.read_bytes()]


@pytest.mark.slow
def test_once_more_nothing_runs_with_either_sweeper(swept):
    before = {path: path.read_bytes() for path in swept.folder.glob("*/journal.jsonl")}
    assert sweep(*swept.words, "seed=1,2", "compute=inline").count("nothing to do") == 2
    said = sweep(*swept.words, "seed=1,2", "hydra/launcher=ddm_ray")
    assert said.count("finished before") == 2 and "▶" not in said

    optuna = ("seed=1,2", "hydra/sweeper=ddm_optuna", "hydra.sweeper.startup=2", "hydra.sweeper.n_jobs=2")
    for n_trials in (3, 5):
        assert "▶" not in sweep(*swept.words, *optuna, f"hydra.sweeper.n_trials={n_trials}")
        found = json.loads((swept.folder / "sweep" / "sweep.json").read_text())
        assert [entry["number"] for entry in found["trials"]] == list(range(n_trials))
    best = min(found["trials"], key=lambda entry: entry["score"])
    assert found["best"]["score"] == best["score"] and best["label"] == f"seed={best['values']['seed']}"
    assert {path: path.read_bytes() for path in swept.folder.glob("*/journal.jsonl")} == before


@dataclass
class Swept:
    folder: Path
    words: tuple[str, ...]
    killed: Path
    """The run whose training was killed."""
    other: Path
    added: list[dict[str, str]]
    """What the sweep has put into the environments of the two controllers that were at work at once."""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two trials at once on a Ray cluster, killed; then gone on with by Hydra's own launcher."""
    folder = tmp_path_factory.mktemp("sweep")
    words = (f"folder={folder}", "expert.training.steps=300", "expert.training.checkpoint_every=50")
    mark = str(folder)
    at_once = ("hydra/launcher=ddm_ray", "hydra.launcher.parallel=2", "compute.cpus=2")
    running = start(*words, "seed=1,2", *at_once, DDM_MARK=mark)
    killed = await_new(folder, "**/expert_0-*/state/checkpoints/step-*")
    worker = json.loads(next(killed.glob("work/expert_0-*/attempt_1/worker.json")).read_text())["pid"]
    os.kill(worker, signal.SIGSTOP)  # or it would be done before Ray has noticed that its controller is gone
    leases = [json.loads(lease.read_text()) for lease in folder.glob("seed=*/controller.json")]
    environments = [environment_of(lease["pid"]) for lease in leases]
    added = [dict(environment.items() - OURS.items() - {("DDM_MARK", mark)}) for environment in environments]
    running.kill()
    running.communicate()
    wait_until(lambda: not left_with(mark), "the end of the trials")

    sweep(*words, "seed=1,2", "compute=inline")
    other = next(run for run in (folder / "seed=1", folder / "seed=2") if run != killed)
    return Swept(folder, words, killed, other, added)


def await_new(folder: Path, pattern: str) -> Path:
    """The run folder in which a path like that has come to be."""

    def found() -> list[Path]:
        return [folder / path.relative_to(folder).parts[0] for path in folder.glob(pattern)]

    wait_until(found, pattern, limit_s=200)
    return found()[0]


def left_with(mark: str) -> list[Path]:
    """Controllers of trials that carry the mark in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (
                mark.encode() in (entry / "environ").read_bytes()
                and b"sweeps.child" in (entry / "cmdline").read_bytes()
            ):
                found.append(entry)
        except OSError:
            continue
    return found
