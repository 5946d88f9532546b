"""The frontier: whatever the graph and the order of events, a stage is offered once, and behind its inputs."""

import time

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pipeline.stage import Input, Stage
from orchestrator.run.ready_queue import ReadyQueue


@st.composite
def graphs(draw):
    """Stages that read any of those before them."""
    stages = []
    for number in range(draw(st.integers(1, 12))):
        read = draw(st.lists(st.sampled_from(stages), unique_by=id, max_size=3)) if stages else []
        inputs = {one.name: Input(stage=one) for one in read}
        stages.append(Stage(name=f"s{number}", kind=draw(st.sampled_from("ab")), config=number, inputs=inputs))
    return stages


@given(graphs(), st.randoms(use_true_random=False))
def test_every_stage_is_offered_once_and_behind_its_inputs(graph, random):
    frontier, finished, running = ReadyQueue(graph), [], []
    while not frontier.is_exhausted() or running:
        frontier.dispatch(lambda stage: random.random() < 0.7 and (running.append(stage) or True))
        if running:
            ended = running.pop(random.randrange(len(running)))
            assert all(given.stage.name in finished for given in ended.inputs.values())
            finished.append(ended.name)
            frontier.finish(ended.name)
    assert sorted(finished) == sorted(stage.name for stage in graph)


def test_a_refusal_holds_for_the_same_demand_only():
    graph = [Stage(name=f"{kind}{number}", kind=kind, config=0) for kind in "ab" for number in range(3)]
    offered = []
    ReadyQueue(graph).dispatch(lambda stage: offered.append(stage.name) or stage.kind == "b")
    assert offered == ["a0", "b0", "b1", "b2"]


def test_a_stage_that_was_given_back_comes_again_when_its_time_has_come():
    (stage,) = graph = [Stage(name="a", kind="a", config=0)]
    frontier = ReadyQueue(graph)
    frontier.dispatch(lambda stage: True)
    frontier.requeue(stage, time.time() + 0.05, losses=2)
    offered = []
    frontier.dispatch(lambda stage: offered.append(stage) or True)
    assert not offered and frontier.only_delayed() and frontier.preemption_count(stage) == 2
    time.sleep(0.06)
    frontier.dispatch(lambda stage: offered.append(stage) or True)
    assert offered == [stage] and frontier.is_exhausted()


def test_a_stage_that_was_taken_over_is_not_offered_when_its_inputs_are_found_finished():
    data = Stage(name="data", kind="a", config=0)
    expert = Stage(name="expert", kind="a", config=0, inputs={"data": Input(stage=data)})
    frontier, offered = ReadyQueue([data, expert], taken={"expert"}), []
    frontier.finish("data")
    frontier.dispatch(lambda stage: offered.append(stage.name) or True)
    assert "expert" not in offered
