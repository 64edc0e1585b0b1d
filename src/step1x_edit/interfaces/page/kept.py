"""The steps of the history as the page shows them: they survive a reload and a restart.

The history has one owner, so every visitor sees all of it; `settings` refuses a server where that
could be a surprise. Pictures are copied into the visitor's own files, as results are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from step1x_edit.errors import CorruptImageError
from step1x_edit.interfaces.page.results import line_of_step, result_name, save_shown
from step1x_edit.interfaces.page.sessions import Asked, Result, Session
from step1x_edit.interfaces.page.texts import text
from step1x_edit.pictures.images import Picture, decode
from step1x_edit.pictures.regions import grown
from step1x_edit.service.history import History, NewStep, Step
from step1x_edit.service.service import EditedPicture
from step1x_edit.settings import Limits

SOURCE: Final = "source"
ORIGINAL: Final = "original"

_NEWEST: Final = 24
_LABEL: Final = 60  # characters


class Kept:
    """The history for the tabs of the page."""

    def __init__(self, history: History, limits: Limits) -> None:
        self._history = history
        self._limits = limits

    def keep(self, asked: Asked, data: bytes, edited: EditedPicture) -> Step | None:
        """Add an edit of the page; None if it cannot be kept."""
        name = Path(asked.source).name
        return self._history.keep(
            NewStep(name, data, asked.mask, edited.data, ".png", edited.metadata)
        )

    def previews(self, session: Session) -> list[tuple[Step, str]]:
        """The newest steps, the newest first, and the path of a small picture of each."""
        found = []
        for step in self._history.steps()[: -_NEWEST - 1 : -1]:
            if step.preview not in session.previews:
                try:
                    path = self.save(session, step.preview, "step.jpg")
                except CorruptImageError:
                    continue
                session.previews[step.preview] = path
            found.append((step, session.previews[step.preview]))
        return found

    def result(self, session: Session, step: Step, language: str) -> Result:
        """A step as the result of an edit that has just ended."""
        data = self._history.read(step.result)
        file = session.save(Path(result_name(step.name)).stem + step.suffix, data)
        after = save_shown(session, decode(data, self._limits))
        source, before = "", after  # a generated picture
        if step.source is not None:
            source = self.save(session, step.source, step.name)
            before = save_shown(session, self._before(step, step.source))
        return Result(
            Asked(source, step.arguments, self._mask(step)),
            before,
            after,
            file,
            line=line_of_step(step, language),
            label=step.metadata.prompt,
            thoughts=None,
            step=step,
        )

    def parent(self, step: Step) -> Step | None:
        """The step whose result was edited; None if that was the original."""
        return None if step.parent is None else self._history.find(step.parent)

    def delete(self, step: Step) -> int:
        """Delete a step and all that were made from it; returns how many."""
        return self._history.delete(step)

    def delete_all(self) -> int:
        """Delete the whole history; returns how many steps it had."""
        return self._history.delete_all()

    def save(self, session: Session, digest: str, name: str) -> str:
        """Copy a picture to a file of a visitor; returns its path."""
        return session.save(name, self._history.read(digest))

    def save_shown(self, session: Session, digest: str) -> str:
        """The same in a format and size that browsers show."""
        return save_shown(session, decode(self._history.read(digest), self._limits))

    def from_original(self, session: Session, step: Step) -> Asked:
        """The one edit of the original in place of all that lead to this step."""
        again = self._history.from_original(step)
        return Asked(session.save(step.name, again.image), again.arguments, again.mask)

    def against(self, step: Step, choice: str) -> str:
        """The SHA-256 of the picture that a choice of `choices` means."""
        return step.original if choice == ORIGINAL else self._history.find(choice).result

    def drift(self, before: str, step: Step) -> float | None:
        """How much the rest of a step's picture differs from another."""
        return self._history.drift(before, step.result)

    def _before(self, step: Step, source: str) -> Picture:
        """The picture that was edited, on the canvas of the result."""
        picture = decode(self._history.read(source), self._limits)
        outpaint = step.arguments["outpaint"]
        return grown(picture, None, outpaint, self._limits).before if outpaint else picture

    def _mask(self, step: Step) -> bytes | None:
        return None if step.mask is None else self._history.read(step.mask)


def choices(step: Step, others: Sequence[Step], language: str) -> list[tuple[str, str]]:
    """What a step can be compared with, as labels and values."""
    named = [(text(f"against.{value}", language), value) for value in (SOURCE, ORIGINAL)]
    for other in others:
        if other.id != step.id:
            named.append((f"{other.metadata.prompt[:_LABEL]} · {other.id[:4]}", other.id))
    return named
