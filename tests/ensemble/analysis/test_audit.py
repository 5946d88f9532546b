"""The audit finds the copies that were planted, names who made them, and lets fresh images be."""

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
from ensemble.analysis.memorization import AuditedSamples, audit_samples, audit_spaces, drawn_experts
from ensemble.config import AuditConfig
from ensemble.ensemble import Ensemble
from experts.codec import PixelCodec
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig
from tests.oracles import MixtureOfGaussians

CODEC = PixelCodec(image_shape=(8, 8, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Digits, divided in two, and the extractors of a reference."""
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
def fresh():
    """150 digits that the data set has never seen."""
    return np.round(load_digits().images[1500:1650] * (255 / 16)).astype(np.uint8)[..., None]


def audited(root, images, out, experts=None):
    samples = AuditedSamples(images=images, seeds=np.arange(100, 100 + len(images)), experts=experts, codec=CODEC)
    folders = (root / "data", root / "partition", root / "reference")
    return audit_samples(samples, *folders, AuditConfig(), out)


@pytest.fixture(scope="module")
def planted(root, fresh):
    """Twelve training images of cluster 1 among the fresh ones."""
    training = list(read_samples(root / "data" / "train"))
    clusters = load_partition(root / "partition").assign_images(np.stack([sample.image for sample in training]))
    copies = [sample for sample, k in zip(training, clusters, strict=True) if k == 1][:12]
    return np.concatenate([fresh, np.stack([sample.image for sample in copies])]), [copy.key for copy in copies]


def test_fresh_images_are_no_copies(root, fresh, tmp_path):
    found = audited(root, fresh, tmp_path)
    assert found.training == len(list(read_samples(root / "data" / "train")))
    for space in found.spaces.values():
        assert space.overall.ratio == pytest.approx(1, abs=0.2)
        assert all(share.p_value > 0.001 for row in (space.overall, *space.clusters) for share in row.shares)


def test_copies_are_found_and_counted_for_the_expert_of_their_cluster(root, planted, tmp_path):
    images, keys = planted
    found = audited(root, images, tmp_path)
    assert set(found.spaces) == {"pixels", "random_conv"} and found.made_by == "looks"
    looks = read_json(root / "partition" / "balance.json")["holdout_looks"]
    for space in found.spaces.values():
        assert [cluster.held_out for cluster in space.clusters] == looks
        innocent, guilty = space.clusters
        assert guilty.shares[0].p_value < 0.001 and guilty.shares[0].low > guilty.shares[0].expected
        assert innocent.shares[0].p_value > 0.001
        assert innocent.samples + guilty.samples == len(images) == space.overall.samples
    assert {suspect.training_key for suspect in found.suspects} <= set(keys) and len(found.suspects) == 8
    assert all(suspect.ratio == 0 and suspect.seed >= 250 and suspect.cluster_id == 1 for suspect in found.suspects)


def test_where_the_draw_is_known_a_sample_counts_for_its_expert(root, planted, tmp_path):
    images, _ = planted
    found = audited(root, images, tmp_path, experts=np.zeros(len(images), np.int64))
    assert found.made_by == "draw"
    guilty, innocent = found.spaces["pixels"].clusters
    assert guilty.shares[0].p_value < 0.005 and (innocent.samples, innocent.shares) == (0, ())


def test_the_same_bytes_are_written_twice_and_the_picture_shows_pairs(root, planted, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        audited(root, planted[0], tmp_path / name)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    picture = np.asarray(Image.open(tmp_path / "one" / "suspects.png"))
    assert picture.shape == (17, 71)
    np.testing.assert_array_equal(picture[:8], picture[9:])
    assert read_json(tmp_path / "one" / "audit.json")["spaces"]["pixels"]["overall"]["samples"] == 162


def test_the_second_space_is_the_references_first_that_is_not_pixels(root):
    assert list(audit_spaces(root / "reference")) == ["pixels", "random_conv"]


@pytest.mark.parametrize(("name", "is_known"), [("sticky", True), ("full", False), ("sticky_resample", False)])
def test_who_made_a_sample_is_known_if_it_was_drawn_once(name, is_known):
    mixture = MixtureOfGaussians((0.5, 0.3, 0.2))
    ensemble = Ensemble(experts=mixture.experts(), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    drawn = drawn_experts(ensemble, range(2000), None, SelectionConfig(name=name))
    assert (drawn is not None) == is_known
    if drawn is not None:
        np.testing.assert_allclose(np.bincount(drawn) / 2000, (0.5, 0.3, 0.2), atol=0.04)


def test_a_single_expert_has_made_everything_so_looks_tell_more():
    alone = Ensemble(experts={0: MixtureOfGaussians((1.0,)).experts()[0]}, noise_schedule=RECTIFIED_FLOW)
    assert drawn_experts(alone, range(5), None, SelectionConfig(name="sticky")) is None
