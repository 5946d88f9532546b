"""List, remove, restore or add the experts of a finished run's ensemble."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli.pipelines import RunArgument
from orchestrator.errors import ConfigError
from orchestrator.reporting.terminal import AsJson, open_console, print_json

if TYPE_CHECKING:
    from orchestrator.config.delivery import DeliveryConfig
    from orchestrator.config.schema import RunConfig
    from orchestrator.run.run_folder import RunFolder

app = typer.Typer(no_args_is_help=True, help=__doc__)
console = open_console()

ALL, ROUTED = "all", "routed"

Ensemble = Annotated[Path | None, typer.Option(help="Ensemble of an earlier change; empty is the run's own")]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the new ensemble; empty is a new folder among the run's artifacts")
]


@app.command("list")
def list_experts(run: RunArgument, ensemble: Ensemble = None, as_json: AsJson = False) -> None:
    """Show every expert: its share of the data, its network, and whether it is missing."""
    pipeline = _open_base(run, ensemble).load()
    rows = _rows(pipeline)
    if as_json:
        print_json(rows)
    console.print(_table(rows))
    _warn(pipeline)


@app.command()
def remove(
    run: RunArgument,
    ids: Annotated[list[int], typer.Argument(help="Ids of the experts to remove", metavar="ID…")],
    ensemble: Ensemble = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Write an ensemble without some experts; gates are renormalized, and the router is not trained again."""
    base = _open_base(run, ensemble, out or run)
    from orchestrator.cli.membership import write_without_experts

    _print_ensemble(run, write_without_experts(base, ids, out), as_json=as_json)


@app.command()
def add(
    run: RunArgument,
    expert: Annotated[Path, typer.Argument(help="The expert's folder, written by `python -m experts` or another run")],
    shards: Annotated[Path | None, typer.Option(help="Its training samples, for its new head in the router")] = None,
    place: Annotated[int | None, typer.Option(help="Id of a missing expert that it replaces")] = None,
    ensemble: Ensemble = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Write an ensemble with one more expert: as a missing id (--place) or with a new router head (--shards)."""
    base = _open_base(run, ensemble, out or run)
    from orchestrator.cli.membership import records_codec, write_with_new_expert, write_with_restored_expert

    if place is not None and shards is None:
        folder = write_with_restored_expert(base, expert, place, out)
    elif shards is not None and place is None:
        folder = write_with_new_expert(base, expert, shards, out)
    else:
        raise ConfigError(
            "a new expert needs its samples (--shards) for a head in the router, or the id of the missing expert "
            f"that it replaces (--place), and not both; got --shards {shards}, --place {place}"
        )
    if not records_codec(expert):
        console.print(f"Warning: {expert} does not record the codec with which it was trained")
    _print_ensemble(run, folder, as_json=as_json)


def finetune(
    run: RunArgument,
    images: Annotated[Path, typer.Option(help="Folder of images, as data.source=image_folder reads it")],
    out: Annotated[Path, typer.Option(help="Folder that the adapters are copied to")],
    experts: Annotated[str, typer.Option(help="all, ids such as 0,2, or routed: by each image's cluster")] = "routed",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each adapter")] = 500,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step")] = 16,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate")] = 1e-4,
    trust: Annotated[bool, typer.Option("--trust", help="Use the settings of a run that someone else wrote")] = False,
) -> None:
    """Train a LoRA adapter of every chosen expert on images, each alone, as stages of the run; its experts stay."""
    from orchestrator.config.finetune import FinetuneConfig
    from orchestrator.config.schema import change_config
    from orchestrator.controller import run_pipeline
    from orchestrator.errors import RunFailed
    from orchestrator.planning.checks.machine import check_folder
    from orchestrator.reporting.results import find_pipeline
    from orchestrator.run.run_folder import RunFolder
    from orchestrator.run.trust import require_trust

    folder, out = RunFolder(run.expanduser()), out.expanduser()
    config = folder.load_config()
    require_trust(folder, config, trust=trust)
    check_folder(out)
    finetune = FinetuneConfig(
        images=str(images.expanduser().absolute()),
        content=_fingerprint_images(images.expanduser()),
        experts=_choose_experts(find_pipeline(folder, monolith=False), experts),
        is_routed=experts == ROUTED,
        rank=rank,
        training=replace(
            config.expert.training, steps=steps, batch_size=batch_size, lr=lr, warmup_steps=min(100, steps // 10)
        ),
    )
    earlier, config = config, change_config(config, {"folder": str(folder.root), "finetune": finetune})
    with _restores(folder, earlier, lambda: "adapter_images" in _finished_stages(folder, config)):
        result = run_pipeline(config, console)
    if result.stopped:
        raise RunFailed("stopped; run the same command to continue")
    _copy_adapters(folder, config, out)
    console.print(f'{out}: pipe.load_lora_weights("{out}")', soft_wrap=True, highlight=False, markup=False)


def extend(
    run: RunArgument,
    path: Annotated[str, typer.Argument(help="The later data, as data.path names the first; without the first")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each expert; empty: a quarter of the first")
    ] = None,
    version: Annotated[str, typer.Option(help="As data.version; another one reads the path again")] = "",
    trust: Annotated[bool, typer.Option("--trust", help="Use the settings of a run that someone else wrote")] = False,
) -> None:
    """Add later data to the clusters of a run, and train its experts on, and its router anew; centroids stay."""
    from orchestrator.cli.pipelines import report_result
    from orchestrator.config.delivery import DeliveryConfig
    from orchestrator.config.schema import change_config
    from orchestrator.controller import run_pipeline
    from orchestrator.run.run_folder import RunFolder
    from orchestrator.run.trust import require_trust

    folder = RunFolder(run.expanduser())
    config = folder.load_config()
    require_trust(folder, config, trust=trust)
    if config.data.path is None:
        raise ConfigError(
            f"data.source={config.data.source} has no later data; extend a run whose data have a data.path"
        )
    steps = steps or max(1, config.expert.training.steps // 4)
    delivery = DeliveryConfig(path=str(replace(config.data, path=path).path), version=version, steps=steps)
    read = _read(folder, config)
    for other in set(config.deliveries) - {*read, delivery}:
        console.print(f"{other.path} was not read yet, and is left out", soft_wrap=True, highlight=False, markup=False)
    config = change_config(config, {"folder": str(folder.root), "deliveries": tuple(dict.fromkeys((*read, delivery)))})
    with _restores(folder, replace(config, deliveries=read), lambda: _read(folder, config) == config.deliveries):
        result = run_pipeline(config, console)
    report_result(config, result)


@contextmanager
def _restores(folder: "RunFolder", earlier: "RunConfig", is_read: Callable[[], bool]) -> Iterator[None]:
    """Write the earlier configuration back if a run fails before it has read what was added to it."""
    from orchestrator.errors import RunFailed
    from orchestrator.run.lease import hold_lease

    try:
        yield
    except RunFailed:
        if not is_read():
            with hold_lease(folder):
                folder.save_config(earlier)
        raise


def _read(folder: "RunFolder", config: "RunConfig") -> tuple["DeliveryConfig", ...]:
    """Return the deliveries of a run that have been read; one that cannot be is no part of the run."""
    finished = _finished_stages(folder, config)
    return tuple(delivery for n, delivery in enumerate(config.deliveries, start=1) if f"dataset_{n}" in finished)


def _finished_stages(folder: "RunFolder", config: "RunConfig") -> set[str]:
    from orchestrator.pipeline.graph import build_graph

    return {stage.name for stage in build_graph(config) if folder.is_finished(stage)}


def _fingerprint_images(images: Path) -> str:
    """Return one fingerprint of all files in a folder; raise `NoSamples` if it is none."""
    from data_partition.errors import NoSamples
    from ddm_core.artifacts import fingerprint
    from ddm_core.files.checksums import checksum

    if not images.is_dir():
        raise NoSamples(f"--images must be a folder of images; got {images}")
    files = {str(path.relative_to(images)): checksum(path) for path in images.rglob("*") if path.is_file()}
    return fingerprint("images", files, {})


def _choose_experts(ensemble: Path, experts: str) -> tuple[int, ...]:
    """Return the ids that an option names; raise `ConfigError` for one that the ensemble lacks."""
    present = sorted(int(path.name.removeprefix("expert_")) for path in ensemble.glob("expert_*"))
    if experts in (ALL, ROUTED):
        return tuple(present)
    ids = [part.strip() for part in experts.split(",")]
    if unknown := [part for part in ids if not part.isdigit() or int(part) not in present]:
        known = ", ".join(map(str, present))
        raise ConfigError(f"--experts must be {ALL}, {ROUTED}, or ids among {known}; got {unknown[0]!r}")
    return tuple(sorted({int(part) for part in ids}))


def _copy_adapters(run: Any, config: Any, out: Path) -> None:
    """Copy the adapters that are trained to `out/expert_<k>`, and print how."""
    from ddm_core.artifacts import MANIFEST, atomic_folder, read_json, verify
    from orchestrator.pipeline.graph import build_graph

    for stage in build_graph(config):
        if stage.kind != "adapter" or not run.is_finished(stage):
            continue
        artifact, k = run.artifact(stage), stage.name.removeprefix("adapter_")
        verify(artifact)
        summary = read_json(artifact / "training.json")
        if not summary["images"]:
            console.print(f"expert {k}: no image lies in its cluster, so it has no adapter")
            continue
        with atomic_folder(out / f"expert_{k}") as temporary:
            shutil.copytree(artifact, temporary, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        console.print(
            f"expert {k}: {summary['images']} images, {summary['steps']} steps, loss {summary['final_loss']:.4f}"
        )


def _open_base(run: Path, ensemble: Path | None, output: Path | None = None) -> Any:
    """Return an ensemble after its checksums are verified, if a folder can be written at `output`."""
    from orchestrator.planning.checks.machine import check_folder
    from orchestrator.run.run_folder import RunFolder

    folder = RunFolder(run.expanduser())
    folder.load_config()
    if output is not None:
        check_folder(output.expanduser())
    from orchestrator.cli.membership import BaseEnsemble

    return BaseEnsemble.open(folder, ensemble and ensemble.expanduser())


def _print_ensemble(run: Path, folder: Path, *, as_json: bool) -> None:
    from ensemble.pipeline import EnsemblePipeline

    pipeline = EnsemblePipeline.from_pretrained(folder)
    if as_json:
        print_json({"ensemble": folder, "experts": _rows(pipeline)})
    present = ", ".join(map(str, sorted(pipeline.ensemble.experts)))
    lines = f"{folder}: experts {present}\n  ddm sample {run} --ensemble {folder}"
    console.print(lines, soft_wrap=True, highlight=False, markup=False)
    _warn(pipeline)


def _warn(pipeline: Any) -> None:
    from ensemble.membership import missing_warning

    if warning := missing_warning(pipeline.ensemble):
        console.print(f"Warning: {warning}", soft_wrap=True, highlight=False)


def _rows(pipeline: Any) -> list[dict[str, Any]]:
    """Return what is known of every expert; one that is missing has an id and a share."""
    from ensemble.membership import data_shares
    from experts.training.flops import count_parameters

    rows: list[dict[str, Any]] = []
    for k, share in enumerate(data_shares(pipeline.ensemble)):
        rows.append({"expert_id": k, "data_share": share, "is_missing": k not in pipeline.ensemble.experts})
        if k in pipeline.ensemble.experts:
            expert = pipeline.ensemble.experts[k]
            networks = [*expert.networks()]
            expert = next(iter(expert.parts().values()), getattr(expert, "shared", expert))
            rows[k] |= {
                "network": ", ".join(dict.fromkeys(type(network).__name__ for network in networks)),
                "parameters": sum(map(count_parameters, networks)),
                "prediction": expert.prediction,
                "noise_schedule": expert.noise_schedule.name,
            }
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{len(rows)} expert(s)")
    for heading in ("expert", "share of\nthe data", "network", "parameters", "prediction", "noise\nschedule"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for row in rows:
        facts = ["missing"]
        if not row["is_missing"]:
            facts = [row["network"], f"{row['parameters']:,}", row["prediction"], row["noise_schedule"]]
        table.add_row(str(row["expert_id"]), f"{100 * row['data_share']:.1f} %", *facts)
    return table
