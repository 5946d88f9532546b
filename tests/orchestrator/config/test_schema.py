"""Every YAML composes and becomes its dataclass; every mistake is reported at once, with the known keys."""

from pathlib import Path

import pytest

from orchestrator.config.hydra_compose import compose, config_folder
from orchestrator.config.schema import RunConfig, known_keys, parse_config
from orchestrator.errors import ConfigError
from orchestrator.pipeline.graph import build_graph

FILES = sorted(path.relative_to(config_folder()) for path in Path(config_folder()).glob("*/*.yaml"))
GROUPS = [file for file in FILES if file.parent.name != "pool"]
"""Pools are configurations of their own: tests/orchestrator/pools/test_config.py."""
NEEDED = {
    "image_folder": ["data.path=pictures"],
    "webdataset": ["data.path=a.tar"],
    "base_first": ["distill=sid"],
    "refine": ["distill=sid"],
}


@pytest.mark.parametrize("file", GROUPS, ids=str)
def test_every_yaml_becomes_its_dataclass(file):
    overrides = [f"{file.parent}={file.stem}", *NEEDED.get(file.stem, [])]
    assert isinstance(parse_config(compose(overrides)), RunConfig)


def test_every_yaml_says_what_it_is_in_its_first_line():
    for file in FILES:
        lines = (Path(config_folder()) / file).read_text().splitlines()
        assert lines[0].startswith("#"), file


def test_every_key_of_the_dataclasses_can_be_overridden():
    config = parse_config(compose(["expert.training.lr=0.5", "data.limit=7", "compute.timeout_s=3"]))
    assert (config.expert.training.lr, config.data.limit, config.compute.timeout_s) == (0.5, 7, 3.0)


def test_one_seed_reaches_every_part():
    config = parse_config(compose(["seed=5"]))
    seeds = (config.partition.seed, config.expert.training.seed, config.router.training.seed, config.scores.seed)
    assert seeds == (5, 5, 5, 5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("partition.num_expert=3", ["did you mean partition.num_experts", "balanced"]),
        ("expert.training.learning_rate=1", ["unknown key", "lr"]),
        ("nonsense=1", ["known here", "partition"]),
        ("data=nonsense", ["data/nonsense", "groups"]),
        ("expert.training.lr=", ["expert.training.lr"]),
    ],
)
def test_an_unknown_key_is_an_error_that_lists_the_known(override, words):
    with pytest.raises(ConfigError) as caught:
        parse_config(compose([override]))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~/pictures", str(Path("~/pictures").expanduser())),
        ("/a folder/with (brackets)", "/a folder/with (brackets)"),
        ("/shards/{000..099}.tar", "/shards/{000..099}.tar"),
        ("s3://bucket/{000..099}.tar", "s3://bucket/{000..099}.tar"),
        ("here", str(Path("here").absolute())),
    ],
)
def test_a_path_is_what_a_person_types(given, meant):
    assert parse_config(compose(["data=image_folder", f"data.path={given}"])).data.path == meant


@pytest.mark.parametrize("experiment", ["digits", "demo"])
@pytest.mark.parametrize("network", ["unet", "dit", "residual_mlp"])
def test_an_experiment_takes_another_network(experiment, network):
    config = parse_config(compose([f"experiment={experiment}", f"expert={network}", "codec=pixels"]))
    assert config.expert.network.kind == network


def test_resources_by_kind_of_stage_can_be_overridden():
    config = parse_config(compose(["compute.stages.expert.cpus=2"]))
    resources = {stage.name: stage.resources.cpus for stage in build_graph(config)}
    assert resources["expert_0"] == 2 and resources["router"] == 1


def test_inline_cannot_keep_a_time_limit():
    with pytest.raises(ConfigError, match="timeout_s=3 needs backend=ray"):
        parse_config(compose(["compute=inline", "compute.timeout_s=3"]))


def test_all_mistakes_are_reported_at_once():
    wrong = {"seed": "x", "data": {"image_sise": 8}, "expert": {"network": {"kind": "unet", "width": 3}}}
    with pytest.raises(ConfigError) as caught:
        parse_config(wrong)
    text = str(caught.value)
    assert text.startswith("3 mistake(s)")
    assert "data.image_sise: unknown key; known here: channels" in text
    assert "expert.network.unet.width: unknown key; known here: attention, channels" in text
    assert "seed:" in text and "'x'" in text


def test_a_batch_that_does_not_divide_names_one_that_does():
    with pytest.raises(ConfigError, match="try 245"):
        parse_config({"partition": {"num_experts": 7}})


def test_known_keys_follow_nested_configurations():
    assert "lr" in known_keys(("expert", "training"))
    assert known_keys(("expert", "training", "lr")) == []
