"""The probe is scikit-learn's, without its import; probes of words survive their file."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from ensemble.evaluation.class_probe import ClassProbe, WordProbes, fit_probe


def make_blobs(seed, classes, images=120, features=6):
    random = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    centers = random.normal(0, 1.5, (classes, features))
    return (centers[labels] + random.normal(size=(images, features))).astype(np.float32), labels


def objective(features, labels, slopes, offsets):
    """Return cross entropy + |slopes|² / (2 samples), which both minimize until a slope is small."""
    return log_loss(labels, softmax(features @ slopes.T + offsets, axis=1)) + (slopes**2).sum() / (2 * len(features))


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 7))
def test_probe_is_that_of_scikit_learn(seed, classes):
    features, labels = make_blobs(seed, classes)
    expected = LogisticRegression(max_iter=300, tol=1e-6).fit(features, labels)
    probe = fit_probe(features, 3 * labels)
    assert probe.classes.tolist() == (3 * expected.classes_).tolist()
    slopes, offsets = expected.coef_, expected.intercept_
    if classes == 2:
        assert not probe.slopes[0].any() and not probe.offsets[0]
        slopes, offsets = np.concatenate([0 * slopes, slopes]), np.concatenate([0 * offsets, offsets])
    excess = objective(features, labels, probe.slopes, probe.offsets) - objective(features, labels, slopes, offsets)
    # Slopes of at most 1e-3 where the curvature is at least 1 / samples: the bound of strong convexity.
    assert -1e-6 <= excess <= (slopes.size + offsets.size) * 1e-3**2 * len(features) / 2


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="two classes, and all 3 show class 7"):
        fit_probe(np.zeros((3, 2), np.float32), np.full(3, 7))


def test_word_probes_read_what_they_saved(tmp_path):
    features, labels = make_blobs(0, 3)
    training, held_out = (features[:80], 9 * features[:80]), (features[80:], 9 * features[80:])
    unlabelled = np.where(np.arange(120) % 4 == 0, -1, labels)
    same_word = np.where(np.arange(120) < 80, labels, 1)
    probes = WordProbes.fit(training, held_out, {"class": labels, "word / ü": unlabelled, "one word": same_word})
    probes.save(tmp_path / "probes.safetensors")
    loaded = WordProbes.load(tmp_path / "probes.safetensors")
    assert loaded.scales == probes.scales
    assert loaded.accuracies == probes.accuracies
    assert loaded.accuracies.keys() == {"class", "word / ü"}
    for name in loaded.accuracies:
        np.testing.assert_array_equal(loaded.predict(name, held_out), probes.predict(name, held_out))
        assert (loaded.predict(name, held_out) == labels[80:]).mean() > 0.7


def test_held_out_images_are_judged_by_other_probes():
    """Labels that no feature tells are known to the probe of samples, and unknown to those of held-out images."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(400, 150)).astype(np.float32), random.integers(0, 2, 400)
    spaces = (features[:40], features[:40]), (features[40:], features[40:])
    probes = WordProbes.fit(*spaces, {"class": labels})
    assert (probes.predict("class", spaces[1]) == labels[40:]).mean() > 0.75
    assert probes.accuracies["class"] < 0.6


def test_probe_counts_every_class():
    probe = ClassProbe(slopes=np.eye(2, dtype=np.float32), offsets=np.zeros(2, np.float32), classes=np.array([0, 2]))
    assert probe.counts(np.eye(2, dtype=np.float32)[[0, 1, 1]], 4).tolist() == [1, 0, 2, 0]
