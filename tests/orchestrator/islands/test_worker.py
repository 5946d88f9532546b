"""The worker's folder on a node: this user's alone, or refused."""

import os
import tempfile

import pytest

from orchestrator.errors import IslandError
from orchestrator.islands.layout import AttemptNames
from orchestrator.islands.worker import WORKDIR, NodeFolders


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.delenv(WORKDIR, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"ddm-{os.getuid()}"


def test_node_folder_is_private(temporary):
    for _ in range(2):
        assert NodeFolders.for_attempt("0a1b2c3d", AttemptNames("s", 1)).shared == temporary / "0a1b2c3d"
    assert temporary.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["link", "shared", "file"])
def test_node_folder_of_others_is_refused(temporary, tmp_path, kind):
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        temporary.symlink_to(tmp_path / "elsewhere")
    elif kind == "shared":
        temporary.mkdir()
        temporary.chmod(0o777)
    else:
        temporary.touch()
    with pytest.raises(IslandError, match=WORKDIR):
        NodeFolders.for_attempt("0a1b2c3d", AttemptNames("s", 1))
