"""The routes for monitoring: a summary, liveness, readiness and metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from step1x_edit import __version__
from step1x_edit.errors import Step1XEditError
from step1x_edit.interfaces.discovery import PROOF_HEADER, proof
from step1x_edit.interfaces.http import openapi, problems
from step1x_edit.interfaces.http.guard import request_id
from step1x_edit.interfaces.http.metrics import TEXT_FORMAT, Metrics
from step1x_edit.service.service import EditService


def health_routes(service: EditService, metrics: Metrics, secret: str) -> APIRouter:
    """The routes for monitoring; `secret` is that of the server's note."""
    health = _Health(service, metrics, secret)
    router = APIRouter(tags=["Watching"])
    router.get("/health", **openapi.GET_HEALTH)(health.summary)
    router.get("/livez", **openapi.GET_LIVENESS)(health.liveness)
    router.get("/readyz", **openapi.GET_READINESS)(health.readiness)
    router.get("/metrics", **openapi.GET_METRICS)(health.figures)
    return router


@dataclass(frozen=True)
class _Health:
    service: EditService
    metrics: Metrics
    secret: str

    async def summary(self) -> Response:
        status = self.service.status().gpu_status
        return JSONResponse(
            {
                "status": "unavailable" if any(self._checks().values()) else "healthy",
                "version": __version__,
                "model_location": status.model_location,
                "model": status.model,
                "queue_length": status.queue_length,
                "loading": status.loading,
            }
        )

    async def liveness(self, request: Request) -> Response:
        nonce = request.query_params.get("nonce", "")
        _, port = request.scope.get("server") or ("", 0)
        is_asked = self.secret and 0 < len(nonce) <= openapi.MAX_NONCE
        headers = {PROOF_HEADER: proof(self.secret, nonce, port)} if is_asked else {}
        return PlainTextResponse("ok\n", headers=headers)

    async def readiness(self, request: Request) -> Response:
        checks = self._checks()
        first = next(filter(None, checks.values()), None)
        if "verbose" in request.query_params:
            lines = [f"[-] {name}: {e}\n" if e else f"[+] {name}\n" for name, e in checks.items()]
            lines.append("not ready\n" if first else "ready\n")
            return PlainTextResponse("".join(lines), 503 if first else 200)
        if first:  # whatever the error's own status, the server is not ready
            failure = replace(problems.of_error(first), status=503)
            return problems.response(failure, request_id(request.scope))
        return PlainTextResponse("ready\n")

    async def figures(self) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type=TEXT_FORMAT)

    def _checks(self) -> dict[str, Step1XEditError | None]:
        """The error that each check of the service found, by the name of the check."""
        found: dict[str, Step1XEditError | None] = {}
        for name, check in self.service.readiness.items():
            try:
                check()
            except Step1XEditError as error:
                found[name] = error
            else:
                found[name] = None
        return found
