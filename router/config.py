"""What can be chosen about the router; imports no torch."""

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
RouterKind = Literal["mlp", "transformer", "prior_table", "nearest_centroid", "density_ratio"]
AUTO: Final = "auto"
"""No rule of its own: whichever one a run's `selection_search` stage finds best."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RouterConfig:
    """The network that says which expert speaks for a noised sample."""

    kind: RouterKind = "mlp"
    """`mlp` reads flattened latents, `transformer` reads tokens of them; `density_ratio` has a small network for each
    expert, so that experts come and go; `nearest_centroid` and `prior_table` train no network."""
    width: Annotated[int, Field(ge=8)] = 128
    """Features of every hidden layer."""
    depth: Annotated[int, Field(ge=1)] = 2
    """Blocks."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads of the transformer."""
    tokens: Annotated[int, Field(ge=1)] = 16
    """Tokens that the transformer cuts flattened latents into."""
    noise_schedule: NoiseScheduleName = "rectified_flow"
    """The noise path of the ensemble."""
    calibrate: bool = True
    """Whether temperatures are fitted on half of the held-out samples; quality is measured on the other half."""
    training: TrainingConfig = TrainingConfig(t_std=1.4)
    """Steps, batch, learning rate and so on; the batch is not divided by K."""
    data: Literal["real", "samples"] = field(default="real", metadata=UNHASHED_IF_DEFAULT)
    """`real`: it trains on all clusters, beside the experts. `samples`: on latents that the finished experts draw, for
    data that may not leave their places; of the data it is told the clusters' counts."""
    samples_per_expert: Annotated[int, Field(ge=1)] = field(default=2048, metadata=UNHASHED_IF_DEFAULT)
    """Latents drawn from an expert on average with `data=samples`; each has its cluster's true share of them."""
    sample_steps: Annotated[int, Field(ge=2)] = field(default=10, metadata=UNHASHED_IF_DEFAULT)
    """Heun steps of each of those draws."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectionConfig:
    """How logits become gates; each number is used by the selections that its sentence names."""

    name: SelectionName | Literal["auto"] = "sticky"
    """The rule, of which `router/selection.py` holds them all; `auto` lets the run choose one by `selection_search`."""
    k: Annotated[int, Field(ge=1)] = 1
    """Experts kept by `top_k`."""
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """`threshold`, and `threshold_then_top1` at high t, keep experts at least so probable."""
    total: Annotated[float, Field(gt=0, le=1)] = 0.9
    """`nucleus` keeps the fewest experts that reach this probability together."""
    draws: Annotated[int, Field(ge=1)] = 1
    """Experts drawn by `sample`, with replacement."""
    t_switch: Annotated[float, Field(ge=0, le=1)] = 0.5
    """`full_then_top1`, `threshold_then_top1` and `full_then_sticky` mix experts above this t and have one from there on; `sticky_resample` draws again."""


def selection_label(selection: SelectionConfig) -> str:
    """A selection's name in stage names and tables, with the numbers that it depends on."""
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
