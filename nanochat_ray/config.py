"""Every knob, once: frozen pydantic models, one per stage. Flags, --config files and saved configs all come from here.

`None` means "derive it". A field marked `RUN_ONLY` changes where or how fast a stage runs, never its result, so it is
not part of a finished stage's identity. Imports neither torch nor Ray.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

RUN_ONLY: dict[str, Any] = {"identity": False}
# For the environment of processes that compute on a CPU. GNU OpenMP's threads spin while they wait for each other. On a
# machine with other work that made steps 14 times slower, since Ray's workers have a low priority; threads that soon go
# to sleep are as fast on a quiet machine (dev/LOG.md).
THREADS_ENV = {"GOMP_SPINCOUNT": "3000"}
EVAL_TOKENS_UNIT = 524_288  # tokens; nanochat counts evaluation tokens in this unit


class Settings(BaseModel):
    """A frozen group of knobs. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def identity(self) -> dict[str, Any]:
        """The fields that decide a result, as plain JSON values."""
        skip = {
            name
            for name, info in type(self).model_fields.items()
            if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("identity") is False
        }
        return self.model_dump(mode="json", exclude=skip)


class ModelConfig(Settings):
    """The network. Its constants are saved with it, so an old checkpoint never loads with new maths."""

    sequence_len: int = Field(2048, ge=1, description="context length in tokens; the windows derive from it")
    vocab_size: int = Field(32768, ge=1)
    n_layer: int = Field(12, ge=1)
    n_head: int = Field(6, ge=1, description="query heads")
    n_kv_head: int = Field(6, ge=1, description="key and value heads")
    n_embd: int = Field(768, ge=1, description="channels")
    window_pattern: str = Field("SSSL", description="S short, L full window; tiled over the layers, the last is L")
    rope_base: float = 100_000.0
    rope_table_factor: int = Field(10, description="rotary table length in units of sequence_len")
    qk_scale: float = Field(1.2, description="factor on queries and keys after their norm")
    logit_softcap: float = 15.0
    norm_eps: float = 2.0**-23
    smear_channels: int = 24
    value_gate_channels: int = 12
    value_gate_scale: float = 3.0
    vocab_pad_multiple: int = 64
    arch_version: int = 1

    @field_validator("window_pattern")
    @classmethod
    def _letters(cls, pattern: str) -> str:
        if not pattern or set(pattern.upper()) - {"S", "L"}:
            raise ValueError(f"window_pattern {pattern!r}: only the letters S and L, at least one")
        return pattern.upper()

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        narrowest = max(self.smear_channels, self.value_gate_channels)
        if self.n_embd < narrowest:
            raise ValueError(f"n_embd {self.n_embd} is below the {narrowest} channels that the smear gate reads")
        return self

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_pad_multiple) * self.vocab_pad_multiple


class TokenizerSettings(Settings):
    """Tokenizer training."""

    max_chars: int = Field(2_000_000_000, gt=0, description="stop after this many characters")
    doc_cap: int = Field(10_000, gt=0, description="characters taken of each document")
    vocab_size: int = Field(32768, ge=265, description="tokens, the nine special ones included")


class PretrainSettings(Settings):
    """Pretraining; nanochat's base_train."""

    depth: int = Field(20, ge=1, description="layers; the one dial that sets everything else")
    aspect_ratio: int = Field(64, ge=1, description="channels per layer of depth")
    head_dim: int = Field(128, ge=2, description="channels per attention head")
    max_seq_len: int = Field(2048, ge=2, description="context length in tokens")
    window_pattern: str = Field("SSSL", description="S short, L full window, tiled over the layers")
    num_iterations: int | None = Field(None, gt=0, description="optimizer steps; the first horizon of three")
    target_flops: float | None = Field(None, gt=0, description="training FLOPs to spend")
    target_param_data_ratio: float | None = Field(12.0, gt=0, description="tokens per scaling parameter")
    device_batch_size: int = Field(32, ge=1, description="rows per worker and micro-step", json_schema_extra=RUN_ONLY)
    total_batch_size: int | None = Field(None, gt=0, description="tokens per optimizer step; unset: by depth")
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    weight_decay: float = Field(0.28, ge=0, description="of the Muon matrices, before scaling")
    warmup_steps: int = Field(40, ge=0)
    warmdown_ratio: float = Field(0.65, ge=0, le=1)
    final_lr_frac: float = Field(0.05, ge=0, le=1)
    muon_eq: bool = Field(True, description="equalise the rows before orthogonalisation")
    muon_plus: bool = Field(True, description="reset the norm after orthogonalisation")
    packing: Literal["best-fit", "stream"] = Field(
        "best-fit", description="best-fit: whole documents where they fit; stream: contiguous tokens, nothing cut"
    )
    fp8: bool = Field(False, description="large linear layers in fp8 (CUDA compute capability 8.9 and later)")
    fp8_recipe: Literal["tensorwise", "rowwise"] = Field("tensorwise", description="what shares one fp8 scale")
    compile: bool | None = Field(None, description="torch.compile; unset: on CUDA only", json_schema_extra=RUN_ONLY)
    seed: int = Field(42, description="of the initial weights and the data order")
    resume_from_step: int | None = Field(
        None, ge=0, description="checkpoint to go on from; unset: the newest that verifies", json_schema_extra=RUN_ONLY
    )
    eval_every: int | None = Field(250, gt=0, description="steps between bits-per-byte evaluations")
    eval_tokens: int = Field(80 * EVAL_TOKENS_UNIT, gt=0, description="validation tokens, rounded down to whole rows")
    core_metric_every: int | None = Field(2000, gt=0, description="steps between CORE evaluations, given a bundle")
    core_metric_max_per_task: int | None = Field(500, gt=0, description="items per CORE task; unset: all")
    sample_every: int | None = Field(2000, gt=0, description="steps between samples")
    save_every: int | None = Field(
        None, gt=0, description="steps between checkpoints; unset: every 10 minutes", json_schema_extra=RUN_ONLY
    )

    @model_validator(mode="after")
    def _checks(self) -> PretrainSettings:
        ModelConfig._letters(self.window_pattern)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even (rotary embedding)")
        if self.num_iterations is None and self.target_flops is None and self.target_param_data_ratio is None:
            raise ValueError("no horizon: set num_iterations, target_flops or target_param_data_ratio")
        check_total_batch_size(self.total_batch_size, self.max_seq_len)
        return self


def check_total_batch_size(total_batch_size: int | None, sequence_len: int) -> None:
    """Raise ValueError unless a step's tokens are whole rows of `sequence_len`."""
    if total_batch_size is not None and total_batch_size % sequence_len:
        nearest = max(1, round(total_batch_size / sequence_len)) * sequence_len
        raise ValueError(
            f"total_batch_size {total_batch_size} is not a multiple of the sequence length {sequence_len}; "
            f"the nearest that is: {nearest}"
        )


class BaseEvalSettings(Settings):
    """Evaluation of the pretrained model; nanochat's base_eval."""

    eval: str = Field("core,bpb,sample", description="what to run, any of core, bpb, sample, joined by commas")
    step: int | None = Field(None, ge=0, description="checkpoint to evaluate; unset: the last")
    max_per_task: int | None = Field(None, gt=0, description="items per CORE task; unset: all")
    split_tokens: int = Field(40 * EVAL_TOKENS_UNIT, gt=0, description="tokens per split, rounded down to whole rows")
    device_batch_size: int = Field(32, ge=1, json_schema_extra=RUN_ONLY)

    @field_validator("eval")
    @classmethod
    def _parts(cls, value: str) -> str:
        unknown = set(value.split(",")) - {"core", "bpb", "sample"}
        if unknown:
            raise ValueError(f"eval {value!r}: unknown {', '.join(sorted(unknown))}; choose from core, bpb, sample")
        return value


class SFTSettings(Settings):
    """Supervised finetuning; nanochat's chat_sft. Unset values are inherited from the pretraining checkpoint."""

    mixture: tuple[str, ...] | None = Field(
        None,
        description="tasks as name[=path][*repeats]: smoltalk, mmlu, gsm8k, json=FILE, spelling, world; "
        "unset: nanochat's mixture, or the embedded world's conversations when that is the data",
    )
    model_step: int | None = Field(None, ge=0, description="pretraining checkpoint to start from; unset: the last")
    load_optimizer: bool = Field(True, description="start from the pretraining optimizer's moments")
    num_iterations: int | None = Field(None, gt=0, description="optimizer steps; unset: whole epochs")
    num_epochs: int = Field(1, ge=1, description="passes over the mixture when num_iterations is unset")
    max_seq_len: int | None = Field(None, ge=2, description="row length in tokens")
    device_batch_size: int | None = Field(None, ge=1, json_schema_extra=RUN_ONLY)
    total_batch_size: int | None = Field(None, gt=0, description="tokens per optimizer step")
    embedding_lr: float | None = None
    unembedding_lr: float | None = None
    matrix_lr: float | None = None
    init_lr_frac: float = 0.8
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    warmdown_ratio: float = Field(0.5, ge=0, le=1)
    final_lr_frac: float = Field(0.0, ge=0, le=1)
    mmlu_epochs: int = Field(3, ge=0, description="times MMLU's auxiliary train set stands in nanochat's mixture")
    gsm8k_epochs: int = Field(4, ge=0, description="times GSM8K's train set stands in nanochat's mixture")
    compile: bool | None = Field(None, description="torch.compile; unset: on CUDA only", json_schema_extra=RUN_ONLY)
    seed: int = Field(42, description="of the data order")
    eval_every: int | None = Field(200, gt=0, description="steps between bits-per-byte evaluations")
    eval_tokens: int = Field(40 * EVAL_TOKENS_UNIT, gt=0)
    chatcore_every: int | None = Field(200, gt=0, description="steps between ChatCORE evaluations")
    chatcore_max_cat: int | None = Field(None, gt=0, description="problems per categorical task; unset: all")
    chatcore_max_sample: int | None = Field(24, gt=0, description="problems per generative task; unset: all")
    save_every: int | None = Field(
        None, gt=0, description="steps between checkpoints; unset: every 10 minutes", json_schema_extra=RUN_ONLY
    )


class ResolvedSFTSettings(SFTSettings):
    """Finetuning settings with nothing left to inherit."""

    max_seq_len: int
    device_batch_size: int = Field(json_schema_extra=RUN_ONLY)
    total_batch_size: int
    embedding_lr: float
    unembedding_lr: float
    matrix_lr: float


class RLSettings(Settings):
    """Reinforcement learning; nanochat's chat_rl. The defaults sample from the policy as it is trained."""

    task: str | None = Field(None, description="a file with prompts, a reward and tools; unset: GSM8K, or the world's")
    prompts: str | None = Field(None, description="JSON lines of GSM8K's form to train on, instead of GSM8K's own")
    eval_prompts: str | None = Field(None, description="the same to evaluate on; unset: a part of --prompts kept apart")
    model_step: int | None = Field(None, ge=0, description="SFT checkpoint to start from; unset: the last")
    num_epochs: int = Field(1, ge=1, description="passes over the prompts when num_iterations is unset")
    num_iterations: int | None = Field(None, gt=0, description="optimizer steps; unset: whole epochs")
    examples_per_step: int = Field(16, ge=1, description="prompts per optimizer step")
    num_samples: int = Field(16, ge=2, description="completions of each prompt: a group")
    prompts_per_unit: int = Field(4, ge=1, description="prompts that one engine completes together: a unit of work")
    max_new_tokens: int = Field(256, ge=1, description="of a completion")
    temperature: float = Field(1.0, gt=0, description="of sampling; training takes the policy at temperature 1")
    top_k: int | None = Field(None, ge=0, description="of sampling; unset or 0: the whole vocabulary")
    async_steps: int = Field(
        0, ge=0, description="sample this many steps ahead, with weights as many steps old; 0: on policy"
    )
    ratio_cap: float = Field(2.0, gt=0, description="with async_steps: upper bound of the importance ratio of a token")
    ppo_clip: float | None = Field(None, gt=0, lt=1, description="PPO's clipped objective with this width; unset: none")
    zscore: bool = Field(False, description="divide advantages by the standard deviation of their group")
    device_batch_size: int = Field(8, ge=1, description="rows per rank and micro-step", json_schema_extra=RUN_ONLY)
    embedding_lr: float = 0.2
    unembedding_lr: float = 0.004
    matrix_lr: float = 0.02
    scalar_lr: float = Field(0.5, description="of the scalars that mix the layers' streams")
    weight_decay: float = Field(0.0, ge=0, description="of the Muon matrices")
    init_lr_frac: float = Field(0.05, gt=0, description="of the learning rates at the first step; they fall to 0")
    load_optimizer: bool = Field(False, description="start from the SFT optimizer's moments")
    seed: int = Field(42, description="of the order of prompts and of sampling")
    eval_every: int | None = Field(60, gt=0, description="steps between evaluations, besides the first and the last")
    eval_examples: int = Field(400, ge=1, description="prompts of an evaluation")
    eval_samples: int = Field(8, ge=1, description="completions of each: pass@1 to pass@this")
    save_every: int | None = Field(
        60, gt=0, description="steps between checkpoints; unset: every 10 minutes", json_schema_extra=RUN_ONLY
    )
    max_rows: int = Field(128, ge=1, description="completions that an engine decodes at a time")
    rollout_threads: int = Field(1, ge=1, description="CPU threads of an engine")
    rollout_engine: Literal["own", "vllm"] = Field(
        "own", description="what samples: our engine, or vLLM on rollout workers (its own samples)",
        json_schema_extra=RUN_ONLY,
    )
    rollout_workers: int | None = Field(
        None, ge=0, json_schema_extra=RUN_ONLY,
        description="Ray actors that sample; 0: the training workers do, in turns; unset: by hardware",
    )
    score_workers: int = Field(
        1, ge=1, description="Ray actors that compute rewards, without a GPU", json_schema_extra=RUN_ONLY
    )
    replay: str | None = Field(
        None, description="folder of a rollout log to train on instead of sampling", json_schema_extra=RUN_ONLY
    )

    @model_validator(mode="after")
    def _checks(self) -> RLSettings:
        if self.rollout_workers == 0 and self.async_steps:
            raise ValueError(
                f"async_steps {self.async_steps} with rollout_workers 0: training workers that sample themselves take "
                "turns, so nothing runs ahead; give async_steps 0 or at least one rollout worker"
            )
        return self


class ChatEvalSettings(Settings):
    """Evaluation of a chat model; nanochat's chat_eval."""

    source: Annotated[Literal["base", "sft", "rl"], Field(json_schema_extra={"short": "-i"})] = "sft"
    task_name: str | None = Field(
        None, description="tasks joined by |; unset: all", json_schema_extra={"short": "-a"}
    )
    temperature: float = Field(0.0, ge=0, json_schema_extra={"short": "-t"})
    max_new_tokens: int = Field(512, ge=1, json_schema_extra={"short": "-m"})
    num_samples: int = Field(1, ge=1, json_schema_extra={"short": "-n"})
    top_k: int | None = Field(50, ge=0, json_schema_extra={"short": "-k"})
    batch_size: int = Field(8, ge=1, json_schema_extra={"short": "-b", **RUN_ONLY})
    step: int | None = Field(None, ge=0, json_schema_extra={"short": "-s"})
    max_problems: int | None = Field(None, gt=0, description="per task", json_schema_extra={"short": "-x"})


class ChatSettings(Settings):
    """The chat on the command line; nanochat's chat_cli."""

    source: Annotated[Literal["base", "sft", "rl"], Field(json_schema_extra={"short": "-i"})] = "sft"
    step: int | None = Field(None, ge=0, json_schema_extra={"short": "-s"})
    prompt: str | None = Field(None, description="answer this and leave", json_schema_extra={"short": "-p"})
    temperature: float = Field(0.6, ge=0, json_schema_extra={"short": "-t"})
    top_k: int | None = Field(50, ge=0, json_schema_extra={"short": "-k"})
    top_p: float = Field(1.0, gt=0, le=1, description="of what top_k leaves, the most likely tokens of this share")
    max_new_tokens: int = Field(256, ge=1, json_schema_extra={"short": "-m"})
    seed: int | None = Field(None, description="unset: another one for each reply")
    system: str | None = Field(None, description="text put in front of the first question")


class RunSettings(Settings):
    """Where and how a job runs. Nothing here changes a result except the data."""

    storage: str | None = Field(
        None, description="folder of all runs; unset: NANOCHAT_BASE_DIR, else ~/.cache/nanochat_ray"
    )
    model_tag: str | None = Field(
        None, description="name of the run's folder below the storage; unset: d<depth>, or the preset's name",
        json_schema_extra={"short": "-g"},
    )
    run: str = Field("dummy", description="name of the tracker's run; dummy: no wandb")
    data: str | None = Field(
        None, description="folder or URI of parquet shards, or climbmix, fineweb-edu, embedded; unset: by hardware"
    )
    val_shard: str | None = Field(None, description="file name of the validation shard; unset: the last by name")
    text_column: str = "text"
    skip_corrupt: bool = Field(False, description="leave corrupt data shards out instead of stopping")
    max_shards: int | None = Field(None, gt=0, description="training shards; unset: all, or what is needed")
    task_data: str | None = Field(None, description="folder of task data (gsm8k/, ...); unset: below the storage")
    eval_bundle: str | None = Field(None, description="folder of the CORE bundle; unset: below the storage")
    workers: str = Field("1", description="training workers (ranks): a number, or MIN:MAX to take what there is")
    parallel: Literal["sharded", "ddp", "zero1", "zero2", "zero3"] = Field(
        "sharded", description="what ranks share: optimizer sharded, torch DDP, or DeepSpeed's ZeRO (extra deepspeed)"
    )
    max_restarts: int = Field(5, ge=0, description="relaunches in a row of training that reach no new checkpoint")
    wait_s: float = Field(1800.0, gt=0, description="seconds to wait for the cluster to have room for the workers")
    hang_s: float = Field(1800.0, gt=0, description="seconds without a sign of life after which a rank counts as hung")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints kept per stage, besides the best")
    eval_workers: int | None = Field(None, ge=1, description="evaluation actors; unset: by hardware")
    ray: bool = Field(True, description="run on Ray; --no-ray: everything in this process")
    device_type: Literal["cpu", "cuda", "mps"] | None = Field(None, description="unset: what is there")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(None, description="compute; unset: by hardware")
    unsafe_sandbox: bool = Field(
        False, description="run the programs that a model writes without isolation where there is none"
    )
    price_per_hour: float | None = Field(None, ge=0, description="of the whole machine, for the report's cost")


    @field_validator("workers", mode="before")
    @classmethod
    def _workers(cls, value: object) -> str:
        parts = str(value).split(":")
        if len(parts) > 2 or not all(part.isdigit() and int(part) >= 1 for part in parts):
            raise ValueError(f"workers {value!r}: a number of at least 1, or MIN:MAX such as 2:8")
        if int(parts[0]) > int(parts[-1]):
            raise ValueError(f"workers {value!r}: MIN is above MAX")
        return ":".join(parts)

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the greatest number of training workers."""
        parts = self.workers.split(":")
        return int(parts[0]), int(parts[-1])


class DownloadSettings(Settings):
    """Getting data shards; nanochat's dataset."""

    data: str = Field(
        "climbmix",
        description="climbmix, fineweb-edu, or any source of shards: a web address, s3://, gs:// or a folder",
    )
    names: tuple[str, ...] | None = Field(
        None, description="shards to get by name; unset: all that the source lists (a web address: its checksum file)"
    )
    storage: str | None = Field(None, description="as of all jobs; a published set has its own folder in it")
    to: str | None = Field(
        None, description="folder to write, shared by all nodes; unset: the published set's below the storage"
    )
    max_shards: int | None = Field(
        None, gt=0, description="training shards, the first by name; unset: all",
        json_schema_extra={"short": "-n", "alias": "--num-files"},
    )
    val_shard: str | None = Field(None, description="the validation shard, always fetched; unset: the last by name")
    concurrency: int = Field(
        4, ge=1, description="shards at a time", json_schema_extra={"short": "-w", "alias": "--num-workers"}
    )
    tries: int = Field(5, ge=1, description="of one shard in a row that bring nothing new")
    backoff_s: float = Field(1.0, ge=0, description="seconds before the second try; doubles with each one")
    verify: bool = Field(False, description="compare the content of shards that are there with their SHA-256")
    ray: bool = Field(True, description="as Ray tasks, on all nodes; --no-ray: in threads of this process")


class RepackageSettings(Settings):
    """Writing a data set as shards."""

    data: str | None = Field(None, description="folder or URI of .parquet, .jsonl, .jsonl.gz, .jsonl.zst or .txt files")
    to: str | None = Field(None, description="folder to write; it must not be there")
    pattern: str = Field("*", description="which files of the folder, such as 'train-*.parquet'")
    text_column: str = Field("text", description="column or key of the documents")
    chars_per_shard: float = Field(2.5e8, gt=0, description="a shard ends with the row group that reaches this")
    val_docs: int = Field(10_240, ge=1, description="documents of the validation shard, the first in order")
    seed: int | None = Field(None, ge=0, description="shuffle all documents; unset: keep their order")


class SpeedrunSettings(Settings):
    """The main job: a preset and what the person changed of it."""

    preset: str | None = Field(None, description="cpu, smoke, d12, d20, d24, d26 or d32; unset: by hardware")
    run: RunSettings = RunSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    pretrain: PretrainSettings = PretrainSettings()
    base_eval: BaseEvalSettings = BaseEvalSettings()
    sft: SFTSettings = SFTSettings()
    chat_eval: ChatEvalSettings = ChatEvalSettings()
    rl: RLSettings = RLSettings()
