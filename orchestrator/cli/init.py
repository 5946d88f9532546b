"""`ddm init`: look at a folder of images, and write a configuration for it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ddm_core.name_lists import join_names
from orchestrator.errors import ConfigError
from orchestrator.reporting.terminal import AsJson, open_console, print_json

if TYPE_CHECKING:
    from data_partition.datasets.inspect_folder import FolderFacts

console = open_console()


def init(
    folder: Annotated[Path, typer.Argument(help="The folder of images; its sub-folders may be classes")],
    out: Annotated[Path | None, typer.Option(help="The file to write; empty is <folder>.yaml here")] = None,
    minutes: Annotated[float, typer.Option(help="Time that the run may take", min=1)] = 10,
    force: Annotated[bool, typer.Option("--force", help="Replace the file")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a folder of images, and write a commented configuration for `ddm run --config`."""
    from data_partition.datasets.inspect_folder import inspect_folder
    from orchestrator.planning.checks.suggest import suggest, to_yaml

    folder = folder.expanduser().absolute()
    target = out or Path(f"{folder.name}.yaml")
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; name another file with --out, or replace it with --force")
    facts = inspect_folder(str(folder))
    suggestions = suggest(facts, folder, minutes)
    target.write_text(to_yaml(suggestions, str(target)), encoding="utf-8")
    if as_json:
        print_json({"facts": facts, "suggestions": suggestions, "file": target})
        return
    table = Table("", "found", title=str(folder), show_header=False)
    for name, text in describe(facts).items():
        table.add_row(name, text or "none")
    console.print(table)
    table = Table("key", "value", "why", title=f"Suggested, in {target}")
    for item in suggestions:
        table.add_row(item.key, str(item.value), item.reason)
    console.print(table)
    console.print(f"Start it with: ddm run --config {shlex.quote(str(target))}", soft_wrap=True, highlight=False)


def describe(facts: "FolderFacts") -> dict[str, str]:
    """Return the rows of the table of what was found."""
    classes = [f"{name} {count}" for name, count in facts.class_counts.items()]
    low, median, high = facts.sides
    pairs = [" = ".join(pair) for pair in facts.duplicates]
    bad = [f"{name}: {reason}" for name, reason in facts.bad.items()]
    return {
        "images": f"{facts.images:,}, {facts.decoded + len(facts.bad):,} of them looked at",
        "sizes": f"shorter side {low} to {high} pixels, median {median}; most are {facts.common_size}",
        "colours": f"{facts.grey_share:.0%} grey",
        "classes": join_names(classes) if classes else "none: no sub-folders",
        "in no class": str(facts.loose),
        "captions": f"{facts.captions} images with a file of text beside them" if facts.captions else "",
        "bad files": join_names(bad),
        "duplicates": join_names(pairs),
        "other files": join_names([f"{count} with {suffix}" for suffix, count in facts.others.items()]),
    }
