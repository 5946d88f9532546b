"""`ddm submit`: run the controller as a job on a Ray cluster, independent of this machine.

The run folder is on a disk that this machine and the Ray cluster mount under the same path. All communication goes
through it, so `ddm status`, `logs`, `stop` and `resume` work as usual. The job first checks that it reads in the folder
the file that was written here.
"""

import socket
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired

from pydantic import ValidationError
from typing_extensions import TypedDict

from ddm_core.artifacts import write_record
from ddm_core.json_values import read_record
from orchestrator.config.compute import IslandConfig, ResourcesConfig
from orchestrator.config.schema import RunConfig
from orchestrator.controller import SUBMITTED_ADDRESS
from orchestrator.errors import ConfigError, OrchestratorError, RunFolderError
from orchestrator.islands.client import IslandClient, JobState
from orchestrator.islands.wheel import build_wheel
from orchestrator.planning.checks.check import check_run
from orchestrator.run.lease import ProcessRecord, hold_lease, this_process
from orchestrator.run.run_folder import RunFolder

SHUTDOWN_S = 30.0
"""Time for a controller to end after the grace period of its stages."""

FOLDER_VISIBLE_S = 3.0
"""Longest delay until a new file is visible on a shared disk."""

JOB_START_S = 120.0
"""Longest time until a job starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A run's controller on a Ray cluster."""

    id: str
    folder: Path
    is_new: bool
    """False if a controller ran there already, so nothing was submitted."""
    previous_failure: str = ""
    """How the previous controller failed; empty if it did not."""


class _SubmissionRecord(TypedDict):
    """Content of `RunFolder.submission`."""

    id: str
    seen: NotRequired[ProcessRecord]
    """The process that has confirmed it."""


def submit_run(config: RunConfig, client: IslandClient) -> Submission:
    """Submit the run's controller to a Ray cluster, unless one of this run is active there.

    Raises `ConfigError` for a run that cannot succeed, and `RunIsLocked` if a controller elsewhere runs the run.
    """
    run = RunFolder(Path(config.folder))
    check_run(config, run)
    client.check_reachable()
    run.root.mkdir(parents=True, exist_ok=True)
    name = f"ddm-{run.run_id()}-c"
    states = {key: state for key, state in client.list_states().items() if key.startswith(name)}
    last = max((int(key.removeprefix(name)) for key in states), default=0)
    if last and not states[f"{name}{last}"].has_ended:
        return Submission(id=f"{name}{last}", folder=run.root, is_new=False)
    with hold_lease(run):
        run.save_config(config)
        write_record(run.submission, {"id": f"{name}{last + 1}"})
    is_new = _send(client, f"{name}{last + 1}", run.root, config.compute.grace_s + SHUTDOWN_S)
    previous_failure = _describe_failure(client, f"{name}{last}", states[f"{name}{last}"]) if last else ""
    return Submission(id=f"{name}{last + 1}", folder=run.root, is_new=is_new, previous_failure=previous_failure)


def resolve_submission(config: RunConfig, address: str, token_file: str) -> tuple[RunConfig, IslandClient]:
    """Return the configuration with an absolute run folder, and a client for the Ray cluster."""
    folder = str(Path(config.folder).expanduser().absolute())
    try:
        island = IslandConfig(address=address, token_file=token_file, storage=folder)
    except ValidationError as error:
        mistakes = "; ".join(f"{mistake['msg']}; got {mistake['input']!r}" for mistake in error.errors())
        raise ConfigError(f"--address: {mistakes}") from None
    return replace(config, folder=folder), IslandClient("for the controller", island)


def wait_until_started(submission: Submission, client: IslandClient, timeout_s: float) -> None:
    """Wait until the job has opened the run folder; raises `OrchestratorError` with its log if it fails."""
    run, deadline = RunFolder(submission.folder), time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state = client.list_states().get(submission.id)
        if "seen" in read_record(_SubmissionRecord, run.submission):
            return
        if state is not None and state.has_ended:
            raise OrchestratorError(_describe_failure(client, submission.id, state))
        time.sleep(0.5)
    raise OrchestratorError(f"{submission.id} has not started within {timeout_s:g} s: that Ray cluster has no CPU free")


def confirm_submission(run: RunFolder, submission_id: str) -> None:
    """Check, as the job's first step, that this is the submitted run folder, and confirm it in `submission.json`.

    Raises `RunFolderError` if the path is missing here or is another folder.
    """
    deadline = time.monotonic() + FOLDER_VISIBLE_S
    while not run.submission.is_file() or read_record(_SubmissionRecord, run.submission)["id"] != submission_id:
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"{run.root} on {socket.gethostname()} is not the folder from which {submission_id} was submitted; "
                "submit again with a folder on a disk that this Ray cluster sees under the same path"
            )
        time.sleep(0.2)
    try:
        write_record(run.submission, {"id": submission_id, "seen": this_process()})
    except OSError as error:
        raise RunFolderError(f"{socket.gethostname()} cannot write to {run.root}: {error}") from error


def _send(client: IslandClient, submission_id: str, folder: Path, grace_s: float) -> bool:
    """Submit the controller's command; return False if another process submitted it at the same time."""
    with tempfile.TemporaryDirectory(prefix="ddm-") as scratch:
        return client.submit(
            submission_id,
            ["python", "-P", "-m", "orchestrator.cli.submitted_controller", str(folder), submission_id],
            wheel=build_wheel(Path(scratch)),
            resources=ResourcesConfig(),
            env={SUBMITTED_ADDRESS: "auto"},
            grace_s=grace_s,
        )


def _describe_failure(client: IslandClient, submission_id: str, state: JobState) -> str:
    """Return how a submission failed, with the last five lines of its log; empty if it succeeded."""
    if state.status == "SUCCEEDED":
        return ""
    log_lines = client.fetch_log(submission_id).strip().splitlines()[-5:]
    return "\n  ".join([f"{submission_id} ended as {state.status}: {state.message}", *log_lines])
