"""Networks are built and called before a run, each class by its own conventions."""

import pytest

from benchmarks.testbed.backbones import SHAPE, TINY, adapter_of, config_of, text
from experts.networks.adapters.adapter import DataShape
from experts.networks.class_settings import NetworkError
from orchestrator.planning.checks import trial_call
from orchestrator.planning.checks.trial_call import try_network


@pytest.mark.parametrize("most", [0, 10**9], ids=["meta", "real"])
@pytest.mark.parametrize("case", TINY)
def test_every_class_passes_at_a_tiny_size(monkeypatch, case, most):
    monkeypatch.setattr(trial_call, "MOST_REAL_PARAMETERS", most)
    reads_text = adapter_of(case).reads_text
    shape = DataShape(
        latent_shape=SHAPE, num_classes=0 if reads_text else 3, text_shape=text(1).shape if reads_text else None
    )
    try_network(config_of(case), shape)


def test_predictions_of_another_shape_are_refused(monkeypatch):
    monkeypatch.setattr(trial_call, "resolve_call", lambda model, noised, t: (lambda *_: noised[:, :1], t))
    with pytest.raises(NetworkError, match=r"predictions of shape \(1, 8, 8\) for latents of shape"):
        try_network(config_of("UNet2DModel"), DataShape(latent_shape=(4, 8, 8), num_classes=3))
