"""How a run is told to use the islands on this machine: cluster_configs/compute/islands_local.yaml and what differs."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml

from artifacts import plain, write_text
from orchestrator.compute_config import IslandConfig
from orchestrator.islands.keeper import FOLDER

FIRST_PORT = 19_000
"""Where the ports of `ddm islands up` begin, a hundred an island."""

LISTED = ("island_1", "island_2")
"""The islands that islands_local.yaml names, in the folder above, with the ports above, one CPU each."""


def describe(folder: Path, islands: Mapping[str, IslandConfig]) -> str:
    """Write the islands into `islands.yaml`, as a file of the group `compute`, and say how to use them."""
    written = folder / "islands.yaml"
    write_text(written, yaml.safe_dump({"backend": "islands", "islands": plain(islands)}, sort_keys=False))
    words = shlex.join(overrides(islands, is_usual=folder == FOLDER.expanduser()))
    ending = "" if folder == FOLDER.expanduser() else f" --folder {shlex.quote(str(folder))}"
    commands = (f"islands check {words}", f"run experiment=digits {words}", f"islands down{ending}")
    said = f"{', '.join(islands)} are up; as a configuration: {written}"
    return "\n".join([said, *(f"  ddm {command}" for command in commands)])


def overrides(islands: Mapping[str, IslandConfig], *, is_usual: bool) -> list[str]:
    """What `ddm run` must be given to use these islands and no others; `is_usual` for those in the usual folder."""
    words = ["compute=islands_local", *(f"~compute.islands.{name}" for name in LISTED if name not in islands)]
    for name, island in islands.items():
        keys = {"token_file": island.token_file, "storage": island.storage}
        if name not in LISTED:
            keys |= {"address": island.address}
        if name not in LISTED or not is_usual:
            words += [f'++compute.islands.{name}.{key}="{value}"' for key, value in keys.items()]
        if island.cpus > 1:
            words.append(f"++compute.islands.{name}.cpus={island.cpus}")
    return words
