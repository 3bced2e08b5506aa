"""The Serve application: replicas that hold engines, with the HTTP ingress in the same process.

Serve looks at the class that `build` is annotated with to check a config's `args`: annotations are no strings here.
"""

import asyncio
import logging
import os
import time
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from starlette.types import ASGIApp

from nanochat_ray.config import THREADS_ENV
from nanochat_ray.messages import PassedOn, SamplingParams
from nanochat_ray.remote import Every
from nanochat_ray.serve.app_settings import ServeSettings, UserConfig, settle

logger = logging.getLogger(__name__)

SIDE_REQUESTS = 64  # of the page, /health, /stats and such, beside those that an engine runs or queues
BUSY_FRAC = 0.75  # of the rows in use: Serve adds a replica if it may
RETRY_AFTER_S = 2.0  # what Serve itself says when its own queue is full
DRAIN_EXTRA_S = 30.0
METRICS_INTERVAL_S = 1.0
WARM_UP_TOKENS = 4
# Serve would run this class in an event loop and a thread of its own; nothing in it takes long, and with one thread
# less between the engines' and the network a chunk costs about a third less.
ONE_LOOP_ENV = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
# Most chunks of all streams together: on a CPU the engine needs the time that they take.
CHUNKS_PER_S = {"cpu": 200.0, "mps": 1000.0, "cuda": 1000.0}
REFUSED = "refused_updates"  # in /stats: why weights of the last user_config were not taken
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


def build(args: ServeSettings) -> serve.Application:
    """The application of a `serve_configs/` file; `args` are its `args`.

    Looks at the cluster for what is left open: how many replicas, on what. Where GPUs come after the head, or when
    somebody waits for them, name the device cuda and `replicas`: those wait. FileNotFoundError that names the command
    if a run is not there, ValueError if vLLM is wanted and missing, or made for another device.
    """
    cluster = ray.cluster_resources() if ray.is_initialized() else {}
    gpus = 0 if args.device in ("cpu", "mps") else int(cluster.get("GPU", 0))
    if args.device == "cuda" and not gpus:
        if args.replicas is None:
            raise ValueError(
                "device cuda: this cluster has no GPU; leave `device` out to take what there is, or say how many "
                "`replicas` are to wait for GPUs that come later"
            )
        gpus = args.replicas
    if args.engine == "vllm":
        from nanochat_ray.interchange.vllm_plugin import check_vllm

        check_vllm("cuda" if gpus else args.device)  # unset and without a GPU yet: each replica takes what it finds
    cpus = args.cpus or (1 if gpus else _cpus_each(args.max_replicas or args.replicas or 1))
    settings = args.model_copy(
        update={
            "models": settle(args.storage, args.choices),
            "device": args.device or ("cuda" if gpus else None),
            "cpus": cpus,
        }
    )
    return deployment(settings, gpus).bind(settings, PassedOn.here())


def _cpus_each(replicas: int) -> int:
    """CPUs of each of so many replicas without GPU: a node's share, with one left for HTTP and the rest of Ray."""
    alive = [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    nodes = [int(node["Resources"].get("CPU", 0)) for node in alive]
    largest = max(nodes, default=os.cpu_count() or 1)
    return max((largest - 1) // -(-replicas // max(len(nodes), 1)), 1)


def deployment(settings: ServeSettings, gpus: int) -> Any:
    """The class with its place on the cluster. The numbers follow from the settings; a config may override them."""
    replicas = settings.replicas or max(gpus, 1)
    streams = len(settings.choices) * (settings.max_rows + settings.max_queue)
    size: dict[str, Any] = {"num_replicas": replicas}
    if settings.max_replicas is not None:
        size = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas or 1,
                max_replicas=settings.max_replicas,
                target_ongoing_requests=BUSY_FRAC * settings.max_rows,
            )
        }
    threads = str(settings.cpus or 1)
    ingress: Any = serve.deployment(serve.ingress()(ChatServer))
    return ingress.options(
        name="ChatServer",
        **size,
        ray_actor_options={
            "num_cpus": settings.cpus or 1,
            "num_gpus": 1 if gpus else 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, **THREADS_ENV, **ONE_LOOP_ENV}},
        },
        # The engine's queue decides whom to send away: it knows for how long. Serve's own bound lies above it.
        max_ongoing_requests=streams + SIDE_REQUESTS,
        max_queued_requests=streams + SIDE_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_timeout_s=settings.http.request_timeout_s + DRAIN_EXTRA_S,
        graceful_shutdown_wait_loop_s=1.0,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        request_router_config={"request_router_class": ROUTER},
    )


def log_to_serve() -> None:
    """Have this package's lines in the replica's own log, which Serve shows in the terminal and the dashboard."""
    package, serves = logging.getLogger("nanochat_ray"), logging.getLogger("ray.serve")
    package.handlers, package.propagate = list(serves.handlers), False
    package.setLevel(serves.level)


def free_bytes(device: str) -> int | None:
    """Memory of the GPU that nobody uses; None for what has no memory of its own."""
    import torch

    return torch.cuda.mem_get_info()[0] if device == "cuda" else None


class ChatServer:
    """One replica: an engine per model, all in one thread, and the HTTP application in front of them."""

    def __init__(self, settings: ServeSettings, passed_on: PassedOn) -> None:
        passed_on.take()
        log_to_serve()
        self.settings = settings

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        from nanochat_ray.serve.api import create_app

        http = self.settings.http_with_keys()
        await asyncio.to_thread(self._start)
        return create_app(self.loop, http)

    def _start(self) -> None:
        """Load the models and start their engines."""
        import torch

        from nanochat_ray.model.precision import pick_device, pick_dtype, prepare_device
        from nanochat_ray.serve.loop import EngineLoop
        from nanochat_ray.serve.metrics import ServeMetrics
        from nanochat_ray.serve.weights import Shelf, make_engine

        begun, settings = time.monotonic(), self.settings
        device = pick_device(settings.device)
        prepare_device(device)
        torch.set_num_threads(settings.cpus or 1)
        dtype, why = pick_dtype(device, settings.dtype)
        self.shelves: dict[str, Shelf] = {}
        loaded = []
        for choice in settings.choices:
            # vLLM has a network of its own on the device; ours only brings it the weights.
            place = "cpu" if settings.engine == "vllm" else device
            shelf = Shelf(settings.storage, choice, settings.defaults, place, dtype)
            checkpoint = shelf.find(choice.step)
            served, model = shelf.load(checkpoint)
            self.shelves[served.name] = shelf
            loaded.append((served, model, checkpoint))
            logger.info("%s: step %d, %s on %s", served.name, served.lineage["step"], why, device)
        kv_bytes = settings.kv_bytes_each(free_bytes(device))
        engines = []
        for served, model, checkpoint in loaded:
            engine = make_engine(settings, served.tokenizer, model, checkpoint, device, kv_bytes)
            warm_up = SamplingParams(max_tokens=WARM_UP_TOKENS, use_tools=False)
            list(engine.generate([[served.tokenizer.bos_id]], warm_up))
            engine.forget()
            engines.append((served, engine))
        self._accepts_requests = False
        self._updates: set[asyncio.Task[None]] = set()
        self._one_update = asyncio.Lock()
        s, most = settings, CHUNKS_PER_S[device]
        self.loop = EngineLoop(engines, s.max_queue, s.stream_interval_s, s.stuck_s, most)
        self.loop.notes |= {"device": device, "pid": os.getpid(), "engine": settings.engine}
        self._metrics = Every(METRICS_INTERVAL_S, ServeMetrics(self.loop).export, "serve-metrics")
        logger.info("ready after %.1f s", time.monotonic() - begun)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's `user_config`: put other weights in place.

        A replica gets no requests until this returns, so one that is in use goes on at once and loads in a thread
        meanwhile; /v1/models says what new requests get. It never raises, for Serve would end a replica that does:
        what cannot be loaded is refused, in the log and in /stats, and the old weights stay.
        """
        update = asyncio.create_task(self._take_over(user_config))
        self._updates.add(update)
        update.add_done_callback(self._updates.discard)
        if not self._accepts_requests:
            await update

    async def _take_over(self, user_config: dict[str, Any]) -> None:
        async with self._one_update:
            self.loop.notes.pop(REFUSED, None)
            await self._take_over_alone(user_config)

    async def _take_over_alone(self, user_config: dict[str, Any]) -> None:
        try:
            wanted = UserConfig.model_validate(user_config or {})
            if isinstance(wanted.weights, dict) and (unknown := sorted(wanted.weights.keys() - self.shelves.keys())):
                raise ValueError(f"weights of {', '.join(unknown)}: this server has {', '.join(self.shelves)}")
        except ValueError as error:
            self._refuse(f"user_config {user_config}: {error}")
            return
        for model in self.loop.models:
            step = wanted.step_of(model.name)
            if step is not None:
                try:
                    await self._update(model.name, None if step == "latest" else step)
                except Exception as error:
                    self._refuse(f"weights of {model.name}, step {step}: {type(error).__name__}: {error}")

    async def _update(self, name: str, step: int | None) -> None:
        shelf = self.shelves[name]
        checkpoint = await asyncio.to_thread(shelf.find, step)
        current = next(model for model in self.loop.models if model.name == name)
        if checkpoint.model_hash == current.lineage["weights_sha256"]:
            return
        served, model = await asyncio.to_thread(shelf.load, checkpoint)
        if served.tokenizer.hash != current.tokenizer.hash:
            raise ValueError("its tokenizer is another one; restart the server for it")
        version = await self.loop.update(served, model)
        logger.info("%s: step %d is version %d", name, checkpoint.step, version)

    def _refuse(self, reason: str) -> None:
        self.loop.notes[REFUSED] = [*self.loop.notes.get(REFUSED, []), reason]
        logger.error("not taken, the old weights stay: %s", reason)

    def check_health(self) -> None:
        """Raises if an engine failed or hangs; Serve then replaces the replica. It asks once before any request."""
        self._accepts_requests = True
        self.loop.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_metrics"):
            self._metrics.close()
            self.loop.close()
