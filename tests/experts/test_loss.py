import pytest
import torch

from experts.condition import Condition
from experts.latents import Batch
from experts.loss import expert_loss
from experts.noise_path import PATHS
from experts.residual_mlp import ResidualMLP


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
def test_a_network_that_says_zero_loses_the_mean_square_of_its_target(prediction, expected):
    model = ResidualMLP(latent_shape=[2], width=8, depth=1)
    assert expert_loss(model, batch(), prediction, PATHS["straight"]).item() == pytest.approx(expected)
