"""Every failure that a caller can receive, as one tree.

    Step1XEditError
    ├── InvalidParameterError         invalid_parameter     Invalid parameter: …
    ├── ImageFileNotFoundError        file_not_found        Image file not found: …
    ├── PathNotAllowedError           path_not_allowed      Path not allowed: …
    ├── ImageError
    │   ├── UnsupportedImageError     unsupported_image     Unsupported image format: …
    │   ├── CorruptImageError         corrupt_image         Cannot read image: …
    │   ├── ImageTooLargeError        image_too_large       Image too large: …
    │   ├── ImageTooSmallError        image_too_small       Image too small: …
    │   ├── ImageAspectError          image_aspect          Image too elongated: …
    │   └── NoRecipeError             no_recipe             No recipe: …
    ├── OutputError
    │   ├── OutputExistsError         output_exists         Output already exists: …
    │   └── OutputNotWritableError    output_not_writable   Cannot write output: …
    │       └── NoSpaceError          no_space              Cannot write output: …
    ├── ServerBusyError               queue_full            Server busy: …
    ├── RateLimitedError              rate_limited          Too many requests: …
    ├── ShuttingDownError             shutting_down         Server shutting down
    ├── OutOfMemoryError              out_of_memory         CUDA out of memory: …
    ├── ModelUnavailableError         model_unavailable     Manager not initialized: …
    │   └── CheckpointError           model_unavailable     Manager not initialized: …
    │       └── ModelFetchError       model_unavailable     Cannot get model: …
    ├── ModelNotFoundError            model_not_found       Model not found: …
    ├── IdempotencyKeyError           idempotency_key       Idempotency-Key in use: …
    ├── EditCancelledError            cancelled             Cancelled
    ├── DeadlineExceededError         deadline_exceeded     Deadline exceeded: …
    ├── SettingsError                 invalid_settings      Invalid settings: …
    ├── WorkerLostError               worker_lost           Worker process lost: …
    ├── JobError
    │   ├── JobNotFoundError          not_found             Job not found: …
    │   ├── JobConflictError          job_conflict          Not possible now: …
    │   └── JobInterruptedError       interrupted           Job interrupted: …
    └── InternalError                 internal              Internal error: …

`str(error)` is the whole sentence for the user: one line of limited length that begins as the
tree shows. This module knows nothing about protocols; each interface maps `code` to its own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import ClassVar

_MEMORY_ADDRESS = re.compile(r"0x[0-9a-fA-F]{8,}")
_ERROR_NUMBER = re.compile(r"\[(Errno|WinError) -?\d+\] ")  # a text follows each number


class Step1XEditError(Exception):
    """The root: a failure that can be reported to the caller in one sentence.

    `detail` follows the beginning of the class. A detail that already starts with this beginning
    is the whole sentence, so that an error can be rebuilt from its text on another machine.
    """

    code: ClassVar[str] = "internal"
    beginning: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False
    """Whether the same call may succeed later."""
    max_length: ClassVar[int] = 500

    def __init__(self, detail: str = "", *, retry_after_s: float | None = None) -> None:
        if detail.startswith(self.beginning):
            sentence = detail
        else:
            sentence = f"{self.beginning}: {detail}" if detail else self.beginning
        super().__init__(_one_line(sentence, self.max_length))
        self.retry_after_s = retry_after_s


class InvalidParameterError(Step1XEditError):
    """A parameter is unknown, missing, of the wrong kind or out of range.

    `param` is its name, if one parameter is the cause, for interfaces that report it separately.
    """

    code = "invalid_parameter"
    beginning = "Invalid parameter"

    def __init__(
        self,
        detail: str = "",
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        fields: Iterable[tuple[str, str]] = (),
    ) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
        self.param = param
        self.fields = tuple(
            (_one_line(name, self.max_length), _one_line(message, self.max_length))
            for name, message in fields
        )
        """Each invalid parameter and what is wrong with it, if known."""


class ImageFileNotFoundError(Step1XEditError):
    """There is no readable regular file at the given path."""

    code = "file_not_found"
    beginning = "Image file not found"


class PathNotAllowedError(Step1XEditError):
    """The path leads outside the allowed folders, or to something that is not a plain file."""

    code = "path_not_allowed"
    beginning = "Path not allowed"


class ImageError(Step1XEditError):
    """The file exists, but its picture cannot be edited."""

    code = "corrupt_image"
    beginning = "Cannot read image"


class UnsupportedImageError(ImageError):
    """The content has none of the supported formats."""

    code = "unsupported_image"
    beginning = "Unsupported image format"


class CorruptImageError(ImageError):
    """The content is damaged or truncated."""

    code = "corrupt_image"
    beginning = "Cannot read image"


class ImageTooLargeError(ImageError):
    """The file or its picture exceeds the configured limits."""

    code = "image_too_large"
    beginning = "Image too large"


class ImageTooSmallError(ImageError):
    """The picture has too few pixels to be edited."""

    code = "image_too_small"
    beginning = "Image too small"


class ImageAspectError(ImageError):
    """One side is so much longer that the other would have no pixels left."""

    code = "image_aspect"
    beginning = "Image too elongated"


class NoRecipeError(ImageError):
    """The file does not say how its picture was made."""

    code = "no_recipe"
    beginning = "No recipe"


class OutputError(Step1XEditError):
    """The result cannot be saved to the requested path."""

    code = "output_not_writable"
    beginning = "Cannot write output"


class OutputExistsError(OutputError):
    """The output exists and overwriting was not requested, or it is an input."""

    code = "output_exists"
    beginning = "Output already exists"


class OutputNotWritableError(OutputError):
    """The folder or the file system refuses the output."""

    retryable = True


class NoSpaceError(OutputNotWritableError):
    """The disk or the quota is full."""

    code = "no_space"


class ServerBusyError(Step1XEditError):
    """The queue is full; `retry_after_s` says when to try again."""

    code = "queue_full"
    beginning = "Server busy"
    retryable = True


class RateLimitedError(Step1XEditError):
    """A client has exceeded its rate; `retry_after_s` says when to try again."""

    code = "rate_limited"
    beginning = "Too many requests"
    retryable = True


class ShuttingDownError(Step1XEditError):
    """The server is stopping and accepts no more work."""

    code = "shutting_down"
    beginning = "Server shutting down"
    retryable = True


class OutOfMemoryError(Step1XEditError):
    """The edit does not fit; a smaller `size_level` may."""

    code = "out_of_memory"
    beginning = "CUDA out of memory"


class ModelUnavailableError(Step1XEditError):
    """No model is available: there is nothing usable to load, or the engine is down."""

    code = "model_unavailable"
    beginning = "Manager not initialized"
    retryable = True


class CheckpointError(ModelUnavailableError):
    """The checkpoint is missing, damaged or of an unknown kind; retrying does not help."""

    retryable = False


class ModelFetchError(CheckpointError):
    """A published model could not be fetched; the sentence says what to change."""

    beginning = "Cannot get model"


class ModelNotFoundError(Step1XEditError):
    """The requested name is not that of the model in use."""

    code = "model_not_found"
    beginning = "Model not found"


class IdempotencyKeyError(Step1XEditError):
    """The key of a request was used with another request."""

    code = "idempotency_key"
    beginning = "Idempotency-Key in use"


class EditCancelledError(Step1XEditError):
    """The caller cancelled the edit."""

    code = "cancelled"
    beginning = "Cancelled"
    retryable = True


class DeadlineExceededError(Step1XEditError):
    """The edit took longer than its time limit."""

    code = "deadline_exceeded"
    beginning = "Deadline exceeded"
    retryable = True


class SettingsError(Step1XEditError):
    """The configuration does not allow a start; the sentence lists all problems."""

    code = "invalid_settings"
    beginning = "Invalid settings"
    max_length = 5000  # the operator wants to see all problems at once


class WorkerLostError(Step1XEditError):
    """The process that owns the model died or hung; the next edit starts a new one."""

    code = "worker_lost"
    beginning = "Worker process lost"
    retryable = True


class JobError(Step1XEditError):
    """A stored job or a pull does not exist, or does not allow this operation."""

    code = "job_conflict"
    beginning = "Not possible now"


class JobNotFoundError(JobError):
    """There is no job with this id, or it no longer exists."""

    code = "not_found"
    beginning = "Job not found"


class JobConflictError(JobError):
    """The state of the job does not allow this; in another state it may."""

    retryable = True


class JobInterruptedError(JobError):
    """The server ended while the job was running; a new request may succeed."""

    code = "interrupted"
    beginning = "Job interrupted"
    retryable = True


class InternalError(Step1XEditError):
    """A bug in this program."""


@contextlib.contextmanager
def about_the_mask() -> Iterator[None]:
    """Make errors about a picture say that they are about the mask."""
    try:
        yield
    except ImageError as error:
        detail = str(error).removeprefix(f"{error.beginning}: ")
        raise type(error)(f"mask: {detail}") from None


def rebuild(code: str, sentence: str) -> Step1XEditError:
    """The error that another process reported by its code and its sentence."""
    return _by_code(Step1XEditError).get(code, InternalError)(sentence)


def _by_code(root: type[Step1XEditError]) -> dict[str, type[Step1XEditError]]:
    """The kinds of error below `root`; if several share a code, the most general one."""
    found: dict[str, type[Step1XEditError]] = {}
    for kind in root.__subclasses__():
        found = {**_by_code(kind), kind.code: kind, **found}
    return found


def _one_line(text: str, max_length: int) -> str:
    """Make `text` safe to print: one line, printable, without error numbers, of limited length."""
    text = _ERROR_NUMBER.sub("", _MEMORY_ADDRESS.sub("0x…", text))
    text = "".join(map(_printable, text)).strip()
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")
