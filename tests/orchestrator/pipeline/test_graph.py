"""The graph is a pure function of the configuration, and a change reaches what depends on it and nothing else."""

from dataclasses import replace
from typing import get_args

import pytest

from orchestrator.config.schema import RunConfig, ScoresConfig
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import without
from router.config import RouterConfig, SelectionConfig, SelectionName, selection_label


def changed_by(before: RunConfig, after: RunConfig) -> set[str]:
    old = {stage.name: stage.fingerprint for stage in build_graph(before)}
    return {stage.name for stage in build_graph(after) if old.get(stage.name) != stage.fingerprint}


def with_training(config, **changes):
    return replace(config, training=replace(config.training, **changes))


def test_the_same_configuration_gives_the_same_fingerprints():
    assert changed_by(RunConfig(), RunConfig()) == set()


def test_every_stage_stands_behind_its_inputs_and_names_are_unique():
    graph = build_graph(RunConfig())
    seen = set()
    for stage in graph:
        assert {given.stage.name for given in stage.inputs.values()} <= seen
        assert stage.name not in seen
        seen.add(stage.name)


def test_a_router_value_changes_the_router_and_what_holds_it():
    config = RunConfig()
    after = replace(config, router=with_training(config.router, lr=0.5))
    assert changed_by(config, after) == {"router", "ensemble", "score_sticky"}


def test_the_routers_cost_changes_the_monolith_too():
    config = RunConfig()
    after = replace(config, router=with_training(config.router, steps=7))
    assert {"router", "monolith"} <= changed_by(config, after)


def test_an_expert_value_leaves_data_partition_and_router_alone():
    config = RunConfig()
    changed = changed_by(config, replace(config, expert=with_training(config.expert, lr=0.5)))
    assert changed.isdisjoint({"dataset", "features", "partition", "router", "codec", "reference"})
    assert "expert_0" in changed


def test_another_number_of_experts_finds_the_features_finished():
    config = RunConfig()
    after = replace(config, partition=replace(config.partition, num_experts=2))
    assert changed_by(config, after).isdisjoint({"dataset", "features", "codec", "reference"})


def test_how_it_is_computed_changes_nothing():
    config = RunConfig()
    assert changed_by(config, replace(config, compute=replace(config.compute, backend="inline", retries=9))) == set()


def test_an_expert_is_given_its_own_shards_and_no_others():
    for stage in build_graph(RunConfig()):
        if stage.kind == "expert":
            assert stage.inputs["shards"].part == f"clusters/{stage.config.cluster_id}"
            assert set(stage.inputs) == {"shards", "codec"}


def test_the_router_does_not_wait_for_the_experts():
    router = next(stage for stage in build_graph(RunConfig()) if stage.kind == "router")
    assert {given.stage.kind for given in router.inputs.values()} == {"partition", "codec"}


def test_the_batch_is_divided_by_k_and_the_steps_stay():
    config = RunConfig()
    graph = {stage.name: stage for stage in build_graph(config)}
    expert, monolith = graph["expert_0"].config.expert.training, graph["monolith"].config.expert.training
    assert expert.batch_size * config.partition.num_experts == monolith.batch_size
    assert expert.steps == monolith.steps


def test_one_expert_needs_no_router():
    config = RunConfig()
    graph = build_graph(replace(config, partition=replace(config.partition, num_experts=1)))
    assert "router" not in {stage.kind for stage in graph}


@pytest.mark.parametrize("name", get_args(SelectionName))
def test_every_selection_has_a_row(name):
    selection = SelectionConfig(name=name)
    graph = build_graph(RunConfig(scores=ScoresConfig(selections=(selection,))))
    assert f"score_{selection_label(selection)}" in {stage.name for stage in graph}


def test_two_settings_of_one_selection_have_two_names():
    assert selection_label(SelectionConfig(name="top_k", k=1)) != selection_label(SelectionConfig(name="top_k", k=2))


def test_without_rebuilds_only_what_read_the_lost_stage():
    graph = build_graph(RunConfig())
    rest = {stage.name: stage for stage in without(graph, "expert_1")}
    before = {stage.name: stage for stage in graph}
    assert "expert_1" not in rest
    assert rest["ensemble"].fingerprint != before["ensemble"].fingerprint
    assert rest["monolith"].fingerprint == before["monolith"].fingerprint


def test_router_path_must_be_the_experts(tmp_path):
    with pytest.raises(ValueError, match="same path"):
        RunConfig(router=RouterConfig(noise_schedule="cosine"))


def auto(config: RunConfig) -> RunConfig:
    return replace(config, ensemble=replace(config.ensemble, selection=SelectionConfig(name="auto")))


def test_auto_puts_a_choice_between_the_ensemble_and_its_score():
    graph = {stage.name: stage for stage in build_graph(auto(RunConfig()))}
    choice, score = graph["selection_search"], graph["score_auto"]
    assert {role: given.stage.name for role, given in choice.inputs.items()} == {
        "ensemble": "ensemble",
        "reference": "reference",
    }
    assert score.inputs["selection_search"].stage is choice
    assert [stage.name for stage in build_graph(RunConfig()) if "selection_search" in (stage.kind, *stage.inputs)] == []


def test_the_candidates_change_the_choice_and_its_score_alone():
    config = auto(RunConfig())
    after = replace(config, selection_search=replace(config.selection_search, steps=3))
    assert changed_by(config, after) == {"selection_search", "score_auto"}
    assert changed_by(RunConfig(), replace(RunConfig(), selection_search=after.selection_search)) == set()


def test_a_score_beside_the_default_can_be_autos_too():
    scores = ScoresConfig(selections=(SelectionConfig(), SelectionConfig(name="auto")))
    kinds = [stage.kind for stage in build_graph(RunConfig(scores=scores))]
    assert kinds.count("selection_search") == 1


def test_an_expert_alone_leaves_no_choice():
    config = auto(RunConfig())
    graph = build_graph(replace(config, partition=replace(config.partition, num_experts=1)))
    choice = next(stage for stage in graph if stage.kind == "selection_search")
    assert [candidate.name for candidate in choice.config.choice.candidates] == ["sticky"]


def test_auto_needs_two_feature_spaces():
    with pytest.raises(ValueError, match="auto needs two feature spaces.*only pixels"):
        auto(RunConfig(scores=ScoresConfig(spaces=("pixels",))))
