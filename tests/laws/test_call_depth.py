"""The call chains that a reader follows: from `ddm run` to the loss, and from `ddm sample` to a network."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from experts import expert
from experts.architectures.residual_mlp import ResidualMLP
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


def record_chains(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[list[str]]:
    """Record the functions of the project on the stack, outermost first, at every call of this function."""
    target: Callable[..., object] = getattr(owner, name)
    chains: list[list[str]] = []

    def record(*args: object, **kwargs: object) -> object:
        chains.append([*list(project_functions(sys._getframe(1)))[::-1], target.__qualname__])
        return target(*args, **kwargs)

    monkeypatch.setattr(owner, name, record)
    return chains


def run_ddm(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ddm", *arguments])
    with pytest.raises(SystemExit, match="^0$"):
        app.main()


def test_loss_is_at_most_12_calls_below_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chains = record_chains(monkeypatch, expert, "expert_loss")
    run_ddm(monkeypatch, "run", *TINY, f"folder={tmp_path}")
    assert any("run_expert" in chain for chain in chains) and any("run_monolith" in chain for chain in chains)
    for chain in chains:
        assert chain[:3] == ["main", "run_command", "run"] and chain[-1] == "expert_loss"
        assert len(chain[1:]) - 1 <= 12, " ".join(chain)


def test_network_is_at_most_10_calls_below_sample(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chains = record_chains(monkeypatch, ResidualMLP, "forward")
    run_ddm(monkeypatch, "sample", str(own_run), "--seeds", "0-3", "--out", str(own_run / "grid.png"))
    assert chains
    for chain in chains:
        assert chain[:3] == ["main", "run_command", "sample"] and chain[-1] == "ResidualMLP.forward"
        assert len(chain[2:]) - 1 <= 9, " ".join(chain)
