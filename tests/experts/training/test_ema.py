import pytest
import torch
from torch import nn

from experts.training.optimizers.ema import (
    SNAPSHOT_WIDTHS,
    MovingAverage,
    SnapshotError,
    power_law_gamma,
    rebuild_average,
    write_snapshots,
)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2, 0.27])
def test_gamma_inverts_the_relative_width(width):
    gamma = power_law_gamma(width)
    assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(width)


def test_average_equals_power_function_average():
    values = torch.linspace(-1, 2, 40, dtype=torch.float64).sin() * 3
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    average = MovingAverage(model, 0.15)
    for step, value in enumerate(values, start=1):
        nn.init.constant_(model.weight, value.item())
        average.update(step)
    power = power_law_gamma(0.15) + 1
    edges = torch.arange(41, dtype=torch.float64) ** power
    expected = (edges.diff() / edges[-1] * values).sum()
    torch.testing.assert_close(average.average["weight"].squeeze(), expected)


def test_average_weights_have_the_relative_width():
    """Compare the standard deviation of the averaged step with the number of steps."""
    count, power = 4000, power_law_gamma(0.1) + 1
    steps = torch.arange(count, dtype=torch.float64) + 0.5
    weights = (torch.arange(count + 1, dtype=torch.float64) ** power).diff() / float(count) ** power
    mean = (weights * steps).sum()
    assert ((weights * (steps - mean) ** 2).sum().sqrt() / count).item() == pytest.approx(0.1, rel=1e-3)


def test_copy_to_overwrites_only_the_given_model():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    average = MovingAverage(model, 0.1)
    expected = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    average.copy_to(other)
    torch.testing.assert_close(other.weight, expected)
    assert not model.weight.any()


@pytest.mark.parametrize("width", [0.05, 0.075, 0.15, 0.2])
def test_snapshots_rebuild_the_average_of_any_width(width, tmp_path):
    model = nn.Linear(1, 3, bias=False)
    averages, direct = [MovingAverage(model, each) for each in SNAPSHOT_WIDTHS], MovingAverage(model, width)
    for step in range(1, 641):
        share = torch.tensor(step / 640)
        model.weight.data.copy_(torch.stack([share, share.sqrt(), (10 * share).sin()])[:, None])
        for average in (*averages, direct):
            average.update(step)
        if step % 40 == 0:
            write_snapshots(tmp_path, averages, step)
    rebuilt = rebuild_average(tmp_path, width)["weight"]
    assert (rebuilt - direct.average["weight"]).abs().max() < 0.01
    assert (averages[1].average["weight"] - direct.average["weight"]).abs().max() > 0.02


def test_nothing_is_rebuilt_from_no_snapshots(tmp_path):
    with pytest.raises(SnapshotError, match=r"training\.ema_snapshots=16"):
        rebuild_average(tmp_path, 0.1)
