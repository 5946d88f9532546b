"""Schedulers on a velocity in closed form: the allowed ones reach the limit, the refused ones are wrong."""

import diffusers
import pytest
import torch

from ensemble.ensemble import Ensemble
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.schedulers import check_scheduler, dynamic_shift, load_scheduler, set_times
from ensemble.solvers import heun, make_noise, uniform_times
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig
from tests.oracles import Oracle, OracleRouter

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
MEANS = torch.tensor([[-2.0, 0.0], [1.0, 1.5], [2.0, -1.0]])
DEVIATIONS = (0.4, 0.5, 0.3)
ALLOWED = {
    "euler": diffusers.FlowMatchEulerDiscreteScheduler(),
    "shifted euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dynamic euler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "heun": diffusers.FlowMatchHeunDiscreteScheduler(),
    "shifted heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "flow map": diffusers.FlowMapEulerDiscreteScheduler(),
    "unipc": diffusers.UniPCMultistepScheduler(**FLOW),
    "dpm++": diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
}
REFUSED = {
    "euler of noise": diffusers.EulerDiscreteScheduler(),
    "ddim": diffusers.DDIMScheduler(),
    "ddim of v": diffusers.DDIMScheduler(prediction_type="v_prediction"),
    "unipc of noise": diffusers.UniPCMultistepScheduler(),
    "dpm++ of noise": diffusers.DPMSolverMultistepScheduler(),
    "lcm": diffusers.LCMScheduler(original_inference_steps=100),
    "flow lcm": diffusers.FlowMatchLCMScheduler(),
    "stochastic euler": diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "dpm++ sde": diffusers.DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
}


@pytest.fixture(scope="module")
def velocity():
    """The exact velocity of a mixture of three Gaussians, through the ensemble."""
    experts = {k: Oracle(mean=mean, deviation=DEVIATIONS[k]) for k, mean in enumerate(MEANS)}
    router = OracleRouter(means=MEANS, deviations=DEVIATIONS, shares=(0.5, 0.3, 0.2))
    ensemble = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=router)
    condition = Condition.null(64)
    routing = ensemble.init_routing(range(64), condition, SelectionConfig(name="full"))
    return lambda noised, t: ensemble.velocity(noised, t, condition, routing)


@pytest.fixture(scope="module")
def limit(velocity):
    return heun(velocity, make_noise(range(64), (2,)), uniform_times(1000))


def relative_error(scheduler, velocity, limit, steps=100):
    """Run the loop of diffusers' pipelines with our times, or the scheduler's own where we refuse it."""
    noised = make_noise(range(64), (2,))
    try:
        times = set_times(scheduler, steps, 256, torch.device("cpu"))
    except (PipelineError, TypeError, AttributeError):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps / 1000
    for t, timestep in zip(times, scheduler.timesteps, strict=True):
        inputs = scheduler.scale_model_input(noised, timestep) if hasattr(scheduler, "scale_model_input") else noised
        noised = scheduler.step(velocity(inputs, t.float().expand(64)), timestep, noised, return_dict=False)[0].float()
    return float((noised - limit).norm() / limit.norm())


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_scheduler_reaches_the_limit(name, velocity, limit):
    check_scheduler(ALLOWED[name])
    assert relative_error(ALLOWED[name], velocity, limit) < 0.01


@pytest.mark.parametrize("name", REFUSED)
def test_refused_scheduler_is_wrong(name, velocity, limit):
    with pytest.raises(PipelineError, match=r"does not sample this ensemble correctly: .*FlowMatchEuler"):
        check_scheduler(REFUSED[name])
    torch.manual_seed(0)
    assert relative_error(REFUSED[name], velocity, limit) > 0.05


def test_flow_sigmas_need_rectified_flow():
    check_scheduler(ALLOWED["euler"], "cosine")
    with pytest.raises(PipelineError, match="alpha = 1 - t"):
        check_scheduler(ALLOWED["unipc"], "cosine")


def test_sigmas_are_the_times_before_the_shift():
    times = set_times(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 2, 1, torch.device("cpu"), [1.0, 0.5])
    assert times.tolist() == [1.0, 0.75]
    with pytest.raises(PipelineError, match="takes no sigmas"):
        set_times(ALLOWED["dpm++"], 2, 1, torch.device("cpu"), [1.0, 0.5])


@pytest.mark.parametrize("sigmas", [[], [1.0, 0.5, 0.6], [0.5, 0.5], [1.2, 0.5], [1.0, 0.0]])
def test_sigmas_that_do_not_fall_to_above_zero_are_refused(sigmas):
    with pytest.raises(PipelineError, match="sigmas must fall from at most 1 to above 0"):
        set_times(ALLOWED["euler"], 2, 1, torch.device("cpu"), sigmas)


def test_dynamic_shift_is_linear_in_the_tokens():
    config = diffusers.FlowMatchEulerDiscreteScheduler().config
    assert [dynamic_shift(config, tokens) for tokens in (256, 4096)] == pytest.approx([0.5, 1.15])


def test_saved_scheduler_must_be_an_allowed_class(tmp_path):
    diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0).save_pretrained(tmp_path / "good")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "bad")
    assert load_scheduler(tmp_path / "good").config.shift == 2.0
    with pytest.raises(PipelineError, match="DDIMScheduler"):
        load_scheduler(tmp_path / "bad")


def test_pipeline_refuses_a_wrong_scheduler(pipe):
    pipe.scheduler = REFUSED["euler of noise"]
    with pytest.raises(PipelineError, match="reads the velocity as noise"):
        pipe(seeds=[0])
