"""Configuration of the router and of selections; imports no torch."""

from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT, UNHASHED_IF_DEFAULT
from experts.config import NoiseScheduleName, TrainingConfig

SelectionName = Literal[
    "full",
    "top_k",
    "threshold",
    "nucleus",
    "sample",
    "sticky",
    "full_then_top1",
    "threshold_then_top1",
    "full_then_sticky",
    "sticky_resample",
    "coupled_resample",
]
RouterKind = Literal["mlp", "transformer", "prior_table", "nearest_centroid", "density_ratio", "density"]
AUTO: Final = "auto"
"""Placeholder for the best selection of a run's `selection_search` stage."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RouterConfig:
    """Network and training of the router."""

    kind: RouterKind = "mlp"
    """`mlp` takes flattened latents, `transformer` takes tokens of them. `density_ratio` has a small network for each
    expert, so that experts can be added and removed. `nearest_centroid` and `prior_table` train no network,
    and neither does `density`, which compares the losses of the experts themselves."""
    width: Annotated[int, Field(ge=8)] = 128
    """Features of every hidden layer."""
    depth: Annotated[int, Field(ge=1)] = 2
    """Blocks."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads of the transformer."""
    tokens: Annotated[int, Field(ge=1)] = 16
    """Number of tokens that the transformer divides flattened latents into."""
    noise_schedule: NoiseScheduleName = "rectified_flow"
    """Noise schedule of the ensemble."""
    draws: Annotated[int, Field(ge=2, multiple_of=2)] = field(default=8, metadata=UNHASHED_IF_DEFAULT)
    """Calls of every expert for one evaluation of the router `density`."""
    calibrate: bool = True
    """Whether temperatures are fitted on one half of the held-out samples; quality is measured on the other half."""
    training: TrainingConfig = TrainingConfig(t_std=1.4)
    """Steps, batch size, learning rate and so on; the batch size is not divided by K."""
    data: Literal["real", "samples"] = field(default="real", metadata=UNHASHED_IF_DEFAULT)
    """`real`: trains on all clusters, in parallel with the experts. `samples`: trains on latents that the finished
    experts generate, for data that may not leave their islands; of the data it uses only the clusters' counts."""
    samples_per_expert: Annotated[int, Field(ge=1)] = field(default=2048, metadata=UNHASHED_IF_DEFAULT)
    """Average number of latents per expert with `data=samples`; each expert generates its cluster's true share."""
    sample_steps: Annotated[int, Field(ge=2)] = field(default=10, metadata=UNHASHED_IF_DEFAULT)
    """Heun steps per generated latent."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectionConfig:
    """The selection, the rule from logits to gates; each number applies to the selections in its description."""

    name: SelectionName | Literal["auto"] = "sticky"
    """One of the rules in `router/selection.py`; with `auto` the run chooses one by its stage `selection_search`."""
    k: Annotated[int, Field(ge=1)] = 1
    """Number of experts that `top_k` keeps."""
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Minimum probability of an expert that `threshold` keeps, and `threshold_then_top1` at high t."""
    total: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Total probability of the fewest experts that `nucleus` keeps."""
    draws: Annotated[int, Field(ge=1)] = 1
    """Number of experts that `sample` draws, with replacement."""
    t_switch: Annotated[float, Field(ge=0, le=1)] = 0.5
    """`full_then_top1`, `threshold_then_top1` and `full_then_sticky` mix experts above this t and use one expert from
    there on. `sticky_resample` draws its expert again at this t."""


def selection_label(selection: SelectionConfig) -> str:
    """Return a selection's name for stage names and tables, with the numbers that it depends on."""
    numbers = {
        "top_k": f"_{selection.k}",
        "threshold": f"_{selection.probability:g}",
        "nucleus": f"_{selection.total:g}",
        "sample": f"_{selection.draws}",
        "full_then_top1": f"_{selection.t_switch:g}",
        "threshold_then_top1": f"_{selection.probability:g}_{selection.t_switch:g}",
        "full_then_sticky": f"_{selection.t_switch:g}",
        "sticky_resample": f"_{selection.t_switch:g}",
    }
    return selection.name + numbers.get(selection.name, "")
