"""Checks of an island from this machine: its address, authentication, clock, resources and storage."""

import os
import secrets
import stat
import time
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path

from orchestrator.islands.client import major_minor
from orchestrator.islands.preflight.probe import try_storage
from orchestrator.islands.preflight.session import PreflightSession, Verdict, judge_clock_skew
from orchestrator.islands.token import is_confidential, read_token

DATE_RESOLUTION_S = 1.0
"""HTTP's Date header has whole seconds."""


def check_address(session: PreflightSession) -> Verdict:
    """Check that no network carries the token unencrypted; warn if the configuration allows it."""
    if is_confidential(session.config.address):
        return Verdict("ok", session.config.address)
    text = f"{session.config.address} gets the token unencrypted; use https, or an ssh tunnel to loopback"
    return Verdict("warning" if session.config.plain_http else "error", text)


def check_token_file(session: PreflightSession) -> Verdict:
    """Check that only this user can read the token."""
    read_token(session.name, session.config)
    path = Path(session.config.token_file).expanduser()
    status = path.stat()
    if status.st_uid != os.getuid():
        text = f"{path} must be owned by user {os.getuid()}, not {status.st_uid}; copy it to a file of your own"
        return Verdict("error", text)
    return Verdict("ok", f"{path}, mode {stat.S_IMODE(status.st_mode):o}")


def check_reach(session: PreflightSession) -> Verdict:
    """Check that a Ray dashboard responds at the address; store its clock for `check_clock`."""
    sent = time.time()
    response = session.send_request("/api/version", None)
    took = time.time() - sent
    session.version_request_times, session.remote_date = (sent, sent + took), response.headers.get("Date", "")
    if response.status_code not in (200, 401, 403):
        return Verdict(
            "error",
            f"{session.config.address} returns {response.status_code} for /api/version, so it is not the dashboard of "
            f"a Ray cluster; correct compute.islands.{session.name}.address",
        )
    return Verdict("ok", f"responds in {1000 * took:.0f} ms")


def check_rejects_unauthenticated(session: PreflightSession) -> Verdict:
    """Check that the island refuses requests without its token."""
    tokens = {"no token": None, "a wrong token": secrets.token_hex(32)}
    accepted = [
        name
        for name, token in tokens.items()
        if session.send_request("/api/jobs/", token).status_code not in (401, 403)
    ]
    if accepted:
        return Verdict(
            "error",
            f"accepts requests with {' and '.join(accepted)}, so anyone may list, start and stop its jobs; start all "
            "its nodes with RAY_AUTH_MODE=token and a token of its own",
        )
    return Verdict("ok", "refuses no token and a wrong one")


def check_token(session: PreflightSession) -> Verdict:
    """Check that the island accepts the configured token."""
    session.remote_ray = str(session.fetch_json("/api/version").get("ray_version", "unknown"))
    return Verdict("ok", "accepted")


def check_ray(session: PreflightSession) -> Verdict:
    """Check that the island's Ray and the client's have the same major and minor version."""
    remote, local = session.remote_ray, version("ray")
    if major_minor(remote) != major_minor(local):
        text = (
            f"remote Ray {remote}, local Ray {local}: major and minor version must agree; install one of them on both"
        )
        return Verdict("error", text)
    return Verdict("ok", remote)


def check_clock(session: PreflightSession) -> Verdict:
    """Compare the clock of the island's head with the local one, within the time of the request."""
    try:
        remote_time = parsedate_to_datetime(session.remote_date).timestamp()
    except ValueError:
        return Verdict("warning", f"its Date header is no time ({session.remote_date!r}); check its clock by hand")
    sent, received = session.version_request_times
    ahead, behind = max(0.0, remote_time - received), max(0.0, sent - (remote_time + DATE_RESOLUTION_S))
    return judge_clock_skew(ahead - behind, DATE_RESOLUTION_S + received - sent)


def check_resources(session: PreflightSession) -> Verdict:
    """Check that the Ray cluster has at least the configured resources."""
    listing = session.fetch_json("/api/v0/nodes?limit=10000&detail=true")
    required = {"CPU": float(session.config.cpus), "GPU": session.config.gpus, **session.config.resources}
    try:
        nodes = [node for node in listing["data"]["result"]["result"] if node["state"] == "ALIVE"]
        total = {name: sum(float(node["resources_total"].get(name, 0.0)) for node in nodes) for name in required}
    except (KeyError, TypeError) as error:
        return Verdict("warning", f"does not list its nodes as Ray does ({error!r}); compare CPUs and GPUs by hand")
    summary = ", ".join(f"{total[name]:g} {name} (configured {required[name]:g})" for name in required)
    if lacking := [name for name in required if total[name] < required[name]]:
        text = f"{len(nodes)} node(s), {summary}: stages wait for {', '.join(lacking)} unless the island grows; "
        return Verdict("warning", f"{text}otherwise lower compute.islands.{session.name}")
    return Verdict("ok", f"{len(nodes)} node(s), {summary}")


def check_storage(session: PreflightSession) -> Verdict:
    """Check that the storage works from this machine."""
    speed = try_storage(session.storage, f"{session.scratch_key}/local")
    return Verdict("ok", f"{session.config.storage}, {speed.write_mb_s:.0f} MB/s out, {speed.read_mb_s:.0f} MB/s in")
