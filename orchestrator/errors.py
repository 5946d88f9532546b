"""What can go wrong above the rooms, and what to catch.

OrchestratorError
├── ConfigError        the configuration is wrong; nothing has run
├── RunFolderError     the folder is not a run, or it lacks what was asked for
├── RunIsLocked        another controller walks this run
└── RunFailed          at least one stage failed for good; the others are finished and kept
"""


class OrchestratorError(Exception):
    """Anything the command line answers with one message and exit code 1."""


class ConfigError(OrchestratorError):
    """The configuration is wrong; the message lists every mistake."""


class RunFolderError(OrchestratorError):
    """A folder is not a run, or it lacks what was asked for."""


class RunIsLocked(OrchestratorError):
    """Another controller walks this run."""


class RunFailed(OrchestratorError):
    """At least one stage failed for good; what had finished is kept."""
