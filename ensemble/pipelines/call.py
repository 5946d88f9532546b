"""The inputs of one call of a pipeline, one row an image, in the words of diffusers' pipelines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ddm_core.seeds import MAX_SEED
from ensemble.routing import CallCounts
from ensemble.sampling.prompts import PromptError, find_class
from ensemble.solvers import make_noise
from experts.conditions.condition import NULL_CLASS, Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.types import Latents, RowIds
from router.config import SelectionName

ClassLabel = str | int | None
OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None]
"""Called with the pipeline, the step, the timestep and the requested tensors; returns those to replace."""


@dataclass
class PipelineOutput(BaseOutput):  # type: ignore[misc, unused-ignore]
    """What one call of a pipeline returns."""

    images: list[Image.Image] | Any
    """PIL images; an array (image, height, width, channel), or a tensor (image, channel, height, width), from 0 to 1;
    or the latents."""
    latents: Tensor
    """The clean latents, before decoding."""
    call_counts: CallCounts
    """Network evaluations per expert, of the router, and velocity evaluations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The noise of every image, which depends on its seed or generator alone."""

    seeds: tuple[int, ...]
    """They decide the experts and all later noise."""
    initial: Latents | None
    """The noise at t = 1; None is that of the seeds."""
    shape: tuple[int, ...]

    @classmethod
    def from_inputs(
        cls,
        count: int,
        shape: tuple[int, ...],
        seeds: Sequence[int] | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Latents | None,
    ) -> "Noise":
        """Read seeds or generators; without either, seeds are drawn from torch's global generator.

        One generator for several images gives each the seed of the generator plus its position.
        """
        if seeds is not None:
            return cls(seeds=tuple(seeds), initial=latents, shape=shape)
        if generator is None:
            drawn = torch.randint(MAX_SEED, (count,)).tolist()
            return cls(seeds=tuple(drawn), initial=latents, shape=shape)
        if isinstance(generator, torch.Generator):
            seeds = [generator.initial_seed() + position for position in range(count)]
        else:
            generator = list(generator)
            seeds = [each.initial_seed() for each in generator]
        initial = randn_tensor((count, *shape), generator=generator) if latents is None else latents
        return cls(seeds=tuple(seeds), initial=initial, shape=shape)

    def draw(self, rows: RowIds, index: int) -> Latents:
        """Return noise of these rows for a draw; draw 0 is the noise at t = 1."""
        if index == 0 and self.initial is not None:
            return self.initial[rows].float()
        return make_noise([self.seeds[row] for row in rows.tolist()], self.shape, index)


def count_images(per_prompt: int = 1, **inputs: Any) -> int:
    """Return the number of images: the common length of all inputs that are sequences, times `per_prompt`.

    Raises `ValueError` for inputs of different lengths, and for no image.
    """
    lengths = {
        name: len(value) * (1 if name in ("seeds", "generator", "latents") else per_prompt)
        for name, value in inputs.items()
        if isinstance(value, Sequence | Tensor | range) and not isinstance(value, str)
    }
    if len(set(lengths.values())) > 1:
        raise ValueError(f"every image needs one of each; got for so many images: {lengths}")
    count = next(iter(lengths.values()), per_prompt)
    if count < 1:
        raise ValueError(f"a call samples at least one image; got {lengths or {'num_images_per_prompt': per_prompt}}")
    return count


def class_ids(labels: ClassLabel | Sequence[ClassLabel], count: int, names: Sequence[str], classes: int) -> Tensor:
    """Return the class of every image, -1 for none; raise `PromptError` for an unknown class."""
    each = [labels] * count if labels is None or isinstance(labels, str | int) else list(labels)
    repeats = max(1, count // max(1, len(each)))
    ids = [_class_id(label, names, classes) for label in each for _ in range(repeats)]
    return torch.tensor(ids)


def _class_id(label: ClassLabel, names: Sequence[str], classes: int) -> int:
    class_id = NULL_CLASS if label is None else find_class(label, names) if isinstance(label, str) else int(label)
    if not NULL_CLASS <= class_id < classes:
        raise PromptError(
            f"classes go from 0 to {classes - 1}, and -1 is none; got {label}"
            if classes
            else "these experts were trained without labels; leave the classes out"
        )
    return class_id


def embed_prompts(
    prompts: str | Sequence[str] | None,
    embeds: Tensor | None,
    mask: Tensor | None,
    pooled: Tensor | None,
    encoder: Any,
) -> TextEmbedding | None:
    """Return the text of every prompt, from strings or from embeddings; None for neither.

    Raises `PromptError` for prompts without a text encoder, and `ValueError` for prompts with embeddings.
    """
    if prompts is not None and embeds is not None:
        raise ValueError("give prompts or prompt embeddings, not both; they would be two texts of one image")
    if prompts is not None:
        if encoder is None:
            raise PromptError(
                "this pipeline has no text encoder; give prompt_embeds, or for experts with classes class_labels"
            )
        text: TextEmbedding = encoder.encode([prompts] if isinstance(prompts, str) else list(prompts))
        return text
    if embeds is None:
        return None
    rows, tokens, _ = embeds.shape
    return TextEmbedding(
        sequence=embeds,
        mask=torch.ones(rows, tokens, dtype=torch.bool) if mask is None else mask.bool(),
        pooled=embeds.new_zeros(rows, 0) if pooled is None else pooled,
        is_null=torch.zeros(rows, dtype=torch.bool),
    ).to(embeds.device)


def repeat_text(text: TextEmbedding | None, count: int) -> TextEmbedding | None:
    """Return the rows, each repeated so that there are `count`; neighbours are of one prompt."""
    if text is None or len(text) == count:
        return text
    return text.rows(torch.arange(len(text)).repeat_interleave(count // len(text)))


def check_output_type(output_type: str) -> None:
    """Raise `ValueError` for a type that images cannot be returned as."""
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type must be one of {', '.join(get_args(OutputType))}; got {output_type}")


def check_selection(selection: str) -> None:
    """Raise `ValueError` for an unknown selection."""
    if selection not in get_args(SelectionName):
        raise ValueError(f"selection must be one of {', '.join(get_args(SelectionName))}; got {selection}")


def to_output(images: Tensor, output_type: OutputType) -> Any:
    """Convert decoded images, channels last and from 0 to 1, to the requested type."""
    if output_type == "pt":
        return images.permute(0, 3, 1, 2)
    if output_type == "np":
        return images.numpy()
    levels = (images * 255).round().byte().numpy()
    return [Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels) for pixels in levels]


def make_condition(ids: Tensor, text: TextEmbedding | None, device: torch.device, dtype: torch.dtype) -> Condition:
    """Return the condition on a device, its text in the type of the networks."""
    condition = Condition(ids, text).to(device)
    if condition.text is None:
        return condition
    moved = TextEmbedding(
        condition.text.sequence.to(dtype), condition.text.mask, condition.text.pooled.to(dtype), condition.text.is_null
    )
    return Condition(condition.class_id, moved)
