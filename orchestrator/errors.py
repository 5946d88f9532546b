"""Errors of the orchestrator, and the exceptions to catch.

DDMError (ddm_core/errors.py)
└── OrchestratorError
    ├── ConfigError        the configuration is wrong; nothing has run
    ├── RunFolderError     the folder is not a run, or it lacks the requested content
    ├── UntrustedFolder    a command would act on settings that this user did not write
    ├── RunIsLocked        another controller runs this run
    ├── LeaseLost          another controller has taken over this run
    ├── IslandError        an island rejects a request, or differs from its configuration
    │   └── Unreachable    an island does not respond; the state of its jobs is unknown
    ├── StorageError       a storage rejects a request or lacks the requested data (islands/storage/errors.py)
    │   ├── StorageUnreachable   a storage does not respond
    │   └── CorruptTransfer      received data differs from sent data
    ├── BudgetReached      the run has cost what it may cost; it can continue with more
    └── RunFailed          at least one stage failed permanently; the others are finished and kept
"""

from ddm_core.errors import DDMError

PAGE = "docs/guides/errors.md"
"""The page of the documentation that has a section on every class of errors."""


class OrchestratorError(DDMError):
    """Any error that the command line reports as one message with exit code 1."""


class ConfigError(OrchestratorError):
    """The configuration is wrong; the message lists every mistake."""


class RunFolderError(OrchestratorError):
    """A folder is not a run, or it lacks the requested content."""


class UntrustedFolder(OrchestratorError):
    """A command would act on compute settings that this user did not write on this machine."""


class RunIsLocked(OrchestratorError):
    """Another controller holds the lease of this run."""


class LeaseLost(OrchestratorError):
    """Another controller has taken over this run; this one must not write any more."""


class IslandError(OrchestratorError):
    """An island rejects a request, or differs from its configuration; a retry does not help."""


class Unreachable(IslandError):
    """An island does not respond; the state of its jobs is unknown."""


class BudgetReached(OrchestratorError):
    """The run has cost as much as `compute.budget_cost` or `compute.budget_hours` allow; its work is kept."""


class RunFailed(OrchestratorError):
    """At least one stage failed permanently; finished stages are kept."""
