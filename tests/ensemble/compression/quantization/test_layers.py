"""Layers that are quantized, in every class of network."""

import re

import pytest
import torch
from torch import nn

from benchmarks.testbed.backbones import TINY, build, inputs
from ensemble.compression.common.calibration_data import record_calls
from ensemble.compression.quantization.layers import PATHS, quantizable_layers
from experts.compressed.quantization.activation_quant import quantize_input
from experts.compressed.quantization.attention_quant import OPERANDS, quantize_operand
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing
from experts.networks.model_io import save_model
from experts.networks.registry import call_network, load_network

ENDS = re.compile(
    r"(^|\.)(conv_(in|out|depth)|(pos|patch)_embed\.(text_)?proj|add_embedding|caption_projection|norm_out\.linear_2"
    r"|(context|text|caption|cap|x|all_x)_embedder|(img|txt)_in|(final_layer(\.\d-\d)?|all_final_layer\.\d-\d)\.linear)(\.|$)"
    r"|samplers|^proj_out(_2)?$"
)
"""Layers that are not: the first and the last ones, those that embed texts, and changes of resolution."""


@pytest.mark.parametrize("case", TINY)
def test_all_layers_but_the_ends_are_quantized_and_stored(case, tmp_path):
    model, arguments = build(case), inputs(case)
    paths = quantizable_layers(model, *PATHS)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert not [path for path in linear if path not in paths and not ENDS.search(path)]
    assert not [path for path in paths if ENDS.search(path)]
    called, times = set(), 1000 * torch.tensor([0.2, 0.8])
    with torch.no_grad(), record_calls(model, paths, lambda path, *_: called.add(path)):
        call_network(model, *arguments)
    for path in called:
        layer = model.get_submodule(path)
        channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        steps = torch.linspace(0.05, 0.2, 2 * channels).reshape(2, channels)
        quantize_input(model, path, 2, 4, channels).set_grids(times, (steps, torch.full_like(steps, 8)))
        shape = tuple(layer.weight.shape)
        pack_weight(model, f"{path}.weight", Packing(bits=4, group_size=16, shape=shape))
    attention = next(path for path, module in model.named_modules() if type(module).__name__.endswith("Attention"))
    if not case.startswith("Sana"):
        grids = (torch.full((2, 1), 0.01), torch.zeros(2, 1))
        quantize_operand(model, attention, OPERANDS[3], 2, 1, 8).set_grids(times, grids)
        for operand in OPERANDS[:3]:
            grids = (torch.full((2, 1), 0.05), torch.full((2, 1), 128.0))
            quantize_operand(model, attention, operand, 2, 1, 8).set_grids(times, grids)
    save_model(model, tmp_path)
    with torch.no_grad():
        outputs = [call_network(one, *arguments) for one in (model, load_network(tmp_path), build(case))]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
