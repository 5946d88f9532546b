"""Check the sources of a run beside its first data: images of adapters, and data that come later."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_partition.datasets.survey import Survey, survey_source
from data_partition.errors import DataError
from ddm_core.artifacts import read_json
from ddm_core.name_lists import join_names
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder

SMALL_BATCH = 64
"""Images of a batch that even a few images may fill, again and again."""


def read_survey(path: Path) -> Survey:
    """Return the counts of a finished data set, from its `dataset.json`."""
    summary = read_json(path)
    return Survey(train=summary["count"], held_out=summary["holdout_count"], class_counts=summary["class_counts"])


def check_own_images(run: RunFolder, stages: Mapping[str, Stage]) -> Iterator[str]:
    """Yield why the images of adapters cannot be read, or do not fill a batch; finished ones are taken from the run."""
    stage = stages.get("adapter_images")
    if stage is None or run.is_finished(stage):
        return
    try:
        survey = survey_source(stage.config.data)
    except DataError as error:
        yield f"adapters need images (ddm finetune --images): {error}"
        return
    most = max(SMALL_BATCH, survey.train + survey.held_out) if survey else None
    batches = {item.config.training.batch_size for item in stages.values() if item.kind == "adapter"}
    if most is not None and (larger := [rows for rows in batches if rows > most]):
        yield (
            f"a batch of adapters has at most as many images as there are, or {SMALL_BATCH}; {stage.config.data.path} "
            f"has {survey.train + survey.held_out if survey else 0}, and --batch-size is {larger[0]}; lower it"
        )


def check_deliveries(run: RunFolder, stages: Mapping[str, Stage]) -> Iterator[str]:
    """Yield why later data cannot be read, or have a class that the run has not; finished ones are taken from it."""
    dataset = stages["dataset"]
    later = [stage for name, stage in stages.items() if name.startswith("dataset_") and not run.is_finished(stage)]
    known: Mapping[str, int] = {}
    if later and run.is_finished(dataset):
        known = read_survey(run.verify_file(dataset, "dataset.json")).class_counts
    for stage in later:
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
