"""Scores of text: closed forms on made-up features, and a whole evaluation of a pipeline with text."""

import itertools

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV

from data_partition.config import PartitionConfig
from data_partition.datasets.captions import find_word
from data_partition.features.extract import extract_features
from data_partition.partition import make_partition
from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import Workspace, read_json, save_arrays, write_json
from ensemble.config import EvaluationConfig, SamplingConfig
from ensemble.evaluation.class_probe import WordProbes
from ensemble.evaluation.evaluate import evaluate
from ensemble.evaluation.feature_space import HeldOutSpace
from ensemble.evaluation.held_out_prompts import load_held_out_conditions, load_held_out_prompts
from ensemble.evaluation.reference import (
    CAPTIONS,
    CLASS,
    PROBE,
    TRAINING_ROWS,
    WORD_PROBES,
    attribute_probe,
    build_reference,
)
from ensemble.evaluation.spaces import RANKED_SPACE
from ensemble.evaluation.text_scores import RECALL_RANK, STRENGTHS, compare_prompts, fit_ridge
from ensemble.sampling.prompts import Prompts
from experts.conditions.text_encoder import TextEncoder
from tests.ensemble.text_pipeline import assemble_text_pipeline
from tests.text_encoders import WORDS

ALL_CAPTIONS = [" ".join(words) for words in itertools.permutations(WORDS[:10], 2)]
CAPTIONS_USED = np.random.default_rng(0).permutation(ALL_CAPTIONS).tolist()[:80]
FIRST, SECOND = (caption.split()[0] for caption in CAPTIONS_USED[:2])
ATTRIBUTE = (FIRST, next(word for word in WORDS[:10] if word not in (FIRST, SECOND)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("text_scores")
    assemble_text_pipeline(root)
    return root


@pytest.fixture(scope="module")
def encoded(root):
    """Return features that are an exact linear map of the pooled captions."""
    pooled = TextEncoder.load(root / "pipeline").encode(CAPTIONS_USED).pooled.numpy()
    return (pooled @ np.random.default_rng(1).normal(size=(pooled.shape[1], 12))).astype(np.float32)


@pytest.fixture
def reference(root, encoded, tmp_path):
    """Write the files that the scores read: every caption is in both parts, the class is that of its first word."""
    labels = np.arange(80) % 2
    save_arrays(tmp_path / TRAINING_ROWS, {"features": with_class(encoded, labels)})
    words = np.array([find_word(caption, ATTRIBUTE) for caption in CAPTIONS_USED])
    kinds = {CLASS: labels, attribute_probe("word"): words, attribute_probe("absent"): np.full(80, -1)}
    real = with_class(encoded, labels), encoded
    WordProbes.fit(real, real, {name: np.tile(each, 2) for name, each in kinds.items()}).save(tmp_path / WORD_PROBES)
    HeldOutSpace(features=with_class(encoded, labels)).save(tmp_path / "efficientnet_lite0.safetensors")
    np.save(tmp_path / "labels.npy", labels)
    write_json(tmp_path / CAPTIONS, {"training": CAPTIONS_USED, "held_out": CAPTIONS_USED})
    return tmp_path


def with_class(features, labels):
    return np.concatenate([features, 5 * np.eye(2, dtype=np.float32)[labels]], axis=1)


def spaces(encoded, labels):
    return {RANKED_SPACE: with_class(encoded, labels), PROBE: encoded}


def test_perfect_samples_are_found_and_of_their_class(root, reference, encoded):
    labels = np.arange(80) % 2
    prompts = Prompts(tuple(labels.tolist()), tuple(CAPTIONS_USED))
    scores = compare_prompts(reference, root / "pipeline", prompts, spaces(encoded, labels), EvaluationConfig())
    assert (scores.recall, scores.recall_real, scores.class_accuracy, scores.class_accuracy_real) == (1, 1, 1, 1)
    assert (scores.captions, scores.recall_chance) == (80, RECALL_RANK / 80)


def test_samples_of_other_prompts_are_at_chance(root, reference, encoded):
    """Over all shifts, each sample meets every caption once, and 20 of the 80 are among its nearest."""
    labels, recalls = np.arange(80) % 2, []
    for shift in range(0, 80, 8):
        captions = CAPTIONS_USED[shift + 1 :] + CAPTIONS_USED[: shift + 1]
        prompts = Prompts(tuple((1 - labels).tolist()), tuple(captions))
        scores = compare_prompts(reference, root / "pipeline", prompts, spaces(encoded, labels), EvaluationConfig())
        recalls.append(scores.recall)
    assert np.mean(recalls) == pytest.approx(RECALL_RANK / 80, abs=0.05)
    assert scores.class_accuracy == 0


def test_attributes_and_new_combinations_are_scored_apart(root, reference, encoded):
    """The word of a caption is its second one, and the images of one word of the attribute are of the other."""
    labels = np.arange(80) % 2
    prompts = Prompts(tuple(labels.tolist()), tuple(CAPTIONS_USED))
    attributes = {"word": ATTRIBUTE, "absent": ("nowhere", "never")}
    config = EvaluationConfig(attributes=attributes, new_combinations=(FIRST,))
    scores = compare_prompts(reference, root / "pipeline", prompts, spaces(encoded, labels), config)
    assert list(scores.attributes) == ["word"]
    assert scores.attributes["word"].samples == scores.attributes["word"].real > 0.85
    assert scores.attributes["word"].new > 0.85
    assert scores.class_accuracy_new == 1
    shifted = {name: np.roll(values, 1, axis=0) for name, values in spaces(encoded, labels).items()}
    scores = compare_prompts(reference, root / "pipeline", prompts, shifted, config)
    assert scores.class_accuracy_new == 0
    assert scores.attributes["word"].samples < 0.8


def test_no_text_means_no_scores_of_text(root, reference, tmp_path):
    prompts, features = Prompts.of_classes([0]), spaces(np.zeros((1, 12), np.float32), np.zeros(1, int))
    assert compare_prompts(reference, tmp_path, prompts, features, EvaluationConfig()) is None
    (reference / CAPTIONS).unlink()
    assert compare_prompts(reference, root / "pipeline", prompts, features, EvaluationConfig()) is None


@pytest.mark.parametrize(("images", "noise"), [(60, 0.1), (60, 5.0), (12, 1.0)])
def test_ridge_is_that_of_scikit_learn(images, noise):
    """Also with fewer images than features."""
    random = np.random.default_rng(images)
    features = random.normal(3, 2, (images, 20))
    targets = features[:, :5] @ random.normal(size=(5, 3)) + noise * random.normal(size=(images, 3))
    expected = RidgeCV(alphas=STRENGTHS).fit(features, targets)
    slopes, offsets = fit_ridge(features, targets)
    np.testing.assert_allclose(slopes, expected.coef_, atol=1e-9)
    np.testing.assert_allclose(offsets, expected.intercept_, atol=1e-9)


def write_captioned(folder, count, seed):
    """Write dark boots and light shirts of 4 x 4 pixels; every fifth has no caption."""
    generator, writer = np.random.default_rng(seed), ShardWriter(folder, 64, class_names=("boot", "shirt"))
    for number in range(count):
        label = number % 2
        image = np.clip(generator.normal(60 + 120 * label, 20, (4, 4, 1)), 0, 255).astype(np.uint8)
        caption = "" if number % 5 == 0 else ("a light shirt" if label else "a dark ankle boot")
        writer.add(Sample(key=f"{number:04d}", image=image, label=label, caption=caption))
    writer.close()


def test_captions_are_prompts_also_without_the_space_that_ranks(root, tmp_path):
    write_captioned(tmp_path / "data" / "train", 80, 0)
    write_captioned(tmp_path / "data" / "holdout", 40, 1)
    config = EvaluationConfig(num_samples=48, components=4, spaces=("pixels",), neighbours=2, conditional=True)
    work, reference = Workspace.at(tmp_path / "work"), tmp_path / "reference"
    build_reference(tmp_path / "data", root / "codec", config, reference, work)
    prompts = load_held_out_prompts(reference, 100, root / "pipeline")
    assert set(prompts.captions) == {"", "a dark ankle boot", "a light shirt"}
    assert compare_prompts(reference, root / "pipeline", prompts, {}, config) is None


def test_evaluation_samples_the_held_out_captions(root, tmp_path):
    write_captioned(tmp_path / "data" / "train", 80, 0)
    write_captioned(tmp_path / "data" / "holdout", 40, 1)
    config = EvaluationConfig(
        num_samples=48, components=4, spaces=("efficientnet_lite0",), neighbours=2, conditional=True
    )
    work = Workspace.at(tmp_path / "work")
    build_reference(tmp_path / "data", root / "codec", config, tmp_path / "reference", work)
    prompts = load_held_out_conditions(tmp_path / "reference", 100, root / "pipeline")
    assert set(zip(prompts.class_ids, prompts.captions, strict=True)) == {
        (0, ""),
        (1, ""),
        (0, "a dark ankle boot"),
        (1, "a light shirt"),
    }
    served = load_held_out_prompts(tmp_path / "reference", 100, root / "pipeline")
    assert served.captions == prompts.captions
    assert all((k < 0) == bool(caption) for k, caption in zip(served.class_ids, served.captions, strict=True))
    partition = PartitionConfig(num_experts=2, components=4)
    for name in ("features", "partition"):
        (tmp_path / name).mkdir()
    extract_features(partition, tmp_path / "data", tmp_path / "features", work)
    make_partition(partition, tmp_path / "data", tmp_path / "features", tmp_path / "partition", work)
    sampling = SamplingConfig(solver="euler", steps=2, guidance_scale=2.0)
    folders = (root / "pipeline", tmp_path / "reference", tmp_path / "partition")
    scores = evaluate(*folders, config, sampling, tmp_path / "scores", work)
    assert scores.text is not None
    assert scores.text.captions == 2
    assert scores.text.recall_real == scores.text.recall_chance == 1
    assert scores.text.class_accuracy_real > 0.9
    assert read_json(tmp_path / "scores" / "scores.json")["text"]["captions"] == 2
    assert scores.calls_per_step == 2
