"""Temporary folders of local islands: only folders of our own making are deleted."""

import pytest

from orchestrator.islands.local.processes import create_scratch, delete_scratch


def test_scratch_folder_is_deleted():
    folder = create_scratch()
    (folder / "file").touch()
    delete_scratch(folder)
    assert not folder.exists()
    delete_scratch(folder)


@pytest.mark.parametrize("name", ["home", "ddm-open", "ddm-link"])
def test_other_folder_is_left_alone(tmp_path, name):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "real" / "file").touch()
    folder = tmp_path / name
    if name == "ddm-link":
        folder.symlink_to(tmp_path / "real")
    else:
        folder.mkdir(mode=0o755 if name == "ddm-open" else 0o700)
    delete_scratch(folder)
    assert folder.exists() and (tmp_path / "real" / "file").exists()
