"""The rounds of a reflection in readable form: verdicts without their tags."""

from __future__ import annotations

from typing import NamedTuple

from step1x_edit.model.reasoning import THINK, VERDICT_TAGS


class VerdictText(NamedTuple):
    """The parts of a verdict's text."""

    kind: str
    """success, others, failed or reflection; empty if the text names none."""
    thought: str
    next: str
    """What to change in the picture next."""

    @property
    def words(self) -> str:
        """The thought, and the change that follows from it."""
        return f"{self.thought} → {self.next}" if self.next else self.thought


def split_verdict(text: str) -> VerdictText:
    """Split "<#Think> a thought <#Reflection> what to change next"."""
    tag = next((tag for tag in VERDICT_TAGS if tag in text), "")
    thought, after = text, ""
    if tag:
        thought, _, after = text.partition(tag)
    return VerdictText(
        tag[2:-1].lower(), thought.strip().removeprefix(THINK).strip(), after.strip()
    )
