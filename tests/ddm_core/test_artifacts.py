"""A folder is whole or absent, and whoever lost its lease does not write."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ddm_core.artifacts import (
    UNHASHED_IF_DEFAULT,
    CorruptArtifact,
    Preempted,
    UnfinishedArtifact,
    Workspace,
    fingerprint,
    is_finished,
    publish,
    read_json,
    read_manifest,
    save_arrays,
    verify,
    write_json,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner), max_leaves=8
)


def fill(out: Path) -> float:
    (out / "deep").mkdir()
    (out / "deep" / "file").write_text("content")
    return 7.0


def made(folder: Path, **more):
    return publish(folder, fill, stage="s", config={"a": 1}, inputs={"data": "f"}, **more)


def test_what_is_published_can_be_read_and_verified(tmp_path):
    manifest = made(tmp_path / "a", island="here", attempt=3)
    assert read_manifest(tmp_path / "a") == manifest
    assert manifest.flops == 7.0 and manifest.attempt == 3
    assert manifest.fingerprint == fingerprint("s", {"a": 1}, {"data": "f"})
    verify(tmp_path / "a")


def test_a_failed_stage_leaves_nothing(tmp_path):
    def broken(out: Path) -> float:
        fill(out)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        publish(tmp_path / "a", broken, stage="s", config={}, inputs={})
    assert list(tmp_path.iterdir()) == []


def test_a_finished_artifact_is_left_as_it_is(tmp_path):
    made(tmp_path / "a")
    publish(tmp_path / "a", lambda out: pytest.fail("ran again"), stage="s", config={"a": 1}, inputs={"data": "f"})


def test_a_worker_without_its_lease_does_not_commit(tmp_path):
    with pytest.raises(Preempted, match="lost its lease"):
        made(tmp_path / "a", may_commit=lambda: False)
    assert not is_finished(tmp_path / "a") and list(tmp_path.iterdir()) == []


def test_what_another_attempt_has_published_meanwhile_is_kept(tmp_path):
    def slow(out: Path) -> float:
        made(tmp_path / "b", attempt=2)
        (tmp_path / "b").rename(tmp_path / "a")
        return fill(out)

    with pytest.raises(Preempted):
        publish(tmp_path / "a", slow, stage="s", config={"a": 1}, inputs={"data": "f"})
    assert read_manifest(tmp_path / "a").attempt == 2
    verify(tmp_path / "a")


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damage_is_found_and_named(tmp_path, damage):
    made(tmp_path / "a")
    file = tmp_path / "a" / "deep" / "file"
    file.unlink() if damage == "missing" else file.write_text("other")
    with pytest.raises(CorruptArtifact, match="deep/file"):
        verify(tmp_path / "a")


def test_an_unfinished_folder_is_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "left-over").write_text("half")
    with pytest.raises(UnfinishedArtifact):
        read_manifest(tmp_path / "a")
    made(tmp_path / "a")
    assert not (tmp_path / "a" / "left-over").exists()


def test_killed_at_any_instant_the_folder_is_whole_or_unfinished(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ddm_core.artifacts import publish\n"
        "def fill(out):\n"
        "    for k in range(40): (out / str(k)).write_text('x' * 10000)\n"
        "    return 1.0\n"
        "print('go', flush=True)\n"
        "for k in range(10**6): publish(Path(sys.argv[1]) / str(k), fill, stage='s', config=k, inputs={})\n"
    )
    for pause_ms in (*range(0, 60, 6), 2000):
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        try:
            child.wait(pause_ms / 1000)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    finished = [folder for folder in tmp_path.iterdir() if is_finished(folder)]
    assert finished
    for folder in finished:
        verify(folder)


@given(JSON, JSON)
def test_fingerprints_differ_exactly_when_configurations_do(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (fingerprint("s", one, {}) == fingerprint("s", other, {})) == same


@given(st.sampled_from(["C", "F", "transposed", "reversed", "strided"]), st.integers(1, 4), st.integers(1, 5))
def test_arrays_come_back_whatever_their_layout(tmp_path_factory, layout, rows, columns):
    plain_array = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    array = {
        "C": plain_array,
        "F": np.asfortranarray(plain_array),
        "transposed": plain_array.T,
        "reversed": plain_array[:, ::-1],
        "strided": np.repeat(plain_array, 2, axis=1)[:, ::2],
    }[layout]
    path = tmp_path_factory.mktemp("arrays") / "a.safetensors"
    save_arrays(path, {"a": array})
    assert np.array_equal(load_file(path)["a"], array)


def test_the_order_of_keys_does_not_matter():
    assert fingerprint("s", {"a": 1, "b": 2}, {"x": "1", "y": "2"}) == fingerprint(
        "s", {"b": 2, "a": 1}, {"y": "2", "x": "1"}
    )


def test_json_says_what_is_wrong(tmp_path):
    with pytest.raises(UnfinishedArtifact, match="does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(CorruptArtifact, match="bad.json"):
        read_json(tmp_path / "bad.json")


def test_a_workspace_reports_and_hears(tmp_path):
    workspace = Workspace.at(tmp_path)
    workspace.report_progress(5, 5, {"loss": 0.5}, unit="images")
    assert read_json(workspace.attempt / "progress.json")["figures"] == {"loss": 0.5}
    assert not workspace.stop_requested()
    (tmp_path / "stop").touch()
    time.sleep(0.25)
    assert workspace.stop_requested()


def test_work_of_another_unit_starts_its_own_clock(tmp_path):
    workspace = Workspace.at(tmp_path)
    workspace.report_progress(1000, 1000, unit="images")
    time.sleep(0.1)
    workspace.report_progress(3, 3, unit="steps")
    assert read_json(workspace.attempt / "progress.json")["left_s"] is None
    workspace.report_progress(7, None, unit="rows")
    time.sleep(0.6)
    workspace.report_progress(9, None, unit="rows")
    progress = read_json(workspace.attempt / "progress.json")
    assert (progress["done"], progress["total"], progress["left_s"]) == (9, None, None)


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": Path("p"), "y": (1, 2)})
    assert read_json(tmp_path / "a.json") == {"x": "p", "y": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_later_key_enters_a_fingerprint_only_once_it_is_used():
    @dataclass
    class Earlier:
        size: int = 1

    @dataclass
    class Now:
        size: int = 1
        extra: str | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)

    def of(*configs):
        return fingerprint("s", {"deep": list(configs)}, {})

    assert of(Now(), Now(size=2)) == of(Earlier(), Earlier(size=2))
    assert len({of(Now()), of(Now(extra="a")), of(Now(extra="b")), of(Now(size=2))}) == 4
