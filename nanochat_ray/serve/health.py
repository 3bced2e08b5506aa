"""Whether the server is up, whether it can answer, and its numbers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Response
from pydantic import BaseModel, ConfigDict, Field

from nanochat_ray.serve.backend import Backend
from nanochat_ray.serve.errors import ApiError, json_response


class Up(BaseModel):
    status: str


class Health(BaseModel):
    """Nanochat's fields. One server process answers for itself: it is one worker, which takes many requests at once."""

    model_config = ConfigDict(extra="allow")
    status: str
    ready: bool = Field(description="a model is loaded and its engine runs")
    num_gpus: int
    available_workers: int


class Stats(BaseModel):
    """Nanochat's fields, and the backend's own."""

    model_config = ConfigDict(extra="allow")
    total_workers: int
    available_workers: int
    busy_workers: int
    workers: list[dict[str, Any]]


def add_health(app: FastAPI, routes: APIRouter, backend: Backend, errors: dict[int | str, dict[str, Any]]) -> None:
    """`/healthz` (this process is up) for all; `/readyz` (it can answer), nanochat's `/health` and `/stats`."""

    def numbers() -> tuple[dict[str, Any], bool, bool]:
        stats = backend.stats()
        ready = bool(backend.models) and stats.get("healthy", True) is not False
        return stats, ready, bool(stats.get("running"))

    @app.get("/healthz", response_model=Up, responses=errors)
    async def healthz() -> Response:
        return json_response({"status": "ok"})

    @routes.get("/readyz", response_model=Up, responses=errors)
    async def readyz() -> Response:
        if not numbers()[1]:
            raise ApiError(503, "No model is ready yet.", code="loading", headers={"retry-after": "2"})
        return json_response({"status": "ready"})

    @routes.get("/health", response_model=Health, responses=errors)
    async def health() -> Response:
        stats, ready, _ = numbers()
        on_gpu = str(stats.get("device", "cpu")).startswith("cuda")
        answer = {"status": "ok", "ready": ready, "num_gpus": int(on_gpu), "available_workers": int(ready)}
        return json_response({**stats, **answer})

    @routes.get("/stats", response_model=Stats, responses=errors)
    async def stats() -> Response:
        known, ready, busy = numbers()
        answer = {
            "total_workers": 1,
            "available_workers": int(ready),
            "busy_workers": int(busy),
            "workers": [{"gpu_id": 0, "device": str(known.get("device", "cpu"))}],
        }
        return json_response({**known, **answer})
