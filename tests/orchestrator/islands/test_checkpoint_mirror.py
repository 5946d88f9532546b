"""Upload of checkpoints and heartbeats to an island's storage."""

import time

import pytest

from ddm_core.artifacts import write_text
from orchestrator.islands import checkpoint_mirror as mirror_module
from orchestrator.islands.checkpoint_mirror import CheckpointMirror
from orchestrator.islands.layout import AttemptNames
from orchestrator.islands.storage.storage import Storage, StorageUnreachable

NAMES = AttemptNames("expert_0-ff", 1)


class FailingStorage(Storage):
    """Storage that is unreachable for the first two uploads of a tree."""

    failures_left = 2

    def put_tree(self, folder, name, skip=()):
        if self.failures_left:
            self.failures_left -= 1
            raise StorageUnreachable("no response")
        return super().put_tree(folder, name, skip)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror_module, "SYNC_INTERVAL_S", 0.02)
    attempt, state = tmp_path / "attempt_1", tmp_path / "state"
    for folder in (attempt, state / "checkpoints", state / "cache"):
        folder.mkdir(parents=True)
    return attempt, state


def test_checkpoint_whose_upload_failed_is_uploaded_again(folders, tmp_path):
    attempt, state = folders
    storage = FailingStorage(str(tmp_path / "storage"), {})
    write_text(state / "checkpoints" / "step-7", "parameters")
    write_text(state / "cache" / "latents", "large")
    with CheckpointMirror(storage, NAMES, attempt, state):
        wait_until(lambda: storage.has_tree(NAMES.state))
    assert set(storage.read_index(NAMES.state)) == {"checkpoints/step-7"}


def test_attempt_with_successor_uploads_no_checkpoint(folders, tmp_path):
    attempt, state = folders
    storage = Storage(str(tmp_path / "storage"), {})
    storage.put_json(NAMES.next().job, {})
    write_text(state / "checkpoints" / "step-7", "parameters")
    write_text(attempt / "log.txt", "line")
    with CheckpointMirror(storage, NAMES, attempt, state) as mirror:
        wait_until(lambda: storage.has_tree(NAMES.folder))
        mirror.push_state()
    assert not storage.has_tree(NAMES.state) and storage.get_json(NAMES.heartbeat)["beats"] == 1
