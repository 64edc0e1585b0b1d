"""An editor takes one picture and gives one back, in this process or through a server.

`EditService` is an editor, and so is `RemoteServer`: the answers, the bytes and the sentences of
errors are the same. An editor knows nothing about the caller's files.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from step1x_edit.channel import Progress

if TYPE_CHECKING:
    from step1x_edit.schemas.answers import EditMetadata
    from step1x_edit.schemas.requests import GeneratePictureRequest, PictureRequest

Notify: TypeAlias = Callable[[Progress], Awaitable[None]]
"""Called in the caller's own task, at least every few seconds, with how far an edit has come."""


async def unreported(progress: Progress) -> None:
    """For callers who do not want to know how far an edit has come."""


class EditedFile(Protocol):
    """A picture that was edited, or made from words alone."""

    @property
    def data(self) -> bytes:
        """The bytes of a file."""

    @property
    def metadata(self) -> EditMetadata:
        """How it was made."""


E_co = TypeVar("E_co", bound=EditedFile, covariant=True)


class Editor(Protocol[E_co]):
    """Edits pictures. Cancelling a call stops the work; `suffix` chooses the format of the result.

    Parameters that a request leaves open get the defaults of the editor's operator.
    """

    async def check_room(self) -> None:
        """Raise what an edit would be refused for now, before its picture is read."""

    async def edit_picture(
        self,
        data: bytes,
        request: PictureRequest,
        report: Notify,
        suffix: str = ".png",
        mask: bytes | None = None,
    ) -> E_co:
        """Edit a picture; `mask` is a picture of what may change."""

    async def edit_next(
        self,
        data: bytes,
        request: PictureRequest,
        report: Notify,
        suffix: str = ".png",
        mask: bytes | None = None,
    ) -> E_co:
        """Edit a picture of a batch that `check_room` has let in: there is room for each of it."""

    async def generate_picture(
        self, request: GeneratePictureRequest, report: Notify, suffix: str = ".png"
    ) -> E_co:
        """Make a picture from words alone."""
