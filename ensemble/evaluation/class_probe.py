"""A linear probe from feature vectors to classes, trained on real images."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file

from ddm_core.artifacts import save_arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassProbe:
    """Multinomial logistic regression; `classes` holds the class id of every row of `slopes`."""

    slopes: Float[np.ndarray, "class feature"]
    offsets: Float[np.ndarray, " class"]
    classes: Int[np.ndarray, " class"]

    def predict(self, features: Float[np.ndarray, "batch feature"]) -> Int[np.ndarray, " batch"]:
        """Return the most probable class id of every row."""
        best: Int[np.ndarray, " batch"] = self.classes[(features @ self.slopes.T + self.offsets).argmax(1)]
        return best

    def counts(self, features: Float[np.ndarray, "batch feature"], num_classes: int) -> Float[np.ndarray, " group"]:
        """Count the rows that the probe assigns to each class."""
        return np.bincount(self.predict(features), minlength=num_classes).astype(np.float64)

    def save(self, file: Path) -> None:
        """Write the probe as safetensors."""
        save_arrays(file, {"slopes": self.slopes, "offsets": self.offsets, "classes": self.classes})

    @classmethod
    def load(cls, file: Path) -> "ClassProbe":
        """Read what `save` wrote."""
        arrays = load_file(file)
        return cls(slopes=arrays["slopes"], offsets=arrays["offsets"], classes=arrays["classes"])


def fit_probe(
    features: Float[np.ndarray, "sample feature"], labels: Int[np.ndarray, " sample"], iterations: int = 300
) -> ClassProbe:
    """Fit the probe; it need not converge, since its accuracy is reported next to its counts."""
    from sklearn.exceptions import ConvergenceWarning  # seconds to import, and only the reference fits a probe
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"a class probe needs images of two classes, and all {len(labels)} show class {labels[0]}; "
            "set `data.labels` to false"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(max_iter=iterations, tol=1e-3).fit(features, labels)
    slopes, offsets = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:
        slopes, offsets = np.concatenate([0 * slopes, slopes]), np.concatenate([0 * offsets, offsets])
    return ClassProbe(
        slopes=slopes.astype(np.float32),
        offsets=offsets.astype(np.float32),
        classes=fitted.classes_.astype(np.int64),
    )
