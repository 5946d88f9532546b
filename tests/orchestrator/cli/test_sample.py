"""`ddm sample`: files that cannot be written are refused before anything is sampled."""

import pytest

from orchestrator.cli.sample import SamplingOptions, prepare_sampling
from orchestrator.errors import ConfigError
from orchestrator.run.run_folder import RunFolder


@pytest.mark.parametrize("out", ["/dev/null/grid.png", "folder.png"])
def test_out_that_cannot_be_written_is_refused_first(out, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match="cannot be written, because of .*; choose another file"):
        prepare_sampling(RunFolder(tmp_path / "no_run"), tmp_path / out, SamplingOptions())
