"""The adapter of a network class: its conventions in one place.

Tensors are typed `Any`, since the checks of a configuration read adapters without importing torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Settings = Mapping[str, Any]
"""Arguments of a class's constructor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShape:
    """What of a network depends on the data."""

    latent_shape: tuple[int, ...]
    num_classes: int = 0
    """0 is no classes."""
    text_shape: tuple[int, int, int] | None = None
    """(tokens, features of a token, features of the pooled vector); None is no text."""

    @property
    def channels(self) -> int:
        """Return the channels of a latent."""
        return self.latent_shape[0]

    @property
    def side(self) -> int:
        """Return the longer side of a latent."""
        return max(self.latent_shape[1:])

    @property
    def text_width(self) -> int:
        """Return the features of a token; 0 is no text."""
        return self.text_shape[1] if self.text_shape else 0

    @property
    def pooled_width(self) -> int:
        """Return the features of the pooled vector; 0 is none."""
        return self.text_shape[2] if self.text_shape else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CallInputs:
    """The inputs of a call, in the network's convention."""

    latents: Any
    """Noised latents (batch, channel, height, width), or packed ones (batch, token, 4 x channel)."""
    timestep: Any
    """One number a row, on the network's scale."""
    condition: Any
    """A `Condition` with the null text filled in."""
    grid: tuple[int, int]
    """Height and width of the latents, or of the grid of packed tokens."""

    @property
    def text(self) -> Any:
        """Return the condition's text."""
        return self.condition.text


def read_patch_size(settings: Settings) -> int:
    """Return the side of a token in latent pixels."""
    return int(settings["patch_size"])


def never(_settings: Settings) -> bool:
    """Return false for any settings."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The conventions of one class, which is imported when a network is built or loaded."""

    class_name: str
    module: str
    """The file of the class, relative to diffusers' models; or the full name of a module of ours."""
    data_settings: Callable[[Settings, DataShape], dict[str, Any]]
    """Maps (settings with the class's defaults, data) to the settings that follow from the data."""
    arguments: Callable[[Any, CallInputs], dict[str, Any]]
    """Maps (model, inputs) to the arguments of a call."""
    time: Literal["1000 t", "t", "1 - t"] = "1000 t"
    """The timestep that it takes for our t, which is 0 for clean samples."""
    sign: Literal[1, -1] = 1
    """-1 if its velocity points from noise to clean samples."""
    packs: bool = False
    """Whether squares of 2 x 2 latent pixels are packed into tokens before the call."""
    reads_classes: bool = False
    reads_text: bool = False
    """Whether it reads the sequence, and so needs a text."""
    reads_pooled: Callable[[Settings], bool] = never
    """Whether these settings need the pooled vector."""
    reads_lengths: bool = False
    """Whether a call reads the values of the mask, so that its work depends on the lengths of the texts."""
    reads_padding: bool = False
    """Whether padding changes its output: it ignores the text's mask."""
    is_square: bool = False
    """Whether it takes latents of equal height and width only."""
    is_flat: bool = False
    """Whether it takes latents of any shape."""
    side_multiple: Callable[[Settings], int] = read_patch_size
    """The number that must divide both sides."""
    checkpointing_fault: str = ""
    """Why gradient checkpointing is refused; empty if it computes the same gradients."""
    has_image_tokens: bool = True
    """Whether the blocks of a transformer return tokens of the image alone, which can be aligned (REPA)."""
    has_lora: bool = True
    """Whether it has diffusers' methods for LoRA; peft can inject adapters in any."""
    time_embedding: str = r"(.*\.)?timestep_embedder"
    """The paths of the layers that turn features of t into an embedding, as a regular expression."""
    blocks: str = r"(.*\.)?(single_|joint_)?transformer_blocks\.\d+"
    """The paths of the blocks that add to hidden states of one width, as a regular expression; empty for none."""
    block_output: int = -1
    """The entry with the hidden states of an image, where a block returns a tuple."""
    has_attention_backends: bool = False
    """Whether diffusers' `set_attention_backend` has an effect."""

    def model_class(self) -> Any:
        """Import the class."""
        is_ours = self.module.startswith("experts.")
        return getattr(import_module(self.module if is_ours else f"diffusers.models.{self.module}"), self.class_name)

    def timestep(self, t: Any) -> Any:
        """Return the network's timestep for t."""
        if self.time == "1 - t":
            return 1 - t
        return t if self.time == "t" else 1000 * t


def position_ids(latents: Any, grid: tuple[int, int]) -> Any:
    """Return the (0, row, column) of every token of a grid, in float32."""
    ids = latents.new_ones(*grid, 3).float()
    ids[..., 0] = 0
    ids[..., 1] = ids[..., 1].cumsum(0) - 1
    ids[..., 2] = ids[..., 2].cumsum(1) - 1
    return ids.flatten(0, 1)


def pixel_sizes(inputs: CallInputs) -> Any:
    """Return the height and width in pixels of every row, as an autoencoder of factor 8 has them."""
    sizes = inputs.latents.new_ones(len(inputs.latents), 2)
    sizes[:, 0] *= 8 * inputs.grid[0]
    sizes[:, 1] *= 8 * inputs.grid[1]
    return sizes
