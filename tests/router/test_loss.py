import math

import pytest
import torch
from torch import Tensor, nn

from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.training.latent_dataset import Batch
from router.train import router_loss


class FixedLogits(nn.Module):
    """A network that returns fixed logits and records its inputs."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.fixed = logits

    def forward(self, noised: Tensor, t: Tensor, class_index: Tensor) -> Tensor:
        self.noised, self.class_index = noised, class_index
        return self.fixed


BATCH = Batch(
    clean=torch.tensor([[1.0], [2.0]]),
    noise=torch.tensor([[0.0], [4.0]]),
    t=torch.tensor([0.25, 0.5]),
    condition=Condition(torch.tensor([1, -1])),
    cluster_id=torch.tensor([0, 1]),
)


def test_router_loss_matches_example() -> None:
    model = FixedLogits(torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log())
    values = router_loss(model, BATCH, RECTIFIED_FLOW, 5)
    assert values["loss"].item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert values["accuracy"].item() == 0.5


def test_network_receives_noised_samples_and_null_class() -> None:
    model = FixedLogits(torch.zeros(2, 2))
    router_loss(model, BATCH, RECTIFIED_FLOW, 5)
    assert model.noised.tolist() == [[0.75], [3.0]]
    assert model.class_index.tolist() == [1, 5]
