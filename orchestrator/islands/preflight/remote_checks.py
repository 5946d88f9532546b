"""What a small job on an island tells: our code, its Python, its storage and its clock as they are there."""

import json
import time
from importlib.metadata import version
from platform import python_version

from orchestrator.config.compute import ResourcesConfig
from orchestrator.errors import IslandError
from orchestrator.islands.client import JobState, minor
from orchestrator.islands.preflight.probe import MARKER, ProbeReport, write_marker
from orchestrator.islands.preflight.session import PreflightSession, Verdict, skew_of

JOB_S = 75.0
"""The island may take so long to start and finish a small job; its first one installs our code."""

NOTICED_S = 2.0
"""Ray looks at its jobs once a second, so that one that has ended seems to run a little longer."""

MISSING = JobState(status="FAILED", message="the island has forgotten it")


def check_job(visit: PreflightSession) -> Verdict:
    """A small job runs there, with our code."""
    started = time.time()
    write_marker(visit.storage, visit.scratch_key)
    try:
        visit.answers.append(_run_probe(visit))
    finally:
        visit.storage.delete(visit.scratch_key)
    return Verdict("ok", f"ran and told in {time.time() - started:.1f} s")


def check_project(visit: PreflightSession) -> Verdict:
    """The island runs our very code."""
    theirs, ours = visit.answer.project, visit.wheel.name.split("-")[1]
    if theirs != ours:
        text = f"runs version {theirs or 'unknown'} although {ours} was sent; something there comes first on its path"
        return Verdict("error", text)
    return Verdict("ok", theirs)


def check_python(visit: PreflightSession) -> Verdict:
    """The same Python runs here and there."""
    theirs, ours = visit.answer.python, python_version()
    if minor(theirs) != minor(ours):
        return Verdict("warning", f"Python {theirs} there, {ours} here; results may differ in the last digit")
    return Verdict("ok", theirs)


def check_torch(visit: PreflightSession) -> Verdict:
    """The same torch runs here and there."""
    theirs, ours = visit.answer.torch, version("torch")
    if not theirs:
        return Verdict("error", "the Python of its jobs has no torch; install the project's dependencies there")
    if minor(theirs) != minor(ours):
        return Verdict("warning", f"torch {theirs} there, {ours} here; results may differ in the last digit")
    return Verdict("ok", theirs)


def check_remote_storage(visit: PreflightSession) -> Verdict:
    """The storage works from there, and is the same one."""
    said = visit.answer
    if said.storage_error:
        return Verdict("error", f"from the island: {said.storage_error}")
    return Verdict("ok", f"{said.write_mb_s:.0f} MB/s out, {said.read_mb_s:.0f} MB/s in")


def check_remote_clock(visit: PreflightSession) -> Verdict:
    """The clock of the node that ran the job: it looked at it last, between our last two looks at the job."""
    (running, ended), told = visit.probed, visit.answer.time
    return skew_of(max(0.0, told - ended) - max(0.0, running - NOTICED_S - told), ended - running + NOTICED_S)


def _run_probe(visit: PreflightSession) -> ProbeReport:
    """Run the probe on the island and return its answer; raises `IslandError` if it has none."""
    submission_id = f"ddm-{visit.scratch_key.replace('/', '-')}"
    given = ["--storage", visit.config.storage, "--options", json.dumps(visit.config.storage_options)]
    visit.client.submit(
        submission_id,
        ["python", "-m", "orchestrator.islands.preflight.probe", *given, "--name", visit.scratch_key],
        wheel=visit.wheel,
        resources=ResourcesConfig(),
        grace_s=1.0,
    )
    state = _ended(visit, submission_id)
    log = visit.client.log(submission_id)
    visit.client.delete(submission_id)
    answers = [line.removeprefix(MARKER) for line in log.splitlines() if line.startswith(MARKER)]
    if not answers:
        last = (log.strip().splitlines() or [state.message])[-1]
        raise IslandError(f"a small job {state.status.lower()}: {last}; give the island's Python our dependencies")
    return ProbeReport(**json.loads(answers[0]))


def _ended(visit: PreflightSession, submission_id: str) -> JobState:
    """How the job has ended; raises `IslandError` if it has not in time."""
    deadline, looked = time.monotonic() + JOB_S, time.time()
    while not (state := visit.client.states().get(submission_id, MISSING)).has_ended:
        if time.monotonic() > deadline:
            visit.client.stop(submission_id)
            raise IslandError(
                f"a small job is {state.status} after {JOB_S:g} s: {state.message} If it is busy, check it later"
            )
        looked = time.time()
        time.sleep(0.3)
    visit.probed = (looked, time.time())
    return state
