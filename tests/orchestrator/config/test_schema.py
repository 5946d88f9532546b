"""Composition of every YAML file, and errors that list all mistakes with the known keys."""

from pathlib import Path

import pytest

from orchestrator.config.hydra_compose import compose, config_folder
from orchestrator.config.schema import RunConfig, change_config, known_keys, parse_config
from orchestrator.errors import ConfigError
from orchestrator.pipeline.graph import build_graph

FILES = sorted(path.relative_to(config_folder()) for path in Path(config_folder()).glob("*/*.yaml"))
GROUPS = [file for file in FILES if file.parent.name != "pool"]
"""Pools have a separate configuration: tests/orchestrator/pools/test_config.py."""
NEEDED = {
    "image_folder": ["data.path=pictures"],
    "webdataset": ["data.path=a.tar"],
    "parquet": ["data.path=a.parquet"],
    "base_first": ["distill=sid"],
    "refine": ["distill=sid"],
    **dict.fromkeys(("small_early", "small_late", "auto"), ["quantize=int8_dynamic"]),
}


@pytest.mark.parametrize("file", GROUPS, ids=str)
def test_compose_every_yaml_parses(file):
    overrides = [f"{file.parent}={file.stem}", *NEEDED.get(file.stem, [])]
    assert isinstance(parse_config(compose(overrides)), RunConfig)


def test_yaml_files_start_with_a_comment():
    for file in FILES:
        lines = (Path(config_folder()) / file).read_text().splitlines()
        assert lines[0].startswith("#"), file


def test_compose_accepts_every_dataclass_key():
    config = parse_config(compose(["expert.training.lr=0.5", "data.limit=7", "compute.timeout_s=3"]))
    assert (config.expert.training.lr, config.data.limit, config.compute.timeout_s) == (0.5, 7, 3.0)


def test_compose_seed_reaches_every_part():
    config = parse_config(compose(["seed=5"]))
    seeds = (config.partition.seed, config.expert.training.seed, config.router.training.seed, config.scores.seed)
    assert seeds == (5, 5, 5, 5)


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("partition.num_expert=3", ["did you mean partition.num_experts", "balanced"]),
        ("expert.training.learning_rate=1", ["unknown key", "lr"]),
        ("nonsense=1", ["known here", "partition"]),
        ("expert.trainin.steps=3", ["expert.trainin: unknown key; did you mean expert.training?", "known here: align"]),
        ("run.dir=a", ["run: unknown key", "known here: accelerate", "folder"]),
        ("data=nonsense", ["data/nonsense", "groups"]),
        ("expert.training.lr=", ["expert.training.lr"]),
        ("expert.training.optimizer=mun", ["expert.training.optimizer", "'adamw'", "'muon'"]),
        ("expert.training.lr_schedule=cosin", ["expert.training.lr_schedule", "'cosine'", "'warmup_stable_decay'"]),
        ("expert.training.betas=[0.9,1]", ["expert.training.betas", "less than 1"]),
    ],
)
def test_compose_unknown_key_lists_known_keys(override, messages):
    with pytest.raises(ConfigError) as caught:
        parse_config(compose([override]))
    assert all(message in str(caught.value) for message in messages), caught.value


@pytest.mark.parametrize("method", ["sid", "mmd", "consistency", "mean_flow", "scm", "sign", "speedup"])
def test_distillation_in_parts_of_a_batch_is_refused(method):
    with pytest.raises(ConfigError, match="whole batch at once; got accumulate=2; set it to 1"):
        parse_config(compose([f"distill={method}", "distill.training.accumulate=2"]))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/pictures", str(Path("~/pictures").expanduser())),
        ("/a folder/with (brackets)", "/a folder/with (brackets)"),
        ("/shards/{000..099}.tar", "/shards/{000..099}.tar"),
        ("s3://bucket/{000..099}.tar", "s3://bucket/{000..099}.tar"),
        ("here", str(Path("here").absolute())),
    ],
)
def test_compose_path_keeps_special_characters(path, expected):
    assert parse_config(compose(["data=image_folder", f"data.path={path}"])).data.path == expected


@pytest.mark.parametrize("experiment", ["digits", "demo"])
@pytest.mark.parametrize("network", ["unet", "dit", "residual_mlp"])
def test_compose_experiment_accepts_other_network(experiment, network):
    config = parse_config(compose([f"experiment={experiment}", f"expert={network}", "codec=pixels"]))
    assert config.expert.network.kind == network


def test_compose_resources_by_kind_of_stage():
    config = parse_config(compose(["compute.stages.expert.cpus=2"]))
    resources = {stage.name: stage.resources.cpus for stage in build_graph(config)}
    assert resources["expert_0"] == 2 and resources["router"] == 1


def test_inline_backend_with_time_limit_is_an_error():
    with pytest.raises(
        ConfigError, match="timeout_s needs a backend with separate workers, such as ray; got timeout_s=3"
    ):
        parse_config(compose(["compute=inline", "compute.timeout_s=3"]))


def test_parse_config_reports_all_mistakes():
    wrong = {"seed": "x", "data": {"image_sise": 8}, "expert": {"network": {"kind": "unet", "width": 3}}}
    with pytest.raises(ConfigError) as caught:
        parse_config(wrong)
    text = str(caught.value)
    assert text.startswith("3 mistake(s)")
    assert "data.image_sise: unknown key; known here: aspect_buckets, caption" in text
    assert "expert.network.unet.width: unknown key; known here: attention, channels" in text
    assert "seed:" in text and "'x'" in text


def test_parse_config_indivisible_batch_suggests_size():
    with pytest.raises(ConfigError, match="try 245"):
        parse_config({"partition": {"num_experts": 7}})


def test_router_of_samples_with_text_is_an_error():
    with pytest.raises(ConfigError, match="draws no texts.*router.data=real, or text=none"):
        parse_config(compose(["experiment=digits", "text=minilm", "router.data=samples"]))


def test_known_keys_of_nested_configuration():
    assert "lr" in known_keys(("expert", "training"))
    assert known_keys(("expert", "training", "lr")) == []


REFLECTED = ("experiment=digits", "ensemble.reflection.steps=8")


def test_reflection_is_set_without_a_plus_and_has_its_weak_model():
    with pytest.raises(ConfigError, match=r"set expert\.training\.early_checkpoint=0\.5, or"):
        parse_config(compose(REFLECTED))
    with pytest.raises(ConfigError, match="set monolith=true"):
        parse_config(compose([*REFLECTED, "ensemble.reflection.weak=monolith", "monolith=false"]))
    reflection = parse_config(compose([*REFLECTED, "expert.training.early_checkpoint=0.5"])).ensemble.reflection
    assert reflection is not None and (reflection.weak, reflection.steps) == ("early", 8)
    with pytest.raises(ConfigError, match=r"reflection\.step: unknown key; known here: expert_id, path, steps, weak"):
        parse_config(compose(["experiment=digits", "ensemble.reflection.step=8"]))


def test_monolith_as_weak_model_is_an_input_of_scores_and_search():
    config = ["ensemble.reflection.weak=monolith", "monolith=true", "ensemble=auto"]
    stages = {stage.name: stage for stage in build_graph(parse_config(compose([*REFLECTED, *config])))}
    for name in ("score_auto", "selection_search"):
        assert stages[name].inputs["weak"].stage is stages["monolith_ensemble"]
    assert stages["score_monolith"].config.sampling.reflection is None
    plain = {stage.name for stage in build_graph(parse_config(compose(["experiment=digits", *config[1:]])))}
    assert plain == stages.keys()


BOUNDS = "expert.time_bounds=[0.5]"


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("router=density", "router.kind=density"),
        ("router.data=samples", "router.data=samples"),
        ("baselines=[distilled_monolith]", r"baselines=\[distilled_monolith\]"),
        ("expert.training.early_checkpoint=0.5", "expert.training.early_checkpoint"),
        ("quantize=shared_base", "quantize=shared_base"),
        ("prune=laptop", "prune=laptop"),
    ],
)
def test_parts_of_a_run_that_need_one_network_refuse_time_bounds(override, name):
    with pytest.raises(ConfigError, match=rf"{name} needs experts of one network each.*time_bounds=\[0.5\]"):
        parse_config(compose([BOUNDS, override]))


def test_compression_of_a_run_with_time_bounds_is_checked():
    config = parse_config(compose([BOUNDS, "quantize=int8_dynamic", "baselines=[monolith]"]))
    stages = {stage.name: stage.config for stage in build_graph(config)}
    assert stages["expert_0"].expert.time_bounds == (0.5,) and not stages["monolith"].expert.time_bounds
    with pytest.raises(ConfigError, match="distill=sid needs experts of one network each"):
        change_config(config, {"distill": parse_config(compose(["distill=sid"])).distill})
    with pytest.raises(ConfigError, match="must be divisible by 8; got 12; try 16"):
        parse_config(compose([BOUNDS, "partition.num_experts=4", "expert.training.batch_size=12"]))


@pytest.mark.parametrize("key", ["seed", "partition.seed", "expert.training.seed", "scores.seed"])
@pytest.mark.parametrize("value", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_refused(key, value):
    with pytest.raises(ConfigError, match=rf"{key}: Input should be"):
        parse_config(compose([f"{key}={value}"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stitch=auto"], "stitch needs a compressed ensemble"),
        (["distill=mmd", "text=minilm", "data=fashion_captions", "data.labels=false"], "texts are hardly ever equal"),
    ],
)
def test_compressions_without_what_they_need_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(compose(overrides))
    assert parse_config(compose(["stitch=auto", "quantize=int8_dynamic"])).stitch is not None
