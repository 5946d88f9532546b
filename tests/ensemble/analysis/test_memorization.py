"""The audit detects images_with_copies copies and their expert, and accepts new images."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_partition.config import DataConfig, PartitionConfig
from data_partition.datasets.build import build_dataset
from data_partition.features.extract import extract_features, fit_extractor, save_extractor
from data_partition.partition import load_partition, make_partition
from data_partition.shards.shards import read_samples
from ddm_core.artifacts import Workspace, read_json, write_json
from ensemble.analysis.memorization import AuditedSamples, audit_samples, load_spaces, pinned_experts
from ensemble.config import AuditConfig
from ensemble.ensemble import Ensemble
from experts.codec import PixelCodec
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig
from tests.oracles import MixtureOfGaussians

CODEC = PixelCodec(image_shape=(8, 8, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Digits, divided in second, and the extractors of a reference."""
    root = tmp_path_factory.mktemp("audit")
    work = Workspace.at(root / "work")
    build_dataset(DataConfig(source="digits", image_size=8, limit=700, holdout=0.3), root / "data", work)
    config = PartitionConfig(num_experts=2, components=8)
    for name in ("features", "partition", "reference"):
        (root / name).mkdir()
    extract_features(config, root / "data", root / "features", work)
    make_partition(config, root / "data", root / "features", root / "partition", work)
    for name in ("pixels", "random_conv"):
        extractor = fit_extractor(name, root / "data" / "train", 8, 0)
        save_extractor(name, extractor, root / "reference" / "extractors" / name)
    write_json(root / "reference" / "reference.json", {"config": {"spaces": ["pixels", "random_conv"]}})
    return root


@pytest.fixture(scope="module")
def new_images():
    """150 digits that are not in the data set."""
    return np.round(load_digits().images[1500:1650] * (255 / 16)).astype(np.uint8)[..., None]


def run_audit(root, images, out, experts=None):
    samples = AuditedSamples(images=images, seeds=np.arange(100, 100 + len(images)), experts=experts, codec=CODEC)
    folders = (root / "data", root / "partition", root / "reference")
    return audit_samples(samples, *folders, AuditConfig(), out)


@pytest.fixture(scope="module")
def images_with_copies(root, new_images):
    """Twelve training images of cluster 1 among the new ones."""
    training = list(read_samples(root / "data" / "train"))
    clusters = load_partition(root / "partition").assign_images(np.stack([sample.image for sample in training]))
    copies = [sample for sample, k in zip(training, clusters, strict=True) if k == 1][:12]
    return np.concatenate([new_images, np.stack([sample.image for sample in copies])]), [copy.key for copy in copies]


def test_new_images_are_not_near(root, new_images, tmp_path):
    audit = run_audit(root, new_images, tmp_path)
    assert audit.training == len(list(read_samples(root / "data" / "train")))
    for space in audit.spaces.values():
        assert space.overall.ratio == pytest.approx(1, abs=0.2)
        assert all(share.p_value > 0.001 for row in (space.overall, *space.clusters) for share in row.shares)


def test_copies_count_for_the_expert_of_their_cluster(root, images_with_copies, tmp_path):
    images, keys = images_with_copies
    audit = run_audit(root, images, tmp_path)
    assert set(audit.spaces) == {"pixels", "random_conv"} and audit.made_by == "looks"
    held_out_counts = read_json(root / "partition" / "balance.json")["holdout_looks"]
    for space in audit.spaces.values():
        assert [cluster.held_out for cluster in space.clusters] == held_out_counts
        other_cluster, copied_cluster = space.clusters
        assert (
            copied_cluster.shares[0].p_value < 0.001
            and copied_cluster.shares[0].low > copied_cluster.shares[0].expected
        )
        assert other_cluster.shares[0].p_value > 0.001
        assert other_cluster.samples + copied_cluster.samples == len(images) == space.overall.samples
    assert {suspect.training_key for suspect in audit.suspects} <= set(keys) and len(audit.suspects) == 8
    assert all(suspect.ratio == 0 and suspect.seed >= 250 and suspect.cluster_id == 1 for suspect in audit.suspects)


def test_samples_with_known_experts_count_for_them(root, images_with_copies, tmp_path):
    images, _ = images_with_copies
    audit = run_audit(root, images, tmp_path, experts=np.zeros(len(images), np.int64))
    assert audit.made_by == "draw"
    copied_cluster, other_cluster = audit.spaces["pixels"].clusters
    assert copied_cluster.shares[0].p_value < 0.005 and (other_cluster.samples, other_cluster.shares) == (0, ())


def test_audit_is_deterministic_and_shows_pairs(root, images_with_copies, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        run_audit(root, images_with_copies[0], tmp_path / name)
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    picture = np.asarray(Image.open(tmp_path / "first" / "suspects.png"))
    assert picture.shape == (17, 71)
    np.testing.assert_array_equal(picture[:8], picture[9:])
    assert read_json(tmp_path / "first" / "audit.json")["spaces"]["pixels"]["overall"]["samples"] == 162


def test_second_space_is_the_first_other_than_pixels(root):
    assert list(load_spaces(root / "reference")) == ["pixels", "random_conv"]


@pytest.mark.parametrize(("name", "is_known"), [("sticky", True), ("full", False), ("sticky_resample", False)])
def test_pinned_experts_are_known_for_sticky_only(name, is_known):
    mixture = MixtureOfGaussians((0.5, 0.3, 0.2))
    ensemble = Ensemble(experts=mixture.experts(), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    expert_ids = pinned_experts(ensemble, range(2000), None, SelectionConfig(name=name))
    assert (expert_ids is not None) == is_known
    if expert_ids is not None:
        np.testing.assert_allclose(np.bincount(expert_ids) / 2000, (0.5, 0.3, 0.2), atol=0.04)


def test_pinned_experts_of_a_monolith_are_unknown():
    alone = Ensemble(experts={0: MixtureOfGaussians((1.0,)).experts()[0]}, noise_schedule=RECTIFIED_FLOW)
    assert pinned_experts(alone, range(5), None, SelectionConfig(name="sticky")) is None
