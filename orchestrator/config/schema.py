"""The configuration of a whole run, typed and checked; imports neither torch nor Ray.

Hydra composes YAML into nested dictionaries. `parse_config` converts them to these dataclasses and reports every
mistake at once. Code in the packages below receives only its own dataclass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from data_partition.config import DataConfig, PartitionConfig
from ddm_core.artifacts import STRICT, to_jsonable
from ddm_core.seeds import Seed
from ensemble.compression.config import (
    AccelerateConfig,
    DistillConfig,
    DynamicInt8Config,
    PruneConfig,
    QuantizeConfig,
    StitchConfig,
    WeightOnlyConfig,
    check_order,
)
from ensemble.config import EvaluationConfig, ReplicationLimits, SamplingConfig, SelectionSearchConfig, ValidationConfig
from ensemble.evaluation.spaces import RANKED_SPACE
from experts.config import CodecConfig, DistilledMonolithConfig, ExpertConfig, TextConfig
from orchestrator.config.compute import CONTROLLER, ComputeConfig
from orchestrator.config.delivery import DeliveryConfig
from orchestrator.config.expert_overrides import complete_expert_overrides
from orchestrator.config.finetune import FinetuneConfig
from orchestrator.config.injection_guard import check_printable
from orchestrator.config.stage_kinds import COMPRESSION_KINDS, ENGINE_KINDS, PARALLEL_KINDS
from orchestrator.errors import ConfigError
from router.config import AUTO, RouterConfig, SelectionConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackingConfig:
    """Curves and images in wandb or trackio: one record per expert, one group per run."""

    library: Literal["wandb", "trackio"] = "wandb"
    """`trackio` has a dashboard on this machine and needs `pip install trackio`."""
    mode: Literal["disabled", "offline", "online"] = "offline"
    """`offline` writes into the run folder and needs no account."""
    project: str = "ddm"
    """Name of the project."""
    finish_s: Annotated[float, Field(ge=0)] = 30.0
    """Time to send the rest at the end of a run; what remains is below `wandb/` in the run folder."""


Event = Literal[
    "finished",
    "failed",
    "stopped",
    "expert_lost",
    "island_lost",
    "controller_lost",
    "budget_nearly_reached",
    "budget_reached",
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NotifyConfig:
    """Events that are posted as JSON to a webhook, such as one of a chat room; nothing is sent by default."""

    webhook_file: str = ""
    """File of mode 600 that holds the https address, which is a secret."""
    events: tuple[Event, ...] = get_args(Event)
    """What is sent."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScoresConfig(EvaluationConfig, ReplicationLimits):
    """The scored selections, the scoring method, and the limits at which a score fails the run."""

    selections: tuple[SelectionConfig, ...] = (SelectionConfig(),)
    """One row of the table each; the ensemble's own selection is always included."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """The complete configuration of a run."""

    name: Annotated[str, Field(pattern=r"^[\w.=,+-]+$")] = "run"
    """Name of the run; letters, digits and `_.=,+-`."""
    folder: str = "runs/run"
    """The run folder: artifacts, journal, logs, report."""
    seed: Seed = 0
    """The seed that the YAML files pass to every part."""
    data: DataConfig = DataConfig()
    """The images."""
    partition: PartitionConfig = PartitionConfig()
    """The partition of the images into clusters."""
    codec: CodecConfig = CodecConfig()
    """The representation of a sample for the networks."""
    text: TextConfig = TextConfig()
    """The encoder of the captions that experts and router read; `none` trains on classes, or on nothing."""
    expert: ExpertConfig = ExpertConfig()
    """The experts; the monolith is one expert with the whole batch."""
    experts: dict[Annotated[int, Field(ge=0)], ExpertConfig] = Field(default_factory=dict)
    """Overrides of `expert` by expert id; the batch size of an override is divided by the number of experts too."""
    router: RouterConfig = RouterConfig()
    """The router."""
    validation: ValidationConfig = ValidationConfig()
    """Pictures and distances of each expert while it trains."""
    budget_minutes: Annotated[float, Field(ge=0)] = 15.0
    """Minutes to which `ddm run data=image_folder` fits, for this machine, what the user leaves open; 0: nothing."""
    monolith: bool | None = None
    """Whether a FLOP-matched monolith is trained as a baseline; None: if `baselines` names it."""
    baselines: tuple[Literal["monolith", "cluster_conditioned", "distilled_monolith"], ...] = ()
    """The baselines: the monolith, one that receives the cluster as a condition, and one distilled from the experts."""
    distilled_monolith: DistilledMonolithConfig = DistilledMonolithConfig()
    """Differences of the distilled monolith from the monolith."""
    ensemble: SamplingConfig = SamplingConfig()
    """The sampling of the ensemble."""
    selection_search: SelectionSearchConfig = SelectionSearchConfig()
    """The search for the selection of `ensemble.selection.name=auto`."""
    from_ensemble: str = ""
    """Fingerprint of the changed ensemble that is scored and compressed instead of the run's own; see `--ensemble`."""
    distill: DistillConfig | None = None
    """Distillation of the experts into few-step students."""
    accelerate: AccelerateConfig | None = None
    """Feature caching between steps, or truncated sampling from a draft."""
    prune: PruneConfig | None = None
    """Removal of layers, heads or hidden units."""
    quantize: QuantizeConfig | None = None
    """Quantization of weights, or of weights and activations."""
    stitch: StitchConfig | None = None
    """The original ensemble on one side of a t, the compressed one on the other."""
    finetune: FinetuneConfig | None = None
    """Adapters of the experts, trained on images of their own; set by `ddm finetune`."""
    deliveries: tuple[DeliveryConfig, ...] = ()
    """Later data, in order; set by `ddm extend`."""
    scores: ScoresConfig = ScoresConfig()
    """The scoring of samples."""
    compute: ComputeConfig = ComputeConfig()
    """Where stages run."""
    wandb: TrackingConfig = TrackingConfig()
    """Logging of curves and images."""
    notify: NotifyConfig = NotifyConfig()
    """Messages to a webhook."""

    @property
    def has_monolith(self) -> bool:
        """Return whether the run trains the monolith."""
        return "monolith" in self.baselines if self.monolith is None else self.monolith

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        """Check the rules that involve several fields."""
        batch, experts = self.expert.training.batch_size, self.partition.num_experts
        if batch % experts:
            raise ValueError(
                f"expert.training.batch_size is the global batch and must be divisible by "
                f"partition.num_experts; got {batch} / {experts}; try {-(-batch // experts) * experts}"
            )
        if self.text.kind != "none" and self.router.data == "samples":
            raise ValueError(
                f"router.data=samples draws no texts, and experts with text={self.text.kind} read some; set "
                "router.data=real, or text=none"
            )
        if self.router.kind == "density" and self.router.data == "samples":
            raise ValueError(
                "router.kind=density trains on nothing, and router.data=samples generates latents to train on; set "
                "router.data=real, or another kind"
            )
        batches = {
            "expert": batch // experts,
            "monolith": batch,
            "cluster_conditioned": batch,
            "distilled_monolith": self.distilled_monolith.batch_size or batch,
            "router": self.router.training.batch_size,
        } | ({} if self.finetune is None else {"adapter": self.finetune.training.batch_size})
        for kind, rows in batches.items():
            if rows % (workers := getattr(self.compute.stages, kind).workers):
                raise ValueError(
                    f"a batch must be divisible by the number of workers; got {rows} samples and {workers} workers of "
                    f"{kind}; change the batch_size or compute.stages.{kind}.workers"
                )
        if self.router.noise_schedule != self.expert.noise_schedule:
            raise ValueError(
                "router and experts must have the same noise schedule; got "
                f"router.noise_schedule={self.router.noise_schedule} and "
                f"expert.noise_schedule={self.expert.noise_schedule}"
            )
        check_engine(self)
        check_buckets(self)
        check_experts(self)
        check_time_bounds(self)
        check_validation(self)
        check_auto_selection(self)
        check_reflection(self)
        has_text = self.text.kind != "none" and not self.data.labels
        check_order(vars(self), self.ensemble, reads_text_alone=has_text, is_changed=self.from_ensemble != "")
        return self


def check_engine(config: RunConfig) -> None:
    """Raise `ValueError` for resources of the data's stages that their engine cannot use."""
    compute, stages = config.compute, {kind: getattr(config.compute.stages, kind) for kind in ENGINE_KINDS}
    if config.data.engine == "ray":
        away = [kind for kind, resources in stages.items() if set(resources.islands) - {CONTROLLER}]
        if away or compute.backend not in ("ray", "islands"):
            raise ValueError(
                "data.engine=ray computes on the Ray cluster of this run: set compute.backend=ray, or islands with "
                f"these stages in the controller's place; got backend={compute.backend}, on islands {away or 'none'}"
            )
    elif several := [kind for kind in ENGINE_KINDS if stages[kind].workers > 1 and kind not in PARALLEL_KINDS]:
        raise ValueError(f"several workers of {', '.join(several)} need data.engine=ray; got data.engine=local")


def check_buckets(config: RunConfig) -> None:
    """Raise `ValueError` for parts of a run that take images of one size only, beside aspect-ratio buckets."""
    if not config.data.aspect_buckets:
        return
    if config.partition.num_experts > 1 and config.router.kind != "prior_table":
        raise ValueError(
            f"data.aspect_buckets makes latents of several shapes, and router.kind={config.router.kind} reads one; set "
            "router=prior_table, which the selection sticky needs alone, or leave the buckets out"
        )
    if compressions := [kind for kind in COMPRESSION_KINDS if getattr(config, kind) is not None]:
        raise ValueError(
            f"{', '.join(compressions)} cannot compress experts of data.aspect_buckets: compressions are measured "
            "at one size; leave one of them out"
        )


def check_experts(config: RunConfig) -> None:
    """Raise `ValueError` for overrides of experts, or baselines, that do not fit the partition."""
    count, workers = config.partition.num_experts, config.compute.stages.expert.workers
    for k, expert in config.experts.items():
        batch = expert.training.batch_size
        if k >= count:
            raise ValueError(
                f"expert ids must be in 0 ... {count - 1} (partition.num_experts={count}); got experts.{k}"
            )
        if batch % (count * workers):
            raise ValueError(
                f"experts.{k}.training.batch_size must be divisible by partition.num_experts times the workers of an "
                f"expert; got {batch} / {count * workers}"
            )
    if "cluster_conditioned" in config.baselines and (count == 1 or config.expert.init is not None):
        raise ValueError(
            "baselines=[cluster_conditioned] needs partition.num_experts > 1 and no expert.init, since no pretrained "
            f"checkpoint has clusters; got partition.num_experts={count}, expert.init={config.expert.init}"
        )
    if (expert_id := config.distilled_monolith.from_expert) is not None and expert_id >= count:
        raise ValueError(f"expert ids must be in 0 ... {count - 1}; got distilled_monolith.from_expert={expert_id}")


def check_validation(config: RunConfig) -> None:
    """Raise `ValueError` for prompts that no expert follows, and a distance without stored held-out samples."""
    prompts, needs = config.validation.prompts, ""
    if prompts and config.text.kind == "none" and not config.data.labels:
        needs = f"validation.prompts={list(prompts)} need classes or captions; set data.labels=true, or text=minilm"
    elif config.validation.kid_samples and config.data.mode == "stream":
        needs = "validation.kid_samples needs latents of held-out samples; set data.mode=copy, or kid_samples=0"
    elif config.validation.kid_samples and config.expert.training.held_out_every is None:
        needs = "validation.kid_samples needs held-out samples; set expert.training.held_out_every=<steps>"
    if needs:
        raise ValueError(needs)


def check_time_bounds(config: RunConfig) -> None:
    """Raise `ValueError` for parts of a run that need experts of one network each, beside experts of several t."""
    for expert in (config.expert, *config.experts.values()):
        training, networks = expert.training, len(expert.time_bounds) + 1
        rows = config.partition.num_experts * config.compute.stages.expert.workers * networks
        if networks > 1 and training.batch_size % rows:
            raise ValueError(
                f"expert.time_bounds={list(expert.time_bounds)} are {networks} networks with a part of the batch each, "
                f"so expert.training.batch_size must be divisible by {rows}; got {training.batch_size}; try "
                f"{-(-training.batch_size // rows) * rows}"
            )
    compressions = {kind: getattr(config, kind) for kind in COMPRESSION_KINDS}
    needs = {
        f"router.kind={config.router.kind}": config.router.kind == "density",
        "router.data=samples": config.router.data == "samples",
        "baselines=[distilled_monolith]": "distilled_monolith" in config.baselines,
        "ddm finetune": config.finetune is not None,
        "expert.training.early_checkpoint": config.expert.training.early_checkpoint is not None,
        "validation.every": config.validation.every is not None,
    } | {
        f"{kind}={method.method}": not isinstance(method, WeightOnlyConfig | DynamicInt8Config)
        for kind, method in compressions.items()
        if method is not None
    }
    has_bounds = any(expert.time_bounds for expert in (config.expert, *config.experts.values()))
    if has_bounds and (found := [name for name, is_set in needs.items() if is_set]):
        raise ValueError(
            f"{found[0]} needs experts of one network each, and expert.time_bounds={list(config.expert.time_bounds)} "
            "divides them by t; leave one of them out (quantize=int8_dynamic and the weight-only ones work with both)"
        )


def check_auto_selection(config: RunConfig) -> None:
    """Raise `ValueError` if a selection search lacks the feature spaces of its comparison."""
    is_auto = any(selection.name == AUTO for selection in (config.ensemble.selection, *config.scores.selections))
    spaces = set(config.scores.spaces)
    if is_auto and (RANKED_SPACE not in spaces or len(spaces) < 2):
        raise ValueError(
            f"selection auto needs {RANKED_SPACE} and another feature space, since a gain in only one does not count; "
            f"got only {', '.join(sorted(spaces))} in scores.spaces: add one, or name a selection"
        )


def check_reflection(config: RunConfig) -> None:
    """Raise `ValueError` if the run would not have the weak model of its reflection."""
    reflection = config.ensemble.reflection
    weak = None if reflection is None else reflection.weak
    if weak == "monolith" and not config.has_monolith:
        raise ValueError("ensemble.reflection.weak=monolith needs the monolith of the run; set monolith=true")
    if weak == "early" and config.expert.training.early_checkpoint is None:
        raise ValueError(
            "ensemble.reflection.weak=early needs an earlier checkpoint of each expert; set "
            "expert.training.early_checkpoint=0.5, or ensemble.reflection.weak=monolith with monolith=true"
        )


def parse_config(composed: Mapping[str, Any]) -> RunConfig:
    """Return the typed configuration; raises `ConfigError` with every mistake and, for unknown keys, the known ones."""
    try:
        config = TypeAdapter(RunConfig).validate_python(complete_expert_overrides(composed))
    except ValidationError as error:
        raise ConfigError(format_mistakes(error, "configuration", known_keys)) from None
    check_printable(to_jsonable(config))
    return config


def change_config(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return a configuration with other sections; raises `ConfigError` if they do not fit the rest."""
    try:
        return replace(config, **changes)
    except ValidationError as error:
        raise ConfigError(format_mistakes(error, "configuration", known_keys)) from None


def known_keys(location: tuple[str | int, ...]) -> list[str]:
    """Return the configuration's keys below a location such as `("expert", "training")`; empty for a leaf."""
    node = _find_type(location)
    return sorted(set().union(*(_fields(kind) for kind in (node, *_union_members(node)))))


def is_text(location: tuple[str | int, ...], value: str) -> bool:
    """Return whether a value at a location is a text; `null` is none where the value is optional."""
    node = _find_type(location)
    return node is str or (isinstance(node, UnionType) and set(get_args(node)) == {str, NoneType} and value != "null")


def _find_type(location: tuple[str | int, ...]) -> Any:
    """Return the type at a location; None for one that the configuration lacks."""
    node: Any = RunConfig
    for part in location:
        if part in _fields(node):
            node = _fields(node)[str(part)].annotation
        else:
            tagged = [kind for kind in _union_members(node) if _tag_value(kind) == part]
            node = tagged[0] if tagged else next(iter(reversed(get_args(node))), None)
    return node


def _union_members(node: Any) -> list[Any]:
    """Return the members of a union, also of unions within it."""
    members = [kind for kind in get_args(node) if not isinstance(kind, FieldInfo)]
    return [nested for kind in members for nested in (kind, *_union_members(kind))]


def _fields(kind: Any) -> dict[str, FieldInfo]:
    return dict(getattr(kind, "__pydantic_fields__", {}))


def _tag_value(kind: Any) -> str | None:
    """Return the value that distinguishes one kind of a union from the others."""
    names = [name for name in ("kind", "method") if name in _fields(kind)]
    return _fields(kind)[names[0]].default if names else None


def format_mistakes(error: ValidationError, title: str, known: Callable[[tuple[str | int, ...]], Sequence[str]]) -> str:
    """Return every mistake with its place, the rule and the value; `known` returns the keys at a place."""
    mistakes = [_explain(mistake, title, known) for mistake in error.errors()]
    return f"{len(mistakes)} mistake(s) in the {title}:\n  " + "\n  ".join(mistakes)


def _explain(mistake: Mapping[str, Any], title: str, known: Callable[[tuple[str | int, ...]], Sequence[str]]) -> str:
    location, value = mistake["loc"], mistake["input"]
    where = ".".join(str(part) for part in location) or title
    if mistake["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown key; known here: {', '.join(known(location[:-1]))}"
    if mistake["type"] == "union_tag_not_found":
        return f"{where}: the method is missing; choose a file of this group, such as those in cluster_configs/{where}"
    if mistake["type"] == "tuple_type" and isinstance(value, str):
        return f"{where}: a list is expected; write {where}=[{value}]"
    suffix = f" (got {value!r})" if value is None or isinstance(value, str | int | float | list | tuple) else ""
    return f"{where}: {mistake['msg'].removeprefix('Value error, ')}{suffix}"
