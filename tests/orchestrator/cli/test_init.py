"""`ddm init` describes a folder as it is, and writes a configuration that passes the checks of `ddm run`."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_partition.errors import SourceMissing
from orchestrator.cli.app import app
from orchestrator.config.config_file import read_overrides
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.errors import ConfigError
from orchestrator.planning.checks.check import check_run
from orchestrator.planning.checks.suggest import estimate_steps
from orchestrator.run.run_folder import RunFolder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write 240 images of 20 x 12 pixels in two classes, a broken one, a copy, two captions and a note."""
    root, random = tmp_path / "my photos, 2024", np.random.default_rng(0)
    for number in range(240):
        path = root / ("cats", "dogs")[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (12, 20, 3), dtype=np.uint8)).save(path)
    (root / "cats" / "000.png").write_bytes(b"not an image")
    (root / "cats" / "002.txt").write_text("a cat")
    (root / "cats" / "004.caption").write_text("another cat")
    (root / "notes.md").write_text("x")
    shutil.copy(root / "dogs" / "001.png", root / "dogs" / "copy.png")
    return root


def init(*arguments: object) -> dict:
    result = CliRunner().invoke(app, ["init", *map(str, arguments), "--json"], catch_exceptions=False)
    return json.loads(result.output)


def test_init_finds_what_lies_in_the_folder(photos, tmp_path):
    facts = init(photos, "--out", tmp_path / "a.yaml")["facts"]
    assert facts["images"] == 241 and facts["class_counts"] == {"cats": 120, "dogs": 121}
    assert facts["sides"] == [12, 12, 12] and facts["common_size"] == "20x12" and facts["grey_share"] == 0
    assert list(facts["bad"]) == ["cats/000.png"] and facts["duplicates"] == [["dogs/001.png", "dogs/copy.png"]]
    assert facts["captions"] == 2 and facts["others"] == {".md": 1}


def test_init_writes_what_run_takes(photos, tmp_path):
    target = tmp_path / "a.yaml"
    init(photos, "--out", target)
    config = parse_config(compose(read_overrides(target)))
    assert config.data.path == str(photos) and config.data.image_size == 8 and config.data.labels
    check_run(config, RunFolder(tmp_path / "run"))
    with pytest.raises(ConfigError, match="exists"):
        init(photos, "--out", target)


def test_init_names_its_file_as_a_shell_reads_it(photos, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    printed = CliRunner().invoke(app, ["init", str(photos)], catch_exceptions=False).output
    assert shlex.split(printed.splitlines()[-1])[-1] == "my photos, 2024.yaml"


def test_init_without_images_says_what_is_there_instead(tmp_path):
    for name in ("a.psd", "b.psd", "c"):
        (tmp_path / name).touch()
    with pytest.raises(SourceMissing, match="no image below it; it holds other files: 2 with .psd, 1 with no suffix;"):
        CliRunner().invoke(app, ["init", str(tmp_path)], catch_exceptions=False)


def test_more_minutes_give_more_steps():
    assert estimate_steps(256, 240, 1)[0] < estimate_steps(256, 240, 1000)[0]


def test_file_of_keys_is_nested_or_flat(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "experiment: digits\ndata: {version: 007, limit: 300}\nname: '1e3'\nmonolith: false\n"
        "scores.spaces: [pixels, random_conv]\nensemble.reflection: null\n"
    )
    config = parse_config(compose(read_overrides(tmp_path / "a.yaml")))
    assert (config.data.version, config.data.limit, config.name, config.monolith) == ("7", 300, "1e3", False)


@pytest.mark.parametrize("text", ["- a\n", "a: [", "\x00", "just words"])
def test_file_that_holds_no_keys_is_one_error(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match="--config"):
        read_overrides(tmp_path / "a.yaml")


def test_record_of_a_run_is_one_error(tmp_path):
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").save_config(RunConfig())
    with pytest.raises(ConfigError, match=r"continue it with `ddm resume .*run`"):
        read_overrides(tmp_path / "run" / "config.yaml")
