"""An artifact is complete or absent, and a worker without its lease does not write."""

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
    (out / "nested").mkdir()
    (out / "nested" / "file").write_text("content")
    return 7.0


def publish_example(folder: Path, **options):
    return publish(folder, fill, stage="s", config={"a": 1}, inputs={"data": "f"}, **options)


def test_published_artifact_can_be_read_and_verified(tmp_path):
    manifest = publish_example(tmp_path / "a", island="here", attempt=3)
    assert read_manifest(tmp_path / "a") == manifest
    assert manifest.flops == 7.0 and manifest.attempt == 3
    assert manifest.fingerprint == fingerprint("s", {"a": 1}, {"data": "f"})
    verify(tmp_path / "a")


def test_failed_stage_leaves_no_files(tmp_path):
    def failing_fill(out: Path) -> float:
        fill(out)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        publish(tmp_path / "a", failing_fill, stage="s", config={}, inputs={})
    assert list(tmp_path.iterdir()) == []


def test_publish_to_finished_artifact_does_not_rerun(tmp_path):
    publish_example(tmp_path / "a")
    publish(tmp_path / "a", lambda out: pytest.fail("ran again"), stage="s", config={"a": 1}, inputs={"data": "f"})


def test_publish_after_lease_loss_is_preempted(tmp_path):
    with pytest.raises(Preempted, match="lost its lease"):
        publish_example(tmp_path / "a", may_commit=lambda: False)
    assert not is_finished(tmp_path / "a") and list(tmp_path.iterdir()) == []


def test_publish_keeps_artifact_of_concurrent_attempt(tmp_path):
    def slow_fill(out: Path) -> float:
        publish_example(tmp_path / "b", attempt=2)
        (tmp_path / "b").rename(tmp_path / "a")
        return fill(out)

    with pytest.raises(Preempted):
        publish(tmp_path / "a", slow_fill, stage="s", config={"a": 1}, inputs={"data": "f"})
    assert read_manifest(tmp_path / "a").attempt == 2
    verify(tmp_path / "a")


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_verify_names_damaged_file(tmp_path, damage):
    publish_example(tmp_path / "a")
    file = tmp_path / "a" / "nested" / "file"
    file.unlink() if damage == "missing" else file.write_text("other")
    with pytest.raises(CorruptArtifact, match="nested/file"):
        verify(tmp_path / "a")


def test_publish_replaces_unfinished_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "leftover").write_text("partial")
    with pytest.raises(UnfinishedArtifact):
        read_manifest(tmp_path / "a")
    publish_example(tmp_path / "a")
    assert not (tmp_path / "a" / "leftover").exists()


def test_publish_killed_at_any_time_is_complete_or_unfinished(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ddm_core.artifacts import publish\n"
        "def fill(out):\n"
        "    for k in range(40): (out / str(k)).write_text('x' * 10000)\n"
        "    return 1.0\n"
        "print('go', flush=True)\n"
        "for k in range(10**6): publish(Path(sys.argv[1]) / str(k), fill, stage='s', config={'k': k}, inputs={})\n"
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
def test_fingerprints_differ_only_if_configs_differ(first, second):
    is_same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (fingerprint("s", first, {}) == fingerprint("s", second, {})) == is_same


@given(st.sampled_from(["C", "F", "transposed", "reversed", "strided"]), st.integers(1, 4), st.integers(1, 5))
def test_saved_arrays_of_any_layout_load_unchanged(tmp_path_factory, layout, rows, columns):
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
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
    assert np.array_equal(load_file(path)["a"], array)


def test_fingerprint_ignores_key_order():
    assert fingerprint("s", {"a": 1, "b": 2}, {"x": "1", "y": "2"}) == fingerprint(
        "s", {"b": 2, "a": 1}, {"y": "2", "x": "1"}
    )


def test_read_json_of_missing_or_invalid_file_raises(tmp_path):
    with pytest.raises(UnfinishedArtifact, match="does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(CorruptArtifact, match="bad.json"):
        read_json(tmp_path / "bad.json")


def test_workspace_reports_progress_and_detects_stop_file(tmp_path):
    workspace = Workspace.at(tmp_path)
    workspace.report_progress(5, 5, {"loss": 0.5}, unit="images")
    assert read_json(workspace.attempt / "progress.json")["figures"] == {"loss": 0.5}
    assert not workspace.stop_requested()
    (tmp_path / "stop").touch()
    time.sleep(0.25)
    assert workspace.stop_requested()


def test_progress_of_new_unit_restarts_pace(tmp_path):
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


def test_write_json_leaves_no_temporary_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": Path("p"), "y": (1, 2)})
    assert read_json(tmp_path / "a.json") == {"x": "p", "y": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_fingerprint_omits_unhashed_default_fields():
    @dataclass
    class Earlier:
        size: int = 1

    @dataclass
    class Current:
        size: int = 1
        extra: str | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)

    def fingerprint_of(*configs):
        return fingerprint("s", {"nested": list(configs)}, {})

    assert fingerprint_of(Current(), Current(size=2)) == fingerprint_of(Earlier(), Earlier(size=2))
    assert (
        len(
            {
                fingerprint_of(Current()),
                fingerprint_of(Current(extra="a")),
                fingerprint_of(Current(extra="b")),
                fingerprint_of(Current(size=2)),
            }
        )
        == 4
    )
