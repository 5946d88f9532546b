"""`python -m orchestrator` runs the command `ddm`."""

from orchestrator.cli.app import main

if __name__ == "__main__":
    main()
