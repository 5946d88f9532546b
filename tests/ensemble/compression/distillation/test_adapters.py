"""A control that was trained on an expert works on its students: adapters fit every network, and keep their effect."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch

from ddm_core.artifacts import Workspace
from ensemble.compression.distillation.config import ConsistencyConfig
from ensemble.compression.distillation.consistency import train_consistency
from ensemble.config import SamplingConfig
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.networks.lora import LoraLayerWeights, add_lora, add_new_lora, extract_lora, remove_lora
from experts.training.lora_training import choose_layers
from experts.training.loss import expert_loss
from experts.training.trainer import fit
from router.config import SelectionConfig
from tests.ensemble.compression.distillation.test_mean_flow import distill, each_method
from tests.ensemble.compression.distillation.test_sid import generate
from tests.ensemble.compression.trained import digits, trained

PLAIN = SamplingConfig(solver="euler", steps=20, selection=SelectionConfig(name="full"))


@each_method
def test_an_adapter_of_the_expert_fits_its_students(method, tmp_path):
    teacher = trained("mlp", Workspace.at(tmp_path / "teacher"))
    student = distill(method, teacher, Workspace.at(tmp_path / "student")).model
    network, condition = deepcopy(student), Condition.null(2)
    noised, t = torch.randn(2, 1, 8, 8), torch.ones(2)
    velocity = lambda: replace(teacher, model=network).velocity(noised, t, condition)  # noqa: E731
    before, generator, lora = velocity(), torch.Generator().manual_seed(0), {}
    for path in choose_layers(teacher.model):
        outputs, inputs = teacher.model.get_submodule(path).weight.shape
        up, down = torch.randn(outputs, 2, generator=generator), torch.randn(2, inputs, generator=generator)
        lora[path] = LoraLayerWeights(up=0.1 * up, down=down, alpha=2.0)
    add_lora(network, lora, "concept")
    assert not torch.allclose(velocity(), before)
    remove_lora(network)
    assert torch.equal(velocity(), before)


@pytest.mark.integration
def test_a_transferred_control_moves_the_student(tmp_path):
    teacher = trained("mlp", Workspace.at(tmp_path / "teacher"), 1500)
    bold = torch.nn.functional.max_pool2d(digits().clean, 2, stride=1, padding=1)[..., 1:, 1:].contiguous()
    network, training = deepcopy(teacher.model), TrainingConfig(steps=400, batch_size=64, lr=2e-3, warmup_steps=10)
    torch.manual_seed(0)
    add_new_lora(network, choose_layers(network), 8)
    loss = partial(expert_loss, prediction="velocity", noise_schedule=RECTIFIED_FLOW)
    lora = extract_lora(fit(network, loss, replace(digits(), clean=bold), training, Workspace.at(tmp_path / "a")).model)
    config = ConsistencyConfig(teacher=True, training=replace(training, steps=800, lr=1e-3))
    student = train_consistency(teacher, digits(), config, Workspace.at(tmp_path / "b")).network
    moved = []
    for expert in (teacher, student):
        controlled = replace(expert, model=deepcopy(expert.model))
        add_lora(controlled.model, lora, "bold")
        moved.append(float((generate(controlled, PLAIN) - generate(expert, PLAIN)).mean()))
    assert moved[1] >= 0.8 * moved[0] > 0
