"""An editor takes a picture and returns an edited one, in this process or through a server.

`EditService` and `RemoteServer` are editors: their answers, bytes and error messages are the same.
An editor knows nothing about the caller's files.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from step1x_edit.channel import Progress

if TYPE_CHECKING:
    from step1x_edit.schemas.answers import EditMetadata
    from step1x_edit.schemas.requests import GeneratePictureRequest, PictureRequest

Reporter: TypeAlias = Callable[[Progress], Awaitable[None]]
"""Called in the caller's own task, at least every few seconds, with the progress of an edit."""


async def unreported(progress: Progress) -> None:
    """For callers that do not need progress."""


class EditedFile(Protocol):
    """A picture that was edited, or generated from a prompt alone."""

    @property
    def data(self) -> bytes:
        """The bytes of a file."""

    @property
    def metadata(self) -> EditMetadata:
        """How it was made."""


E_co = TypeVar("E_co", bound=EditedFile, covariant=True)


class Editor(Protocol[E_co]):
    """Edits pictures. Cancelling a call cancels the edit; `suffix` selects the output format.

    Parameters that a request leaves unset get the operator's defaults.
    """

    async def check_room(self) -> None:
        """Raise the error that an edit would be refused with now, before its picture is read."""

    async def loaded_model(self) -> str | None:
        """The name of the model; None while none is loaded."""

    async def edit_picture(
        self,
        data: bytes,
        request: PictureRequest,
        report: Reporter,
        suffix: str = ".png",
        mask: bytes | None = None,
    ) -> E_co:
        """Edit a picture; `mask` is a picture of the region that may change."""

    async def edit_next(
        self,
        data: bytes,
        request: PictureRequest,
        report: Reporter,
        suffix: str = ".png",
        mask: bytes | None = None,
    ) -> E_co:
        """Edit a picture of a batch that `check_room` has admitted, which has room for each."""

    async def generate_picture(
        self, request: GeneratePictureRequest, report: Reporter, suffix: str = ".png"
    ) -> E_co:
        """Generate a picture from a prompt alone."""
