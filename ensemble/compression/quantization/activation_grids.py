"""Find the grids on which the inputs of layers, and the operands of attention, are rounded at each calibrated time.

Wang et al. 2025 (QuEST), arXiv:2402.03666: one grid a calibrated time, and with four bits one a channel.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.common.calibration_data import calibration_batches, record_calls, run_network, subsample_rows
from ensemble.compression.quantization.config import QuESTConfig
from experts.compressed.conditional.timestep_recorder import TimestepRecorder
from experts.compressed.quantization.activation_quant import Grids, quantize_input
from experts.compressed.quantization.attention_quant import AttentionProducts, attention_layers, quantize_operand
from experts.compressed.quantization.fake_quant import search_grids
from experts.expert import Expert
from experts.training.latent_dataset import LatentDataset

Samples = Float[Tensor, "channel sample"]
Place = tuple[str, str]
"""Path of a layer, and the operand of an attention layer, or "" for the input of another."""


@dataclass(slots=True)
class GridSearch:
    """Samples of what is rounded, and the grids that were found for each calibrated time."""

    config: QuESTConfig
    keeps: int
    """Rows of samples that are kept of one time."""
    latest: dict[Place, Samples] = field(default_factory=dict)
    kept: dict[Place, list[Samples]] = field(default_factory=dict)
    found: dict[Place, list[tuple[Tensor, ...]]] = field(default_factory=dict)

    def observe(self, place: Place, rows: Float[Tensor, "*row channel"]) -> None:
        """Take a sample of rows at this time."""
        sample = subsample_rows(rows.detach().flatten(0, -2).float(), self.keeps).T
        is_channelwise = self.config.channelwise and place[1] != "probability"
        self.latest[place] = sample if is_channelwise else sample.reshape(1, -1)

    def end_time(self) -> None:
        """Search the grids of this time, or keep its samples if all times share a grid."""
        for place, sample in self.latest.items():
            if self.config.timewise:
                self.found.setdefault(place, []).append(search_grids(sample, self.bits(place)))
            else:
                self.kept.setdefault(place, []).append(sample)
        self.latest.clear()

    def grids(self) -> dict[Place, Grids]:
        """Return all grids."""
        shared = {place: [search_grids(torch.cat(kept, 1), self.bits(place))] for place, kept in self.kept.items()}
        return {
            place: (torch.stack([one[0] for one in found]), torch.stack([one[1] for one in found]))
            for place, found in (self.found | shared).items()
        }

    def bits(self, place: Place) -> Any:
        """Return the bits of a grid; attention probabilities have their own."""
        return self.config.probability_bits if place[1] == "probability" else self.config.activation_bits


def round_activations(
    model: nn.Module,
    paths: Sequence[str],
    expert: Expert,
    dataset: LatentDataset,
    config: QuESTConfig,
    workspace: Workspace,
) -> list[str]:
    """Round the inputs of these layers and the operands of attention, in place; return the layers that were called.

    Raises `Preempted` between two calibrated times.
    """
    uniform = [(number + 0.5) / config.times for number in range(config.times)]
    schedule = uniform if expert.few_step is None else sorted(expert.few_step.times)
    batches = calibration_batches(dataset, config.rows, config.seed, len(schedule))
    search = GridSearch(config, config.tokens if config.timewise else -(-config.tokens // len(schedule)))
    convolutions = {path for path in paths if isinstance(model.get_submodule(path), nn.Conv2d)}

    def record(path: str, layer_input: Tensor, layer_output: Tensor) -> None:
        search.observe((path, ""), layer_input.movedim(1, -1) if path in convolutions else layer_input)

    attention = attention_layers(model) if config.probability_bits is not None else []
    clock, times = TimestepRecorder(), []
    handle = model.register_forward_pre_hook(clock, with_kwargs=True)
    with torch.no_grad(), record_calls(model, paths, record), _record_operands(model, attention, search.observe):
        for number, (t, batch) in enumerate(zip(schedule, batches, strict=True)):
            if workspace.stop_requested():
                raise Preempted(f"stopped after {number} of {len(schedule)} times; calibration restarts from the first")
            run_network(model, expert, replace(batch, t=torch.full_like(batch.t, t)))
            if clock.timestep is not None:
                times.append(clock.timestep[0].float())
            search.end_time()
    handle.remove()
    timesteps = torch.stack(times) if config.timewise else torch.stack(times).mean().reshape(1)
    grids = search.grids()
    for (path, operand), (steps, zeros) in grids.items():
        bits, (count, channels) = search.bits((path, operand)), steps.shape
        quantizer = (
            quantize_operand(model, path, operand, count, channels, bits)
            if operand
            else quantize_input(model, path, count, bits, channels)
        )
        quantizer.set_grids(timesteps, (steps, zeros))
    return [path for path in paths if (path, "") in grids]


@contextmanager
def _record_operands(
    model: nn.Module, paths: Sequence[str], observe: Callable[[Place, Tensor], None]
) -> Iterator[None]:
    """Observe the operands of these attention layers, where they call torch's attention."""

    def add_hooks(stack: ExitStack, path: str) -> None:
        def observed(operand: str, x: Tensor) -> Tensor:
            observe((path, operand), x)
            return x

        def enter(*_: Any) -> None:
            products.__enter__()  # type: ignore[no-untyped-call]

        def leave(*_: Any) -> None:
            products.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        products, layer = AttentionProducts(observed), model.get_submodule(path)
        stack.callback(layer.register_forward_pre_hook(enter).remove)
        stack.callback(layer.register_forward_hook(leave, always_call=True).remove)

    with ExitStack() as stack:
        for path in paths:
            add_hooks(stack, path)
        yield
