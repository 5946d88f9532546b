"""AdaRound: round every weight down or up, so that the output of its layer changes least.

    min over W^ of  E || (W - W^) x ||^2 = tr((W - W^) G (W - W^)^T),    W^ / s one of the two integers around W / s

Nagel et al. 2020, arXiv:2004.10568, equation 13, with the Gram matrix G = E[x x^T] of the layer's rounded inputs. Each
row is solved by coordinate descent from the nearest integers: the weight whose other integer lowers the error most
changes, until none does. On random problems that was nearer to the optimum than the paper's relaxation, and faster.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.common.calibration_data import record_calls, run_network
from ensemble.compression.quantization.quantization_aware import exact_weight, weight_quantizer
from experts.expert import Expert
from experts.training.latent_dataset import Batch

Gram = Float[Tensor, "entry entry"]
GRAM_ELEMENTS = 2**26
"""Elements of all Gram matrices that are held at once, unless that of a single layer has more."""
TOLERANCE = 1e-5
"""Change of a row's error, relative to that of the nearest integers, at which the descent stops."""
MARGIN = 0.1
"""Distance, in steps, of an exact weight from the next one to which training could move it."""


def round_adaptively(
    model: nn.Module,
    paths: Sequence[str],
    expert: Expert,
    batches: Sequence[Batch],
    workspace: Workspace,
) -> None:
    """Move the exact weights of these layers, in place, by less than a step to where they round as chosen.

    Raises `Preempted` between two layers.
    """
    weights = {
        path: exact_weight(model, path) for path in paths if getattr(model.get_submodule(path), "groups", 1) == 1
    }
    for chunk in _chunks({path: weight[0].numel() for path, weight in weights.items()}):
        grams = _gram_matrices(model, chunk, expert, batches)
        for path in chunk:
            if workspace.stop_requested():
                raise Preempted("stopped while weights were rounded; rounding restarts from the first layer")
            quantizer = weight_quantizer(model, path)
            scales, bits, weight = quantizer.scales.float(), quantizer.packing.bits, weights[path]
            numbers = weight.detach().flatten(1) / torch.where(scales != 0, scales, 1.0)
            chosen = choose_integers(numbers, scales, grams[path], bits)
            moved = torch.clamp(numbers, chosen - 0.5 + MARGIN, chosen + 0.5 - MARGIN) * scales
            with torch.no_grad():
                weight.copy_(moved.reshape(weight.shape))


def choose_integers(
    numbers: Float[Tensor, "row entry"], scales: Float[Tensor, "row 1"], gram: Gram, bits: int
) -> Float[Tensor, "row entry"]:
    """Return for each weight over its scale the integer below or above it, within `bits` bits."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    chosen = numbers.round().clamp(lowest, highest)
    slope = (chosen - numbers) * scales @ gram
    tolerance = TOLERANCE * ((chosen - numbers) * scales * slope).sum(1)
    while True:
        other = torch.where(chosen > numbers, numbers.floor(), numbers.ceil()).clamp(lowest, highest)
        step = (other - chosen) * scales
        change, entry = (step * (2 * slope + step * gram.diagonal())).min(1)
        row = (change < -tolerance).nonzero().squeeze(1)
        if not len(row):
            return chosen
        entry = entry[row]
        chosen[row, entry] = other[row, entry]
        slope[row] += step[row, entry, None] * gram[entry]


def _chunks(entries: dict[str, int]) -> Iterator[list[str]]:
    """Yield the layers in groups whose Gram matrices fit in memory together."""
    chunk, held = list[str](), 0
    for path, count in entries.items():
        if chunk and held + count**2 > GRAM_ELEMENTS:
            yield chunk
            chunk, held = [], 0
        chunk.append(path)
        held += count**2
    yield chunk


def _gram_matrices(model: nn.Module, paths: Sequence[str], expert: Expert, batches: Sequence[Batch]) -> dict[str, Gram]:
    """Return E[x x^T] of the rounded inputs of each layer; of a convolution, x is what one output reads."""
    grams: dict[str, Tensor] = {}

    def record(path: str, layer_input: Tensor, layer_output: Tensor) -> None:
        layer = model.get_submodule(path)
        rows = layer_input.detach().float()
        if isinstance(layer, nn.Conv2d):
            padding: Any = layer.padding  # numbers in all classes
            columns = functional.unfold(rows, layer.kernel_size, layer.dilation, padding, layer.stride)
            rows = columns.transpose(1, 2)
        rows = rows.flatten(0, -2)
        grams[path] = grams.get(path, torch.zeros(())) + rows.T @ rows / len(rows)

    with torch.no_grad(), record_calls(model, paths, record):
        for batch in batches:
            run_network(model, expert, batch)
    return grams
