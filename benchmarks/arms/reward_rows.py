"""The row of `benchmarks.papers` on generation under a reward: data on a plane of 16 dimensions, a reward along it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from benchmarks.arms.paper_networks import train_captioned
from benchmarks.arms.paper_row import PaperRow
from ensemble.solvers import euler, make_noise, uniform_times
from experts.conditions.condition import Condition
from experts.conditions.text_encoder import TextEncoder
from experts.config import TextConfig
from experts.expert import Expert

SAMPLES, LABELED, WIDTH, STEPS = 4000, 300, 16, 40
THICKNESS = 0.1
"""Deviation of the data beside their plane."""
QUANTILES = (0.5, 0.75, 0.9, 0.95)
BEYOND = 3.0
"""The target beyond the data, in units of the quantile .99."""


def draw_plane() -> tuple[Tensor, Tensor, Tensor]:
    """Return data near a plane, the two directions of the plane, and the reward of every sample."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(WIDTH, 2, generator=generator)).Q
    inside = torch.randn(SAMPLES, 2, generator=generator)
    clean = inside @ plane.T + THICKNESS * torch.randn(SAMPLES, WIDTH, generator=generator)
    return clean, plane, clean @ plane[:, 0]


def label_all(clean: Tensor, reward: Tensor) -> Tensor:
    """Return the values of a regressor on all samples, with noise; it saw the noised reward of some."""
    generator = torch.Generator().manual_seed(1)
    noised = reward + 0.1 * torch.randn(len(reward), generator=generator)
    model = Ridge().fit(clean[:LABELED].numpy(), noised[:LABELED].numpy())
    values = torch.from_numpy(model.predict(clean.numpy())).float()
    return values + 0.1 * torch.randn(len(values), generator=generator)


@torch.inference_mode()
def sample_under(expert: Expert, encoder: TextEncoder, target: float, count: int = 400) -> Tensor:
    """Return samples under a value of the reward."""
    condition = Condition(torch.full((count,), -1), encoder.encode([str(target)] * count))
    noise = make_noise(range(count), (WIDTH,))
    return euler(lambda noised, t: expert.velocity(noised, t, condition), noise, uniform_times(STEPS))


def measure_reward(folder: Path) -> PaperRow:
    """Sample under rising values of a regressor, and of one that was fitted to noise."""
    clean, plane, reward = draw_plane()
    encoder = TextEncoder.from_config(TextConfig(kind="number", length=2))
    if encoder is None:
        raise ValueError("text=number has an encoder")
    noise = reward[torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(2))]
    rewards, distances = dict[str, list[float]](), dict[str, list[float]]()
    for name, truth in (("regressor", reward), ("noise", noise)):
        values = label_all(clean, truth) if name == "regressor" else truth
        expert = train_captioned(clean, [f"{value:.3f}" for value in values.tolist()], encoder, folder / f"by {name}")
        levels = [float(values.quantile(q)) for q in QUANTILES]
        samples = [sample_under(expert, encoder, each) for each in (*levels, BEYOND * float(values.quantile(0.99)))]
        rewards[name] = [float((each @ plane[:, 0]).mean()) for each in samples]
        distances[name] = [float((each - each @ plane @ plane.T).norm(dim=1).mean()) for each in samples]
    of_data = float((clean - clean @ plane @ plane.T).norm(dim=1).mean())
    ours, beside = rewards["regressor"], [each / of_data for each in distances["regressor"]]
    return PaperRow(
        paper="Reward-directed generation (2404.07771)",
        says="a regressor's value as condition raises the reward; beyond the data's values, samples leave the data",
        file="experts/conditions/number_text.py",
        command="ddm run text=number data.captions=true; ddm sample RUN --prompt 1.5",
        criterion=(
            "mean reward rises with the target at quantiles .5 to .95, at .9 ≥ data's mean + 1 deviation, distance to "
            "the plane ≤ 1.2 × the data's; at 3 × quantile .99 ≥ 2 × that; reward of noise: moved ≤ .2 deviations"
        ),
        ours=(
            f"reward {_join(ours)}; distance to the plane {_join(beside)} × the data's; reward of noise "
            f"{_join(rewards['noise'])}"
        ),
        theirs="a regret bound: error of the regressor, plus one that grows with the target's distance to the data",
        differs="a plane of 16 dimensions with noise; an MLP with the number's sines as a pooled text; no guidance",
        holds=ours[0] < ours[1] < ours[2] < ours[3]
        and ours[2] >= float(reward.mean() + reward.std())
        and beside[2] <= 1.2
        and beside[-1] >= 2 * beside[2]
        and max(abs(each - rewards["noise"][0]) for each in rewards["noise"][:4]) <= 0.2 * float(reward.std()),
    )


def _join(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


ROWS: Mapping[str, Callable[[Path], PaperRow]] = {"reward": measure_reward}
