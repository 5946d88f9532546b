import pytest
import torch

from experts.architectures.residual_mlp import ResidualMLP
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.training.latent_dataset import Batch
from experts.training.loss import converted_loss, expert_loss


def batch():
    clean = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    noise = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    return Batch(
        clean=clean,
        noise=noise,
        t=torch.tensor([0.25, 0.5]),
        condition=Condition.null(2),
        cluster_id=torch.zeros(2, dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("velocity", (4 + 4 + 1 + 4) / 4), ("noise", (9 + 0 + 1 + 1) / 4), ("clean", (1 + 4 + 0 + 1) / 4)],
)
def test_zero_prediction_loses_the_mean_square_target(prediction, expected):
    model = ResidualMLP(latent_shape=[2], width=8, depth=1)
    assert expert_loss(model, batch(), prediction, NOISE_SCHEDULES["rectified_flow"]).item() == pytest.approx(expected)


def test_weight_of_t_multiplies_the_error_of_a_row():
    model = ResidualMLP(latent_shape=[2], width=8, depth=1)
    schedule = NOISE_SCHEDULES["rectified_flow"]
    loss = expert_loss(model, batch(), "clean", schedule, lambda prediction, t, schedule: 8 * t)
    assert loss.item() == pytest.approx((2 * (1 + 4) + 4 * (0 + 1)) / 4)
    converted = converted_loss(
        model, batch(), ("clean", schedule), ("clean", schedule), lambda *_: torch.tensor([2.0, 4])
    )
    assert converted.item() == pytest.approx(loss.item())


@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))
@pytest.mark.parametrize("prediction", ["velocity", "noise", "clean"])
def test_loss_converted_to_itself_is_unchanged(prediction, name):
    model = ResidualMLP(latent_shape=[2], width=8, depth=1)
    torch.nn.init.normal_(model.exit.bias)
    source = (prediction, NOISE_SCHEDULES[name])
    expected = expert_loss(model, batch(), *source)
    torch.testing.assert_close(converted_loss(model, batch(), source, source), expected, rtol=1e-4, atol=1e-5)


class ExactNoiseNetwork(ResidualMLP):
    """Returns the noise of the batch for any input."""

    def forward(self, noised, t, class_index, pooled_text=None):
        return batch().noise


def test_exact_noise_has_zero_loss_in_every_prediction(monkeypatch):
    from experts.networks import registry as networks

    monkeypatch.setitem(networks.CALLS, "ExactNoiseNetwork", networks.CALLS["ResidualMLP"])
    model, source = ExactNoiseNetwork(latent_shape=[2]), ("noise", NOISE_SCHEDULES["linear_beta"])
    for name in NOISE_SCHEDULES:
        for prediction in ("velocity", "noise", "clean"):
            assert converted_loss(model, batch(), source, (prediction, NOISE_SCHEDULES[name])).item() < 1e-8
