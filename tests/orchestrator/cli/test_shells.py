"""The command line in real shells and terminals: completion, 80 columns, colors, and what `ddm` alone shows."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.large_runs import build_run
from orchestrator.cli.app import app

ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
ENVIRONMENT.pop("NO_COLOR", None)
SOURCE = 'eval "$(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1 ddm --show-completion {shell})"\n'
COMPLETE = {
    "bash": "COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _ddm_completion ddm; echo ${{COMPREPLY[@]}}",
    "zsh": "_arguments() {{ print -r -- $@ }}; words=({line}); CURRENT=$#words; _ddm_completion",
    "fish": "complete -C '{line}'",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    build_run(folder / "runs" / "many", 3, 20)
    return folder


def words(text: str) -> set[str]:
    return set(re.findall(r"[\w/]+", text))


@pytest.mark.integration
@pytest.mark.parametrize("shell", COMPLETE)
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ddm ver", {"verify"}),
        ("ddm logs runs/m", {"runs/many"}),
        ("ddm logs runs/many expert_", {"expert_0", "expert_1", "expert_2"}),
    ],
)
def test_a_real_shell_completes(shell, line, found, runs):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    head = "compdef() { }; " if shell == "zsh" else ""
    source = SOURCE.format(shell=shell) if shell != "fish" else "eval (ddm --show-completion fish | string collect)\n"
    script = head + source + COMPLETE[shell].format(line=line)
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, cwd=runs, env=ENVIRONMENT, timeout=240)
    assert found <= words(done.stdout) and not words(done.stdout) & {"status", "router"}, done.stdout + done.stderr


def complete(line: str, folder: Path) -> set[str]:
    """Return what `ddm` offers to bash, without bash."""
    parts = line.split(" ")
    variables = {"_DDM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(parts) - 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return words(CliRunner().invoke(app, env=variables, prog_name="ddm").output)


def test_stages_and_runs_are_completed(runs):
    assert complete("ddm logs runs/", runs) == {"runs/many"}
    assert complete("ddm logs runs/many expert_1", runs) == {"expert_1"}
    assert complete("ddm logs runs/none expert_1", runs) == set()


def test_ddm_alone_shows_what_to_do_next(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "ddm run experiment=digits" in CliRunner().invoke(app, []).stdout
    monkeypatch.chdir(runs)
    assert CliRunner().invoke(app, []).stdout.startswith("ddm resume runs/many")
    (Path("runs") / "broken").mkdir(exist_ok=True)
    (Path("runs") / "broken" / "config.yaml").write_text("]")
    assert "ddm status runs/broken" in CliRunner().invoke(app, []).stdout
    shutil.rmtree(Path("runs") / "broken")


def on_a_terminal(arguments: list[str], folder: Path, **variables: str) -> str:
    """Return what `ddm` prints on a terminal of 80 columns."""
    read, write = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "80", **variables}
    command = [sys.executable, "-m", "orchestrator", *arguments]
    process = subprocess.Popen(command, stdout=write, stderr=write, cwd=folder, env=environment)
    os.close(write)
    parts = []
    while True:
        try:
            parts.append(os.read(read, 65536))
        except OSError:  # what Linux raises when the other end is closed
            break
        if not parts[-1]:
            break
    os.close(read)
    assert process.wait() == 0
    return b"".join(parts).decode()


ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["status", "runs/many"], ["plan", "experiment=digits"], ["--help"]])
def test_output_fits_a_terminal_and_obeys_no_color(arguments, runs, monkeypatch):
    monkeypatch.chdir(runs)
    colored = on_a_terminal(arguments, runs)
    assert ESCAPE.search(colored)
    assert max(len(line) for line in ESCAPE.sub("", colored).replace("\r", "").splitlines()) <= 80
    plain = on_a_terminal(arguments, runs, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38;5|48;5)", plain)
    piped = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert piped.exit_code == 0 and "\x1b" not in piped.stdout
