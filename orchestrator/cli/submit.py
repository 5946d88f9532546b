"""`ddm submit`: the controller itself as a job on a Ray cluster, which needs nobody from then on.

The run folder lies on a disk that this machine and that Ray cluster see under the same path, and everything else goes
through it: `ddm status`, `logs`, `stop` and `resume` work as ever. The job's first act is to look whether it finds
there what was written here.
"""

import socket
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from ddm_core.artifacts import read_json, write_json
from orchestrator.config.compute import IslandConfig, ResourcesConfig
from orchestrator.config.schema import RunConfig
from orchestrator.controller import SUBMITTED_TO
from orchestrator.errors import ConfigError, OrchestratorError, RunFolderError
from orchestrator.islands.client import IslandClient, JobState
from orchestrator.islands.wheel import build_wheel
from orchestrator.run.lease import hold_lease, this_process
from orchestrator.run.run_folder import RunFolder

CLOSING_S = 30.0
"""What a controller may take to end, beyond the grace that its stages have to save their work."""

SEEN_S = 3.0
"""A shared disk may show a new file so late."""

SEEN_AFTER_S = 120.0
"""A job may take so long to begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A run's controller on a Ray cluster."""

    id: str
    folder: Path
    is_new: bool
    """False if it was there already, and so nothing was submitted."""
    earlier: str = ""
    """How the controller before it ended, unless that ended well."""


def submit_run(config: RunConfig, client: IslandClient) -> Submission:
    """Send the run's controller to a Ray cluster; one that is there already is left alone.

    Raises `RunIsLocked` if somebody elsewhere walks the run.
    """
    client.check_reachable()
    run = RunFolder(Path(config.folder))
    run.root.mkdir(parents=True, exist_ok=True)
    name = f"ddm-{run.run_id()}-c"
    states = {key: state for key, state in client.states().items() if key.startswith(name)}
    last = max((int(key.removeprefix(name)) for key in states), default=0)
    if last and not states[f"{name}{last}"].has_ended:
        return Submission(id=f"{name}{last}", folder=run.root, is_new=False)
    with hold_lease(run):
        run.save_config(config)
        write_json(run.submission, {"id": f"{name}{last + 1}"})
    is_new = _send(client, f"{name}{last + 1}", run.root, config.compute.grace_s + CLOSING_S)
    earlier = _last_words(client, f"{name}{last}", states[f"{name}{last}"]) if last else ""
    return Submission(id=f"{name}{last + 1}", folder=run.root, is_new=is_new, earlier=earlier)


def reachable_from(config: RunConfig, address: str, token_file: str) -> tuple[RunConfig, IslandClient]:
    """The configuration with a folder that means the same everywhere, and a client for the Ray cluster."""
    folder = str(Path(config.folder).expanduser().absolute())
    try:
        island = IslandConfig(address=address, token_file=token_file, storage=folder)
    except ValidationError as error:
        mistakes = "; ".join(f"{mistake['msg']} (given: {mistake['input']!r})" for mistake in error.errors())
        raise ConfigError(f"--address: {mistakes}") from None
    return replace(config, folder=folder), IslandClient("for the controller", island)


def wait_until_seen(submission: Submission, client: IslandClient, timeout_s: float) -> None:
    """Wait until the job has found the run folder; raises `OrchestratorError` with its log if it has not."""
    run, deadline = RunFolder(submission.folder), time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state = client.states().get(submission.id)
        if "seen" in read_json(run.submission):
            return
        if state is not None and state.has_ended:
            raise OrchestratorError(_last_words(client, submission.id, state))
        time.sleep(0.5)
    raise OrchestratorError(f"{submission.id} has not begun within {timeout_s:g} s: that Ray cluster has no CPU free")


def confirm_folder_seen(run: RunFolder, submission_id: str) -> None:
    """The job's first act: find what was written when it was submitted, and answer it.

    Raises `RunFolderError` if this is another folder under the same path, or none.
    """
    deadline = time.monotonic() + SEEN_S
    while not run.submission.is_file() or read_json(run.submission)["id"] != submission_id:
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"{run.root} on {socket.gethostname()} is not the folder from which {submission_id} was submitted; "
                "submit again with a folder on a disk that this Ray cluster sees under the same path"
            )
        time.sleep(0.2)
    try:
        write_json(run.submission, {"id": submission_id, "seen": this_process()})
    except OSError as error:
        raise RunFolderError(f"{socket.gethostname()} cannot write to {run.root}: {error}") from error


def _send(client: IslandClient, submission_id: str, folder: Path, grace_s: float) -> bool:
    """Submit the one command that a controller is; False if somebody else has just done so."""
    with tempfile.TemporaryDirectory(prefix="ddm-") as scratch:
        return client.submit(
            submission_id,
            ["python", "-m", "orchestrator.cli.submitted_controller", str(folder), submission_id],
            wheel=build_wheel(Path(scratch)),
            resources=ResourcesConfig(),
            env={SUBMITTED_TO: "auto"},
            grace_s=grace_s,
        )


def _last_words(client: IslandClient, submission_id: str, state: JobState) -> str:
    """How a submission ended, with the end of its log; empty if it ended well."""
    if state.status == "SUCCEEDED":
        return ""
    said = client.log(submission_id).strip().splitlines()[-5:]
    return "\n  ".join([f"{submission_id} ended as {state.status}: {state.message}", *said])
