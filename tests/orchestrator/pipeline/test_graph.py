"""The graph is a pure function of the configuration; a change reaches its dependents and no other stage."""

from collections import deque
from dataclasses import replace
from typing import get_args

import pytest

from experts.config import CodecConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, ScoresConfig, parse_config
from orchestrator.pipeline import graph as graph_module
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import remove_stage
from orchestrator.reporting.results import current_graph, find_pipeline, load_score_rows
from orchestrator.sweeps.trial import is_run_finished
from router.config import RouterConfig, SelectionConfig, SelectionName, selection_label
from tests.orchestrator.sweeps.fake_sweep import build_fake_trial
from tests.orchestrator.sweeps.fake_trial import run_fake_trial


def changed_by(before: RunConfig, after: RunConfig) -> set[str]:
    old = {stage.name: stage.fingerprint for stage in build_graph(before)}
    return {stage.name for stage in build_graph(after) if old.get(stage.name) != stage.fingerprint}


def with_training(config, **changes):
    return replace(config, training=replace(config.training, **changes))


@pytest.fixture
def built_graphs(monkeypatch):
    """Count the graphs that are built, from an empty cache."""
    configs = []

    class CountingBuilder(graph_module._GraphBuilder):
        def __init__(self, config):
            configs.append(config)
            super().__init__(config)

    monkeypatch.setattr(graph_module, "_GraphBuilder", CountingBuilder)
    monkeypatch.setattr(graph_module, "_recent_graphs", deque(maxlen=8))
    return configs


def test_equal_configurations_have_equal_fingerprints(monkeypatch):
    monkeypatch.setattr(graph_module, "_recent_graphs", deque(maxlen=0))
    assert changed_by(RunConfig(), RunConfig()) == set()


def test_stages_follow_their_inputs_and_names_are_unique():
    graph = build_graph(RunConfig())
    earlier = set()
    for stage in graph:
        assert {artifact.stage.name for artifact in stage.inputs.values()} <= earlier
        assert stage.name not in earlier
        earlier.add(stage.name)


def test_router_change_reaches_router_and_ensemble_only():
    config = RunConfig()
    after = replace(config, router=with_training(config.router, lr=0.5))
    assert changed_by(config, after) == {"router", "ensemble", "score_sticky"}


def test_router_cost_change_reaches_monolith():
    config = RunConfig(monolith=True)
    after = replace(config, router=with_training(config.router, steps=7))
    assert {"router", "monolith"} <= changed_by(config, after)


def test_expert_change_leaves_data_and_router_unchanged():
    config = RunConfig()
    changed = changed_by(config, replace(config, expert=with_training(config.expert, lr=0.5)))
    assert changed.isdisjoint({"dataset", "features", "partition", "router", "codec", "reference"})
    assert "expert_0" in changed


@pytest.mark.parametrize("kind", ["pca", "patch_pca"])
def test_only_samples_and_scores_wait_for_the_decoder(kind):
    plain = RunConfig(codec=CodecConfig(kind=kind, components=24, whitening=0.5))
    config = replace(plain, codec=replace(plain.codec, kind=f"{kind}_conv"))
    readers = {"ensemble", "reference", "score_sticky"}
    assert changed_by(plain, config) == {"decoder"} | readers
    assert changed_by(config, replace(config, codec=with_decoder_steps(config.codec, 7))) == {"decoder"} | readers
    assert "decoder" not in {stage.name for stage in build_graph(plain)}


def with_decoder_steps(codec, steps):
    return replace(codec, decoder_training=replace(codec.decoder_training, steps=steps))


def test_number_of_experts_leaves_features_unchanged():
    config = RunConfig()
    after = replace(config, partition=replace(config.partition, num_experts=2))
    assert changed_by(config, after).isdisjoint({"dataset", "features", "codec", "reference"})


def test_compute_settings_change_no_fingerprint():
    config = RunConfig()
    assert changed_by(config, replace(config, compute=replace(config.compute, backend="inline", retries=9))) == set()


def test_expert_reads_only_the_latents_of_its_cluster():
    for stage in build_graph(RunConfig()):
        if stage.kind == "expert":
            assert stage.inputs["latents"].part == f"latents/{stage.config.cluster_id}"
            assert stage.inputs["holdout"].part == f"holdout_latents/{stage.config.cluster_id}"
            assert set(stage.inputs) == {"latents", "codec", "holdout"}
            without = {role: source for role, source in stage.inputs.items() if role != "holdout"}
            assert replace(stage, inputs=without).fingerprint == stage.fingerprint


def test_router_does_not_depend_on_experts():
    router = next(stage for stage in build_graph(RunConfig()) if stage.kind == "router")
    assert {artifact.stage.kind for artifact in router.inputs.values()} == {"partition", "codec"}


def test_router_density_reads_all_experts():
    config = RunConfig(router=RouterConfig(kind="density"))
    router = next(stage for stage in build_graph(config) if stage.kind == "router")
    experts = {f"expert_{k}" for k in range(config.partition.num_experts)}
    assert set(router.inputs) == experts | {"codec", "clusters", "holdouts"}


def test_expert_batch_is_divided_by_k_with_equal_steps():
    config = RunConfig(monolith=True)
    graph = {stage.name: stage for stage in build_graph(config)}
    expert, monolith = graph["expert_0"].config.expert.training, graph["monolith"].config.expert.training
    assert expert.batch_size * config.partition.num_experts == monolith.batch_size
    assert expert.steps == monolith.steps


def test_monolith_is_trained_only_on_request():
    names = {stage.name for stage in build_graph(RunConfig())}
    added = {"monolith", "monolith_ensemble", "score_monolith"}
    for config in (RunConfig(monolith=True), RunConfig(baselines=("monolith",))):
        assert {stage.name for stage in build_graph(config)} - names == added
    for refusal in ("monolith=false", "baselines=[]"):
        graph = build_graph(parse_config(compose(["experiment=digits", refusal])))
        assert added.isdisjoint({stage.name for stage in graph})


def test_single_expert_has_no_router():
    config = RunConfig()
    graph = build_graph(replace(config, partition=replace(config.partition, num_experts=1)))
    assert "router" not in {stage.kind for stage in graph}


@pytest.mark.parametrize("name", get_args(SelectionName))
def test_every_selection_has_a_score(name):
    selection = SelectionConfig(name=name)
    graph = build_graph(RunConfig(scores=ScoresConfig(selections=(selection,))))
    assert f"score_{selection_label(selection)}" in {stage.name for stage in graph}


def test_selection_settings_have_different_labels():
    assert selection_label(SelectionConfig(name="top_k", k=1)) != selection_label(SelectionConfig(name="top_k", k=2))


def test_remove_stage_rebuilds_only_its_dependents():
    graph = build_graph(RunConfig(monolith=True))
    rest = {stage.name: stage for stage in remove_stage(graph, "expert_1")}
    before = {stage.name: stage for stage in graph}
    assert "expert_1" not in rest
    assert rest["ensemble"].fingerprint != before["ensemble"].fingerprint
    assert rest["monolith"].fingerprint == before["monolith"].fingerprint


def test_different_noise_schedules_are_rejected():
    with pytest.raises(ValueError, match="same noise schedule"):
        RunConfig(router=RouterConfig(noise_schedule="cosine"))


def with_auto_selection(config: RunConfig) -> RunConfig:
    return replace(config, ensemble=replace(config.ensemble, selection=SelectionConfig(name="auto")))


def test_auto_adds_selection_search_before_score():
    graph = {stage.name: stage for stage in build_graph(with_auto_selection(RunConfig()))}
    search, score = graph["selection_search"], graph["score_auto"]
    assert {role: artifact.stage.name for role, artifact in search.inputs.items()} == {
        "ensemble": "ensemble",
        "reference": "reference",
    }
    assert score.inputs["selection_search"].stage is search
    assert [stage.name for stage in build_graph(RunConfig()) if "selection_search" in (stage.kind, *stage.inputs)] == []


def test_candidates_change_only_search_and_its_score():
    config = with_auto_selection(RunConfig())
    after = replace(config, selection_search=replace(config.selection_search, steps=3))
    assert changed_by(config, after) == {"selection_search", "score_auto"}
    assert changed_by(RunConfig(), replace(RunConfig(), selection_search=after.selection_search)) == set()


def test_additional_score_can_use_auto():
    scores = ScoresConfig(selections=(SelectionConfig(), SelectionConfig(name="auto")))
    kinds = [stage.kind for stage in build_graph(RunConfig(scores=scores))]
    assert kinds.count("selection_search") == 1


def test_changed_ensemble_is_scored_like_the_original():
    scores = ScoresConfig(selections=(SelectionConfig(name="full"), SelectionConfig(name="auto")))
    graph = {stage.name: stage for stage in build_graph(RunConfig(scores=scores, from_ensemble="content"))}
    for suffix in ("", "_full", "_auto"):
        own, changed = graph[f"score{suffix or '_sticky'}"], graph[f"score_from_ensemble{suffix}"]
        assert changed.config == own.config and changed.inputs.keys() == own.inputs.keys()
        assert changed.inputs["ensemble"].stage.name == "from_ensemble"


def test_single_expert_leaves_one_candidate():
    config = with_auto_selection(RunConfig())
    graph = build_graph(replace(config, partition=replace(config.partition, num_experts=1)))
    search = next(stage for stage in graph if stage.kind == "selection_search")
    assert [candidate.name for candidate in search.config.search.candidates] == ["sticky"]


def test_auto_needs_two_feature_spaces():
    with pytest.raises(ValueError, match="auto needs efficientnet_lite0 and another feature space.*only pixels"):
        with_auto_selection(RunConfig(scores=ScoresConfig(spaces=("pixels",))))


def test_equal_configurations_share_one_graph(built_graphs):
    first, second = build_graph(RunConfig()), build_graph(RunConfig())
    assert len(built_graphs) == 1 and first is not second
    assert all(left is right for left, right in zip(first, second, strict=True))
    build_graph(RunConfig(seed=1))
    assert len(built_graphs) == 2


def test_commands_on_a_run_build_its_graph_once(built_graphs, tmp_path):
    trial = build_fake_trial(tmp_path, 0, {})
    trial.run.save_config(trial.config)
    assert run_fake_trial(trial.run) == 0 and len(built_graphs) == 1
    built_graphs.clear()
    graph_module._recent_graphs.clear()
    assert find_pipeline(trial.run, monolith=False).is_dir()
    assert load_score_rows(trial.run, current_graph(trial.run, trial.run.load_config()))
    assert is_run_finished(trial.run, trial.run.load_config())
    assert len(built_graphs) == 1
