"""What can be chosen about the router; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from experts.config import PathName, TrainingConfig

SelectionName = Literal["full", "top_k", "threshold", "nucleus", "sample", "sticky", "anneal"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RouterConfig:
    """The network that says which expert speaks for a noised sample."""

    kind: Literal["mlp", "transformer"] = "mlp"
    """`mlp` reads flattened latents, `transformer` reads tokens of them."""
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
    training: TrainingConfig = TrainingConfig(t_std=1.4)
    """Steps, batch, learning rate and so on; the batch is not divided by K."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectionConfig:
    """How logits become gates; each number is used by the selections that its sentence names."""

    name: SelectionName = "sticky"
    """The rule; `router/select.py` has one function for each."""
    k: Annotated[int, Field(ge=1)] = 1
    """Experts kept by `top_k`."""
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """`threshold` keeps experts at least so probable."""
    total: Annotated[float, Field(gt=0, le=1)] = 0.9
    """`nucleus` keeps the fewest experts that reach this probability together."""
    draws: Annotated[int, Field(ge=1)] = 1
    """Experts drawn by `sample`, with replacement."""
    t_switch: Annotated[float, Field(ge=0, le=1)] = 0.5
    """`anneal` mixes all experts above this t and takes the most probable one below."""
