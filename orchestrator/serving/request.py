"""The body of `POST /v1/images/generations`: OpenAI's fields and ours, checked against the model that it names."""

import secrets
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.serving.config import Limits
from orchestrator.serving.errors import ServingError

MAX_SEED = 2**63 - 1
Seed = Annotated[int, Field(ge=0, le=MAX_SEED, strict=True)]
OutputFormat = Literal["png", "jpeg", "webp"]


class ImageRequest(BaseModel):
    """OpenAI's fields, and below them ours, which its client sends in `extra_body`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = ""
    model: str | None = None
    n: Annotated[int, Field(ge=1, strict=True)] | None = 1
    size: str | None = "auto"
    """`auto`, or width x height of the model."""
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    """`url` is a data URL: the service keeps no files."""
    output_format: OutputFormat | None = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of jpeg and webp."""
    stream: bool | None = False
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = 0
    """Previews of each image, with `stream`."""
    quality: str | None = None
    """Accepted and ignored, like the next four: ensembles have no such choice."""
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    user: str | None = None

    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None
    """One for each image; an image depends on its seed alone."""
    steps: Annotated[int, Field(ge=1, strict=True)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    selection: str | None = None
    negative_prompt: str | None = None
    class_label: str | Annotated[int, Field(strict=True)] | None = None
    """Name or number of a class."""
    adapter: str | None = None
    """A LoRA that the service was started with, or `finetune`, that of the run."""
    compression: str | None = None
    """A compression stage of the model's run, such as `quantize`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a request is checked against."""

    name: str
    created: int
    """Unix time of its folder."""
    width: int
    height: int
    class_names: tuple[str, ...]
    num_classes: int
    has_text: bool
    experts: int
    steps: int
    """Default number of solver steps, or that of the few-step schedule."""
    guidance_scale: float
    selection: str
    selections: tuple[str, ...]
    """Those that a request may name."""
    is_few_step: bool
    has_guidance: bool
    """False for students with distilled guidance."""
    adapters: tuple[str, ...] = ()
    compressions: tuple[str, ...] = ()
    base: str = ""
    """The model whose experts have an adapter here; empty for a model of its own."""
    adapter: str | None = None
    """That adapter."""

    def with_adapters(self) -> dict[str, "ModelFacts"]:
        """Return the model, and with each of its adapters, by name."""
        alone = replace(self, adapters=(), compressions=(), base=self.name)
        named = {variant_name(self.name, adapter): adapter for adapter in self.adapters}
        return {self.name: self} | {name: replace(alone, name=name, adapter=adapter) for name, adapter in named.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A checked request: which images of which model."""

    model: str
    adapter: str | None
    prompt: str
    negative_prompt: str
    class_label: str | None
    seeds: tuple[int, ...]
    steps: int | None
    """None is the model's, as for the next two."""
    guidance_scale: float | None
    selection: str | None
    output_format: OutputFormat
    quality: int
    """Of jpeg and webp."""
    previews: int


def variant_name(model: str, variant: str) -> str:
    """Return the name of what a compression stage or an adapter makes of a model."""
    return f"{model}:{variant}"


def check_request(body: ImageRequest, facts: ModelFacts, limits: Limits) -> Generation:
    """Return what to sample; raise `ServingError` for what this model or this service cannot do."""
    n = body.n or 1
    if n > limits.images:
        raise _refuse("n", f"n must be at most {limits.images} images here; got {n}")
    if body.seeds is not None and len(body.seeds) != n:
        raise _refuse("seeds", f"every image needs one seed: seeds has {len(body.seeds)} numbers and n is {n}")
    sizes = ("auto", f"{facts.width}x{facts.height}")
    if body.size is not None and body.size not in sizes:
        raise _refuse("size", f"{facts.name} makes images of {sizes[1]}; got size {body.size[:40]!r}: leave it out")
    _check_condition(body, facts, limits)
    _check_sampling(body, facts, limits)
    for field, known in (("adapter", facts.adapters), ("compression", facts.compressions)):
        value = getattr(body, field)
        if value is not None and value not in known:
            names = f"is one of {', '.join(known)}" if known else "is not there"
            raise _refuse(field, f"{field} of {facts.name} {names}; got {value[:40]!r}")
    if (body.partial_images or 0) and not body.stream:
        raise _refuse("partial_images", "partial_images needs stream=true; set it, or leave partial_images out")
    return Generation(
        model=facts.base or (facts.name if body.compression is None else variant_name(facts.name, body.compression)),
        adapter=facts.adapter or body.adapter,
        prompt=body.prompt,
        negative_prompt=body.negative_prompt or "",
        class_label=None if body.class_label is None else str(body.class_label),
        seeds=tuple(body.seeds or (secrets.randbelow(2**53) for _ in range(n))),
        steps=body.steps,
        guidance_scale=body.guidance_scale,
        selection=body.selection,
        output_format=body.output_format or "png",
        quality=100 if body.output_compression is None else body.output_compression,
        previews=(body.partial_images or 0) if body.stream else 0,
    )


def _refuse(field: str, message: str) -> ServingError:
    return ServingError(message, param=field)


def _check_condition(body: ImageRequest, facts: ModelFacts, limits: Limits) -> None:
    for field in ("prompt", "negative_prompt"):
        text = getattr(body, field) or ""
        if len(text) > limits.prompt_characters:
            raise _refuse(field, f"{field} has {len(text)} characters; at most {limits.prompt_characters} are allowed")
        if text.strip() and not facts.has_text:
            remedy = f"use class_label, one of {', '.join(facts.class_names)}" if facts.class_names else "leave it out"
            raise _refuse(field, f"{facts.name} was trained without text, so it cannot follow a {field}; {remedy}")
    label = body.class_label
    if label is None:
        return
    if not facts.num_classes:
        raise _refuse("class_label", f"{facts.name} was trained without classes; leave class_label out")
    names = facts.class_names
    if str(label) not in names and not (str(label).isdecimal() and int(str(label)[:20]) < facts.num_classes):
        known = ", ".join(names) or f"0 to {facts.num_classes - 1}"
        raise _refuse("class_label", f"class_label must be a class of {facts.name}, {known}; got {str(label)[:40]!r}")


def _check_sampling(body: ImageRequest, facts: ModelFacts, limits: Limits) -> None:
    if body.steps is not None:
        if facts.is_few_step:
            raise _refuse("steps", f"{facts.name} has {facts.steps} fixed steps; leave steps out")
        if body.steps > limits.steps:
            raise _refuse("steps", f"steps must be at most {limits.steps} here; got {body.steps}")
    if body.guidance_scale is not None and not facts.has_guidance:
        raise _refuse("guidance_scale", f"{facts.name} was distilled with its guidance; leave guidance_scale out")
    if body.selection is not None and body.selection not in facts.selections:
        known = ", ".join(facts.selections)
        raise _refuse("selection", f"selection must be one of {known}; got {body.selection[:40]!r}")
    if (body.negative_prompt or "").strip():
        scale = facts.guidance_scale if body.guidance_scale is None else body.guidance_scale
        if scale == 1 or not facts.has_guidance:
            raise _refuse(
                "negative_prompt",
                "negative_prompt is a branch of guidance, which is off here; set guidance_scale above 1",
            )
        if not body.prompt.strip() and body.class_label is None:
            raise _refuse("negative_prompt", "guidance leads from negative_prompt to a prompt or class; set one")
