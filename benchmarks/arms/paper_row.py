"""One row of docs/papers.md."""

from dataclasses import dataclass

YES, NO = "yes", "**no**"


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One paper's claim, and our measurement of it."""

    paper: str
    says: str
    file: str
    command: str
    criterion: str
    ours: str
    theirs: str
    differs: str
    holds: bool

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        values = (self.paper, self.says, self.file, self.command, self.criterion, self.ours, self.theirs, self.differs)
        return (*values, YES if self.holds else NO)
