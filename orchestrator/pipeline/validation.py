"""Validation of an expert while it trains: in its process, or in one beside it; it never fails a training."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from ddm_core.artifacts import Workspace, write_json
from ensemble.config import ValidationConfig
from ensemble.evaluation.validation import EXPERT, TASK, ValidationTask, validate, validation_steps
from experts.config import TrainingConfig
from experts.expert import Expert
from orchestrator.pipeline.stage import FIRST_SAMPLES, STEP_SAMPLES, VALIDATION
from orchestrator.pipeline.stage_inputs import Inputs

log = logging.getLogger(__name__)

FINISH_WITHIN_S = 600.0
"""Time that a process beside the training has after its end."""


@dataclass(kw_only=True)
class Validator:
    """Validates an expert at the planned checkpoints, and at the first one of this attempt."""

    config: ValidationConfig
    training: TrainingConfig
    inputs: Inputs
    workspace: Workspace
    _beside: subprocess.Popen[bytes] | None = None
    _is_first: bool = True

    def on_checkpoint(self, load: Callable[[], Expert]) -> None:
        """Validate the expert of the newest checkpoint, if its step is a planned one."""
        self._run(load, _saved_step(self.workspace))

    def finish(self, load: Callable[[], Expert]) -> None:
        """Validate the trained expert; a process beside the training ends before this returns."""
        try:
            self._wait()
            self._run(load, self.training.steps)
            self._wait()
        finally:
            self.stop()

    def stop(self) -> None:
        """Kill the process beside the training."""
        if self._beside is not None:
            self._beside.kill()
            self._beside.communicate()

    def _run(self, load: Callable[[], Expert], step: int) -> None:
        planned = validation_steps(self.config, self.training)
        if not planned or (step not in planned and not self._is_first):
            return
        self._is_first = False
        try:
            if self.config.beside:
                self._start(load, self._task(step))
            else:
                validate(load(), self._task(step))
                self._keep_first(step)
        except Exception:  # whatever is wrong with a picture, the expert is trained
            log.warning("no validation of this expert at step %d", step, exc_info=True)

    def _task(self, step: int) -> ValidationTask:
        inputs = {role: str(path.absolute()) for role, path in self.inputs.items()}
        return ValidationTask(
            config=self.config,
            step=step,
            codec=inputs["codec"],
            latents=inputs["latents"],
            held_out=inputs.get("holdout", ""),
            device=self.config.device or self.training.device,
            picture=str(self.workspace.attempt.absolute() / STEP_SAMPLES.format(step)),
            distances=str(self.workspace.attempt.absolute() / VALIDATION),
        )

    def _start(self, load: Callable[[], Expert], task: ValidationTask) -> None:
        """Start a process that validates a copy of the expert, unless the last one still runs."""
        if self._beside is not None and self._beside.poll() is None:
            log.warning("no validation at step %d: the one before still runs", task.step)
            return
        self._report()
        folder = self.workspace.scratch / "validation"
        shutil.rmtree(folder, ignore_errors=True)
        load().save(folder / EXPERT)
        write_json(folder / TASK, task)
        with (self.workspace.attempt / "validation.log").open("wb") as output:
            self._beside = subprocess.Popen(
                [sys.executable, "-P", "-m", "ensemble.evaluation.validation", str(folder.absolute())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _wait(self) -> None:
        """Wait for the process beside the training."""
        if self._beside is not None:
            try:
                self._beside.wait(FINISH_WITHIN_S)
            except subprocess.TimeoutExpired:
                log.warning("a validation took more than %.0f s after the training, and was stopped", FINISH_WITHIN_S)
                self.stop()
            self._report()

    def _report(self) -> None:
        """Log why the last process failed, or keep its picture as the first one of the attempt."""
        if self._beside is None:
            return
        if self._beside.returncode:
            lines = (self.workspace.attempt / "validation.log").read_text(encoding="utf-8", errors="replace")
            reason = lines.strip().rpartition("\n")[2] or "its process was killed"
            log.warning("no validation of this expert: %s (all of it: validation.log)", reason)
        self._beside = None
        for picture in sorted(self.workspace.attempt.glob("samples-*.png"))[:1]:
            self._keep_first(int(picture.stem.removeprefix("samples-")))

    def _keep_first(self, step: int) -> None:
        first = self.workspace.attempt / FIRST_SAMPLES
        if not first.exists():
            shutil.copyfile(self.workspace.attempt / STEP_SAMPLES.format(step), first)


def _saved_step(workspace: Workspace) -> int:
    """Return the step of the newest checkpoint."""
    return max(int(path.name.removeprefix("step-")) for path in workspace.scratch.glob("checkpoints/step-*"))
