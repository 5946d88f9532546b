"""SkyPilot: spot and then its fallback, a separate Python environment, and an end when idle.

SkyPilot depends on a hundred packages, so its fields are listed here from its documentation.
"""

import subprocess

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from orchestrator.pools.providers.skypilot import select_launched
from tests.orchestrator.pools.pools import load_shipped, pools, render_document

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(**known):
    return {"type": "object", "properties": known, "required": list(known), "additionalProperties": False}


CANDIDATE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["use_spot"],
    "properties": {
        "infra": {"type": "string", "pattern": r"^(aws|gcp|azure|kubernetes|\*)(/.+)?$"},
        "cpus": {"type": "string", "pattern": r"^\d+\+$"},
        "memory": {"type": "string", "pattern": r"^[\d.]+\+$"},
        "accelerators": {"type": "string", "pattern": r"^[\w-]+:\d+$"},
        "use_spot": {"type": "boolean"},
        "instance_type": {"type": "string"},
        "image_id": {"type": "string"},
    },
}
TASK = fields(
    name={"type": "string"},
    num_nodes={"type": "integer", "minimum": 1},
    resources=fields(
        ordered={"type": "array", "items": CANDIDATE, "minItems": 1},
        disk_size={"type": "integer"},
        labels=TEXTS,
        autostop=fields(idle_minutes={"type": "integer", "minimum": 0}, down={"const": True}),
    ),
    file_mounts=TEXTS,
    setup={"type": "string"},
    run={"type": "string"},
)


@settings(deadline=None, max_examples=25)
@given(pools("skypilot"))
def test_any_pool_is_one_valid_task_per_launched_type(config):
    for name in select_launched(config):
        task = render_document(config, f"{name}.yaml")
        Draft202012Validator(TASK).validate(task)
        assert task["num_nodes"] == config.nodes[name].max_nodes
        for script in (task["setup"], task["run"]):
            subprocess.run(["bash", "-n", "-c", script], check=True)


def test_spot_is_first_and_its_fallback_second():
    ordered = render_document(load_shipped("skypilot", "region=aws/us-east-1"), "l4_spot.yaml")["resources"]["ordered"]
    assert [candidate["use_spot"] for candidate in ordered] == [True, False]
    assert all(each["infra"] == "aws/us-east-1" and each["accelerators"] == "L4:1" for each in ordered)
    assert list(select_launched(load_shipped("skypilot"))) == ["l4_spot"]


@pytest.mark.parametrize(("idle_minutes", "polls"), [("10", 10), ("0.1", 1)])
def test_run_script_ends_after_idle_minutes(idle_minutes, polls):
    run = render_document(load_shipped("skypilot", f"idle_minutes={idle_minutes}"), "l4_spot.yaml")["run"]
    assert f'while [ "$idle" -lt {polls} ]' in run and "ray job list" in run


def test_token_is_a_file_and_skypilots_ray_is_not_stopped():
    task = render_document(load_shipped("skypilot", "token_file=/t/token"), "l4_spot.yaml")
    assert task["file_mounts"] == {"~/.ray/auth_token": "/t/token"}
    assert "RAY_AUTH_MODE=token" in task["run"] and "ray stop" not in task["run"]
    starts = [line for line in task["run"].splitlines() if "ray start" in line]
    assert len(starts) == 2 and all("--dashboard-agent-listen-port=52375" in line for line in starts)


def test_fallback_of_disabled_spot_type_is_launched():
    assert list(select_launched(load_shipped("skypilot", "nodes.l4_spot.max_nodes=0"))) == ["l4"]
