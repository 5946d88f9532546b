"""Several workers on one training, through Ray Train: the same network as one worker, also after kills."""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import distributed

from ddm_core.artifacts import Workspace, list_files, read_json
from experts.config import ExpertConfig
from experts.expert import train_expert
from experts.training.parallel.distributed import GroupError
from orchestrator.backends.inline import InlineBackend
from orchestrator.config.compute import ComputeConfig, ResourcesConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.errors import ConfigError
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder
from orchestrator.run.worker import execute

TRAINING = {"steps": 600, "batch_size": 32, "log_every": 20, "checkpoint_every": 20}
EXPERT = {"expert": {"network": {"kind": "residual_mlp", "width": 64}, "training": TRAINING}, "cluster_id": 0}


def job(folder: Path, stage: str, workers: int = 2, attempt: int = 1, kind: str = "expert", **changes) -> Job:
    """Return the job of a training on digits; other stage names give the same work."""
    training = Job(
        stage=stage,
        kind=kind,
        config=EXPERT,
        inputs={"latents": str(folder / "dataset" / "train"), "codec": str(folder / "codec")},
        input_fingerprints={},
        artifact=str(folder / stage),
        scratch=str(folder / f"{stage}_work" / "state"),
        attempt=attempt,
        stop_files=(),
        resources=ResourcesConfig(workers=workers),
    )
    attempt_folder(training).mkdir(parents=True)
    return replace(training, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with shards of digits, a codec, and an expert trained by one worker."""
    root = tmp_path_factory.mktemp("group")
    digits = {"source": "digits", "image_size": 8, "limit": 300}
    assert execute(job(root, "dataset", kind="dataset", config=digits, inputs={})).state == "finished"
    shards = {"shards": str(root / "dataset" / "train")}
    assert execute(job(root, "codec", kind="codec", config={"kind": "pixels"}, inputs=shards)).state == "finished"
    assert execute(job(root, "alone", workers=1)).state == "finished"
    return root


@pytest.fixture(scope="module")
def backend():
    """Yield a backend on a loopback Ray cluster with room for two workers."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from orchestrator.backends.ray_tasks import RayBackend

    with contextlib.closing(RayBackend(ComputeConfig(cpus=2))) as ray_backend:
        yield ray_backend


def wait(backend, until=lambda: False) -> AttemptOutcome | None:
    """Return the outcome of the only job, or None as soon as `until` is true."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if ended := backend.poll(0.005):
            return ended[0]
        if until():
            return None
    raise AssertionError("nothing ended within four minutes")


def has_saved(training: Job, step: int) -> bool:
    checkpoints = Path(training.scratch).glob("checkpoints/step-*")
    return any(int(path.name.removeprefix("step-")) >= step for path in checkpoints)


def pid_of(training: Job, rank: int) -> int:
    return int(read_json(attempt_folder(training) / (f"worker_{rank}" if rank else "") / "worker.json")["pid"])


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, its IPv6 form, and ::1, as the kernel writes them."""


def listeners_of(pid: int) -> set[str]:
    """Return the local addresses of a process's listening TCP sockets."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            sockets.add(os.readlink(entry))
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in list_files(folder)}


def train_without_ray(rank: int, folder: Path) -> None:
    """Train as one of two workers, without Ray and without interruption."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(str(folder / "rendezvous"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    workspace = replace(Workspace.at(folder / "undisturbed_work"), attempt=folder / f"rank_{rank}")
    workspace.attempt.mkdir()
    out = folder / ("undisturbed" if rank == 0 else "output_1")
    out.mkdir()
    config = TypeAdapter(ExpertConfig).validate_python(EXPERT["expert"])
    train_expert(config, [folder / "dataset" / "train"], folder / "codec", out, workspace)
    os._exit(0)


@pytest.fixture(scope="module")
def undisturbed(folder):
    """Return the expert of two workers that trained without interruption."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=train_without_ray, args=(rank, folder)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    return folder / "undisturbed"


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_killed_and_stopped_workers_train_identically(backend, folder, undisturbed):
    check_nearly_equal(undisturbed, folder / "alone")
    draws = random.Random()

    killed = job(folder, "expert")
    backend.submit(killed)
    moment = draws.randrange(20, 200)
    assert wait(backend, lambda: has_saved(killed, moment)) is None
    for rank in range(2):
        assert listeners_of(pid_of(killed, rank)) <= LOOPBACK
    os.kill(pid_of(killed, draws.randrange(2)), signal.SIGKILL)
    outcome = wait(backend)
    assert (outcome.state, outcome.transient) == ("lost", True) and "vanished" in outcome.error

    stopped = job(folder, "expert", attempt=2)
    backend.submit(stopped)
    assert wait(backend, lambda: has_saved(stopped, 300)) is None
    os.kill(pid_of(stopped, 1), signal.SIGTERM)
    outcome = wait(backend)
    assert outcome.state == "preempted" and "stopped at step" in outcome.error
    assert has_saved(stopped, int(outcome.error.split()[3]))

    backend.submit(job(folder, "expert", attempt=3))
    assert wait(backend).state == "finished"
    assert content(folder / "expert") == content(undisturbed)
    assert not Path(stopped.scratch).exists() and not (attempt_folder(stopped) / "group").exists()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_group_killed_at_start_releases_resources(backend, folder):
    import ray

    early = job(folder, "early")
    backend.submit(early)
    assert wait(backend, lambda: not ray.available_resources().get("CPU")) is None
    backend.kill("early")
    outcome = wait(backend)
    assert (outcome.state, outcome.transient) == ("lost", True) and "signal 9" in outcome.error
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, "its CPUs are still in use"
        time.sleep(0.05)


def check_nearly_equal(actual: Path, expected: Path) -> None:
    """Check equality up to rounding: no element differs by more than 2e-5 of its tensor's largest."""
    left, right = (load_file(next(folder.glob("*.safetensors"))) for folder in (actual, expected))
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=0, atol=2e-5 * float(value.abs().max()))


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_group_outcome_is_of_worker_that_failed(tmp_path):
    from ray.exceptions import RayActorError, RayTaskError
    from ray.train import ControllerError, WorkerGroupError

    from orchestrator.backends.ray_train import StageEnded, _outcome

    training = job(tmp_path, "expert")
    failed = AttemptOutcome(stage="expert", attempt=1, state="failed", error="DataError: broken")
    broken = AttemptOutcome(stage="expert", attempt=1, state="lost", error="another worker is gone", transient=True)

    def outcome_of(error: Exception) -> tuple[str, bool, str]:
        def run():
            raise error

        outcome = _outcome(training, run)
        return outcome.state, outcome.transient, outcome.error

    both = {0: StageEnded(broken), 1: StageEnded(failed)}
    assert outcome_of(WorkerGroupError("", both)) == ("failed", False, "DataError: broken")
    dead = {0: StageEnded(broken), 1: RayActorError()}
    assert outcome_of(WorkerGroupError("", dead)) == ("lost", True, "worker(s) 1 vanished")
    assert outcome_of(WorkerGroupError("", {0: StageEnded(broken)})) == (
        "lost",
        True,
        "worker(s) of the group vanished",
    )
    blind = RayTaskError(
        "_init_process_group", "its traceback", GroupError("worker 1 cannot see /runs/a")
    ).as_instanceof_cause()
    assert outcome_of(ControllerError(blind)) == ("failed", False, "GroupError: worker 1 cannot see /runs/a")
    state, transient, error = outcome_of(ControllerError(ConnectionError("no route")))
    assert (state, transient) == ("lost", True) and "no route" in error


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_worker_without_shared_folder_names_it(tmp_path):
    from orchestrator.backends.ray_train import _init_process_group

    with pytest.raises(GroupError, match=rf"shared disk; worker 1 on .* cannot see {tmp_path}/elsewhere: .*shared"):
        _init_process_group(tmp_path / "elsewhere", "gloo", 1, 2)


def test_inline_with_two_workers_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"stage .* needs 2; .*=ray.*compute\.stages\.expert\.workers=1"):
        InlineBackend().submit(job(tmp_path, "expert"))


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (
            ["compute=inline", "compute.stages.expert.workers=2"],
            "backend=ray or backend=islands; got stages.expert with backend=inline",
        ),
        (["compute.stages.ensemble.workers=2"], "several workers need one of latents, expert"),
        (["compute.stages.features.workers=2"], "several workers of features need data.engine=ray"),
        (["compute=inline", "data.engine=ray"], "set compute.backend=ray, .*got backend=inline"),
        (['compute.stages.expert.labels=["zone=west"]'], "labels select nodes .* backend=ray"),
        (["compute.stages.router.workers=7"], "7 workers of router"),
        (["compute.stages.expert.workers=7"], "7 workers of expert"),
    ],
)
def test_config_with_impossible_resources_is_an_error(overrides, rule):
    with pytest.raises(ConfigError, match=rule):
        parse_config(compose([*overrides]))
