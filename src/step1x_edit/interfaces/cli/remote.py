"""A running server as the command line uses it: the REST routes, with pictures sent both ways.

An edit is a stored job, because a job reports progress and can be cancelled. The job is created,
followed until it ends, downloaded and deleted, even if it fails or the caller cancels.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import BaseModel, ValidationError

from step1x_edit.channel import Phase, Progress
from step1x_edit.errors import (
    InternalError,
    InvalidParameterError,
    ModelUnavailableError,
    SettingsError,
    Step1XEditError,
    rebuild,
)
from step1x_edit.interfaces import hosts
from step1x_edit.pictures import images
from step1x_edit.pictures.manifests import carries_manifest
from step1x_edit.pictures.result_files import ResultFile, ResultFiles
from step1x_edit.schemas.answers import (
    EditMetadata,
    GpuAnswer,
    JobAnswer,
    JobEventAnswer,
    JobState,
    StatusAnswer,
)
from step1x_edit.schemas.requests import (
    GeneratePictureRequest,
    PictureRequest,
    given_in,
)
from step1x_edit.service.editor import Reporter
from step1x_edit.service.source import size_of_result
from step1x_edit.settings import Settings
from step1x_edit.waiting import drop, first_of

_Answer = TypeVar("_Answer", bound=BaseModel)

_JOBS: Final = "/v1/jobs"
_MCP: Final = "/mcp"  # the path in a server's note
_CONNECT_S: Final = 10.0
_SILENCE_S: Final = 120.0  # events arrive at least every 15 s; reading an upload may take longer
_LATE_ANSWER_S: Final = 5.0  # after Ctrl-C, for the id of a job that the server may have created
_MAX_ANSWER: Final = 4 * 1024 * 1024  # bytes, for all answers without a picture


_UNSIGNED: Final = (
    "the server's signature is lost in this format; save it as .png, or set C2PA_CERT here too"
)


@dataclass(frozen=True)
class RemotePicture:
    """The bytes of a picture that a server has edited or made, and its metadata."""

    data: bytes
    metadata: EditMetadata


class RemoteServer:
    """The editor at a URL; `token` is its API key, if it requires one."""

    def __init__(self, url: str, token: str | None, settings: Settings) -> None:
        self._url = _root(url)
        self._token = token
        self._limits = settings.limits
        self._settings = settings

    @property
    def url(self) -> str:
        """The URL of the server."""
        return self._url

    async def check_room(self) -> None:
        """Raise an error if the server cannot be used, before pictures are sent."""
        async with self._client() as client:
            await self._ask(client, "GET", _JOBS, params={"limit": 1})

    async def edit_picture(
        self,
        data: bytes,
        request: PictureRequest,
        report: Reporter,
        suffix: str = ".png",
        mask: bytes | None = None,
    ) -> RemotePicture:
        """Edit a picture; cancelling the call cancels the job."""
        if suffix != ".png":  # a job's result is a PNG: check now that it can be converted
            await asyncio.to_thread(self._check_encodable, data, request, suffix)
        files = {"file": ("picture", data)}
        if mask is not None:
            files["mask"] = ("mask", mask)
        fields = {
            name: json.dumps(value) if isinstance(value, list) else str(value)
            for name, value in given_in(request, PictureRequest).items()
        }
        return await self._done({"files": files, "data": fields}, report, suffix, data)

    edit_next = edit_picture  # each edit is a stored job, which the server keeps until its turn

    async def generate_picture(
        self, request: GeneratePictureRequest, report: Reporter, suffix: str = ".png"
    ) -> RemotePicture:
        """Generate a picture from text; cancelling the call cancels the job."""
        body = {"json": given_in(request, GeneratePictureRequest)}
        return await self._done(body, report, suffix, None)

    async def _done(
        self, body: Mapping[str, Any], report: Reporter, suffix: str, original: bytes | None
    ) -> RemotePicture:
        """The result of a job with this body, in the format of the suffix.

        If this process has a certificate, it signs what the server has not signed.
        """
        files = await asyncio.to_thread(lambda: self._files)  # before the work: it may be refused
        async with self._client() as client:
            job = await self._created(client, body)
            try:
                ended = await self._followed(client, job, report)
                if ended.status is not JobState.SUCCEEDED or ended.metadata is None:
                    raise rebuild(ended.code or "", ended.error or "")
                content = f"{_JOBS}/{job.id}/content"
                answer = await self._ask(client, "GET", content, max_bytes=self._max_picture)
                png = answer.content
            finally:
                await self._forget(client, job.id)
        if suffix == ".png" and (carries_manifest(png) or not files.are_signed):
            return RemotePicture(png, ended.metadata)
        await report(Progress(Phase.SAVING))
        file = await asyncio.to_thread(self._converted, png, suffix, original)
        return RemotePicture(file.data, ended.metadata.with_warning(file.warning))

    async def status(self) -> StatusAnswer:
        """The location of its model."""
        return await self._gpu(StatusAnswer, "GET", "status")

    async def loaded_model(self) -> str | None:
        """The name of its model; None while none is loaded."""
        return (await self.status()).gpu_status.model

    async def offload(self) -> GpuAnswer:
        """Move its model to host memory, after the running edit."""
        return await self._gpu(GpuAnswer, "POST", "offload")

    async def release(self) -> GpuAnswer:
        """Unload its model, after the running edit."""
        return await self._gpu(GpuAnswer, "POST", "release")

    async def _gpu(self, kind: type[_Answer], method: str, name: str) -> _Answer:
        async with self._client() as client:
            # A move waits for the running edit, however long that takes.
            patience = httpx2.Timeout(_CONNECT_S, read=None)
            answer = await self._ask(client, method, f"/api/gpu/{name}", timeout=patience)
        return self._read(kind, answer)

    # --- a job ---

    async def _created(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> JobAnswer:
        """Create a job; cancelling the call deletes it, even if its answer is still on the way."""
        creating = asyncio.ensure_future(self._sent(client, body))
        try:
            return await asyncio.shield(creating)
        except asyncio.CancelledError:
            await first_of(creating, timeout_s=_LATE_ANSWER_S)
            drop(creating)
            if creating.done() and not creating.cancelled() and creating.exception() is None:
                await self._forget(client, creating.result().id)
            raise

    async def _sent(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> JobAnswer:
        async with self._reporting_silence():
            try:
                answer = await self._bounded(client, "POST", _JOBS, _MAX_ANSWER, **body)
            except (httpx2.ReadError, httpx2.WriteError):  # refused before the body was read
                raise ModelUnavailableError(
                    f"the server at {self._url} did not accept the picture; it may be larger than "
                    "the server's MAX_UPLOAD_MB allows"
                ) from None
            await self._check(answer)
        return self._read(JobAnswer, answer)

    async def _followed(
        self, client: httpx2.AsyncClient, job: JobAnswer, report: Reporter
    ) -> JobAnswer:
        """Receive the events of a job until it ends; an interrupted stream is resumed."""
        path, last = f"{_JOBS}/{job.id}", "0"
        if job.position is not None:
            await report(Progress(Phase.QUEUED, job.position, warning=job.warning))
        while not job.status.is_final:
            headers = {"Last-Event-ID": last}
            async with (
                self._reporting_silence(),
                client.stream("GET", f"{path}/events", headers=headers) as stream,
            ):
                if not stream.is_success:
                    await self._check(await self._whole(stream, _MAX_ANSWER))
                async for line in self._lines(stream):
                    name, _, value = line.partition(": ")
                    if name == "id":
                        last = value
                    elif name == "data":
                        await _report(value, report)
            job = self._read(JobAnswer, await self._ask(client, "GET", path))
        return job

    async def _forget(self, client: httpx2.AsyncClient, job_id: str) -> None:
        """Cancel a job if it has not ended, and delete it."""
        with contextlib.suppress(Step1XEditError):  # the server deletes old jobs itself
            await self._ask(client, "POST", f"{_JOBS}/{job_id}/cancel")
            await self._ask(client, "DELETE", f"{_JOBS}/{job_id}")

    def _check_encodable(self, data: bytes, request: PictureRequest, suffix: str) -> None:
        picture = images.decode(data, self._limits)
        images.check_encodable(*size_of_result(request, picture.width, picture.height), suffix)

    @cached_property
    def _files(self) -> ResultFiles:
        """Made once for all pictures: a certificate is read, and tried by signing."""
        return ResultFiles(self._settings)

    def _converted(self, png: bytes, suffix: str, original: bytes | None) -> ResultFile:
        """The same picture as the server would have written it in this format."""
        picture, record = images.decode(png, self._limits), images.read_record(png)
        if record is None:
            raise self._other_version()
        file = self._files.write(picture, suffix, record, original)
        if carries_manifest(png) and not carries_manifest(file.data):
            return ResultFile(file.data, "; ".join(filter(None, (file.warning, _UNSIGNED))))
        return file

    # --- requests ---

    def _client(self) -> httpx2.AsyncClient:
        headers = {"Accept-Encoding": "identity"}  # a compressed answer could expand to any length
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        return httpx2.AsyncClient(
            base_url=self._url,
            headers=headers,
            timeout=httpx2.Timeout(_SILENCE_S, connect=_CONNECT_S),
            # Servers on this machine are reached without the configured proxy.
            trust_env=urlsplit(self._url).hostname not in hosts.LOOPBACK,
        )

    async def _ask(
        self,
        client: httpx2.AsyncClient,
        method: str,
        path: str,
        max_bytes: int = _MAX_ANSWER,
        **options: Any,
    ) -> httpx2.Response:
        async with self._reporting_silence():
            answer = await self._bounded(client, method, path, max_bytes, **options)
            await self._check(answer)
        return answer

    async def _bounded(
        self, client: httpx2.AsyncClient, method: str, path: str, max_bytes: int, **options: Any
    ) -> httpx2.Response:
        """Send a request and read the answer, whose body may have at most `max_bytes`."""
        async with client.stream(method, path, **options) as answer:
            return await self._whole(answer, max_bytes)

    async def _whole(self, answer: httpx2.Response, max_bytes: int) -> httpx2.Response:
        content = bytearray()
        async for part in answer.aiter_raw():  # decompressed, a few bytes could have any length
            content += part
            if len(content) > max_bytes:
                raise self._without_end()
        headers = httpx2.Headers(answer.headers)
        headers.pop("Content-Encoding", None)
        return httpx2.Response(answer.status_code, headers=headers, content=bytes(content))

    async def _lines(self, stream: httpx2.Response) -> AsyncIterator[str]:
        """The lines of a stream of events, each of limited length."""
        rest = b""
        async for part in stream.aiter_raw():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield line.decode("utf-8", "replace").rstrip("\r")
            if len(rest) > _MAX_ANSWER:
                raise self._without_end()

    def _without_end(self) -> ModelUnavailableError:
        return ModelUnavailableError(
            f"the server at {self._url} sends a longer answer than step1x-edit ever does"
        )

    @property
    def _max_picture(self) -> int:
        """The largest PNG of a picture of the maximum size, including its metadata."""
        return 4 * self._limits.max_pixels + self._limits.max_bytes + _MAX_ANSWER

    @contextlib.asynccontextmanager
    async def _reporting_silence(self) -> AsyncIterator[None]:
        """Report in one sentence that the server does not answer."""
        try:
            yield
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            reason = str(error) or type(error).__name__
            raise ModelUnavailableError(
                f"the server at {self._url} does not answer ({reason})"
            ) from None

    async def _check(self, answer: httpx2.Response) -> None:
        """Raise the error that an answer reports."""
        if answer.is_success:
            return
        code, detail = _problem(answer)
        if answer.status_code == httpx2.codes.UNAUTHORIZED:
            raise SettingsError(
                f"the server at {self._url} requires its API key; set API_KEY or use --api-key"
            )
        if answer.status_code == httpx2.codes.NOT_FOUND and not detail.startswith("Job not found"):
            raise ModelUnavailableError(
                f"there is no REST API of step1x-edit at {self._url}; start the server with "
                "ENABLE_API=true, or use --standalone"
            )
        error = rebuild(code, detail)
        if isinstance(error, InternalError) and code != InternalError.code:
            raise ModelUnavailableError(
                f"the server at {self._url} refuses with status {answer.status_code}: {detail}"
            )
        with contextlib.suppress(KeyError, ValueError):
            error.retry_after_s = float(answer.headers["Retry-After"])
        raise error

    def _read(self, kind: type[_Answer], answer: httpx2.Response) -> _Answer:
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError:
            raise self._other_version() from None

    def _other_version(self) -> ModelUnavailableError:
        return ModelUnavailableError(
            f"the server at {self._url} does not answer like this version of step1x-edit"
        )


def _root(url: str) -> str:
    """The base URL of the routes; the URL of the server's MCP is accepted too."""
    try:
        parts = urlsplit(url)
        is_known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_known = False
    if not is_known:
        raise InvalidParameterError(f"--url must be like http://127.0.0.1:8000, got {url!r}")
    return url.rstrip("/").removesuffix(_MCP)


def _problem(answer: httpx2.Response) -> tuple[str, str]:
    """The code and the sentence of a failure; without them, no code and the status in words."""
    with contextlib.suppress(ValueError, AttributeError):
        problem = answer.json()
        return str(problem.get("code", "")), str(problem.get("detail", ""))
    return "", answer.reason_phrase


async def _report(data: str, report: Reporter) -> None:
    with contextlib.suppress(ValidationError, ValueError):  # progress is reported again
        progress = JobEventAnswer.model_validate_json(data).progress
        if progress is not None:
            step = progress.step or progress.position or 0
            await report(Progress(Phase(progress.phase), step, progress.total or 0))
