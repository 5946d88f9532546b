"""The call chains that a reader follows: from `ddm run` to the loss, and from `ddm sample` to a network."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

import pytest

from experts.architectures.residual_mlp import ResidualMLP
from experts.training.loss import expert_loss
from orchestrator.cli import app
from tests.laws.conftest import TINY

ROOT = Path(__file__).parents[2]
PACKAGES = tuple(
    str(ROOT / name) for name in ("data_partition", "ddm_core", "ensemble", "experts", "orchestrator", "router")
)


def project_functions(frame: FrameType | None) -> Iterator[str]:
    """Yield the names of this project's functions on the stack, innermost first."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGES):
            yield frame.f_code.co_qualname
        frame = frame.f_back


@contextmanager
def recorded_chains(target: CodeType) -> Iterator[list[list[str]]]:
    """Record the project's functions on the stack, outermost first, at every call of `target`."""
    chains: list[list[str]] = []

    def record(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is target:
            chains.append(list(project_functions(frame))[::-1])

    sys.setprofile(record)
    try:
        yield chains
    finally:
        sys.setprofile(None)


def run_ddm(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ddm", *arguments])
    with pytest.raises(SystemExit, match="^0$"):
        app.main()


def test_loss_is_at_most_12_calls_below_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded_chains(inner_code(expert_loss)) as chains:
        run_ddm(monkeypatch, "run", *TINY, f"folder={tmp_path}")
    assert any("run_expert" in chain for chain in chains) and any("run_monolith" in chain for chain in chains)
    for chain in chains:
        assert chain[:3] == ["main", "run_command", "run"] and chain[-1] == "expert_loss"
        assert len(chain[1:]) - 1 <= 12, " ".join(chain)


def test_network_is_at_most_10_calls_below_sample(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded_chains(inner_code(ResidualMLP.forward)) as chains:
        run_ddm(monkeypatch, "sample", str(own_run), "--seeds", "0-3", "--out", str(own_run / "grid.png"))
    assert chains
    for chain in chains:
        assert chain[:3] == ["main", "run_command", "sample"] and chain[-1] == "ResidualMLP.forward"
        assert len(chain[2:]) - 1 <= 9, " ".join(chain)


def inner_code(function: object) -> CodeType:
    """Return the code of a function, without the wrappers of runtime type checks."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__code__
