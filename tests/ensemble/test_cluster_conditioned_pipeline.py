"""The cluster-conditioned baseline as a pipeline: one network on disk, one expert per cluster."""

import pytest
import torch

from ddm_core.artifacts import list_files, read_json, write_json
from ensemble.config import SamplingConfig
from ensemble.evaluation.generate import RowFlops
from ensemble.pipeline import EnsemblePipeline, assemble
from ensemble.pipeline_folder import PipelineError
from ensemble.sampling.prompts import Prompts
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


def test_shared_network_is_stored_once_and_called_once(folder):
    assert sum(path.suffix == ".safetensors" for path in list_files(folder / "cluster_conditioned")) == 1
    assert not (folder / "expert_0").exists()
    pipeline = EnsemblePipeline.from_pretrained(folder)
    assert sorted(pipeline.ensemble.experts) == [0, 1, 2]
    assert pipeline.num_classes == CLASSES
    result = pipeline(range(40), STICKY, Prompts.of_classes([0, 1] * 20))
    assert result.calls_per_step == 1 and result.calls.router == 0
    assert set(result.calls.experts) == {0, 1, 2}
    costs = RowFlops.measure(pipeline)
    assert costs.experts[0] == costs.experts[2] > 0


def test_saved_pipeline_gives_the_same_samples(folder, tmp_path):
    pipeline = EnsemblePipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "again")
    again = EnsemblePipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(again(range(4), STICKY).images, pipeline(range(4), STICKY).images)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )


def test_unknown_cluster_raises(folder):
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"experts": [0, 1, 2, 3]})
    with pytest.raises(PipelineError, match=r"trained on 3 clusters, and model_index.json lists experts \[3\]"):
        EnsemblePipeline.from_pretrained(folder)
