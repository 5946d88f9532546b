"""Checks of an island by a small job on it: code, Python, storage and clock as the job observes them."""

import json
import time
from importlib.metadata import version
from platform import python_version

from orchestrator.config.compute import ResourcesConfig
from orchestrator.errors import IslandError
from orchestrator.islands.client import JobState, major_minor
from orchestrator.islands.preflight.probe import REPORT_PREFIX, ProbeReport, write_marker
from orchestrator.islands.preflight.session import PreflightSession, Verdict, judge_clock_skew

JOB_S = 75.0
"""Time limit for a small job, start included; the first job on an island installs this project's code."""

POLL_DELAY_S = 2.0
"""Ray polls its jobs once a second, so it may list an ended job as running for a little longer."""

FORGOTTEN = JobState(status="FAILED", message="the island does not list the job any more")


def check_job(session: PreflightSession) -> Verdict:
    """Check that a small job runs on the island with this project's code."""
    started = time.time()
    write_marker(session.storage, session.scratch_key)
    try:
        session.probe_reports.append(_run_probe(session))
    finally:
        session.storage.delete(session.scratch_key)
    return Verdict("ok", f"ran and reported in {time.time() - started:.1f} s")


def check_project(session: PreflightSession) -> Verdict:
    """Check that the island runs the wheel that was sent."""
    remote, local = session.probe_report.project, session.wheel.name.split("-")[1]
    if remote != local:
        text = (
            f"runs version {remote or 'unknown'} although {local} was sent; remove the other one from its Python path"
        )
        return Verdict("error", text)
    return Verdict("ok", remote)


def check_python(session: PreflightSession) -> Verdict:
    """Check that remote and local Python have the same major and minor version."""
    remote, local = session.probe_report.python, python_version()
    if major_minor(remote) != major_minor(local):
        return Verdict("warning", f"remote Python {remote}, local Python {local}; results may differ in the last digit")
    return Verdict("ok", remote)


def check_torch(session: PreflightSession) -> Verdict:
    """Check that remote and local torch have the same major and minor version."""
    remote, local = session.probe_report.torch, version("torch")
    if not remote:
        return Verdict("error", "the Python of its jobs has no torch; install the project's dependencies there")
    if major_minor(remote) != major_minor(local):
        return Verdict("warning", f"remote torch {remote}, local torch {local}; results may differ in the last digit")
    return Verdict("ok", remote)


def check_remote_storage(session: PreflightSession) -> Verdict:
    """Check that the island can use the storage, and that it is the same one."""
    report = session.probe_report
    if report.storage_error:
        return Verdict("error", f"from the island: {report.storage_error}")
    return Verdict("ok", f"{report.write_mb_s:.0f} MB/s out, {report.read_mb_s:.0f} MB/s in")


def check_remote_clock(session: PreflightSession) -> Verdict:
    """Compare the clock of the job's node at the end of the job with the local times of the last two polls."""
    (running, ended), remote_time = session.job_end_times, session.probe_report.time
    ahead, behind = max(0.0, remote_time - ended), max(0.0, running - POLL_DELAY_S - remote_time)
    return judge_clock_skew(ahead - behind, ended - running + POLL_DELAY_S)


def _run_probe(session: PreflightSession) -> ProbeReport:
    """Run the probe on the island and return its report; raise `IslandError` if it prints none."""
    submission_id = f"ddm-{session.scratch_key.replace('/', '-')}"
    options = ["--storage", session.config.storage, "--options", json.dumps(session.config.storage_options)]
    session.client.submit(
        submission_id,
        ["python", "-P", "-m", "orchestrator.islands.preflight.probe", *options, "--name", session.scratch_key],
        wheel=session.wheel,
        resources=ResourcesConfig(),
        grace_s=1.0,
    )
    state = _wait_until_ended(session, submission_id)
    log = session.client.fetch_log(submission_id)
    session.client.delete(submission_id)
    reports = [line.removeprefix(REPORT_PREFIX) for line in log.splitlines() if line.startswith(REPORT_PREFIX)]
    if not reports:
        last_line = (log.strip().splitlines() or [state.message])[-1]
        raise IslandError(
            f"a small job {state.status.lower()}: {last_line}; install this project's dependencies in its Python"
        )
    return ProbeReport(**json.loads(reports[0]))


def _wait_until_ended(session: PreflightSession, submission_id: str) -> JobState:
    """Return the final state of the job; raise `IslandError` if it has not ended within `JOB_S`."""
    deadline, polled = time.monotonic() + JOB_S, time.time()
    while not (state := session.client.list_states().get(submission_id, FORGOTTEN)).has_ended:
        if time.monotonic() > deadline:
            session.client.stop(submission_id)
            raise IslandError(
                f"a small job is {state.status} after {JOB_S:g} s: {state.message} If it is busy, check it later"
            )
        polled = time.time()
        time.sleep(0.3)
    session.job_end_times = (polled, time.time())
    return state
