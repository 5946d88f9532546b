"""`ddm run -m` as a person uses it: real runs on digits, killed and started again."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.orchestrator.sweeps.test_pool import wait_until

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


def start(*words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", "-m", *TINY, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
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
def test_optuna_on_one_ray_cluster_killed_in_a_training_goes_on_in_it(tmp_path):
    folder = tmp_path / "sweep"
    words = (
        f"folder={folder}",
        "hydra/sweeper=ddm_optuna",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=1",
        "expert.training.lr=tag(log,interval(1e-4,1e-2))",
        "compute.cpus=1",
        "expert.training.steps=400",
        "expert.training.checkpoint_every=50",
    )
    running = start(*words, DDM_MARK=str(tmp_path))
    first = await_new(folder, "*/report.html")
    second = await_new(folder, "**/expert_0-*/state/checkpoints/step-*", without=first)
    worker = json.loads(next(second.glob("work/expert_0-*/attempt_1/worker.json")).read_text())["pid"]
    os.kill(worker, signal.SIGSTOP)  # or it would be done before Ray has noticed that its controller is gone
    added = environment_of(json.loads((second / "controller.json").read_text())["pid"])
    running.kill()
    running.communicate()
    wait_until(lambda: not left_with(str(tmp_path)), "the end of the trials")
    before = (first / "journal.jsonl").read_bytes()

    said = sweep(*words)
    assert "finished in" in said and "2 finished trial(s)" in said
    assert (first / "journal.jsonl").read_bytes() == before
    assert attempts(second) == [1, 2]
    assert len(finished(second)) == len(set(finished(second))) == len(finished(first))
    assert "continuing from step" in next(second.glob("work/expert_0-*/attempt_2/log.txt")).read_text()
    found = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert [entry["number"] for entry in found["trials"]] == [0, 1]
    assert {entry["label"] for entry in found["trials"]} == {first.name, second.name}
    assert sorted(path.name for path in folder.iterdir()) == sorted(["sweep", first.name, second.name])

    only_ours = added.keys() - os.environ.keys() - {"DDM_MARK"}
    assert only_ours == {"DDM_RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    token = added["RAY_AUTH_TOKEN"].encode()
    assert not [path for path in folder.rglob("*") if path.is_file() and token in path.read_bytes()]


@pytest.mark.slow
def test_a_grid_killed_at_its_second_trial_goes_on_there(tmp_path):
    words = ("compute=inline", f"folder={tmp_path}", "expert.training.steps=30")
    running = start(*words, "seed=1,2")
    first = await_new(tmp_path, "*/report.html")
    second = await_new(tmp_path, "*/artifacts/dataset-*/manifest.json", without=first)
    running.kill()
    running.communicate()
    assert {first.name, second.name} == {"seed=1", "seed=2"}
    before = (first / "journal.jsonl").read_bytes()

    assert "nothing to do" in sweep(*words, "seed=1,2")
    assert (first / "journal.jsonl").read_bytes() == before
    assert len(finished(second)) == len(set(finished(second))) == len(finished(first))

    said = sweep(*words, "seed=1,2,3", "partition.num_experts=1", "hydra/launcher=ddm_ray", "hydra.launcher.parallel=2")
    assert said.count("finished before") == 2 and len(re.findall(r"seed=3 finished in", said)) == 1
    assert (first / "journal.jsonl").read_bytes() == before


def await_new(folder: Path, pattern: str, without: Path | None = None) -> Path:
    """The run folder in which a path like that has come to be."""

    def found() -> list[Path]:
        paths = (path.relative_to(folder).parts[0] for path in folder.glob(pattern))
        return [folder / name for name in paths if without is None or name != without.name]

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
