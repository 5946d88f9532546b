"""The Diffusion Classifier against the Bayes classifier, on Gaussians."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ensemble.analysis.diffusion_classifier import (
    create_models,
    denoising_errors,
    eliminate_classes,
    expert_accuracy,
)
from ensemble.config import ClassifierConfig
from ensemble.ensemble import Ensemble
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import COSINE, RECTIFIED_FLOW, NoiseSchedule
from tests.oracles import MixtureOfGaussians, gaussian_velocity

MEANS = torch.tensor([[0.0, 0.0], [1.0, 0.5], [-0.5, 1.5]], dtype=torch.float64)
IMAGES = 1.2 * torch.randn(300, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@dataclass
class ClassGaussians:
    """One Gaussian per class, with its exact velocity."""

    deviations: tuple[float, ...]
    noise_schedule: NoiseSchedule = RECTIFIED_FLOW

    def models(self, noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        velocity = torch.zeros_like(noised)
        for class_id, deviation in enumerate(self.deviations):
            rows = condition.class_id == class_id
            velocity[rows] = gaussian_velocity(noised[rows], t[rows], MEANS[class_id], deviation, self.noise_schedule)
        return velocity[None]

    def bayes(self, images: Tensor) -> Tensor:
        pairs = zip(MEANS, self.deviations, strict=True)
        logs = [torch.distributions.Normal(mean, deviation).log_prob(images).sum(1) for mean, deviation in pairs]
        return torch.stack(logs, dim=1)


def agreement(classes: ClassGaussians, noises: int, weighting: str) -> float:
    config = ClassifierConfig(noises_per_image=noises, weighting=weighting)
    errors = denoising_errors(classes.models, IMAGES, 3, classes.noise_schedule, config)
    return float((errors[0].argmin(1) == classes.bayes(IMAGES).argmax(1)).double().mean())


@pytest.mark.parametrize("path", [RECTIFIED_FLOW, COSINE])
def test_classifier_converges_to_bayes_with_more_noises(path):
    classes = ClassGaussians((0.7, 0.7, 0.7), path)
    few, many = agreement(classes, 1, "velocity"), agreement(classes, 500, "velocity")
    assert few < 0.9 and many > 0.98


def test_likelihood_weights_handle_different_widths():
    classes = ClassGaussians((0.4, 0.8, 1.6))
    assert agreement(classes, 400, "likelihood") > 0.96
    assert agreement(classes, 400, "velocity") < 0.94


def test_likelihood_weights_give_log_likelihood_differences():
    classes = ClassGaussians((0.4, 0.8, 1.6), COSINE)
    config = ClassifierConfig(noises_per_image=1500, weighting="likelihood")
    errors = denoising_errors(classes.models, IMAGES[:20], 3, COSINE, config)[0]
    logs = -errors * IMAGES.shape[1]
    difference = (logs - logs[:, :1]) - (classes.bayes(IMAGES[:20]) - classes.bayes(IMAGES[:20])[:, :1])
    assert difference.abs().mean() < 0.25


def test_errors_do_not_depend_on_the_batch():
    classes = ClassGaussians((0.7, 0.7, 0.7))
    one_batch = denoising_errors(classes.models, IMAGES, 3, RECTIFIED_FLOW, ClassifierConfig(noises_per_image=2))
    small_batches = denoising_errors(
        classes.models, IMAGES, 3, RECTIFIED_FLOW, ClassifierConfig(noises_per_image=2, batch_size=7)
    )
    torch.testing.assert_close(one_batch, small_batches, rtol=0, atol=0)


def test_models_are_the_ensemble_and_its_experts():
    mixture = MixtureOfGaussians((0.5, 0.3, 0.2))
    experts = {k: expert for k, expert in mixture.experts().items() if k != 1}
    ensemble = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    t = torch.full((len(IMAGES),), 0.4, dtype=torch.float64)
    velocities = create_models(ensemble)(IMAGES, t, Condition.null(len(IMAGES)))
    assert velocities.shape == (3, *IMAGES.shape)
    for row, k in ((1, 0), (2, 2)):
        alone = gaussian_velocity(IMAGES, t, mixture.means[k], mixture.deviation, RECTIFIED_FLOW)
        torch.testing.assert_close(velocities[row], alone)
    complete = Ensemble(experts=mixture.experts(), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    exact = mixture.marginal_velocity(IMAGES, t, RECTIFIED_FLOW)
    torch.testing.assert_close(create_models(complete)(IMAGES, t, Condition.null(len(IMAGES)))[0], exact)


def test_accuracy_is_computed_by_cluster():
    # Two models (the ensemble, expert 1), four images of classes 0 0 1 1, two clusters of 30 and 10 images.
    errors = torch.tensor([[[0, 1], [0, 1], [1, 0], [0, 1]], [[1, 0], [0, 1], [1, 0], [1, 0]]]).double()
    labels, clusters = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])
    result = expert_accuracy(errors, labels, clusters, (30, 10), (1,))
    assert result.models == ("ensemble", "expert_1")
    assert result.accuracy == ((1.0, 0.0), (pytest.approx(2 / 3), 1.0))
    assert result.overall == (pytest.approx(0.75), pytest.approx((2 / 3 * 30 + 10) / 40))
    assert (result.own_cluster, result.other_clusters) == (1.0, pytest.approx(2 / 3))
    assert result.images == (3, 1) and result.floor == (pytest.approx(2 / 3), 1.0) and result.chance == 0.5


def test_cluster_without_images_has_no_accuracy():
    errors = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]], dtype=torch.float64)
    result = expert_accuracy(errors, torch.tensor([0]), torch.tensor([0]), (5, 0), (0,))
    assert result.accuracy[0] == (1.0, None) and result.floor == (1.0, None) and result.other_clusters is None


def test_elimination_keeps_the_accuracy_at_a_third_of_the_calls():
    """Li et al. 2023, section 4, on ten Gaussians: paired noise decides most images after a few pairs."""
    generator = torch.Generator().manual_seed(0)
    means = 0.8 * torch.randn(10, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (200,), generator=generator)
    images = means[labels] + 0.7 * torch.randn(200, 8, generator=generator, dtype=torch.float64)

    def models(noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return gaussian_velocity(noised, t, means[condition.class_id], 0.7, RECTIFIED_FLOW)[None]

    config = ClassifierConfig(noises_per_image=32)
    full = denoising_errors(models, images, 10, RECTIFIED_FLOW, config)[0].argmin(1)
    errors, rows = eliminate_classes(models, images, 10, RECTIFIED_FLOW, replace(config, elimination=3))
    right, right_in_full = ((guess == labels).double().mean() for guess in (errors[0].argmin(1), full))
    assert right >= right_in_full - 0.005 and rows <= 0.3 * 200 * 10 * 32
    unpaired = [denoising_errors(models, images, 10, RECTIFIED_FLOW, replace(config, seed=k))[0] for k in range(10)]
    independent = torch.stack([errors[:, k] for k, errors in enumerate(unpaired)], 1).argmin(1)
    assert (independent == labels).double().mean() < right_in_full


def test_elimination_of_nothing_gives_the_same_classes():
    classes, config = ClassGaussians((0.7, 0.7, 0.7)), ClassifierConfig(noises_per_image=64)
    errors, rows = eliminate_classes(classes.models, IMAGES, 3, RECTIFIED_FLOW, replace(config, elimination=1e9))
    assert rows == 300 * 3 * 64 and errors.isfinite().all()
    full = denoising_errors(classes.models, IMAGES, 3, RECTIFIED_FLOW, config)
    assert (errors.argmin(2) == full.argmin(2)).double().mean() > 0.9
