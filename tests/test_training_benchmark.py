"""Parts of the trainer's benchmark run at a tiny size, and what was measured of the other parts stays."""

import ast
from pathlib import Path

import pytest

from benchmarks import training
from benchmarks.arms import bare_loop, script_loop
from benchmarks.arms.trainer.cases import Effort
from benchmarks.record import Claim, Listing
from ddm_core.artifacts import read_json

TINY = Effort(turns=1, is_tiny=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["steps", "waits", "gradients", "sampling"])
def test_part_runs_under_its_name(part):
    claims, listings = training.PARTS[part](TINY)
    assert {training.part_of(name) for name in [c.name for c in claims] + [t.title for t in listings]} == {part}
    assert all(claim.holds for claim in claims if part in ("waits", "gradients"))


@pytest.mark.parametrize("loop", [bare_loop, script_loop])
def test_loop_imports_nothing_of_what_it_judges(loop):
    source, ours = Path(loop.__file__), {path.name for path in Path(__file__).parents[1].iterdir() if path.is_dir()}
    nodes = list(ast.walk(ast.parse(source.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {f"{'.' * node.level}{node.module}" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert "torch" in imported
    assert not {name.split(".")[0] for name in imported} & {"", *ours}


def test_measured_part_replaces_its_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path)

    def claim(name, value):
        return Claim(name=name, bar="1", value=value, spread="", holds=True)

    training.keep("sampling", 2.0, [claim("sampling: a", "1"), claim("sampling: b", "1")], [])
    training.keep("steps", 3.0, [claim("steps: a", "1")], [Listing(title="steps: t", columns=("c",))])
    training.keep("sampling", 5.0, [claim("sampling: b", "2")], [])
    result = read_json(tmp_path / "training.json")
    assert [(row["name"], row["value"]) for row in result["claims"]] == [("steps: a", "1"), ("sampling: b", "2")]
    assert [table["title"] for table in result["listings"]] == ["steps: t"]
    assert result["seconds"] == 8.0
