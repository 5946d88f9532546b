"""Trust in run folders: `ddm` acts on the settings of a folder only if this user wrote them.

A run folder may come from anyone. Its configuration names addresses, token files, batch options, data and checkpoints,
and a command that acts on them would send credentials and read files for a stranger. So whoever writes a run's
configuration signs it, and the commands that act on it verify the signature. Commands that only read the folder, such
as `ddm status`, `report` and `sample`, need no trust and use nothing of `compute`.
"""

import os
import stat
from pathlib import Path

from orchestrator.config.schema import RunConfig
from orchestrator.errors import UntrustedFolder
from orchestrator.run.disk_errors import disk_errors_as_messages
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.signature import is_signed, sign


def is_trusted(run: RunFolder) -> bool:
    """Return whether this user wrote the run's present configuration."""
    return is_signed(run.config_file, run.signature)


def may_read_images(run: RunFolder, shards: Path) -> bool:
    """Return whether a command that needs no trust may read the images of shards.

    Images of an offset index are read from addresses that the folder names: a stranger's choice.
    """
    from data_partition.shards.shards import read_index  # most commands read no shards, and start faster

    return read_index(shards).source is None or is_trusted(run)


def require_trust(run: RunFolder, config: RunConfig, *, trust: bool) -> None:
    """Raise `UntrustedFolder` for a configuration that this user did not write; with `trust`, sign it instead."""
    require_plain_files(run)
    if trust:
        with disk_errors_as_messages(run.root):
            sign(run.config_file, run.signature)
    elif not is_trusted(run):
        raise UntrustedFolder(
            "\n".join(
                [
                    f"the settings of {run.root} were not written by you on this machine, or its {run.signature.name} "
                    "is damaged. This command would",
                    *(f"  {line}" for line in describe_access(config)),
                    "If you trust all of this, add --trust. With settings of your own, use `ddm run folder=…`",
                ]
            )
        )


def require_plain_files(run: RunFolder) -> None:
    """Raise `UntrustedFolder` if anything in a folder that this user has not signed leads out of it.

    A command that writes in a run folder would follow a stranger's link out of it, write through a hard link to another
    file, or wait for a pipe. In a folder of this user, links are a way to use several disks.
    """
    if is_trusted(run):
        return
    root = os.path.join(os.path.realpath(run.root), "")
    for folder, names, files in os.walk(run.root):
        for path in (Path(folder, name) for name in (*names, *files)):
            status = path.lstat()
            is_plain = stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
            is_inner_link = stat.S_ISLNK(status.st_mode) and os.path.realpath(path).startswith(root)
            if not is_plain and not is_inner_link:
                raise UntrustedFolder(
                    f"{path} leads out of {run.root}, which was not written by you on this machine: it is a link, a "
                    "hard link, a pipe or a device. Delete it, or copy the folder without it"
                )


def describe_access(config: RunConfig) -> list[str]:
    """Describe what a run of this configuration contacts, runs and reads outside its folder, one line each."""
    compute = config.compute
    lines = [f"run stages with backend {compute.backend!r}"]
    if compute.address:
        lines.append(f"connect to the Ray cluster {compute.address!r}")
    lines += [
        f"send the token in {island.token_file!r} to {island.address!r}, and shards to {island.storage!r}"
        for island in compute.islands.values()
    ]
    if compute.slurm:
        lines.append("submit Slurm jobs with " + ", ".join(f"{key}={value!r}" for key, value in compute.slurm.items()))
    reads = (
        config.data.path,
        config.codec.path,
        config.text.path,
        config.expert.init,
        *(expert.init for expert in config.experts.values()),
        config.finetune and config.finetune.images,
    )
    lines += [f"read {path!r}" for path in dict.fromkeys(path for path in reads if path)]
    if config.data.mode == "stream":
        lines.append("read the tars that its offset indexes name, wherever they are")
    if config.wandb.mode != "disabled":
        lines.append(f"track the run with {config.wandb.library}, mode {config.wandb.mode!r}")
    if config.notify.webhook_file:
        lines.append(f"post the events of the run to the address in {config.notify.webhook_file!r}")
    return lines
