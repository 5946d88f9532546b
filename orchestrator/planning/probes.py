"""The networks' speeds on an island: a short job there that prints what it has measured."""

import json
import secrets
import time
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from artifacts import plain
from orchestrator.compute_config import IslandConfig, ResourcesConfig
from orchestrator.errors import IslandError
from orchestrator.islands.client import IslandClient
from orchestrator.planning.calibration import SAID, Place
from orchestrator.planning.speeds import Probe

LONGEST_S = 300.0
LOOK_S = 0.5


def probe_island(
    name: str, island: IslandConfig, probe: Probe, resources: ResourcesConfig, wheel: Path, grace_s: float
) -> Place:
    """The island as an expert would find it; one that refuses or does not answer is a place with a problem."""
    client, submission = IslandClient(name, island), f"ddm-probe-{secrets.token_hex(4)}"
    command = ["python", "-m", "orchestrator.planning.calibrate", "--probe", json.dumps(plain(probe))]
    started, asked = time.monotonic(), replace(resources, workers=1)
    try:
        client.reach()
        client.submit(submission, command, wheel=wheel, resources=asked, grace_s=grace_s)
        if not _ends(client, submission):
            client.stop(submission)
            return Place(problem=f"its probe did not end within {LONGEST_S:g} s")
        took_s = time.monotonic() - started
        measured = read_place(client.log(submission))
        client.delete(submission)
    except IslandError as error:
        return Place(problem=str(error))
    return measured if measured.problem else replace(measured, start_s=max(0.0, took_s - measured.start_s))


def read_place(log: str) -> Place:
    """What a probe has printed; if it has not come so far, its last line is the problem."""
    lines = log.strip().splitlines()
    said = next((line for line in lines if line.startswith(SAID)), None)
    if said is None:
        return Place(problem=f"its probe failed: {lines[-1] if lines else 'it printed nothing'}")
    return TypeAdapter(Place).validate_json(said.removeprefix(SAID))


def _ends(client: IslandClient, submission: str) -> bool:
    """Wait for the probe; False if it takes too long."""
    give_up = time.monotonic() + LONGEST_S
    while time.monotonic() < give_up:
        state = client.states().get(submission)
        if state is not None and state.has_ended:
            return True
        time.sleep(LOOK_S)
    return False
