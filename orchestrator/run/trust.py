"""Trust in run folders: `ddm` acts on the settings of a folder only if this user wrote them.

A run folder may come from anyone. Its configuration names addresses, token files, batch options, data and checkpoints,
and a command that acts on them would send credentials and read files for a stranger. So whoever writes a run's
configuration signs it, and the commands that act on it verify the signature. Commands that only read the folder, such
as `ddm status`, `report` and `sample`, need no trust and use nothing of `compute`.
"""

from orchestrator.config.schema import RunConfig
from orchestrator.errors import UntrustedFolder
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.signature import is_signed, sign


def is_trusted(run: RunFolder) -> bool:
    """Return whether this user wrote the run's present configuration."""
    return is_signed(run.config_file, run.signature)


def require_trust(run: RunFolder, config: RunConfig, *, trust: bool) -> None:
    """Raise `UntrustedFolder` for a configuration that this user did not write; with `trust`, sign it instead."""
    if trust:
        sign(run.config_file, run.signature)
    elif not is_trusted(run):
        raise UntrustedFolder(
            "\n".join(
                [
                    f"the settings of {run.root} were not written by you on this machine. This command would",
                    *(f"  {line}" for line in describe_access(config)),
                    "If you trust all of this, add --trust. With settings of your own, use `ddm run folder=…`",
                ]
            )
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
    reads = (config.data.path, config.expert.init, *(expert.init for expert in config.experts.values()))
    lines += [f"read {path!r}" for path in dict.fromkeys(path for path in reads if path)]
    if config.wandb.mode != "disabled":
        lines.append(f"track the run with wandb, mode {config.wandb.mode!r}")
    return lines
