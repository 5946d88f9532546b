import pytest
import torch

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.sample import sample
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig
from tests.oracles import IdentityCodec, MixtureOfGaussians

MIXTURE = MixtureOfGaussians((0.5, 0.3, 0.2))


def whole() -> Ensemble:
    return Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())


def config(name: str = "sticky", **chosen: object) -> SamplingConfig:
    return SamplingConfig(**{"solver": "euler", "steps": 4, "selection": SelectionConfig(name=name)} | chosen)


@pytest.mark.parametrize(
    ("chosen", "class_ids", "calls"),
    [
        ({"name": "sticky"}, None, 1),
        ({"name": "full"}, None, 3),
        ({"name": "sticky", "solver": "heun"}, None, 1),
        ({"name": "sticky", "guidance_scale": 3.0}, [0] * 5, 2),
        ({"name": "sticky", "guidance_scale": 3.0}, None, 1),
    ],
)
def test_calls_per_step(chosen: dict[str, object], class_ids: list[int] | None, calls: float) -> None:
    drawn = sample(whole(), IdentityCodec(), range(5), config(**chosen), class_ids)
    assert drawn.calls_per_step == pytest.approx(calls)
    assert drawn.images.shape == (5, 1, 2, 1)
    assert torch.equal(drawn.images.flatten(1), drawn.latents)


@pytest.mark.parametrize(("seeds", "class_ids"), [([], None), ([1, 2], [0])])
def test_seeds_and_classes_must_pair(seeds: list[int], class_ids: list[int] | None) -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        sample(whole(), IdentityCodec(), seeds, config(), class_ids)


def test_progress_rises_to_the_end() -> None:
    seen = []
    sample(
        whole(),
        IdentityCodec(),
        range(5),
        config(batch_size=2),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (5, 5)
    assert all(total == 5 for _, total in seen)


def test_a_row_of_class_minus_one_is_unconditional() -> None:
    mixed = sample(whole(), IdentityCodec(), [1, 2], config(guidance_scale=4.0), [-1, -1])
    plain = sample(whole(), IdentityCodec(), [1, 2], config())
    torch.testing.assert_close(mixed.latents, plain.latents)
