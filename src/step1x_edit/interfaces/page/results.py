"""The results of an edit: files, thumbnails, the archive of a batch, and the lines about it.

Files are written as the service made them. Gradio's own reading and writing of pictures is not
used, because it would encode them again; the module does not import Gradio.
"""

from __future__ import annotations

import asyncio
import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from PIL import Image

from step1x_edit.errors import EditCancelledError, Step1XEditError
from step1x_edit.interfaces.page.lines import alert_of, caution, done_line
from step1x_edit.interfaces.page.progress import ProgressLine
from step1x_edit.interfaces.page.sessions import Asked, Result, Session, Thoughts
from step1x_edit.interfaces.page.texts import text
from step1x_edit.interfaces.rounds import split_verdict
from step1x_edit.model.request import Pixels
from step1x_edit.pictures.images import Picture
from step1x_edit.service.history import Step
from step1x_edit.service.service import EditedPicture

_PREVIEW_SIDE: Final = 512
_SHOWN_SIDE: Final = 1280


def save_result(
    session: Session,
    edited: EditedPicture,
    asked: Asked,
    before: str,
    line: str,
    language: str,
    step: Step | None,
) -> Result:
    """Write the result, both as it is and as it is shown."""
    return Result(
        asked,
        before,
        after=save_shown(session, edited.picture),
        file=session.save(result_name(Path(asked.source).name), edited.data),
        line=line,
        label=edited.metadata.prompt,
        thoughts=_save_thoughts(session, edited, language),
        step=step,
    )


def _save_thoughts(session: Session, edited: EditedPicture, language: str) -> Thoughts | None:
    reasoning = edited.metadata.reasoning
    if reasoning is None:
        return None
    pictures, verdicts = [], []
    for number, (each, small) in enumerate(zip(reasoning.rounds, edited.rounds, strict=False), 1):
        words = [text("round", language, number=number)]
        if each.score is not None:
            words.append(text("round.score", language, score=f"{each.score:g}"))
        if number == reasoning.best:
            words.append(text("round.best", language))
        caption = " · ".join(words)
        pictures.append((session.save("round.jpg", small), caption))
        if each.verdict is not None:
            verdicts.append(f"{caption}: {split_verdict(each.verdict).words}")
    return Thoughts(reasoning.prompt or "", pictures, "\n".join(verdicts))


# --- several pictures -----------------------------------------------------------------------------


class BatchResults:
    """The results and the problems of a batch."""

    def __init__(self, session: Session, language: str) -> None:
        self.problems: list[str] = []
        self._session = session
        self._language = language
        self._files: dict[str, str] = {}  # on disk, because they may be many and large
        self._shown: list[tuple[str, str]] = []

    async def add(self, edited: EditedPicture, name: str) -> list[tuple[str, str]]:
        """Write a result to the disk; returns the pictures of the gallery."""
        taken = _unused(result_name(name), self._files)

        def save() -> tuple[str, str]:
            shown = _thumbnail(edited.picture.pixels, _PREVIEW_SIDE, edited.picture.icc_profile)
            return self._session.save("shown.webp", shown), self._session.save(taken, edited.data)

        shown, self._files[taken] = await asyncio.to_thread(save)
        self._shown = [*self._shown, (shown, name)]
        return self._shown

    def add_problem(self, error: Step1XEditError, name: str) -> None:
        """Keep the line about a picture that could not be edited."""
        self.problems.append(alert_of(error, self._language, name))

    def line(self, total: int) -> str:
        """The line below a batch that ran to its end."""
        counts = {"successes": len(self._files), "total": total}
        return done_line(text("batch.done", self._language, **counts))

    async def pack(self) -> str | None:
        """Move the files into an archive, which is no larger than they are; None if none exist."""
        return await asyncio.to_thread(self._pack) if self._files else None

    def _pack(self) -> str:
        path = self._session.place("step1x-edit.zip")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, file in self._files.items():
                archive.write(file, name)
                Path(file).unlink()
        return str(path)


# --- lines ----------------------------------------------------------------------------------------


def line_of_result(
    edited: EditedPicture, progress: ProgressLine, language: str, step: Step | None
) -> str:
    """The line below a result, which may be a step of the history."""
    metadata, seconds = edited.metadata, f"{progress.seconds:.1f}"
    words = text("done", language, seconds=seconds, seed=metadata.seed)
    if metadata.changed_share is not None:
        share = f"{metadata.changed_share * 100:.1f}"
        words += " · " + text("changed", language, share=share)
    if step is not None:
        words += _drift_words(step.drift, language)
    line = done_line(words)
    if not progress.is_known:
        return line + caution(text("unknown_edit", language))
    return line if metadata.warning is None else line + caution(metadata.warning)


def line_of_step(step: Step, language: str) -> str:
    """The line below a step of the history."""
    words = text("step", language, seed=step.metadata.seed)
    return done_line(words + _drift_words(step.drift, language))


def _drift_words(drift: float | None, language: str) -> str:
    """The part of a line about the drift, if it is known."""
    return "" if drift is None else " · " + text("drift", language, levels=f"{drift:.1f}")


def line_of_failure(error: Step1XEditError, language: str) -> str:
    """The line below an edit that ended without a result."""
    if isinstance(error, EditCancelledError):
        return done_line(text("stopped", language))
    return alert_of(error, language)


# --- files ----------------------------------------------------------------------------------------


def save_shown(session: Session, picture: Picture) -> str:
    """Write a picture in a format and size that browsers show; returns its path."""
    shown = _thumbnail(picture.pixels, _SHOWN_SIDE, picture.icc_profile)
    return session.save("shown.webp", shown)


def save_preview(session: Session, preview: Pixels) -> str:
    """Write the preview of a running edit; returns its path."""
    return session.save("preview.webp", _thumbnail(preview, _PREVIEW_SIDE, None))


def _thumbnail(pixels: Pixels, side: int, icc_profile: bytes | None) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85, icc_profile=icc_profile)
    return buffer.getvalue()


def result_name(name: str) -> str:
    """The name of a result, from that of its picture."""
    stem = re.sub(r"[^\w-]+", "_", Path(name).stem)[:80].removesuffix("_edited")
    return f"{stem or 'picture'}_edited.png"


def _unused(name: str, taken: Mapping[str, object]) -> str:
    stem, number, free = name.removesuffix(".png"), 1, name
    while free in taken:
        number += 1
        free = f"{stem}_{number}.png"
    return free
