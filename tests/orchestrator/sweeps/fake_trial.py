"""A fake of a trial's controller: the same lease, journal, artifacts and exit codes, without training.

`python -m tests.orchestrator.sweeps.fake_trial FOLDER` publishes every stage of the run, slowly enough to be killed.
The configuration's seed selects the outcome: 1 fails, 2 never ends, all others are scored with their learning rate.
"""

import json
import sys
import time
from pathlib import Path

from rich.console import Console

from ddm_core.artifacts import publish
from ddm_core.die_with_parent import die_with_parent
from orchestrator.controller import _stop_on_signals
from orchestrator.pipeline.graph import build_graph
from orchestrator.run.lease import hold_lease
from orchestrator.run.run_folder import RunFolder

SEED_THAT_FAILS, SEED_THAT_NEVER_ENDS = 1, 2


def score(config) -> float:
    """Return the Fréchet distance with which a configuration is scored."""
    return config.expert.training.lr


def run_fake_trial(run: RunFolder, score=score) -> int:
    """Publish the missing artifacts; return the exit code of a controller."""
    config = run.load_config()
    run.record("run_started")
    for stage in build_graph(config):
        while config.seed == SEED_THAT_NEVER_ENDS and not run.stop.exists():
            time.sleep(0.02)
        if run.stop.exists():
            run.stop.unlink()
            return 130
        if config.seed == SEED_THAT_FAILS and stage.kind == "expert":
            Console().print("Error: the disk is full\n  and so is the other one")
            return 1
        if run.is_finished(stage):
            continue
        run.record("submitted", stage=stage.name)
        time.sleep(0.02)
        publish(
            run.artifact(stage),
            lambda folder: _write_scores(folder, score(config)),
            stage=stage.name,
            config=stage.config,
            inputs=stage.input_fingerprints,
        )
        run.record("finished", stage=stage.name)
    run.report.write_text("a report")
    return 0


def _write_scores(folder: Path, value: float) -> float:
    spaces = dict.fromkeys(("efficientnet_lite0", "pixels"), {"fd": value})
    (folder / "scores.json").write_text(json.dumps({"spaces": spaces, "calls_per_step": 1.0}))
    return 1.0


if __name__ == "__main__":
    die_with_parent()
    folder = RunFolder(Path(sys.argv[1]))
    with hold_lease(folder), _stop_on_signals(folder, Console()):
        code = run_fake_trial(folder)
    sys.exit(code)
