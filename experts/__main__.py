"""Train one expert by hand: `python -m experts --shards DIR --codec DIR --out DIR [--config FILE.json]`.

It needs no orchestrator. Run again with the same arguments, it resumes from its last checkpoint. It fits a missing
codec on the shards first. On SIGTERM it saves a checkpoint and exits with code 75.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ddm_core.artifacts import Preempted, Workspace, fingerprint, list_files, publish
from ddm_core.errors import DDMError
from ddm_core.files.checksums import checksum
from ddm_core.signals import sigterm_flag
from experts.codec import encoder_folder
from experts.codecs.registry import fit_codec
from experts.conditions.text_encoder import SETTINGS, TextEncoder
from experts.config import CodecConfig, ExpertConfig
from experts.expert import train_expert
from experts.networks.pretrained_files import init_checksum
from experts.time_split import train_intervals

PREEMPTED = 75
"""Exit code of a training that has saved a checkpoint and can resume (EX_TEMPFAIL)."""


def main() -> int:
    """Parse the arguments, train, and return the exit code."""
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = read_config(arguments.config)
        with sigterm_flag() as stopping:
            train(arguments, config, stopping)
    except Preempted as preempted:
        sys.stderr.write(f"{preempted}\n")
        return PREEMPTED
    except (DDMError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m experts", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shards",
        type=Path,
        required=True,
        action="append",
        help="folder of shards, or of latents of a run; may be repeated",
    )
    parser.add_argument(
        "--held-out", type=Path, default=[], action="append", help="folder of held-out samples, to measure its error on"
    )
    parser.add_argument("--codec", type=Path, required=True, help="codec folder; fitted there if it is missing")
    parser.add_argument("--out", type=Path, required=True, help="the expert's folder; checkpoints are in OUT.work")
    parser.add_argument("--config", type=Path, help="JSON of an ExpertConfig; missing keys have their defaults")
    parser.add_argument(
        "--text", type=Path, help="folder with a text_encoder.json, such as an ensemble's; reads the shards' captions"
    )
    parser.add_argument("--cluster-id", type=int, default=0, help="cluster id of the shards")
    parser.add_argument("--num-classes", type=int, help="classes of the whole data set; default: those of the shards")
    return parser.parse_args()


def read_config(path: Path | None) -> ExpertConfig:
    """Read the configuration from a JSON file, or return the defaults; raise `ValueError` that lists every mistake."""
    if path is None:
        return ExpertConfig()
    try:
        return TypeAdapter(ExpertConfig).validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, OSError) as error:
        raise ValueError(f"{path} is not a valid ExpertConfig: {error}") from error


def train(arguments: argparse.Namespace, config: ExpertConfig, stopping: Callable[[], bool]) -> None:
    """Fit a missing codec, then train and publish the expert; raise `Preempted` once `stopping()` is true."""
    workspace = replace(Workspace.at(arguments.out.with_name(f"{arguments.out.name}.work")), stopping=stopping)
    if not (arguments.codec / "codec.json").exists():
        fit_codec(CodecConfig(), arguments.shards[0], arguments.codec, workspace)

    text = None if arguments.text is None else TextEncoder.load(arguments.text)
    if arguments.text is not None and text is None:
        raise ValueError(f"--text {arguments.text} has no text_encoder.json; name the folder of an ensemble with text")

    def fill(folder: Path) -> float:
        train = partial(
            train_expert,
            shards=arguments.shards,
            codec=arguments.codec,
            num_classes=arguments.num_classes,
            cluster_id=arguments.cluster_id,
            text=text,
            held_out=arguments.held_out,
        )
        return train_intervals(config, folder, workspace, train).flops

    inputs = input_fingerprints(arguments)
    if config.init is not None:
        inputs["init"] = init_checksum(Path(config.init))
    manifest = publish(arguments.out, fill, stage="expert", config=config, inputs=inputs)
    if manifest.fingerprint != fingerprint("expert", config, inputs):
        raise ValueError(
            f"{arguments.out} holds an expert of another configuration or other data; delete it or choose another --out"
        )


def input_fingerprints(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the fingerprints of shards and of the codec that encodes, from the checksums of their files."""
    folders = {"codec": encoder_folder(arguments.codec)} | {
        f"shards_{number}": path for number, path in enumerate(arguments.shards)
    }
    fingerprints = {
        role: fingerprint(role, {str(file.relative_to(path)): checksum(file) for file in list_files(path)}, {})
        for role, path in folders.items()
    }
    if arguments.text is not None:
        fingerprints["text"] = checksum(arguments.text / SETTINGS)
    return fingerprints | {"cluster_id": str(arguments.cluster_id), "num_classes": str(arguments.num_classes)}


if __name__ == "__main__":
    sys.exit(main())
