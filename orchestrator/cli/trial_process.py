"""`python -m orchestrator.cli.trial_process FOLDER`: run `ddm resume FOLDER` as a child that ends with its sweep.

A killed trial leaves the state of any killed controller, and the next controller resumes from it.
"""

import sys

from ddm_core.die_with_parent import die_with_parent
from orchestrator.cli.app import main

if __name__ == "__main__":
    die_with_parent()
    sys.argv[1:1] = ["resume"]
    main()
