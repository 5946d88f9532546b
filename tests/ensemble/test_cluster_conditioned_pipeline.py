"""The baseline that is told the cluster, as a pipeline: one network on the disk, one expert for each cluster."""

import pytest
import torch

from ddm_core.artifacts import files_in, read_json, write_json
from ensemble.config import SamplingConfig
from ensemble.evaluation.generate import RowFlops
from ensemble.pipeline import DDMPipeline, PipelineError, assemble
from experts.baselines.cluster_conditioned import ClusterConditionedExpert
from experts.codec import PixelCodec
from experts.config import ResidualMLPConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from router.config import RouterConfig, SelectionConfig
from router.models.registry import build_router
from router.router import Router

SHAPE, CLUSTERS, CLASSES = (1, 4, 4), 3, 2
STICKY = SamplingConfig(solver="heun", steps=3, selection=SelectionConfig(name="sticky"))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    pairs = (CLASSES + 1) * CLUSTERS
    model = build_network(ResidualMLPConfig(width=8, depth=1), SHAPE, pairs).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    shared = Expert(
        model=model,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=SHAPE,
        num_classes=pairs,
        cluster_id=0,
    )
    ClusterConditionedExpert(shared=shared, cluster_id=0, num_clusters=CLUSTERS).save(tmp_path / "trained")
    counts = torch.tensor([[5.0, 1, 1], [1, 5, 1], [6, 6, 2]], dtype=torch.float64)
    network = build_router(RouterConfig(width=8, depth=1), SHAPE, CLUSTERS, CLASSES)
    Router(model=network, noise_schedule=RECTIFIED_FLOW, prior_counts=counts).save(tmp_path / "router")
    (tmp_path / "codec").mkdir()
    PixelCodec(image_shape=(4, 4, 1)).save(tmp_path / "codec")
    trained = dict.fromkeys(range(CLUSTERS), tmp_path / "trained")
    assemble(trained, tmp_path / "router", tmp_path / "codec", tmp_path / "pipeline", class_names=("a", "b"))
    return tmp_path / "pipeline"


def test_it_is_stored_once_and_sampled_with_one_call_a_step(folder):
    assert sum(path.suffix == ".safetensors" for path in files_in(folder / "cluster_conditioned")) == 1
    assert not (folder / "expert_0").exists()
    pipeline = DDMPipeline.from_pretrained(folder)
    assert sorted(pipeline.ensemble.experts) == [0, 1, 2]
    assert pipeline.num_classes == CLASSES
    drawn = pipeline(range(40), STICKY, [0, 1] * 20)
    assert drawn.calls_per_step == 1 and drawn.calls.router == 0
    assert set(drawn.calls.experts) == {0, 1, 2}
    costs = RowFlops.of(pipeline)
    assert costs.experts[0] == costs.experts[2] > 0


def test_what_is_saved_again_is_the_same(folder, tmp_path):
    pipeline = DDMPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "again")
    again = DDMPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(again(range(4), STICKY).images, pipeline(range(4), STICKY).images)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )


def test_a_cluster_that_it_was_not_told_of_is_an_error(folder):
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"experts": [0, 1, 2, 3]})
    with pytest.raises(PipelineError, match=r"not told of the clusters \[3\]"):
        DDMPipeline.from_pretrained(folder)
