"""Every ending of a command is an exit code and at most one message."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from experts.__main__ import PREEMPTED
from orchestrator.cli.exits import BUDGET, FAILED, INTERRUPTED, run_command
from orchestrator.errors import BudgetReached, ConfigError
from tests.test_house import ROOT


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("[bold]x\x1b[31m \udcff"), 1, "[bold]x\\x1b[31m \\udcff"),
        (PermissionError(13, "Permission denied", "/a"), 1, "/a: Permission denied"),
        (BudgetReached("spent"), 3, "spent\nSee docs/guides/errors.md#budgetreached"),
        (MemoryError(), 1, "this needs more memory than there is; ask for fewer"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 1, "more memory than there is"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
    ],
)
def test_error_is_a_code_and_one_message(capsys, error, code, message):
    assert run_command(raising(error)) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert captured.err.count("Error:") == (code in (1, 3))


def test_every_exit_code_is_documented():
    page = (ROOT / "docs" / "guides" / "scripts.md").read_text()
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
    assert documented == {0, FAILED, 2, BUDGET, PREEMPTED, INTERRUPTED}  # 2 is that of the parser


def test_defect_of_the_program_is_not_hidden():
    for error in (ZeroDivisionError(), RuntimeError("shapes")):
        with pytest.raises(type(error)):
            run_command(raising(error))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_output_is_one_message():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "orchestrator", "--help"]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 1 and process.stderr.startswith("Error: ") and process.stderr.count("\n") == 2


def test_closed_pipe_is_silent():
    process = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m orchestrator --help | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stderr == "" and process.returncode in (0, 1)


@pytest.mark.parametrize(
    "command", ["experts list", "audit", "classify", "compress", "evaluate", "sample", "resume", "report"]
)
def test_missing_run_is_refused_before_torch_is_imported(tmp_path, command):
    code = (
        "import sys; from orchestrator.cli.app import app; from orchestrator.errors import RunFolderError\n"
        f"try: app([*{command!r}.split(), {str(tmp_path)!r}], standalone_mode=False)\n"
        "except RunFolderError as error: print('not a run folder' in str(error), 'torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "True False\n"
