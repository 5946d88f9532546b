"""Linear probes from feature vectors to classes and words, fitted to real images alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
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
    """Minimize cross entropy + |slopes|² / (2 samples), with the slopes of the first of two classes at zero.

    The optimum is that of scikit-learn's `LogisticRegression`, which takes half a second to import. The fit need not
    converge, since its accuracy is reported next to its counts. Raises `ValueError` if all labels are equal.
    """
    from scipy.optimize import minimize  # a third of a second to import, and scores only read probes

    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"a class probe needs images of two classes, and all {len(labels)} show class {labels[0]}; "
            "set `data.labels` to false"
        )
    rows, expected = torch.from_numpy(features).double(), torch.from_numpy(targets)
    fixed = 1 if len(classes) == 2 else 0

    def loss_and_slope(parameters: Float[np.ndarray, " parameter"]) -> tuple[float, Float[np.ndarray, " parameter"]]:
        weights = torch.from_numpy(parameters).view(len(classes) - fixed, -1).requires_grad_()
        logits = torch.nn.functional.pad(rows @ weights[:, :-1].T + weights[:, -1], (fixed, 0))
        penalty = weights[:, :-1].square().sum() / (2 * len(rows))
        loss = torch.nn.functional.cross_entropy(logits, expected) + penalty
        return loss.item(), torch.autograd.grad(loss, weights)[0].numpy().ravel()

    start = np.zeros((len(classes) - fixed) * (features.shape[1] + 1))
    options = {"maxiter": iterations, "maxls": 50, "gtol": 1e-3, "ftol": 64 * np.finfo(float).eps}
    fitted = minimize(loss_and_slope, start, jac=True, method="L-BFGS-B", options=options).x
    weights = np.pad(fitted.reshape(len(classes) - fixed, -1), ((fixed, 0), (0, 0))).astype(np.float32)
    return ClassProbe(slopes=weights[:, :-1], offsets=weights[:, -1], classes=classes.astype(np.int64))


Spaces = tuple[Float[np.ndarray, "_ _"], Float[np.ndarray, "_ _"]]
"""Features of the same images in the space that ranks, and principal components of their pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordProbes:
    """Probes of classes and of words of captions, each by a name; they read two spaces at once."""

    scales: tuple[float, float]
    """Divisors of the features of each space: both get the same spread."""
    probes: dict[str, ClassProbe]
    accuracies: dict[str, float]
    """Share of the held-out images whose label a probe finds that knows all other real images but half of these."""

    @classmethod
    def fit(cls, training: Spaces, held_out: Spaces, labels: Mapping[str, Int[np.ndarray, " real"]]) -> "WordProbes":
        """Fit a probe to each kind of label, of training and then held-out images; -1 has none.

        A kind without two labels among the held-out images gets no probe. The probes know all real images, also those
        of new combinations.
        """
        scales = float(training[0].std()), float(training[1].std())
        features = np.concatenate([_join(training, scales), _join(held_out, scales)])
        is_held_out = np.arange(len(features)) >= len(training[0])
        probes, accuracies = {}, {}
        for name, each in labels.items():
            known = each >= 0
            if len(np.unique(each[known & is_held_out])) > 1:
                probes[name] = fit_probe(features[known], each[known])
                accuracies[name] = _cross_validate(features, each, is_held_out)
        return cls(scales=scales, probes=probes, accuracies=accuracies)

    def predict(self, name: str, samples: Spaces) -> Int[np.ndarray, " image"]:
        """Return the most probable label of this kind of each image."""
        return self.probes[name].predict(_join(samples, self.scales))

    def save(self, file: Path) -> None:
        """Write the probes as safetensors."""
        arrays = {"scales": np.array(self.scales)}
        for name, probe in self.probes.items():
            arrays[f"accuracy/{name}"] = np.array(self.accuracies[name])
            arrays |= {f"{key}/{name}": getattr(probe, key) for key in ("slopes", "offsets", "classes")}
        save_arrays(file, arrays)

    @classmethod
    def load(cls, file: Path) -> "WordProbes":
        """Read what `save` wrote."""
        arrays, probes = load_file(file), {}
        for name in [key.partition("/")[2] for key in arrays if key.startswith("accuracy/")]:
            slopes, offsets, classes = (arrays[f"{key}/{name}"] for key in ("slopes", "offsets", "classes"))
            probes[name] = ClassProbe(slopes=slopes, offsets=offsets, classes=classes)
        accuracies = {name: arrays[f"accuracy/{name}"].item() for name in probes}
        first, second = arrays["scales"].tolist()
        return cls(scales=(first, second), probes=probes, accuracies=accuracies)


def _join(spaces: Spaces, scales: tuple[float, float]) -> Float[np.ndarray, "image joined"]:
    return np.concatenate([features / scale for features, scale in zip(spaces, scales, strict=True)], axis=1)


def _cross_validate(
    features: Float[np.ndarray, "image joined"],
    labels: Int[np.ndarray, " image"],
    is_held_out: Bool[np.ndarray, " image"],
) -> float:
    """Return the accuracy on the held-out images, each half of which is judged by a probe that knows the others."""
    is_known, half, is_right = labels >= 0, np.arange(len(labels)) % 2, []
    for number in (0, 1):
        fold = is_held_out & is_known & (half == number)
        others = is_known & ~fold
        is_right.append(fit_probe(features[others], labels[others]).predict(features[fold]) == labels[fold])
    return float(np.concatenate(is_right).mean())
