"""`ddm run -m` as a user runs it: real runs on digits, killed and started again."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.controller import LOOPBACK_ONLY
from orchestrator.run.lease import read_holder
from orchestrator.run.run_folder import RunFolder
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

RAY_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", LOOPBACK_ONLY)
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in RAY_VARIABLES}
"""The environment without the tests' Ray variables, so that a sweep has to set them."""


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", "-m", *TINY, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT | environment,
    )


def sweep(*arguments: str, code: int = 0) -> str:
    running = start(*arguments)
    output, _ = running.communicate(timeout=280)
    assert running.returncode == code, output
    assert "Traceback" not in output, output
    return output


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
    ("arguments", "message"),
    [
        (["partition.num_expert=1,2"], "did you mean partition.num_experts"),
        (["experiment=digits,nope", "hydra/launcher=ddm_ray"], "one of demo, digits"),
        (["seed=1,2", "hydra/launcher=ddm_rays"], "basic ddm_ray"),
        (["seed=1,2", "hydra/launcher=ddm_ray", "hydra.launcher.parallel=0"], "hydra.launcher.parallel"),
        (["hydra/sweeper=ddm_optuna"], "nothing to choose"),
        (["seed=1,2", "hydra/sweeper=ddm_optuna", "hydra/launcher=basic"], "ddm_ray"),
        (["seed=1,2", "hydra/sweeper=ddm_optuna", "hydra.sweeper.metric=full.pixels.fd"], "sticky.pixels.fd"),
        (["seed=1,2", "hydra/sweeper=ddm_optuna", "hydra.sweeper.direction=up"], "hydra.sweeper.direction"),
        (["expert.training.lr=interval(1,0)", "hydra/sweeper=ddm_optuna"], "expert.training.lr"),
    ],
)
def test_mistake_is_one_error_and_runs_nothing(tmp_path, arguments, message):
    assert message in sweep(f"folder={tmp_path}", *arguments, code=1)
    assert not list(tmp_path.glob("*/journal.jsonl"))


@pytest.mark.parametrize(
    "sweeper",
    [(), ("hydra/launcher=ddm_ray",), ("hydra/sweeper=ddm_optuna", "hydra.sweeper.n_trials=3")],
)
def test_sweep_that_cannot_succeed_starts_nothing(tmp_path, sweeper):
    data = ("data=image_folder", f"data.path={tmp_path / 'nowhere'}")
    output = sweep(f"folder={tmp_path / 'sweep'}", *data, "seed=1,2", *sweeper, code=1)
    assert output.count("nowhere is not a folder") == 1
    assert not list(tmp_path.glob("sweep/seed*"))


@pytest.mark.parametrize("launcher", [(), ("hydra/launcher=ddm_ray",)])
def test_trials_that_cannot_succeed_end_first(tmp_path, launcher):
    """Two of three numbers of experts are too large for the data."""
    running = start(f"folder={tmp_path}", *launcher, "partition.num_experts=1,30,40")
    try:
        wait_until(lambda: list(tmp_path.glob("*=1/journal.jsonl")), "the start of the first trial", limit_s=120)
        assert not list(tmp_path.glob("*0"))
    finally:
        running.kill()
        output, _ = running.communicate()
    assert output.count("an expert needs 20") == 2


def test_launcher_without_a_sweep_is_rejected():
    command = [sys.executable, "-m", "orchestrator", "run", "hydra/launcher=ddm_ray"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1 and "add -m" in process.stderr


@pytest.mark.integration
def test_grid_killed_in_a_training_continues_it(swept):
    first = swept.killed
    assert attempts(first) == [1, 2]
    assert "continuing from step" in next(first.glob("work/expert_0-*/attempt_2/log.txt")).read_text()
    for run in (first, swept.other):
        stages = [path.parent.name.rpartition("-")[0] for path in run.glob("artifacts/*/manifest.json")]
        assert len(finished(run)) == len(set(finished(run))) and set(finished(run)) <= set(stages)
        assert len(stages) == len(set(stages)) > 8  # the kill may fall between an artifact and its line in the journal


@pytest.mark.integration
def test_only_the_environment_has_the_ray_cluster(swept):
    added, other = swept.added
    assert added == other and added.keys() == {"DDM_RAY_ADDRESS", *RAY_VARIABLES}
    token = added["RAY_AUTH_TOKEN"].encode()
    assert not [path for path in swept.folder.rglob("*") if path.is_file() and token in path.read_bytes()]


@pytest.mark.integration
def test_repeated_sweep_runs_nothing_with_either_sweeper(swept):
    before = {path: path.read_bytes() for path in swept.folder.glob("*/journal.jsonl")}
    assert sweep(*swept.arguments, "seed=1,2").count("nothing to do") == 2
    output = sweep(*swept.arguments, "seed=1,2", "hydra/launcher=ddm_ray")
    assert output.count("finished before") == 2 and "▶" not in output

    optuna = ("seed=1,2", "hydra/sweeper=ddm_optuna", "hydra.sweeper.startup=2", "hydra.sweeper.n_jobs=2")
    for n_trials in (3, 5):
        assert "▶" not in sweep(*swept.arguments, *optuna, f"hydra.sweeper.n_trials={n_trials}")
        summary = json.loads((swept.folder / "sweep" / "sweep.json").read_text())
        assert [entry["number"] for entry in summary["trials"]] == list(range(n_trials))
    best = min(summary["trials"], key=lambda entry: entry["score"])
    assert summary["best"]["score"] == best["score"] and best["label"] == f"seed={best['values']['seed']}"
    assert {path: path.read_bytes() for path in swept.folder.glob("*/journal.jsonl")} == before


@dataclass
class Swept:
    folder: Path
    arguments: tuple[str, ...]
    killed: Path
    """The run whose training was killed."""
    other: Path
    added: list[dict[str, str]]
    """Variables that the sweep added to the environments of the two parallel controllers."""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two parallel trials on a Ray cluster that are killed and then continued by Hydra's own launcher."""
    folder = tmp_path_factory.mktemp("sweep")
    arguments = (f"folder={folder}", "expert.training.steps=300", "expert.training.checkpoint_every=50")
    mark = str(folder)
    parallel = ("compute=ray_local", "hydra/launcher=ddm_ray", "hydra.launcher.parallel=2", "compute.cpus=2")
    running = start(*arguments, "seed=1,2", *parallel, DDM_MARK=mark)
    killed = wait_for_run(folder, "**/expert_0-*/state/checkpoints/step-*")
    worker = json.loads(next(killed.glob("work/expert_0-*/attempt_1/worker.json")).read_text())["pid"]
    os.kill(worker, signal.SIGSTOP)  # so that it is unfinished when Ray notices that its controller is gone
    holders = [read_holder(RunFolder(trial)) for trial in folder.glob("seed=*")]
    environments = [environment_of(holder.process["pid"]) for holder in holders if holder is not None]
    added = [dict(environment.items() - ENVIRONMENT.items() - {("DDM_MARK", mark)}) for environment in environments]
    running.kill()
    running.communicate()
    wait_until(lambda: not marked_controllers(mark), "the end of the trials")

    sweep(*arguments, "seed=1,2")
    other = next(run for run in (folder / "seed=1", folder / "seed=2") if run != killed)
    return Swept(folder, arguments, killed, other, added)


def wait_for_run(folder: Path, pattern: str) -> Path:
    """Wait for a path that matches the pattern, and return its run folder."""

    def matching_runs() -> list[Path]:
        return [folder / path.relative_to(folder).parts[0] for path in folder.glob(pattern)]

    wait_until(matching_runs, pattern, limit_s=200)
    return matching_runs()[0]


def marked_controllers(mark: str) -> list[Path]:
    """Return trial controllers with the mark in their environment."""
    controllers = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (
                mark.encode() in (entry / "environ").read_bytes()
                and b"cli.trial_process" in (entry / "cmdline").read_bytes()
            ):
                controllers.append(entry)
        except OSError:
            continue
    return controllers
