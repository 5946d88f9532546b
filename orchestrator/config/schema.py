"""The configuration of a whole run, typed and checked; imports neither torch nor Ray.

Hydra composes YAML into nested dictionaries; `parse_config` turns them into these dataclasses and reports every
mistake at once. Below this room, code sees only its own dataclass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from data_partition.config import DataConfig, PartitionConfig
from ddm_core.artifacts import STRICT
from ensemble.compression.config import (
    AccelerateConfig,
    DistillConfig,
    PruneConfig,
    QuantizeConfig,
    StitchConfig,
    check_order,
)
from ensemble.config import EvaluationConfig, SamplingConfig, SelectionSearchConfig
from experts.config import CodecConfig, DistilledMonolithConfig, ExpertConfig
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.expert_overrides import complete_expert_overrides
from orchestrator.errors import ConfigError
from router.config import AUTO, RouterConfig, SelectionConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackingConfig:
    """Weights & Biases: one wandb run per expert, one group per run."""

    mode: Literal["disabled", "offline", "online"] = "offline"
    """`offline` writes into the run folder and never asks for an account."""
    project: str = "ddm"
    """Name of the wandb project."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScoresConfig(EvaluationConfig):
    """Which selections are scored, and how."""

    selections: tuple[SelectionConfig, ...] = (SelectionConfig(),)
    """One row of the table each; the ensemble's own selection is always among them."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Everything that a run depends on."""

    name: Annotated[str, Field(pattern=r"^[\w.=,+-]+$")] = "run"
    """Name of the run; letters, digits and `_.=,+-`."""
    folder: str = "runs/run"
    """The run folder: artifacts, journal, logs, report."""
    seed: int = 0
    """The seed that the YAML files hand to every part."""
    data: DataConfig = DataConfig()
    """Which images."""
    partition: PartitionConfig = PartitionConfig()
    """How they are divided."""
    codec: CodecConfig = CodecConfig()
    """What a sample is to a network."""
    expert: ExpertConfig = ExpertConfig()
    """The experts; the monolith is one expert with the whole batch."""
    experts: dict[Annotated[int, Field(ge=0)], ExpertConfig] = Field(default_factory=dict)
    """Experts that differ, by their ids; what an entry leaves out is as in `expert`, and its batch is divided too."""
    router: RouterConfig = RouterConfig()
    """The router."""
    monolith: bool = True
    """Whether a FLOP-matched monolith is trained beside the experts."""
    baselines: tuple[Literal["cluster_conditioned", "distilled_monolith"], ...] = ()
    """More to compare with: `told`, a monolith that is told the cluster; `student`, distilled from the experts."""
    distilled_monolith: DistilledMonolithConfig = DistilledMonolithConfig()
    """How the student differs from the monolith."""
    ensemble: SamplingConfig = SamplingConfig()
    """How the ensemble is sampled."""
    selection_search: SelectionSearchConfig = SelectionSearchConfig()
    """How `ensemble.selection.name=auto` finds its selection."""
    distill: DistillConfig | None = None
    """A faster ensemble beside the whole one: its experts learn to do with few steps,"""
    accelerate: AccelerateConfig | None = None
    """keep features from one step to the next, or begin with a draft,"""
    prune: PruneConfig | None = None
    """a smaller one: layers, heads or hidden units are taken out,"""
    quantize: QuantizeConfig | None = None
    """weights, or weights and activations, are brought to few bits,"""
    stitch: StitchConfig | None = None
    """and the whole one speaks on the other side of a t."""
    scores: ScoresConfig = ScoresConfig()
    """How samples are scored."""
    compute: ComputeConfig = ComputeConfig()
    """Where it runs."""
    wandb: TrackingConfig = TrackingConfig()
    """Where curves and pictures are logged."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Check what no single field can."""
        batch, experts = self.expert.training.batch_size, self.partition.num_experts
        if batch % experts:
            raise ValueError(
                f"expert.training.batch_size is the global batch and must be divisible by "
                f"partition.num_experts: {batch} / {experts} is not whole; try {-(-batch // experts) * experts}"
            )
        batches = {
            "expert": batch // experts,
            "monolith": batch,
            "cluster_conditioned": batch,
            "distilled_monolith": self.distilled_monolith.batch_size or batch,
            "router": self.router.training.batch_size,
        }
        for kind, rows in batches.items():
            if rows % (workers := getattr(self.compute.stages, kind).workers):
                raise ValueError(
                    f"a batch of {rows} samples cannot be shared equally by the {workers} workers of {kind}; "
                    f"change the batch_size or compute.stages.{kind}.workers"
                )
        if self.router.noise_schedule != self.expert.noise_schedule:
            raise ValueError(
                f"router.noise_schedule is {self.router.noise_schedule} and expert.noise_schedule is {self.expert.noise_schedule}; the router must see "
                "samples noised as the ensemble's are: give both the same path"
            )
        check_experts(self)
        check_choice(self)
        kinds = ("distill", "accelerate", "prune", "quantize", "stitch")
        check_order({kind: getattr(self, kind) for kind in kinds}, reflects=self.ensemble.reflection is not None)
        return self


def check_experts(config: RunConfig) -> None:
    """Raise `ValueError` for experts that differ, or baselines, that do not belong to this partition."""
    count, workers = config.partition.num_experts, config.compute.stages.expert.workers
    for k, expert in config.experts.items():
        batch = expert.training.batch_size
        if k >= count:
            raise ValueError(f"experts.{k}: partition.num_experts is {count}, so expert ids go from 0 to {count - 1}")
        if batch % (count * workers):
            raise ValueError(
                f"experts.{k}.training.batch_size is divided by partition.num_experts and by the workers of an expert: "
                f"{batch} / {count * workers} is not whole"
            )
    if "cluster_conditioned" in config.baselines and (count == 1 or config.expert.init is not None):
        raise ValueError(
            "baselines=[told] needs partition.num_experts > 1, and no expert.init: no checkpoint knows the clusters"
        )
    if (ours := config.distilled_monolith.from_expert) is not None and ours >= count:
        raise ValueError(f"distilled_monolith.from_expert is {ours}, and expert ids go from 0 to {count - 1}")


def check_choice(config: RunConfig) -> None:
    """Raise `ValueError` if a selection is to be chosen where a choice could be made by one gain alone."""
    is_auto = any(selection.name == AUTO for selection in (config.ensemble.selection, *config.scores.selections))
    if is_auto and len(spaces := set(config.scores.spaces)) < 2:
        raise ValueError(
            f"selection auto needs two feature spaces, since a gain in one alone is not a gain; scores.spaces has only "
            f"{', '.join(spaces)}: add another, or name a selection"
        )


def parse_config(composed: Mapping[str, Any]) -> RunConfig:
    """The typed configuration; raises `ConfigError` with every mistake and, for unknown keys, the known ones."""
    try:
        return TypeAdapter(RunConfig).validate_python(complete_expert_overrides(composed))
    except ValidationError as error:
        raise ConfigError(listed(error, "configuration", known_keys)) from None


def known_keys(location: tuple[str | int, ...]) -> list[str]:
    """The keys that the configuration has below a location such as `("expert", "training")`; empty for a leaf."""
    node: Any = RunConfig
    for part in location:
        if part in _fields(node):
            node = _fields(node)[str(part)].annotation
        else:
            tagged = [kind for kind in _kinds(node) if _tag(kind) == part]
            node = tagged[0] if tagged else next(iter(reversed(get_args(node))), None)
    return sorted(set().union(*(_fields(kind) for kind in (node, *_kinds(node)))))


def _kinds(node: Any) -> list[Any]:
    """The members of a union, also of a union within it."""
    found = [kind for kind in get_args(node) if not isinstance(kind, FieldInfo)]
    return [one for kind in found for one in (kind, *_kinds(kind))]


def _fields(kind: Any) -> dict[str, FieldInfo]:
    return dict(getattr(kind, "__pydantic_fields__", {}))


def _tag(kind: Any) -> str | None:
    """What tells one kind of a union from the others."""
    names = [name for name in ("kind", "method") if name in _fields(kind)]
    return _fields(kind)[names[0]].default if names else None


def listed(error: ValidationError, what: str, known: Callable[[tuple[str | int, ...]], Sequence[str]]) -> str:
    """Every mistake in `what`, each with its place, the rule and the value; `known` names the keys at a place."""
    mistakes = [_explain(mistake, what, known) for mistake in error.errors()]
    return f"{len(mistakes)} mistake(s) in the {what}:\n  " + "\n  ".join(mistakes)


def _explain(mistake: Mapping[str, Any], what: str, known: Callable[[tuple[str | int, ...]], Sequence[str]]) -> str:
    location, value = mistake["loc"], mistake["input"]
    where = ".".join(str(part) for part in location) or what
    if mistake["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown key; known here: {', '.join(known(location[:-1]))}"
    if mistake["type"] == "union_tag_not_found":
        return f"{where}: which method is meant? choose a file of this group, such as those in cluster_configs/{where}"
    given = "" if isinstance(value, dict) else f" (given: {value!r})"
    return f"{where}: {mistake['msg'].removeprefix('Value error, ')}{given}"
