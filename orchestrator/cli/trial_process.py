"""`python -m orchestrator.cli.trial_process FOLDER`: run `ddm resume FOLDER` as a child that ends with its sweep.

A killed trial leaves the state of any killed controller, and the next controller resumes from it.
"""

import sys

from orchestrator.cli.app import main
from orchestrator.run.die_with_parent import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    sys.argv[1:1] = ["resume"]
    main()
