"""The model card of a run's ensemble: data, clusters, costs, scores, audit and licence, from the run folder."""

from collections.abc import Sequence
from typing import Any

import yaml

from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.facts import load_audits, load_clusters
from orchestrator.reporting.results import current_graph, load_score_rows, load_training_flops
from orchestrator.reporting.tables.ranking import ScoreRow
from orchestrator.run.run_folder import RunFolder

USE = """```python
import ddm

pipe = ddm.DDMPipeline.from_pretrained("{name}")
pipe(seeds=range(4)).images
```
Each expert is also a plain diffusers model: `{network}.from_pretrained("{name}", subfolder="expert_0")`."""


def render_model_card(run: RunFolder, name: str, license_name: str = "other") -> str:
    """Return the README of a repository `name` with this run's ensemble.

    `license_name` is an identifier of the Hub. Raises `RunFolderError` or `CorruptArtifact` for a damaged run.
    """
    config = run.load_config()
    graph = current_graph(run, config)
    header = {"license": license_name, "library_name": "diffusers", "tags": ["decentralized-diffusion", "diffusers"]}
    sections = [
        f"# {name}",
        f"An ensemble of {config.partition.num_experts} diffusion models, each trained alone on one cluster of the "
        "data, and a router. They sample as one model (McAllister et al. 2025, arXiv:2501.05450).",
        USE.format(name=name, network=_network(config)),
        "## Data\n" + _data(config),
        "## Clusters\n" + _clusters(run, graph),
        "## Training\n" + _training(run, graph),
        "## Scores\n" + _scores(load_score_rows(run, graph)),
        "## Audit\n" + _audit(run, graph),
        f"## Licence\n{license_name}. The licence of the data applies to what the model reproduces of them.",
    ]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def _network(config: RunConfig) -> str:
    return str(getattr(config.expert.network, "class_name", "AutoModel"))


def _data(config: RunConfig) -> str:
    data = config.data
    kind = "grey" if data.channels == 1 else "RGB"
    condition = "classes" if data.labels else "no classes"
    captions = ", captions" if data.captions else ""
    path = f" from `{data.shown_path}`" if data.path else ""
    return f"{data.source}{path}: {data.image_size} x {data.image_size} pixels, {kind}, {condition}{captions}."


def _clusters(run: RunFolder, graph: Sequence[Stage]) -> str:
    if not any(stage.name == "partition" and run.is_finished(stage) for stage in graph):
        return "Not recorded."
    rows = [
        [cluster.cluster_id, f"{cluster.count:,}", f"{100 * cluster.share:.1f} %", _number(cluster.epochs)]
        for cluster in load_clusters(run, graph)
    ]
    return _table(["cluster", "images", "share", "epochs of its expert"], rows)


def _training(run: RunFolder, graph: Sequence[Stage]) -> str:
    return _table(
        ["stage", "FLOPs"], [[name, f"{flops:.3g}"] for name, flops in load_training_flops(run, graph).items()]
    )


def _scores(rows: Sequence[ScoreRow]) -> str:
    if not rows:
        return "Not scored."
    spaces = list(rows[0].scores["spaces"])
    cells = [
        [row.label, *(f"{row.scores['spaces'][space]['fd']:.4g}" for space in spaces), row.scores["calls_per_step"]]
        for row in rows
    ]
    distances = [f"Fréchet distance, {space}" for space in spaces]
    return "Against held-out images; lower is better.\n\n" + _table(["sampled by", *distances, "expert calls"], cells)


def _audit(run: RunFolder, graph: Sequence[Stage]) -> str:
    audits = load_audits(run, graph)
    if not audits:
        return "Samples were not compared with the training images. `ddm audit` does that."
    lines = []
    for audit in audits:
        for share in audit.result["spaces"]["pixels"]["overall"]["shares"]:
            near = f"nearer to a training image than the closest {100 * share['quantile']:g} % of held-out images"
            lines.append(f"* {audit.name}: {100 * share['share']:.1f} % of the samples are {near}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
