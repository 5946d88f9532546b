"""Experts that are loaded when they are called, so that the loaded ones stay within a budget of memory.

Adapters are small, stay in memory, and are injected again into an expert that is loaded again.
"""

import logging
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ddm_core.artifacts import CorruptArtifact, read_json
from ddm_core.json_values import from_json
from ensemble.pipeline_folder import PipelineError
from experts.compressed.caching.feature_cache import ExpertCache
from experts.compressed.quantization.shared_weight_io import SHARED
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.expert import CACHE_FILE, METADATA_FILE, Expert, ExpertMetadata
from experts.expert_model import ExpertModel
from experts.networks.lora import Lora, add_lora, remove_lora, set_weights
from experts.networks.pretrained_files import weight_files
from experts.types import Latents

log = logging.getLogger(__name__)

Residency = Literal["all", "grouped", "paged"]
"""`all`: every expert is loaded. `grouped`: one expert after the other, for whole trajectories. `paged`: by need."""


@dataclass(slots=True)
class PagedAdapters:
    """The adapters of one expert, loaded or not."""

    loras: dict[str, tuple[Lora, float]] = field(default_factory=dict)
    """The factors and the weight of each, by name."""
    active: dict[str, float] | None = None
    """The weights of those in use; None is all."""

    def inject(self, network: nn.Module) -> None:
        """Add them to a network that was loaded without."""
        for name, (lora, weight) in self.loras.items():
            add_lora(network, lora, name, weight)
        if self.active is not None:
            set_weights(network, self.active)


@dataclass(slots=True, kw_only=True)
class ExpertPager:
    """Loads experts from their folders, and drops those that were not called for longest."""

    max_bytes: int
    """Most bytes of weights that are loaded at once."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None
    loads: int = 0
    """Number of loads so far."""
    loaded: OrderedDict[Path, Expert] = field(default_factory=OrderedDict)
    adapters: dict[Path, PagedAdapters] = field(default_factory=lambda: defaultdict(PagedAdapters))
    on_change: Callable[[Path, Expert | None], None] = lambda _folder, _expert: None
    """Called with every expert that is loaded, and with None after it is dropped."""

    def get(self, expert: "PagedExpert") -> Expert:
        """Return the loaded expert; others are dropped before it is loaded."""
        if expert.folder not in self.loaded:
            while self.loaded and self.loaded_bytes + expert.size_bytes > self.max_bytes:
                self.drop(next(iter(self.loaded)))
            self.loads += 1
            loaded = Expert.load(expert.folder)
            loaded.model.to(self.device, self.dtype)
            self.adapters[expert.folder].inject(loaded.model)
            self.loaded[expert.folder] = loaded
            self.on_change(expert.folder, loaded)
        self.loaded.move_to_end(expert.folder)
        return self.loaded[expert.folder]

    def drop(self, folder: Path) -> None:
        """Free the memory of an expert, if it is loaded."""
        if self.loaded.pop(folder, None) is not None:
            self.on_change(folder, None)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load experts to this device and type from now on."""
        self.device, self.dtype = device, dtype
        for folder in list(self.loaded):
            self.drop(folder)

    @property
    def loaded_bytes(self) -> int:
        """Return the bytes of the weights that are loaded."""
        return sum(weight_bytes(folder) for folder in self.loaded)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedExpert(ExpertModel):
    """An expert that its pager loads when it is called."""

    folder: Path
    pager: ExpertPager
    size_bytes: int
    latent_shape: tuple[int, ...]
    num_classes: int
    few_step: FewStepSchedule | None = None
    needs_cache: bool = False

    @classmethod
    def open(cls, folder: Path, pager: ExpertPager) -> "PagedExpert":
        """Read what is known without the weights; raise `PipelineError` for an expert of several networks."""
        if not (folder / METADATA_FILE).is_file():
            raise PipelineError(f"{folder} holds several networks, which are not paged; leave max_memory out")
        try:
            metadata = from_json(ExpertMetadata, read_json(folder / METADATA_FILE))
        except ValueError as error:
            raise CorruptArtifact(f"{folder} does not hold a valid expert: {error}; train it again") from error
        return cls(
            folder=folder,
            pager=pager,
            size_bytes=weight_bytes(folder),
            latent_shape=metadata.latent_shape,
            num_classes=metadata.num_classes,
            few_step=metadata.few_step,
            needs_cache=(folder / CACHE_FILE).is_file(),
        )

    def velocity(self, noised: Latents, t: Tensor, condition: Condition, noise_schedule: NoiseSchedule) -> Latents:
        """Return the velocity of every row."""
        return self.pager.get(self).velocity(noised, t, condition, noise_schedule)

    def cached_velocity(
        self,
        noised: Latents,
        t: Tensor,
        condition: Condition,
        noise_schedule: NoiseSchedule,
        rows: Int[Tensor, " row"],
        cache: ExpertCache,
    ) -> Latents:
        """Return the velocity of these rows of a trajectory, with the cached features of earlier steps."""
        return self.pager.get(self).cached_velocity(noised, t, condition, noise_schedule, rows, cache)

    @property
    def adapter_names(self) -> list[str]:
        """Return the names of its adapters."""
        return sorted(self.pager.adapters[self.folder].loras)

    def add_lora(self, lora: Lora, name: str, weight: float) -> None:
        """Load the expert and add an adapter, which it has again whenever it is loaded; raises like `add_lora`."""
        add_lora(self.pager.get(self).model, lora, name, weight)
        adapters = self.pager.adapters[self.folder]
        adapters.loras[name], adapters.active = (lora, weight), None

    def set_adapters(self, weights: dict[str, float]) -> None:
        """Activate adapters with these weights, and no others."""
        self.pager.adapters[self.folder].active = weights
        if loaded := self.pager.loaded.get(self.folder):
            set_weights(loaded.model, weights)

    def remove_adapters(self) -> None:
        """Remove all adapters."""
        self.pager.adapters.pop(self.folder, None)
        if loaded := self.pager.loaded.get(self.folder):
            remove_lora(loaded.model)

    def to(self, device: torch.device | str) -> "PagedExpert":
        """Load experts to this device from now on."""
        self.pager.device = torch.device(device)
        return self

    def save(self, folder: Path) -> None:
        """Load the expert and write its folder."""
        self.pager.get(self).save(folder)


def weight_bytes(folder: Path) -> int:
    """Return the size of an expert's weights, of all its networks; raise `CorruptArtifact` if they are missing."""
    if not (folder / METADATA_FILE).is_file():
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    try:
        return sum(path.stat().st_size for path in weight_files(folder))
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{folder}: {error}") from error


def choose_residency(folders: dict[int, Path], max_bytes: int, *, keeps_expert: bool) -> tuple[Residency, str]:
    """Return how experts share a budget of memory, and why; raise `PipelineError` if the largest alone exceeds it.

    `keeps_expert` is whether the selection draws one expert for a whole trajectory.
    """
    sizes = {k: weight_bytes(folder) for k, folder in folders.items()}
    total, largest = sum(sizes.values()), max(sizes, key=lambda k: sizes[k])
    budget = f"{max_bytes / 1e6:,.0f} MB"
    if total <= max_bytes:
        return "all", f"the experts have {total / 1e6:,.0f} MB of weights, which fit into {budget}"
    if sizes[largest] > max_bytes:
        raise PipelineError(
            f"expert {largest} alone has {sizes[largest] / 1e6:,.1f} MB of weights, more than max_memory, {budget}; "
            "raise it, or compress the experts"
        )
    reason = f"of {total / 1e6:,.0f} MB of weights, {budget} fit at a time"
    if keeps_expert:
        return "grouped", f"{reason}, and every image keeps its expert: experts are loaded one after the other"
    return "paged", f"{reason}, and images change experts: experts are loaded at every step; sticky avoids that"


def choose_loader(
    folder: Path, max_memory: int | str, dtype: torch.dtype | None
) -> Callable[[Path], ExpertModel] | None:
    """Return the function that opens an expert's folder without loading it; None if all fit into a budget.

    `max_memory` is a number of bytes or text such as `4GB`. Raises `PipelineError` for an expert larger than it, and
    for experts that share weights.
    """
    folders = {int(path.name.removeprefix("expert_")): path for path in folder.glob("expert_*") if path.is_dir()}
    max_bytes = read_bytes(max_memory)
    mode, reason = choose_residency(folders, max_bytes, keeps_expert=True) if folders else ("all", "there are none")
    log.info("experts: %s, as %s", mode, reason)
    if mode == "all":
        return None
    if (folder / SHARED).is_dir():
        raise PipelineError(f"the experts of {folder} share weights, and are not paged; leave max_memory out")
    pager = ExpertPager(max_bytes=max_bytes, dtype=dtype)
    return partial(PagedExpert.open, pager=pager)


def read_bytes(size: int | str) -> int:
    """Return a number of bytes, which may be text such as `500MB` or `4GB`; raise `PipelineError` for any other."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)I?B?", str(size).upper())
    if not match:
        raise PipelineError(f"max_memory must be a number of bytes, or such as 500MB or 4GB; got {size!r}")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))
