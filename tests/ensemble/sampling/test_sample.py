import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.sample import sample
from experts.codec import PixelCodec
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from router.config import SelectionConfig
from tests.ensemble.test_pipeline import make_expert
from tests.oracles import IdentityCodec, MixtureOfGaussians

ROOT = Path(__file__).parents[3]
MIXTURE = MixtureOfGaussians((0.5, 0.3, 0.2))


def make_ensemble() -> Ensemble:
    return Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())


def config(name: str = "sticky", **settings: object) -> SamplingConfig:
    return SamplingConfig(**{"solver": "euler", "steps": 4, "selection": SelectionConfig(name=name)} | settings)


@pytest.mark.parametrize(
    ("settings", "class_ids", "calls"),
    [
        ({"name": "sticky"}, None, 1),
        ({"name": "full"}, None, 3),
        ({"name": "sticky", "solver": "heun"}, None, 1),
        ({"name": "sticky", "guidance_scale": 3.0}, [0] * 5, 2),
        ({"name": "sticky", "guidance_scale": 3.0}, None, 1),
    ],
)
def test_calls_per_step_follow_selection_and_guidance(
    settings: dict[str, object], class_ids: list[int] | None, calls: float
) -> None:
    result = sample(
        make_ensemble(), IdentityCodec(), range(5), config(**settings), class_ids and Condition.of_classes(class_ids)
    )
    assert result.calls_per_step == pytest.approx(calls)
    assert result.images.shape == (5, 1, 2, 1)
    assert torch.equal(result.images.flatten(1), result.latents)


@pytest.mark.parametrize(("name", "moved"), [("sticky", 1), ("full", 3)])
def test_only_experts_that_are_called_are_moved(name: str, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble, seen = make_ensemble(), []
    monkeypatch.setattr(type(ensemble.experts[0]), "to", lambda expert, _device: seen.append(expert) or expert)
    result = sample(ensemble, IdentityCodec(), [7], config(name))
    assert len(seen) == moved == len(result.calls.experts)
    assert {id(expert) for expert in seen} == {id(ensemble.experts[k]) for k in result.calls.experts}


@pytest.mark.parametrize(("seeds", "class_ids"), [([], None), ([1, 2], [0])])
def test_sample_with_unpaired_seeds_and_classes_raises(seeds: list[int], class_ids: list[int] | None) -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        sample(make_ensemble(), IdentityCodec(), seeds, config(), class_ids and Condition.of_classes(class_ids))


def test_progress_increases_to_the_total() -> None:
    reports = []
    sample(
        make_ensemble(),
        IdentityCodec(),
        range(5),
        config(batch_size=2),
        on_progress=lambda done, total: reports.append((done, total)),
    )
    done = [done for done, _ in reports]
    assert done == sorted(done)
    assert reports[-1] == (5, 5)
    assert all(total == 5 for _, total in reports)


def test_class_minus_one_is_unconditional() -> None:
    mixed = sample(make_ensemble(), IdentityCodec(), [1, 2], config(guidance_scale=4.0), Condition.null(2))
    plain = sample(make_ensemble(), IdentityCodec(), [1, 2], config())
    torch.testing.assert_close(mixed.latents, plain.latents)


@pytest.mark.parametrize("few_step", [None, FewStepSchedule.uniform(2, "renoise")])
@pytest.mark.parametrize(("solver", "guidance_scale"), [("heun", 1.0), ("euler", 1.0), ("heun", 3.0)])
def test_network_is_five_calls_from_sample(solver, guidance_scale, few_step, tmp_path) -> None:
    expert = replace(Expert.load(make_expert(tmp_path / "expert", 0)), few_step=few_step)
    depths = []

    def record_depth(model, inputs) -> None:
        ours = [frame.function for frame in inspect.stack() if Path(frame.filename).is_relative_to(ROOT / "ensemble")]
        ours += [frame.function for frame in inspect.stack() if Path(frame.filename).is_relative_to(ROOT / "experts")]
        depths.append(len(ours) - 1)

    expert.model.register_forward_pre_hook(record_depth)
    ensemble, codec = Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW), PixelCodec(image_shape=(4, 4, 1))
    sample(ensemble, codec, [0], config(solver=solver, guidance_scale=guidance_scale), Condition.of_classes([1]))
    assert max(depths) <= 5
