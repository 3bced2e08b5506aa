"""vLLM in the place of our engine: the same methods, events and rollouts, so that callers need not know which it is.

Tools are used through our own state machine (`Stream.take`). A request to vLLM ends at the token that closes a tool
call; the tool is asked, its output appended, and the stream goes on as another request. vLLM finds all that came before
in its prefix cache, and reads the tool's output in one step. The other way, a logits processor that forces the output
token by token, would need the tools in vLLM's process, a forward pass for each forced token, and the history of every
row on the host in each step.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.engine.blocks import Node
from nanochat_ray.engine.calculator import calculate
from nanochat_ray.engine.engine import KV_FRAC_CPU, Engine, EngineStats
from nanochat_ray.engine.sampler import Sampled, check_sampling
from nanochat_ray.engine.scheduler import Stream
from nanochat_ray.engine.tool_use import Tool
from nanochat_ray.messages import SamplingParams, TokenEvent
from nanochat_ray.model.attention import windows_of
from nanochat_ray.model.flat_weights import FlatWeights, flatten
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer

# For vLLM, which reads them when an engine is made. In this process, so that a step's tokens are known when it returns
# and weights need not be copied through a pipe; and without a message to vLLM's makers about this machine.
VLLM_ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
FORCED = Sampled(-1)  # what a stream takes instead of it is forced
BITS = 24  # of a sampler's random number
CPU_BLOCK_TOKENS = 32  # positions of a block; vLLM's kernels for CPUs take multiples of this


class VllmEngine(Engine):
    """An `Engine` whose network and scheduler are vLLM's. `generate` and `rollouts` are inherited, all else is not.

    Sampling follows the same rules: temperature, then top_k, then top_p of what that leaves; log-probabilities at
    temperature 1 over the whole vocabulary. The random numbers are vLLM's, seeded from the stream's own, so samples
    are others than our engine's, and repeatable on the same version of vLLM, kind of device and size of the cache. vLLM
    takes temperatures between 1e-5 and 0.01 as 0.01.

    One per process: vLLM keeps state in globals. Not for several threads at once.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, config: ModelConfig, max_rows: int = 64, *, dtype: torch.dtype,
        device: str = "cpu", chunk_tokens: int = 256, kv_bytes: int | None = None, tools: Sequence[Tool] = (calculate,),
        blank: bool = False,
    ) -> None:  # fmt: skip
        """`folder` is what `export_for_vllm` wrote of a network with this config, or of the config alone; then the
        network is `blank`, with weights of no meaning until the first `update`.

        `kv_bytes` is the memory of the cache; unset, on a GPU what vLLM leaves free, elsewhere what `max_rows` whole
        contexts need, within a quarter of the free memory. ValueError if there is no vLLM that can be used, or only
        one for another kind of device.
        """
        from nanochat_ray.interchange.vllm_plugin import check_device, check_installed, engine_args, shapes_of

        check_installed()
        os.environ.update(VLLM_ENV)
        try:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.llm_engine import LLMEngine
        except Exception as error:
            raise ValueError(f"vLLM does not load: {' '.join(str(error).split())[:300]}") from error

        on_gpu = device.startswith("cuda")
        check_device(str(current_platform.device_type), device)
        self.tokenizer, self.max_rows, self.chunk_tokens = tokenizer, max_rows, chunk_tokens
        self.tools = tuple(tools)
        self.terminals = frozenset({tokenizer.encode_special("<|assistant_end|>"), tokenizer.bos_id})
        self.version = self._loaded = 0
        self._config, self._dtype, self._shapes = config, dtype, shapes_of(config)
        if kv_bytes is None and not on_gpu:  # by itself vLLM would take nearly all there is
            free = int(psutil.virtual_memory().available * KV_FRAC_CPU)
            kv_bytes = min(cache_bytes(config, max_rows, self.context, dtype), free)
        arguments = engine_args(
            folder, dtype=dtype, max_model_len=self.context + 1, max_num_seqs=max_rows, kv_bytes=kv_bytes, blank=blank
        )
        arguments |= {"max_logprobs": -1, "async_scheduling": False}
        if on_gpu:
            arguments["max_num_batched_tokens"] = chunk_tokens + max_rows  # a chunk, and a token of each row
        else:
            # A row with a seed that reads its prompt in parts makes vLLM fail here, since a CPU's generator of random
            # numbers cannot be set back: prompts are read whole. Small blocks let more of a stream be found again.
            arguments |= {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": self.context + 1 + max_rows,
                "block_size": CPU_BLOCK_TOKENS,
            }
        self._vllm = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._new: dict[int, FlatWeights] = {}  # by version, not taken over yet
        self._waiting: deque[Stream] = deque()  # for weights
        self._running: dict[str, Stream] = {}  # by the name of the request that vLLM has of it
        self._requests: dict[int, list[Stream]] = {}
        self._unread: dict[int, list[TokenEvent]] = {}
        self._n_requests = self._n_names = 0
        self._prompt_tokens = self._cached_tokens = self._sampled_tokens = 0
        self.failed = False  # for good: another engine needs another process

    @property
    def model(self) -> GPT:
        """There is none: the network is vLLM's own."""
        raise AttributeError("an engine of vLLM has no network of ours")

    @property
    def context(self) -> int:
        return self._config.sequence_len

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        p, n_vocab = params, self._config.vocab_size
        if p.max_tokens < 1 or p.num_samples < 1:
            raise ValueError(f"max_tokens {p.max_tokens} and num_samples {p.num_samples} must be at least 1")
        check_sampling(p)
        if not 1 <= len(prompt) <= self.context:
            raise ValueError(
                f"a prompt has {len(prompt)} tokens, the model's context is 1 to {self.context}; shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < n_vocab:
            raise ValueError(f"a prompt has an id that is not among the model's 0 to {n_vocab - 1}")

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        streams = self._new_streams(prompt, params, Node())
        self._waiting += streams
        return streams[0].request

    def cancel(self, number: int) -> None:
        streams = self._requests.pop(number, [])
        self._waiting = deque(stream for stream in self._waiting if stream not in streams)
        self._abort([name for name, stream in self._running.items() if stream in streams])

    def step(self) -> list[TokenEvent]:
        self._begin_waiting()
        events: list[TokenEvent] = []
        for output in self._vllm_step():
            stream = self._running[output.request_id]
            if len(stream.tokens) == stream.n_prompt:
                stream.cached_tokens = output.num_cached_tokens or 0
                self._prompt_tokens += stream.n_prompt
                self._cached_tokens += stream.cached_tokens
            events += self._take(stream, output.outputs[0])
            if output.finished:
                del self._running[output.request_id]
                if not stream.finished:
                    self._go_on(stream, output.outputs[0].finish_reason)
            elif stream.finished:  # by a stop text, of which vLLM knows nothing
                self._abort([output.request_id])
            if stream.finished:
                streams = self._requests[stream.request]
                streams.remove(stream)
                if not streams:
                    del self._requests[stream.request]
        return events

    def _go_on(self, stream: Stream, finish_reason: str | None) -> None:
        """Begin a stream's next request behind a tool call; whatever else ended the last one would end this one too."""
        if finish_reason != "stop":
            self.failed = True
            raise RuntimeError(f"vLLM ended a request half-way: {finish_reason}")
        self._begin(stream)

    def _vllm_step(self) -> list[Any]:
        assert not self.failed, "vLLM failed in an earlier step"
        try:
            return self._vllm.step()
        except BaseException:
            self.failed = True
            raise

    def _take(self, stream: Stream, completion: Any) -> list[TokenEvent]:
        """The events of new tokens, and of those that a tool forces behind them."""
        events = []
        for place, token in enumerate(completion.token_ids):
            logprobs = completion.logprobs[place] if completion.logprobs else None
            events.append(stream.take(_sampled(token, logprobs, stream.sampler.logprobs), self.terminals))
            self._sampled_tokens += 1
            while stream.forced and not stream.finished:
                events.append(stream.take(FORCED, self.terminals))
            if stream.finished:
                break
        return events

    def _begin_waiting(self) -> None:
        """Hand the streams that wait to vLLM, as far as they want the weights that it has or can be given."""
        while self._waiting:
            stream = self._waiting[0]
            if stream.version != self._loaded:
                if self._running:
                    return
                self._load(stream.version)
            self._begin(self._waiting.popleft())

    def _begin(self, stream: Stream) -> None:
        """Have vLLM go on with a stream from where it is."""
        from vllm import SamplingParams as Asked
        from vllm.sampling_params import RequestOutputKind

        sampler, n_vocab = stream.sampler, self._config.vocab_size
        stops = set(self.terminals)
        if stream.tools is not None:
            stops.add(self.tokenizer.encode_special("<|python_end|>"))
        asked = Asked(
            temperature=0.0 if sampler.greedy else sampler.temperature,
            top_k=0 if sampler.greedy else min(sampler.top_k or 0, n_vocab),
            top_p=sampler.top_p,
            # A generator's first number depends on 32 bits of its seed, so one random number is too short.
            seed=int(sampler.draw() * 2**BITS) << BITS | int(sampler.draw() * 2**BITS),
            max_tokens=stream.max_len - len(stream.tokens),
            stop_token_ids=sorted(stops),
            logprobs=None if sampler.logprobs is None else min(sampler.logprobs, n_vocab),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        name, self._n_names = str(self._n_names), self._n_names + 1
        self._running[name] = stream
        self._vllm.add_request(name, {"type": "token", "prompt_token_ids": list(stream.tokens)}, asked)

    def _abort(self, names: list[str]) -> None:
        if not self.failed:
            self._vllm.abort_request(names)
        for name in names:
            del self._running[name]

    def update(self, model: GPT | FlatWeights) -> int:
        """Take new weights for the requests submitted from now on. Returns the version.

        vLLM holds one version. So requests that are in flight end on theirs, and later ones begin when those have
        ended. ValueError unless the network has the same shape and precision.
        """
        if isinstance(model, GPT):
            if (model.config, model.compute_dtype) != (self._config, self._dtype):
                raise ValueError(
                    f"new weights must fit the old ones' place: {model.config}, {model.compute_dtype} "
                    f"instead of {self._config}, {self._dtype}; start another engine"
                )
            model = flatten(model, self.version + 1)
        sent = {place.name: place.shape for place in model.places}
        if other := sorted(n for n in sent.keys() | self._shapes.keys() if sent.get(n) != self._shapes.get(n)):
            name = other[0]
            raise ValueError(
                f"weights do not fit the network: {name} has {sent.get(name)}, wanted is {self._shapes.get(name)}"
            )
        wanted = {stream.version for stream in self._waiting}
        self._new = {version: kept for version, kept in self._new.items() if version in wanted}
        self._new[self.version + 1] = model
        if not self._running and not self._waiting:
            self._load(self.version + 1)
        self.version += 1
        return self.version

    def _load(self, version: int) -> None:
        from nanochat_ray.interchange.vllm_plugin import load_weights

        load_weights(self._vllm, self._new.pop(version))
        self._loaded = version

    def forget(self) -> None:
        emptied = self._vllm.reset_prefix_cache()
        assert emptied or self._running, "nothing runs, and yet vLLM's cache is in use"

    def stats(self) -> EngineStats:
        scheduler = self._vllm.engine_core.engine_core.scheduler
        running, waiting = scheduler.get_request_counts()
        blocks = self._vllm.vllm_config.cache_config.num_gpu_blocks or 0
        return EngineStats(
            running=running,
            waiting=waiting + len(self._waiting),
            blocks_used=round(scheduler.get_kv_cache_usage() * blocks),
            blocks_total=blocks,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            sampled_tokens=self._sampled_tokens,
            preemptions=0,  # vLLM counts its own only where its metrics are on
            version=self.version,
        )

    def close(self) -> None:
        """End vLLM's engine and give its memory back."""
        self._vllm.engine_core.shutdown()


def cache_bytes(config: ModelConfig, max_rows: int, n_positions: int, dtype: torch.dtype) -> int:
    """Memory of the cache for so many rows of so many positions, and for at least one context."""
    # vLLM pads kinds of layers to equal numbers of layers, of the rarest kind or of the commonest, and heads.
    kinds = Counter(windows_of(config))
    kinds[config.sequence_len] += 1  # the layer that smear needs
    layers = max(sum(-(-n // size) * size for n in kinds.values()) for size in kinds.values())
    position = 2 * config.n_kv_head * (-(-config.head_dim // 32) * 32) * dtype.itemsize * layers
    return max(max_rows * (n_positions + CPU_BLOCK_TOKENS), 2 * config.sequence_len) * position


def _sampled(token: int, logprobs: Any, n_top: int | None) -> Sampled:
    """What our sampler would say of the token; `logprobs` is vLLM's, by token."""
    if n_top is None:
        return Sampled(token)
    ranked = sorted((-found.logprob, other) for other, found in logprobs.items() if found.rank <= n_top)
    return Sampled(token, logprobs[token].logprob, tuple((other, -loss) for loss, other in ranked[:n_top]))
