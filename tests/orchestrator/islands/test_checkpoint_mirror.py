"""What an island keeps in its storage of an attempt that trains there."""

import time

import pytest

from ddm_core.artifacts import write_text
from orchestrator.islands import checkpoint_mirror as mirror_module
from orchestrator.islands.checkpoint_mirror import CheckpointMirror
from orchestrator.islands.layout import Names
from orchestrator.islands.storage.storage import Storage, StorageUnreachable

NAMES = Names("expert_0-ff", 1)


class Failing(Storage):
    """Does not answer for the first few trees that it is given."""

    refusals = 2

    def put_tree(self, folder, name, skip=()):
        if self.refusals:
            self.refusals -= 1
            raise StorageUnreachable("no answer")
        return super().put_tree(folder, name, skip)


def until(question) -> None:
    give_up = time.monotonic() + 10
    while not question():
        assert time.monotonic() < give_up
        time.sleep(0.01)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror_module, "SYNC_INTERVAL_S", 0.02)
    attempt, state = tmp_path / "attempt_1", tmp_path / "state"
    for folder in (attempt, state / "checkpoints", state / "cache"):
        folder.mkdir(parents=True)
    return attempt, state


def test_a_checkpoint_that_the_storage_did_not_take_is_sent_again_without_another_one(folders, tmp_path):
    attempt, state = folders
    storage = Failing(str(tmp_path / "storage"), {})
    write_text(state / "checkpoints" / "step-7", "parameters")
    write_text(state / "cache" / "latents", "large")
    with CheckpointMirror(storage, NAMES, attempt, state):
        until(lambda: storage.has_tree(NAMES.state))
    assert set(storage.tree(NAMES.state)) == {"checkpoints/step-7"}


def test_an_attempt_that_has_a_successor_sends_no_checkpoint(folders, tmp_path):
    attempt, state = folders
    storage = Storage(str(tmp_path / "storage"), {})
    storage.put_json(NAMES.next().job, {})
    write_text(state / "checkpoints" / "step-7", "parameters")
    write_text(attempt / "log.txt", "word")
    with CheckpointMirror(storage, NAMES, attempt, state) as mirror:
        until(lambda: storage.has_tree(NAMES.folder))
        mirror.push_state()
    assert not storage.has_tree(NAMES.state) and storage.get_json(NAMES.beat)["beats"] == 1
