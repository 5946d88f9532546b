from pathlib import Path

import numpy as np
import pytest

from data_partition.errors import NoSamples, TooManyFeatures
from data_partition.features import pca
from data_partition.features.pca import PCA, fit_pca

VALUES = np.random.default_rng(0).normal(size=(200, 6)) @ np.diag([5.0, 3.0, 2.0, 1.0, 0.5, 0.1]) + 4.0
VALUES = VALUES.astype(np.float32)


def test_pca_with_all_components_is_lossless():
    fitted = fit_pca([VALUES], 6)
    np.testing.assert_allclose(fitted.decode(fitted.encode(VALUES)), VALUES, atol=1e-5)


def test_pca_variances_equal_variances_of_codes():
    fitted = fit_pca([VALUES], 4)
    np.testing.assert_allclose(fitted.encode(VALUES).var(axis=0), fitted.variances, rtol=1e-4)
    assert (np.diff(fitted.variances) <= 0).all()


def test_pca_basis_is_orthonormal():
    components = fit_pca([VALUES], 4).components
    np.testing.assert_allclose(components @ components.T, np.eye(4), atol=1e-6)


def test_pca_equals_singular_value_decomposition():
    fitted = fit_pca([VALUES], 3)
    _, singular, vectors = np.linalg.svd(VALUES - VALUES.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs((fitted.components * vectors[:3]).sum(axis=1)), 1.0, atol=1e-5)
    np.testing.assert_allclose(fitted.variances, singular[:3] ** 2 / 200, rtol=1e-4)


def test_pca_is_independent_of_batches():
    single, batched = fit_pca([VALUES], 3), fit_pca(np.split(VALUES, 8), 3)
    np.testing.assert_allclose(single.components, batched.components, atol=1e-6)


def test_pca_save_load_round_trip(tmp_path: Path):
    fitted = fit_pca([VALUES], 3)
    fitted.save(tmp_path / "pca.safetensors")
    loaded = PCA.load(tmp_path / "pca.safetensors")
    np.testing.assert_array_equal(loaded.encode(VALUES), fitted.encode(VALUES))


def test_pca_has_at_most_as_many_components_as_features():
    assert fit_pca([VALUES], 96).components.shape == (6, 6)


def test_pca_of_too_many_features_or_no_samples_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pca, "MAX_FEATURES", 5)
    with pytest.raises(TooManyFeatures, match="6 values an image"):
        fit_pca([VALUES], 3)
    with pytest.raises(NoSamples):
        fit_pca([], 3)
