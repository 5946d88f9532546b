"""What can be chosen about the router; imports no torch."""

from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import LATER, STRICT
from experts.config import PathName, TrainingConfig

SelectionName = Literal[
    "full",
    "top_k",
    "threshold",
    "nucleus",
    "sample",
    "sticky",
    "anneal",
    "switch",
    "sticky_at",
    "redraw",
    "coupled",
]
RouterKind = Literal["mlp", "transformer", "table", "centroids", "density_ratio"]
AUTO: Final = "auto"
"""No rule of its own: whichever one a run's `choice` stage finds best."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RouterConfig:
    """The network that says which expert speaks for a noised sample."""

    kind: RouterKind = "mlp"
    """`mlp` reads flattened latents, `transformer` reads tokens of them; `density_ratio` has a small network for each
    expert, so that experts come and go; `centroids` and `table` train no network."""
    width: Annotated[int, Field(ge=8)] = 128
    """Features of every hidden layer."""
    depth: Annotated[int, Field(ge=1)] = 2
    """Blocks."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads of the transformer."""
    tokens: Annotated[int, Field(ge=1)] = 16
    """Tokens that the transformer cuts flattened latents into."""
    path: PathName = "straight"
    """The noise path of the ensemble."""
    calibrate: bool = True
    """Whether temperatures are fitted on half of the held-out samples; quality is measured on the other half."""
    training: TrainingConfig = TrainingConfig(t_std=1.4)
    """Steps, batch, learning rate and so on; the batch is not divided by K."""
    data: Literal["real", "samples"] = field(default="real", metadata=LATER)
    """`real`: it trains on all clusters, beside the experts. `samples`: on latents that the finished experts draw, for
    data that may not leave their places; of the data it is told the clusters' counts."""
    samples_per_expert: Annotated[int, Field(ge=1)] = field(default=2048, metadata=LATER)
    """Latents drawn from an expert on average with `data=samples`; each has its cluster's true share of them."""
    sample_steps: Annotated[int, Field(ge=2)] = field(default=10, metadata=LATER)
    """Heun steps of each of those draws."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectionConfig:
    """How logits become gates; each number is used by the selections that its sentence names."""

    name: SelectionName | Literal["auto"] = "sticky"
    """The rule, of which `router/selection.py` holds them all; `auto` lets the run choose one by `choice`."""
    k: Annotated[int, Field(ge=1)] = 1
    """Experts kept by `top_k`."""
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """`threshold`, and `switch` at high t, keep experts at least so probable."""
    total: Annotated[float, Field(gt=0, le=1)] = 0.9
    """`nucleus` keeps the fewest experts that reach this probability together."""
    draws: Annotated[int, Field(ge=1)] = 1
    """Experts drawn by `sample`, with replacement."""
    t_switch: Annotated[float, Field(ge=0, le=1)] = 0.5
    """`anneal`, `switch` and `sticky_at` mix experts above this t and have one from there on; `redraw` draws again."""


def row_name(selection: SelectionConfig) -> str:
    """A selection's name in stage names and tables, with the numbers that it depends on."""
    numbers = {
        "top_k": f"_{selection.k}",
        "threshold": f"_{selection.probability:g}",
        "nucleus": f"_{selection.total:g}",
        "sample": f"_{selection.draws}",
        "anneal": f"_{selection.t_switch:g}",
        "switch": f"_{selection.probability:g}_{selection.t_switch:g}",
        "sticky_at": f"_{selection.t_switch:g}",
        "redraw": f"_{selection.t_switch:g}",
    }
    return selection.name + numbers.get(selection.name, "")
