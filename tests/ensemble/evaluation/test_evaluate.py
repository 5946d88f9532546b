"""Evaluation end to end on digits: deterministic, and sensitive to defects of the samples."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from data_partition.config import DataConfig, PartitionConfig
from data_partition.datasets.build import build_dataset
from data_partition.features.extract import extract_features
from data_partition.features.pixels import flatten_pixels
from data_partition.partition import make_partition
from data_partition.shards.shards import ShardWriter, read_index, read_samples
from ddm_core.artifacts import Preempted, Workspace, list_files, read_json, write_json
from ddm_core.files.checksums import checksum
from ensemble.analysis.memorization import AuditedSamples, audit_samples
from ensemble.config import (
    TRAJECTORIES,
    AuditConfig,
    EvaluationConfig,
    ReflectionConfig,
    SamplingConfig,
    SelectionSearchConfig,
)
from ensemble.evaluation import selection_search
from ensemble.evaluation.evaluate import HELD_OUT_CALLS, evaluate, measure_ensemble
from ensemble.evaluation.feature_space import HeldOutSpace
from ensemble.evaluation.generate import generate
from ensemble.evaluation.reference import PROBE, EvaluationError, build_reference, fit_config_to, warn_if_lossy
from ensemble.evaluation.scores import Distances
from ensemble.evaluation.scoring import Reference, compare_clusters
from ensemble.pipeline import assemble
from experts.codecs.registry import fit_codec, load_codec
from experts.config import CodecConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert, train_expert
from experts.training.held_out import measure_held_out
from experts.training.latents.divide import divide_latents
from experts.training.latents.encode import encode_dataset
from experts.training.latents.folder import read_latents
from experts.training.latents.shard_encoder import FrozenCodec
from router.config import RouterConfig, SelectionConfig
from router.train import train_router

CONFIG = EvaluationConfig(num_samples=150, components=16, spaces=("efficientnet_lite0", "pixels"))
FEATURES = "efficientnet_lite0"
SAMPLING = SamplingConfig(steps=4, batch_size=64)
TRAINING = TrainingConfig(steps=40, batch_size=64, warmup_steps=5)
NETWORK = ResidualMLPConfig(width=32, depth=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def dataset(root) -> Path:
    build_dataset(DataConfig(source="digits", image_size=8, limit=900), root / "data", Workspace.at(root / "work_data"))
    return root / "data"


@pytest.fixture(scope="module")
def partition(root, dataset, codec) -> Path:
    config, work = PartitionConfig(num_experts=2, components=16), Workspace.at(root / "work_partition")
    for name in ("features", "partition"):
        (root / name).mkdir()
    extract_features(config, dataset, root / "features", work)
    make_partition(config, dataset, root / "features", root / "partition", work)
    codec = FrozenCodec.open(codec, load_codec(codec))
    encode_dataset(dataset, codec, None, root / "latents", Workspace.at(root / "work_latents"))
    holdouts = [root / "partition" / "holdout" / str(k) for k in range(2)]
    divide_latents(root / "latents" / "holdout", holdouts, root / "partition" / "holdout_latents")
    return root / "partition"


@pytest.fixture(scope="module")
def codec(root, dataset) -> Path:
    (root / "codec").mkdir()
    fit_codec(CodecConfig(components=16), dataset / "train", root / "codec", Workspace.at(root / "work_codec"))
    return root / "codec"


@pytest.fixture(scope="module")
def reference(root, dataset, codec) -> Path:
    build_reference(dataset, codec, CONFIG, root / "reference", Workspace.at(root / "work_reference"))
    return root / "reference"


@pytest.fixture(scope="module")
def pipeline(root, partition, codec) -> Path:
    """Two briefly trained experts and their router."""
    clusters = [partition / "clusters" / str(k) for k in range(2)]
    config = ExpertConfig(network=NETWORK, training=TRAINING)
    for k, cluster in enumerate(clusters):
        work = Workspace.at(root / f"work_expert_{k}")
        train_expert(config, [cluster], codec, root / f"expert_{k}", work, num_classes=10, cluster_id=k)
    holdouts = [partition / "holdout" / str(k) for k in range(2)]
    routing = RouterConfig(width=16, depth=1, training=TRAINING)
    (root / "router").mkdir()
    train_router(
        routing, clusters, codec, holdouts, root / "router", Workspace.at(root / "work_router"), num_classes=10
    )
    assemble({k: root / f"expert_{k}" for k in range(2)}, root / "router", codec, root / "pipeline")
    return root / "pipeline"


def load_images(folder: Path):
    """Return all images of a folder of shards, and their labels."""
    samples = list(read_samples(folder))
    return np.stack([sample.image for sample in samples]), np.array([sample.label for sample in samples])


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): checksum(path) for path in list_files(folder)}


def score(reference: Path, images):
    """Return the scores of any images: EfficientNet features, classes, copies."""
    loaded = Reference.load(reference, CONFIG)
    spaces = loaded.extract(images).spaces
    classes = loaded.compare_classes(spaces[PROBE])
    return loaded.compare_space(FEATURES, spaces[FEATURES]), classes, loaded.find_copies(spaces["pixels"])


# Reference


@pytest.mark.slow
def test_reference_is_deterministic(dataset, codec, reference, tmp_path):
    build_reference(dataset, codec, CONFIG, tmp_path / "again", Workspace.at(tmp_path / "work"))
    assert contents(tmp_path / "again") == contents(reference)


def test_reference_has_no_pickle(reference):
    assert {path.suffix for path in list_files(reference)} <= {".safetensors", ".npy", ".json"}


def test_training_images_score_like_the_floor(dataset, reference):
    images, _ = load_images(dataset / "train")
    rows = np.random.default_rng(7).choice(len(images), 150, replace=False)
    space, classes, copies = score(reference, images[rows])
    assert space.fd == pytest.approx(space.floor.fd, rel=0.5)
    assert abs(space.kid - space.floor.kid) < 4 * space.kid_std
    assert space.precision == pytest.approx(space.floor.precision, abs=0.1)
    assert classes.coverage == 1
    assert classes.tv < 2 * classes.tv_floor
    assert classes.probe_accuracy > 0.85
    assert copies.share == 1 and copies.p_value < 1e-9  # training images are copies of themselves


def test_held_out_images_have_perfect_scores(dataset, reference):
    images, _ = load_images(dataset / "holdout")
    space, classes, copies = score(reference, images)
    assert copies.p_value > 0.001
    assert (classes.tv, classes.coverage) == (0, 1)
    assert (space.precision, space.recall) == (1, 1)
    assert space.fd == pytest.approx(0, abs=1e-4)


def test_missing_classes_worsen_the_scores(dataset, reference):
    images, labels = load_images(dataset / "train")
    everything, all_classes, _ = score(reference, images[:150])
    reduced, reduced_classes, _ = score(reference, images[labels >= 3][:150])
    assert reduced_classes.coverage <= 0.8 < all_classes.coverage
    assert reduced_classes.tv > all_classes.tv + 0.1
    assert reduced.kid > everything.kid
    assert reduced.fd > everything.fd
    assert reduced.recall < everything.recall


def test_noise_worsens_the_scores(dataset, reference):
    images, _ = load_images(dataset / "train")
    noise = np.random.default_rng(0).integers(0, 256, images[:150].shape, dtype=np.uint8)
    space, classes, copies = score(reference, noise)
    assert space.fd > 5 * space.floor.fd and space.kid > 10 * space.kid_std
    assert classes.tv > 2 * classes.tv_floor
    assert copies.share == 0


# The codec's own distance


def pixel_distances(dataset: Path, codec: Path, folder: Path) -> dict:
    """Return the distances of real images and of the codec in pixels, which are quick."""
    config = replace(CONFIG, spaces=("pixels",))
    build_reference(dataset, codec, config, folder / "reference", Workspace.at(folder / "work"))
    return read_json(folder / "reference" / "reference.json")["spaces"]["pixels"]


def test_lossless_codec_has_the_distance_of_real_images(dataset, tmp_path):
    write_json(tmp_path / "codec" / "codec.json", {"kind": "pixels", "image_shape": [8, 8, 1]})
    space = pixel_distances(dataset, tmp_path / "codec", tmp_path)
    assert space["codec"]["fd"] == pytest.approx(space["floor"]["fd"], rel=1e-6)


def test_codec_with_fewer_components_is_worse(dataset, codec, tmp_path):
    (tmp_path / "codec").mkdir()
    fit_codec(CodecConfig(components=4), dataset / "train", tmp_path / "codec", Workspace.at(tmp_path / "work_codec"))
    worse = pixel_distances(dataset, tmp_path / "codec", tmp_path / "worse")
    better = pixel_distances(dataset, codec, tmp_path / "better")
    assert worse["codec"]["fd"] > better["codec"]["fd"] > better["floor"]["fd"] == worse["floor"]["fd"]


@pytest.mark.parametrize(("fd", "is_lossy"), [(25.0, False), (252.0, True)])
def test_log_warns_of_a_codec_that_ruins_images(fd, is_lossy, caplog):
    warn_if_lossy({FEATURES: {"codec": Distances(fd=fd), "floor": Distances(fd=21.0)}})
    assert ("the codec alone has a Fréchet distance of 252, and real images of 21" in caplog.text) == is_lossy


def test_copies_are_those_of_an_audit(dataset, codec, partition, tmp_path):
    pixel_distances(dataset, codec, tmp_path)
    images = np.concatenate([load_images(dataset / "holdout")[0], load_images(dataset / "train")[0][:30]])
    samples = AuditedSamples(images=images, seeds=np.arange(len(images)), experts=None, codec=load_codec(codec))
    audit = audit_samples(samples, dataset, partition, tmp_path / "reference", AuditConfig(), tmp_path)
    loaded = Reference.load(tmp_path / "reference", replace(CONFIG, spaces=("pixels",)))
    copies, audited = loaded.find_copies(flatten_pixels(images)), audit.spaces["pixels"].overall.shares[0]
    assert copies.p_value < 0.001
    assert (copies.quantile, copies.share, copies.expected) == (audited.quantile, audited.share, audited.expected)
    assert copies.threshold == pytest.approx(audited.threshold, rel=1e-5)


def test_held_out_images_have_the_shares_of_the_clusters(dataset, partition):
    images, _ = load_images(dataset / "holdout")
    scores = compare_clusters(partition, images)
    assert scores.tv == 0
    assert scores.shares == scores.data_shares


def test_single_cluster_has_maximal_total_variation(partition):
    images, _ = load_images(partition / "clusters" / "0")
    scores = compare_clusters(partition, images)
    assert scores.shares == (1, 0)
    assert scores.tv == pytest.approx(scores.data_shares[1])


def test_reference_of_another_configuration_raises(reference):
    with pytest.raises(EvaluationError, match="neighbours is 5, was 3; build the reference again"):
        Reference.load(reference, replace(CONFIG, neighbours=5))
    Reference.load(reference, replace(CONFIG, conditional=True))


def test_too_many_neighbours_raise():
    with pytest.raises(ValueError, match="more than 200 rows, not 195"):
        HeldOutSpace.fit(FEATURES, np.eye(195, dtype=np.float32), 16, 200)


@pytest.mark.parametrize(
    ("training", "held_out", "samples", "components"),
    [(10_000, 10_000, 5000, 64), (1602, 195, 1602, 64), (600, 60, 600, 30), (40, 1000, 40, 20)],
)
def test_config_is_fitted_to_small_data_sets(training, held_out, samples, components):
    fitted = fit_config_to(EvaluationConfig(num_samples=5000, components=64), training, held_out)
    assert (fitted.num_samples, fitted.components) == (samples, components)


def test_too_few_held_out_images_raise_with_remedy():
    with pytest.raises(EvaluationError, match="raise data.holdout"):
        fit_config_to(EvaluationConfig(), 100, 15)


@pytest.mark.slow
def test_data_without_labels_have_no_class_scores(dataset, codec, tmp_path):
    for name in ("train", "holdout"):
        writer = ShardWriter(tmp_path / "data" / name)
        for sample in read_samples(dataset / name):
            writer.add(replace(sample, label=-1))
        writer.close()
    assert read_index(tmp_path / "data" / "train").class_names == ()
    config = replace(CONFIG, spaces=("pixels",))
    work = Workspace.at(tmp_path / "work")
    summary = build_reference(tmp_path / "data", codec, config, tmp_path / "reference", work)
    assert summary.probe_accuracy is None
    assert Reference.load(tmp_path / "reference", config).compare_classes(np.zeros((3, 16), np.float32)) is None


# Pipeline


@pytest.mark.slow
def test_evaluation_is_byte_identical(pipeline, reference, partition, tmp_path):
    for name in ("first", "second"):
        work = Workspace.at(tmp_path / f"work_{name}")
        evaluate(pipeline, reference, partition, CONFIG, SAMPLING, tmp_path / name, work)
    assert set(contents(tmp_path / "first")) == {"scores.json", "images.npy", "seeds.npy", "grid.png", TRAJECTORIES}
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_evaluate_writes_scores_images_seeds_and_grid(pipeline, reference, partition, tmp_path):
    scores = evaluate(pipeline, reference, partition, CONFIG, SAMPLING, tmp_path, Workspace.at(tmp_path / "work"))
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["spaces"]["pixels"]["fd"] == scores.spaces["pixels"].fd
    assert not any("second" in key for key in written)
    assert list(scores.spaces) == [FEATURES, "pixels"]
    assert all(space.fd > space.codec.fd > space.floor.fd for space in scores.spaces.values())
    assert scores.spaces["pixels"].kid is None  # it does not get worse with the images
    assert scores.held_out == 110
    assert sum(scores.cluster_shares) == pytest.approx(1)
    assert scores.num_samples == 150
    assert scores.selection == "sticky"
    images = np.load(tmp_path / "images.npy", allow_pickle=False)
    assert (images.shape, images.dtype) == ((150, 8, 8, 1), np.uint8)
    assert np.load(tmp_path / "seeds.npy", allow_pickle=False).tolist() == list(range(150))
    assert Image.open(tmp_path / "grid.png").size == (71, 71)
    kept = load_file(tmp_path / TRAJECTORIES)
    assert kept["seeds"].tolist() == list(range(8))
    assert kept["times"].tolist() == [1, 0.75, 0.5, 0.25]
    assert kept["frames"].shape == (8, 5, 8, 8, 1)
    assert np.abs(kept["frames"][:, -1].astype(int) - images[:8]).max() <= 1  # the image, up to rounding
    assert kept["gates"].shape == kept["posterior"].shape == (8, 4, 2)
    assert (kept["gates"] == kept["gates"][:, :1]).all() and set(kept["gates"].flat) == {0, 1}  # sticky
    np.testing.assert_allclose(kept["posterior"].sum(-1), 1, rtol=1e-5)


def test_held_out_loss_of_one_expert_is_that_of_training(root, reference, partition, codec, tmp_path):
    assemble({0: root / "expert_1"}, None, codec, tmp_path / "single")
    loss = measure_ensemble(tmp_path / "single", partition, SAMPLING)
    clusters = [read_latents(partition / "holdout_latents" / str(k)) for k in range(2)]
    counts = [len(latents) for latents in clusters]
    measured = [
        measure_held_out(Expert.load(root / "expert_1").velocity, latents, RECTIFIED_FLOW, 64, torch.device("cpu"))
        for latents in clusters
    ]
    assert sum(counts) < HELD_OUT_CALLS / 8 / 2 + 200
    whole = sum(count * one["held_out"] for count, one in zip(counts, measured, strict=True)) / sum(counts)
    assert loss == pytest.approx(whole, rel=0.05)


def test_ensemble_has_a_lower_held_out_loss_than_its_expert(root, pipeline, partition, codec, tmp_path):
    assemble({0: root / "expert_0"}, None, codec, tmp_path / "single")
    single, both = (measure_ensemble(folder, partition, SAMPLING) for folder in (tmp_path / "single", pipeline))
    assert both < single


def test_reflection_in_itself_is_not_kept(pipeline, reference, tmp_path, monkeypatch):
    """Weak = strong changes little, so the search decides against the cost."""
    monkeypatch.setattr(selection_search, "MIN_RANKED_HELD_OUT", 10)
    search = SelectionSearchConfig(candidates=(SelectionConfig(),), num_samples=150, steps=4)
    reflection = ReflectionConfig(weak="folder", path=str(pipeline))
    sampling = replace(SAMPLING, solver="euler", steps=8, reflection=reflection)
    work = Workspace.at(tmp_path / "work")
    selection_search.search_selection(pipeline, reference, search, CONFIG, sampling, tmp_path, work)
    choice = selection_search.read_choice(tmp_path)
    assert choice.selection.name == "sticky" and not choice.reflects


def test_calls_and_flops_follow_the_selection(pipeline, tmp_path):
    def cost(name):
        sampling = replace(SAMPLING, solver="euler", selection=SelectionConfig(name=name))
        return generate(pipeline, range(40), None, sampling, Workspace.at(tmp_path))

    sticky, full = cost("sticky"), cost("full")
    assert sticky.calls.experts.total() == 40 * 4
    assert full.calls.experts.total() == 2 * 40 * 4
    assert (sticky.calls.router, full.calls.router) == (0, 40 * 4)
    assert full.flops > 2 * sticky.flops > 0


def test_generate_resumes_after_a_stop(pipeline, tmp_path):
    complete = generate(pipeline, range(150), None, SAMPLING, Workspace.at(tmp_path / "complete"))
    interrupted = Workspace.at(tmp_path / "interrupted")
    generate(pipeline, range(150), None, SAMPLING, interrupted)
    first, *_, last = sorted(interrupted.scratch.glob("images-*/*.safetensors"))
    last.unlink()
    stamp = first.stat().st_mtime_ns
    resumed = generate(pipeline, range(150), None, SAMPLING, interrupted)
    assert first.stat().st_mtime_ns == stamp
    assert np.array_equal(resumed.images, complete.images)
    assert resumed.calls == complete.calls
    other = generate(pipeline, range(150), None, replace(SAMPLING, steps=5), interrupted)
    assert not np.array_equal(other.images, complete.images)


def test_stop_request_preempts_generate(pipeline, tmp_path):
    work = Workspace.at(tmp_path)
    (tmp_path / "stop").touch()
    with pytest.raises(Preempted):
        generate(pipeline, range(10), None, SAMPLING, work)


def test_guided_evaluation_doubles_the_calls(pipeline, reference, partition, tmp_path):
    config = replace(CONFIG, conditional=True)
    conditional = evaluate(pipeline, reference, partition, config, SAMPLING, tmp_path, Workspace.at(tmp_path / "work"))
    guided = replace(SAMPLING, guidance_scale=2.0)
    twice = evaluate(pipeline, reference, partition, config, guided, tmp_path, Workspace.at(tmp_path / "work"))
    assert twice.calls_per_step == 2 * conditional.calls_per_step
