"""What an expert drew while it trained, found in the folders of its attempts."""

import json

from orchestrator.pipeline.stage import FIRST_SAMPLES, STEP_SAMPLES, VALIDATION, Stage
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.step_samples import find_step_samples

STAGE = Stage(name="expert_0", kind="expert", config=None)


def attempt(run, number, *steps):
    folder = run.attempt(STAGE, number)
    folder.mkdir(parents=True)
    for step in steps:
        (folder / STEP_SAMPLES.format(step)).touch()
    return folder


def test_latest_attempt_counts_and_damaged_rows_do_not(tmp_path):
    run = RunFolder(tmp_path)
    first, second = attempt(run, 1, 100, 200), attempt(run, 2, 200, 1500)
    rows = [{"step": 100, "kid": 0.5, "kid_std": 0.25}, {"step": 200, "kid": 9.0, "kid_std": 1.0}]
    (first / VALIDATION).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 15')
    (second / VALIDATION).write_text('{"step": 200, "kid": 0.125, "kid_std": 0.0625}\n{"step": 1500, "kid": "?"}\n')
    found = find_step_samples(run, STAGE)
    assert [samples.label for samples in found.values()] == [
        "step 100, KID 0.500 ± 0.250",
        "step 200, KID 0.125 ± 0.062",
        "step 1,500",
    ]
    assert found[200].picture.parent == second and found[100].picture.parent == first


def test_link_out_of_the_attempt_is_not_read(tmp_path):
    run = RunFolder(tmp_path / "run")
    folder = attempt(run, 1, 100)
    (tmp_path / "other.jsonl").write_text('{"step": 100, "kid": 0.5, "kid_std": 0.25}\n')
    (folder / VALIDATION).symlink_to(tmp_path / "other.jsonl")
    assert find_step_samples(run, STAGE)[100].kid is None


def test_older_run_has_the_picture_of_its_first_checkpoint(tmp_path):
    run = RunFolder(tmp_path)
    (attempt(run, 1) / FIRST_SAMPLES).touch()
    assert find_step_samples(run, STAGE)[0].label == "first checkpoint"
