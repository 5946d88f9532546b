"""Train one expert by hand: `python -m experts --shards DIR --codec DIR --out DIR [--config FILE.json]`.

Needs no orchestrator. Started again with the same arguments it continues from its last checkpoint. A missing
codec is fitted on the shards first. SIGTERM makes it save its work and exit with code 75.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from data_partition.errors import DataError
from ddm_core.artifacts import ArtifactError, Preempted, Workspace, checksum, files_in, fingerprint, publish
from ddm_core.signals import sigterm_flag
from experts.codecs.registry import fit_codec
from experts.config import CodecConfig, ExpertConfig
from experts.expert import train_expert
from experts.networks.pretrained_files import init_checksum
from experts.training.checkpoint import CheckpointError
from experts.training.trainer import TrainingDiverged

PREEMPTED = 75
"""Exit code of a training that has saved its work and can go on (EX_TEMPFAIL)."""


def main() -> int:
    """Read the arguments, train, and return the exit code."""
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = read_config(arguments.config)
        with sigterm_flag() as stopping:
            train(arguments, config, stopping)
    except Preempted as stopped:
        sys.stderr.write(f"{stopped}\n")
        return PREEMPTED
    except (ArtifactError, CheckpointError, DataError, TrainingDiverged, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experts", description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, required=True, action="append", help="folder of shards; may be repeated")
    parser.add_argument("--codec", type=Path, required=True, help="codec folder; fitted there if it is missing")
    parser.add_argument("--out", type=Path, required=True, help="the expert's folder; checkpoints lie beside it")
    parser.add_argument("--config", type=Path, help="JSON of an ExpertConfig; what it leaves out has its default")
    parser.add_argument("--cluster-id", type=int, default=0, help="which cluster the shards are")
    parser.add_argument("--num-classes", type=int, help="classes of the whole data set; default: what the shards name")
    return parser.parse_args()


def read_config(path: Path | None) -> ExpertConfig:
    """The configuration in a JSON file, every mistake in it at once; defaults without a file."""
    if path is None:
        return ExpertConfig()
    try:
        return TypeAdapter(ExpertConfig).validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, OSError) as error:
        raise ValueError(f"{path} is not a configuration of an expert: {error}") from error


def train(arguments: argparse.Namespace, config: ExpertConfig, stopping: Callable[[], bool]) -> None:
    """Fit the codec if it is missing, then train and publish the expert; raises `Preempted` once `stopping` says so."""
    workspace = replace(Workspace.at(arguments.out.with_name(f"{arguments.out.name}.work")), stopping=stopping)
    if not (arguments.codec / "codec.json").exists():
        fit_codec(CodecConfig(), arguments.shards[0], arguments.codec, workspace)

    def fill(folder: Path) -> float:
        summary = train_expert(
            config,
            arguments.shards,
            arguments.codec,
            folder,
            workspace,
            num_classes=arguments.num_classes,
            cluster_id=arguments.cluster_id,
        )
        return summary.flops

    inputs = identities(arguments)
    if config.init is not None:
        inputs["init"] = init_checksum(Path(config.init))
    made = publish(arguments.out, fill, stage="expert", config=config, inputs=inputs)
    if made.fingerprint != fingerprint("expert", config, inputs):
        raise ValueError(
            f"{arguments.out} holds an expert of another configuration or other data; delete it or choose another --out"
        )


def identities(arguments: argparse.Namespace) -> dict[str, str]:
    """What the expert learns from, as checksums of every file."""
    folders = {"codec": arguments.codec} | {f"shards_{number}": path for number, path in enumerate(arguments.shards)}
    found = {
        role: fingerprint(role, {str(file.relative_to(path)): checksum(file) for file in files_in(path)}, {})
        for role, path in folders.items()
    }
    return found | {"cluster_id": str(arguments.cluster_id), "num_classes": str(arguments.num_classes)}


if __name__ == "__main__":
    sys.exit(main())
