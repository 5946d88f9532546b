"""What images are asked for: a class and a caption a row, as words that anyone can read, before they are encoded."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from ddm_core.errors import DDMError
from experts.conditions.condition import NULL_CLASS


class PromptError(DDMError, ValueError):
    """A model cannot be asked for this."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """One request a row."""

    class_ids: tuple[int, ...]
    """-1 for none."""
    captions: tuple[str, ...]
    """Empty for none."""

    def __post_init__(self) -> None:
        """Raise `ValueError` unless every row has a class and a caption."""
        if len(self.class_ids) != len(self.captions):
            raise ValueError(f"{len(self.class_ids)} classes do not pair with {len(self.captions)} captions")

    @classmethod
    def of_classes(cls, class_ids: Sequence[int]) -> "Prompts":
        """Return requests without captions."""
        return cls(tuple(class_ids), ("",) * len(class_ids))

    @classmethod
    def of_captions(cls, captions: Sequence[str], class_id: int = NULL_CLASS) -> "Prompts":
        """Return requests of one class."""
        return cls((class_id,) * len(captions), tuple(captions))

    def select(self, keep: Bool[np.ndarray, " row"]) -> "Prompts":
        """Return the rows where `keep` is true."""
        rows = np.flatnonzero(keep).tolist()
        return Prompts(tuple(self.class_ids[row] for row in rows), tuple(self.captions[row] for row in rows))

    def for_classes(self, num_classes: int) -> "Prompts":
        """Return the prompts that experts of so many classes can follow: without classes the captions alone."""
        return self if num_classes else Prompts.of_captions(self.captions)

    def rows(self, rows: slice) -> "Prompts":
        """Return these rows."""
        return Prompts(self.class_ids[rows], self.captions[rows])

    def by_text(self) -> "Prompts":
        """Return the same requests without the class where there is a caption."""
        class_ids = [NULL_CLASS if caption else k for k, caption in zip(self.class_ids, self.captions, strict=True)]
        return Prompts(tuple(class_ids), self.captions)

    def __len__(self) -> int:
        return len(self.class_ids)


def find_class(label: str, class_names: Sequence[str]) -> int:
    """Return the id of a class, given by its name or its number; raise `PromptError` for any other label."""
    if label in class_names:
        return list(class_names).index(label)
    if label.isdigit() and int(label) < len(class_names):
        return int(label)
    if not class_names:
        raise PromptError(f"{label!r} is not a class: these experts were trained without labels; leave it out")
    close = {name.lower(): name for name in class_names}
    guesses = difflib.get_close_matches(label.lower(), close, n=1)
    guess = f"; did you mean {close[guesses[0]]!r}?" if guesses else ""
    known = ", ".join(f"{number} {name}" for number, name in enumerate(class_names))
    raise PromptError(f"{label!r} is not a class{guess or ';'} known: {known}")
