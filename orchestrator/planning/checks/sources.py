"""Check the sources of a run beside its first data: images of adapters, and data that come later."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_partition.datasets.survey import Survey, survey_source
from data_partition.errors import DataError
from ddm_core.artifacts import read_json
from ddm_core.name_lists import join_names
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder


def read_survey(path: Path) -> Survey:
    """Return the counts of a finished data set, from its `dataset.json`."""
    summary = read_json(path)
    return Survey(train=summary["count"], held_out=summary["holdout_count"], class_counts=summary["class_counts"])


def check_own_images(run: RunFolder, stage: Stage | None) -> Iterator[str]:
    """Yield why the images of adapters cannot be read; finished ones are taken from the run."""
    if stage is not None and not run.is_finished(stage):
        try:
            survey_source(stage.config.data)
        except DataError as error:
            yield f"adapters need images (ddm finetune --images): {error}"


def check_deliveries(run: RunFolder, stages: Mapping[str, Stage]) -> Iterator[str]:
    """Yield why later data cannot be read, or have a class that the run has not; finished ones are taken from it."""
    dataset = stages["dataset"]
    known = read_survey(run.verify_file(dataset, "dataset.json")).class_counts if run.is_finished(dataset) else {}
    for name, stage in stages.items():
        if not name.startswith("dataset_") or run.is_finished(stage):
            continue
        try:
            survey = survey_source(stage.config)
        except DataError as error:
            yield f"later data (ddm extend): {error}"
            continue
        others = sorted(survey.class_counts.keys() - known.keys()) if survey and known and stage.config.labels else []
        if others:
            yield (
                f"later data (ddm extend): {stage.config.path} has the class {others[0]!r}, and the classes of the "
                f"run are {join_names([*known])}; leave it out, or start a new run"
            )
