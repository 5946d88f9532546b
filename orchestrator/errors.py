"""What can go wrong above the rooms, and what to catch.

OrchestratorError
├── ConfigError        the configuration is wrong; nothing has run
├── RunFolderError     the folder is not a run, or it lacks what was asked for
├── RunIsLocked        another controller walks this run
├── IslandError        an island refuses us, or is not what the configuration says
│   └── Unreachable    an island does not answer, which says nothing about the jobs on it
├── StorageError       a storage refuses us or lacks what was asked for (islands/storage_errors.py)
│   ├── StorageUnreachable   a storage does not answer
│   └── CorruptTransfer      what came is not what was sent
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


class IslandError(OrchestratorError):
    """An island refuses us, or is not what the configuration says; trying again does not help."""


class Unreachable(IslandError):
    """An island does not answer, which says nothing about the jobs on it."""


class RunFailed(OrchestratorError):
    """At least one stage failed for good; what had finished is kept."""
