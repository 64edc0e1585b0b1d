"""Uploads of the page: Gradio reads them into our folders.

Gradio would put them all into one folder, under the hash of their content, and keep the partial
file of an interrupted upload.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from gradio.route_utils import upload_fn
from gradio.routes import file_upload_statuses
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from step1x_edit.errors import EditCancelledError, ImageTooLargeError
from step1x_edit.interfaces.page.files import PageFiles
from step1x_edit.settings import MEBI

_DRAWN: Final = re.compile(r"(background|composite|layer_\d+)\.png")
"""The files that Gradio's editor uploads again after each stroke; events name only the last."""
_TOO_LONG: Final = "maximum allowed size"  # in the message of Gradio's reader


async def receive_upload(request: Request, files: PageFiles, max_bytes: int) -> Response:
    """Take the files of a form and answer with their paths, as the page's script expects."""
    upload_id = request.query_params.get("upload_id")
    length = int(request.headers.get("content-length", 2 * max_bytes))  # the guard's limit
    async with files.upload(length) as upload:
        try:
            paths, _, _ = await upload_fn(
                request,
                upload.folder,
                max_bytes,
                upload_id,
                upload_progress=file_upload_statuses if upload_id else None,
            )
        except MultiPartException as error:
            if _TOO_LONG in error.message:
                raise ImageTooLargeError(f"at most {max_bytes / MEBI:g} MB are allowed") from None
            raise HTTPException(400, "The form cannot be read.") from None
        except TypeError:  # a text instead of a file
            paths = []
        except ClientDisconnect:
            raise EditCancelledError from None
        if not paths:
            raise HTTPException(400, "Send one or more files, each in a field 'files'.")
        upload.is_passing = all(_DRAWN.fullmatch(Path(path).name) for path in paths)
    return JSONResponse(paths)
