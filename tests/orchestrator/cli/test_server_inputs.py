"""`ddm ui` and `ddm serve` refuse wrong inputs in one sentence, before they import what serves.

`docs/fault_matrix.md` has every fault, with a real server for those that it survives.
"""

import re
import sys

import pytest
from typer.testing import CliRunner

from ddm_core.errors import DDMError
from orchestrator.cli.app import app
from orchestrator.config.schema import RunConfig
from orchestrator.run.run_folder import RunFolder

KEY = "0123456789abcdef" * 4
COMMANDS = {
    "run": (["serve", "run"],),
    "keys": (["serve", "run", "--keys", "keys"], ["ui", "run", "--token-file", "keys"]),
}


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch):
    """Make a run without artifacts and a secret; whatever imports a server fails with an `ImportError`."""
    monkeypatch.chdir(tmp_path)
    RunFolder(tmp_path / "run").save_config(RunConfig())
    (tmp_path / "keys").write_text(KEY)
    (tmp_path / "keys").chmod(0o600)
    for name in ("ui", "serving"):
        monkeypatch.setitem(sys.modules, f"orchestrator.{name}.server", None)
    return tmp_path


def replaced_by_folder(file):
    file.unlink()
    file.mkdir()


def cut(file):
    """Leave the whole lines of the first half, which are valid YAML."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2].rpartition(b"\n")[0])


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("keys", lambda file: file.unlink(), "No such file"),
        ("keys", replaced_by_folder, "Is a directory"),
        ("keys", lambda file: file.write_bytes(b"\xff\x00\xfe"), "cannot be read"),
        ("keys", lambda file: file.write_text(" \n"), "keys is empty|keys has no API key"),
        ("keys", lambda file: file.write_text(f"{KEY} {KEY}"), "one token and nothing else|line 1 of keys"),
        ("keys", lambda file: file.chmod(0o644), "chmod 600"),
        ("run/config.yaml", lambda file: file.unlink(), "neither a run nor the folder of an ensemble"),
        ("run/config.yaml", replaced_by_folder, "neither a run nor the folder of an ensemble"),
        ("run/config.yaml", lambda file: file.write_bytes(b"\xff\x00\xfe"), "cannot be read"),
        ("run/config.yaml", cut, "does not match its checksum"),
        ("run/config.yaml", lambda file: None, "has no finished ensemble"),
    ],
)
def test_a_wrong_input_is_named_before_a_server_is_imported(inputs, name, damage, reason):
    damage(inputs / name)
    for words in COMMANDS[name.partition("/")[0]]:
        result = CliRunner().invoke(app, [*words, "--port", "0"])
        assert isinstance(result.exception, DDMError) and re.search(reason, str(result.exception)), result
