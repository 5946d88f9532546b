"""`ddm run data=image_folder` fits its settings to the pictures; what the user sets stays."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.errors import ConfigError
from orchestrator.planning.checks.own_pictures import fit_overrides
from orchestrator.run.run_folder import RunFolder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Write 120 coloured images of 40 x 30 pixels."""
    folder, random = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for number in range(120):
        Image.fromarray(random.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def fit(*overrides: str) -> tuple[list[str], str]:
    console = Console(record=True, width=200)
    fitted = fit_overrides(overrides, console)
    return fitted, console.export_text()


def test_the_choice_is_said_in_three_lines_and_composes(pictures):
    overrides, text = fit("data=image_folder", f"data.path={pictures}", "budget_minutes=2")
    config = parse_config(compose(overrides))
    assert (config.data.image_size, config.data.channels, config.data.labels) == (28, 3, False)
    assert (config.name, config.folder) == ("pictures", "runs/pictures")
    assert (config.codec.kind, config.partition.num_experts, config.has_monolith) == ("pca", 1, False)
    assert config.expert.training.lr == 2e-3
    assert "120 pictures, most of them 40x30" in text and "data.image_size=28" in text
    assert len(text.strip().splitlines()) == 3
    assert "data.flip=true mirrors half of so few pictures" in text and not config.data.flip


@pytest.mark.parametrize("chosen", ["data.image_size=16", "expert.training.steps=7", "partition.num_experts=2"])
def test_what_the_user_sets_stays(pictures, chosen):
    overrides, _ = fit("data=image_folder", f"data.path={pictures}", chosen)
    assert overrides[-1] == chosen
    assert sum(text.startswith(chosen.split("=")[0] + "=") for text in overrides) == 1
    parse_config(compose(overrides))


def test_a_chosen_group_is_not_fitted_below(pictures):
    overrides, _ = fit("data=image_folder", f"data.path={pictures}", "codec=patch_pca")
    assert not [text for text in overrides if text.startswith("codec.")]


@pytest.mark.parametrize("other", ["budget_minutes=0", "experiment=digits"])
def test_nothing_is_fitted_without_a_budget_or_for_an_experiment(pictures, other):
    overrides = ["data=image_folder", f"data.path={pictures}", other]
    assert fit(*overrides) == (overrides, "")


def test_the_run_of_the_same_pictures_keeps_its_steps(pictures, tmp_path):
    command = ("data=image_folder", f"data.path={pictures}", f"folder={tmp_path / 'run'}")
    first = parse_config(compose([*fit(*command)[0], "expert.training.steps=321"]))
    RunFolder(tmp_path / "run").save_config(first)
    assert "expert.training.steps=321" in fit(*command)[0]
    assert "expert.training.steps=321" not in fit(*command, "budget_minutes=1")[0]


def test_few_pictures_are_not_learned_by_heart(pictures):
    steps = parse_config(compose(fit("data=image_folder", f"data.path={pictures}", "budget_minutes=600")[0]))
    assert steps.expert.training.steps * steps.expert.training.batch_size <= 400 * 120


def test_a_budget_that_is_no_number_is_one_error(pictures):
    with pytest.raises(ConfigError, match="budget_minutes takes a number"):
        fit("data=image_folder", f"data.path={pictures}", "budget_minutes=soon")
