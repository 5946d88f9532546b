"""The ready queue: for any graph and order of events, a stage is offered once, after its inputs."""

import time

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pipeline.stage import Input, Stage
from orchestrator.run.ready_queue import ReadyQueue


@st.composite
def graphs(draw):
    """Generate stages whose inputs are any earlier stages."""
    stages = []
    for number in range(draw(st.integers(1, 12))):
        read = draw(st.lists(st.sampled_from(stages), unique_by=id, max_size=3)) if stages else []
        inputs = {source.name: Input(stage=source) for source in read}
        stages.append(Stage(name=f"s{number}", kind=draw(st.sampled_from("ab")), config=number, inputs=inputs))
    return stages


@given(graphs(), st.randoms(use_true_random=False))
def test_dispatch_offers_stages_once_after_their_inputs(graph, random):
    queue, finished, running = ReadyQueue(graph), [], []
    while not queue.is_exhausted() or running:
        queue.dispatch(lambda stage: random.random() < 0.7 and (running.append(stage) or True))
        if running:
            ended = running.pop(random.randrange(len(running)))
            assert all(source.stage.name in finished for source in ended.inputs.values())
            finished.append(ended.name)
            queue.finish(ended.name)
    assert sorted(finished) == sorted(stage.name for stage in graph)


def test_dispatch_refusal_skips_same_demand_only():
    graph = [Stage(name=f"{kind}{number}", kind=kind, config=0) for kind in "ab" for number in range(3)]
    offered = []
    ReadyQueue(graph).dispatch(lambda stage: offered.append(stage.name) or stage.kind == "b")
    assert offered == ["a0", "b0", "b1", "b2"]


def test_lowest_rank_is_offered_first():
    ranks = {"late": 2, "also_late": 2, "first": 0, "long": 1}
    graph = [Stage(name=name, kind="a", config=0, rank=rank) for name, rank in ranks.items()]
    offered = []
    ReadyQueue(graph).dispatch(lambda stage: offered.append(stage.name) or True)
    assert offered == ["first", "long", "late", "also_late"]


def test_requeue_offers_stage_after_its_delay():
    (stage,) = graph = [Stage(name="a", kind="a", config=0)]
    queue = ReadyQueue(graph)
    queue.dispatch(lambda stage: True)
    queue.requeue(stage, time.time() + 0.05, losses=2)
    offered = []
    queue.dispatch(lambda stage: offered.append(stage) or True)
    assert not offered and queue.has_only_delayed() and queue.preemption_count(stage) == 2
    time.sleep(0.06)
    queue.dispatch(lambda stage: offered.append(stage) or True)
    assert offered == [stage] and queue.is_exhausted()


def test_dispatch_never_offers_taken_stages():
    data = Stage(name="data", kind="a", config=0)
    expert = Stage(name="expert", kind="a", config=0, inputs={"data": Input(stage=data)})
    queue, offered = ReadyQueue([data, expert], taken={"expert"}), []
    queue.finish("data")
    queue.dispatch(lambda stage: offered.append(stage.name) or True)
    assert "expert" not in offered
