"""What can be checked of an island from outside: its door, its clock, what it has, and its storage."""

import os
import secrets
import stat
import time
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.islands.client import minor
from orchestrator.islands.preflight.probe import try_storage
from orchestrator.islands.preflight.session import PreflightSession, Verdict, skew_of
from orchestrator.islands.token import read_token

DATE_STEP_S = 1.0
"""HTTP tells the time in whole seconds."""


def check_address(visit: PreflightSession) -> Verdict:
    """The token must not cross a network in clear."""
    url = urlsplit(visit.config.address)
    if url.scheme == "https" or _is_loopback(url.hostname or ""):
        return Verdict("ok", visit.config.address)
    text = f"{visit.config.address} sends the token in clear; use https, or an ssh tunnel to loopback"
    return Verdict("warning", text)


def check_token_file(visit: PreflightSession) -> Verdict:
    """Nobody else may read the token."""
    read_token(visit.name, visit.config.token_file)
    path = Path(visit.config.token_file).expanduser()
    found = path.stat()
    if found.st_uid != os.getuid():
        return Verdict("error", f"{path} is user {found.st_uid}'s and we are {os.getuid()}; copy it to a file of ours")
    return Verdict("ok", f"{path}, mode {stat.S_IMODE(found.st_mode):o}")


def check_reach(visit: PreflightSession) -> Verdict:
    """Something answers; its clock is read on the way."""
    sent = time.time()
    answered = visit.fetch_json("/api/version", None)
    took = time.time() - sent
    visit.asked, visit.date = (sent, sent + took), answered.headers.get("Date", "")
    if answered.status_code not in (200, 401, 403):
        return Verdict(
            "error",
            f"{visit.config.address} answers {answered.status_code} to /api/version, so it is not the dashboard of a "
            f"Ray cluster; correct compute.islands.{visit.name}.address",
        )
    return Verdict("ok", f"answers in {1000 * took:.0f} ms")


def check_rejects_unauthenticated(visit: PreflightSession) -> Verdict:
    """Without the island's token nothing may be had."""
    tried = {"no token": None, "a wrong token": secrets.token_hex(32)}
    let_in = [
        what for what, token in tried.items() if visit.fetch_json("/api/jobs/", token).status_code not in (401, 403)
    ]
    if let_in:
        return Verdict(
            "error",
            f"refuses nobody: {' and '.join(let_in)} may list, start and stop its jobs; start all its nodes with "
            "RAY_AUTH_MODE=token and a token of its own",
        )
    return Verdict("ok", "refuses no token and a wrong one")


def check_token(visit: PreflightSession) -> Verdict:
    """The island takes the token that we have."""
    visit.ray = str(visit.report("/api/version").get("ray_version", "unknown"))
    return Verdict("ok", "accepted")


def check_ray(visit: PreflightSession) -> Verdict:
    """Jobs and their client must be of one release."""
    theirs, ours = visit.ray, version("ray")
    if minor(theirs) != minor(ours):
        text = f"Ray {theirs} there, {ours} here: major and minor version must agree; install one of them on both"
        return Verdict("error", text)
    return Verdict("ok", theirs)


def check_clock(visit: PreflightSession) -> Verdict:
    """The clock of the island's head against ours, give or take the round trip."""
    try:
        told = parsedate_to_datetime(visit.date).timestamp()
    except ValueError:
        return Verdict("warning", f"tells no time ({visit.date!r}); look at its clock by hand")
    sent, received = visit.asked
    ahead, behind = max(0.0, told - received), max(0.0, sent - (told + DATE_STEP_S))
    return skew_of(ahead - behind, DATE_STEP_S + received - sent)


def check_resources(visit: PreflightSession) -> Verdict:
    """The Ray cluster has at least what the configuration counts on."""
    said = visit.report("/api/v0/nodes?limit=10000&detail=true")
    wanted = {"CPU": float(visit.config.cpus), "GPU": visit.config.gpus, **visit.config.resources}
    try:
        nodes = [node for node in said["data"]["result"]["result"] if node["state"] == "ALIVE"]
        has = {name: sum(float(node["resources_total"].get(name, 0.0)) for node in nodes) for name in wanted}
    except (KeyError, TypeError) as error:
        return Verdict("warning", f"does not list its nodes as Ray does ({error!r}); compare CPUs and GPUs by hand")
    listed = ", ".join(f"{has[name]:g} {name} (configured {wanted[name]:g})" for name in wanted)
    if lacking := [name for name in wanted if has[name] < wanted[name]]:
        text = f"{len(nodes)} node(s), {listed}: stages wait for {', '.join(lacking)} unless the island grows; "
        return Verdict("warning", f"{text}otherwise lower compute.islands.{visit.name}")
    return Verdict("ok", f"{len(nodes)} node(s), {listed}")


def check_storage(visit: PreflightSession) -> Verdict:
    """The storage works from here."""
    speed = try_storage(visit.storage, f"{visit.scratch_key}/here")
    return Verdict("ok", f"{visit.config.storage}, {speed.write_mb_s:.0f} MB/s out, {speed.read_mb_s:.0f} MB/s in")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
