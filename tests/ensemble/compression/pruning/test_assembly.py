"""A-SDM's assembly: the share of FLOPs, blocks that are trained alone, and kernels of removed layers."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace
from ensemble.compression.common.calibration_data import calibration_batches, run_network
from ensemble.compression.config import WeightOnlyConfig
from ensemble.compression.method import StageError
from ensemble.compression.pruning.assembly import add_kernels, assemble, prune_assembly
from ensemble.compression.pruning.config import AssemblyConfig
from ensemble.compression.pruning.feature_distillation import distillation_loss
from ensemble.compression.quantization.weight_only import quantize_weights
from experts.compressed.pruning.layers import removable_layers
from experts.config import TrainingConfig
from experts.expert import Expert, network_flops
from tests.ensemble.compression.trained import digits, trained

SHORT = TrainingConfig(steps=20, batch_size=16, lr=1e-3, warmup_steps=2, log_every=10)


@pytest.fixture(scope="module", params=["dit", "unet"])
def original(request, tmp_path_factory):
    return trained(request.param, Workspace.at(tmp_path_factory.mktemp("trained")))


PARTS = {
    True: ("mid_block.resnets.1", "mid_block.resnets.0", ".conv2", 0.072),
    False: ("transformer_blocks.0.ff", "transformer_blocks.1.ff", ".net.2", 0.34),
}
"""A kept layer, a removed one of its shape, a layer within, and the share of FLOPs: of the U-Net, of the DiT."""


def predict(model, expert):
    with torch.no_grad():
        return run_network(model, expert, calibration_batches(digits(), 8, 1, 1)[0])


def run(expert, folder, **settings):
    config = replace(AssemblyConfig(rows=32, incubation=None, finetune=None), **settings)
    return prune_assembly(expert, digits(), config, Workspace.at(folder))


@pytest.mark.parametrize(("order", "ratio"), [("shallow", 0.35), ("output_loss", 0.5), ("random", 0.2)])
def test_the_share_of_flops_is_the_asked_one(original, order, ratio, tmp_path):
    result = run(original, tmp_path, ratio=ratio, order=order)
    left = network_flops(result.network.model, (1, 8, 8)) / network_flops(original.model, (1, 8, 8))
    assert left == result.details["flops"] == pytest.approx(1 - ratio, abs=0.01)


def test_trained_blocks_fit_and_the_original_stays(original, tmp_path):
    """At this ratio a stage of the U-Net begins with a norm that is trained on maps that need no gradient."""
    before = {name: value.clone() for name, value in original.model.state_dict().items()}
    incubation = replace(SHORT, steps=2 * SHORT.steps)
    result = run(original, tmp_path / "a", ratio=0.2, incubation=incubation)
    details, state = result.details, result.network.model.state_dict()
    assert details["error_incubated"] < details["error_assembled"]
    assert all(torch.equal(original.model.state_dict()[name], value) for name, value in before.items())
    stages = tuple(f"{path}." for path in details["incubated"])
    inherited = {name: before[name] for name in state if not name.startswith(stages)}
    assert inherited and all(torch.equal(state[name], value) for name, value in inherited.items())


def test_semantic_supervision_is_part_of_the_loss(original):
    """The term is zero for the teacher itself, grows with the distance, and is part of the loss."""
    model, batch = deepcopy(original.model), calibration_batches(digits(), 8, 0, 1)[0]
    losses = [
        distillation_loss(original, [], {}, AssemblyConfig(semantic_weight=weight), SHORT) for weight in (2.0, 0.0)
    ]
    assert float(losses[0](model, batch)["semantic"]) == 0 and "semantic" not in losses[1](model, batch)
    terms = []
    for scale in (1.1, 1.5):
        next(model.parameters()).data.mul_(scale)
        terms.append(losses[0](model, batch))
        plain = losses[1](model, batch)["loss"]
        torch.testing.assert_close(terms[-1]["loss"] - plain, 2 * terms[-1]["semantic"], rtol=1e-3, atol=1e-6)
    assert 0 < terms[0]["semantic"] < terms[1]["semantic"]


def test_kernels_of_removed_layers_are_inherited_and_saved(original, tmp_path):
    kept, removed, name, ratio = PARTS[hasattr(original.model, "mid_block")]
    others = [path for path in removable_layers(original.model) if "attn" in path or "up_blocks.1" in path]
    model, layers, narrowed = assemble(original, [removed, *others], ratio)
    plain = predict(model, original)
    assert layers == [removed] and bool(narrowed) == kept.endswith("ff")
    for inherit, error in ((False, 1e-5), (True, 0.1)):
        several, config = deepcopy(model), AssemblyConfig(kernels=3, inherit=inherit)
        assert add_kernels(several, original.model, layers, config) == {kept: [removed]}
        sources = [original.model.get_submodule(f"{path}{name}") for path in (kept, removed if inherit else kept, kept)]
        kernels = several.get_submodule(f"{kept}{name}").kernels
        assert torch.equal(kernels, torch.stack([layer.weight for layer in sources]))
        assert float((predict(several, original) - plain).norm() / plain.norm()) < error
    expert = replace(original, model=several)
    packed = quantize_weights(expert, WeightOnlyConfig(group_size=8)).network
    for number, saved in enumerate((expert, packed)):
        saved.save(tmp_path / str(number))
        loaded = Expert.load(tmp_path / str(number))
        assert torch.equal(predict(loaded.model, original), predict(saved.model, original))
    assert not [weight for weight in packed.model.parameters() if weight.ndim > 2 and weight.numel() >= 1024]


def test_what_cannot_be_assembled_is_an_error(original, tmp_path):
    with pytest.raises(StageError, match=r"set prune\.ratio=0\.\d+ or another order"):
        run(original, tmp_path, ratio=0.99, order="random")
    with pytest.raises(StageError, match=r"set prune\.kernels=1"):
        add_kernels(deepcopy(original.model), original.model, [], AssemblyConfig(kernels=2))
    with pytest.raises(StageError, match=r"removes no layers of Linear; .* \(its layers: 1 Linear\)"):
        run(replace(original, model=torch.nn.Linear(2, 2)), tmp_path)
