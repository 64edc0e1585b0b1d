"""The routes under /api/gpu: the location of the model, and moving it off the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from step1x_edit.interfaces.http import openapi
from step1x_edit.service.service import EditService


def gpu_routes(service: EditService) -> APIRouter:
    """The routes under /api/gpu."""
    gpu = _Gpu(service)
    router = APIRouter(prefix="/api/gpu", tags=["GPU"])
    router.get("/status", **openapi.GET_GPU_STATUS)(gpu.status)
    router.post("/offload", **openapi.OFFLOAD_GPU)(gpu.offload)
    router.post("/release", **openapi.RELEASE_GPU)(gpu.release)
    return router


@dataclass(frozen=True)
class _Gpu:
    service: EditService

    async def status(self) -> Response:
        return JSONResponse(self.service.status().to_dict())

    async def offload(self) -> Response:
        return JSONResponse((await self.service.offload()).to_dict())

    async def release(self) -> Response:
        return JSONResponse((await self.service.release()).to_dict())
