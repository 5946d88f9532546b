"""`python -m orchestrator.cli.trial_process FOLDER`: `ddm resume FOLDER` that ends with its sweep.

What it leaves is what any killed controller leaves, and the next one goes on from there.
"""

import sys

from orchestrator.cli.app import main
from orchestrator.run.die_with_parent import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    sys.argv[1:1] = ["resume"]
    main()
