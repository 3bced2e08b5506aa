"""The requests of OpenAI's API that are understood, and the shapes of what comes back.

Types are strict: a number in quotes is refused. Keys that are not named here are ignored. A key that asks for something
this server does not do is refused, unless its value asks for nothing. The response models describe the API in the
OpenAPI document; answers are built as plain dictionaries, since they are made once per token (see answers.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_LEGACY_LOGPROBS = 5
MAX_SEED = 2 * 10**19  # beyond every 64-bit number, and a bound that a double holds exactly, as JSON tools ask


def _nothing_but(*accepted: Any) -> tuple[AfterValidator, WithJsonSchema]:
    """A value for which there is nothing to do: one of these."""

    def check(value: Any) -> Any:
        if not any(value == this and isinstance(value, bool) == isinstance(this, bool) for this in accepted):
            raise ValueError("this server does not do that; leave it out")
        return value

    return AfterValidator(check), WithJsonSchema({"enum": list(accepted)})


def _integral(value: Any) -> Any:
    """JSON knows one kind of number: 1.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole(least: int, most: int | None = None) -> tuple[Any, BeforeValidator]:
    """Annotations of an int between bounds."""
    return Field(ge=least, le=most), BeforeValidator(_integral)


AtLeastOne = Annotated[int, *whole(1)]
Penalty = Annotated[Any, *_nothing_but(0, None)]
Tools = Annotated[Any, *_nothing_but([], None)]
ToolChoice = Annotated[Any, *_nothing_but("none", "auto", None)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Seed = Annotated[int, *whole(-MAX_SEED, MAX_SEED)]


class Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class TextPart(Request):
    type: Literal["text"]
    text: str


class Part(Request):
    """A stretch of an assistant's message: plain text, a tool call, or the tool's output."""

    type: Literal["text", "python", "python_output"]
    text: str


class Question(Request):
    """What a person or the person's program says. A developer's message is a system message."""

    role: Literal["system", "developer", "user"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]


# Lists are refused at their first bad item: to describe a hundred thousand of them would hold up everybody for seconds.
Parts = Annotated[list[Part], Field(fail_fast=True)]


class Answer(Request):
    role: Literal["assistant"]
    content: str | Parts | None = None
    parts: Parts | None = Field(None, description="extension: stands for content, with its tool calls")


Message = Annotated[Question | Answer, Field(discriminator="role")]


class StreamOptions(Request):
    include_usage: bool | None = None


class SamplingRequest(Request):
    """What a chat and a completion have in common. What is left out, or null, comes from the model's defaults."""

    model: str | None = Field(None, description="a name from /v1/models; left out: the first one")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[int, *whole(0, 1_000_000)] | None = Field(None, description="extension; 0: the whole vocabulary")
    max_tokens: AtLeastOne | None = Field(None, description="at most; what the context leaves may be less")
    n: AtLeastOne | None = Field(None, description="samples")
    seed: Seed | None = Field(None, description="left out: a random one")
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    use_tools: bool | None = Field(None, description="extension: whether the calculator answers calls")
    user: str | None = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    logit_bias: Annotated[Any, *_nothing_but({}, None)] = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether the last chunk of a stream is to have the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(SamplingRequest):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: AtLeastOne | None = Field(None, description="newer name of max_tokens, goes before it")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, *whole(0, MAX_TOP_LOGPROBS)] | None = Field(None, description="with logprobs")
    response_format: Annotated[Any, *_nothing_but({"type": "text"}, None)] = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    functions: Tools = None
    function_call: ToolChoice = None
    modalities: Annotated[Any, *_nothing_but(["text"], None)] = None


TokenIds = Annotated[list[Annotated[int, *whole(0)]], Field(fail_fast=True, min_length=1)]
Texts = Annotated[list[str], Field(fail_fast=True)]
ManyTokenIds = Annotated[list[TokenIds], Field(fail_fast=True)]


class CompletionRequest(SamplingRequest):
    prompt: str | TokenIds | Texts | ManyTokenIds | None = Field(
        None, description="text or token ids, or a list of such; BOS is put in front"
    )
    echo: bool | None = Field(None, description="the prompt's text in front of the answer's")
    logprobs: Annotated[int, *whole(0, MAX_LEGACY_LOGPROBS)] | None = None
    suffix: Annotated[Any, *_nothing_but("", None)] = None
    best_of: Annotated[Any, *_nothing_but(1, None)] = None


# ---- what comes back


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
    detail: str | None = Field(None, description="the message, from nanochat's own endpoint")


class CompletionDetails(BaseModel):
    forced_tokens: int = Field(description="extension: of the completion's tokens, those that a tool put there")


class PromptDetails(BaseModel):
    cached_tokens: int = Field(description="of the prompts' tokens, those that were computed for earlier requests")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int = Field(description="without the token that ends an answer")
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(BaseModel):
    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None
    parts: list[Part] = Field(description="extension: the whole message, tool calls and their results included")


FinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class LegacyLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Defaults(BaseModel):
    temperature: float
    top_k: int
    top_p: float
    max_tokens: int


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: int = Field(description="extension: tokens of prompt and answer together")
    chat: bool = Field(description="extension: false for a base model, which knows no conversations")
    defaults: Defaults = Field(description="extension: for what a request leaves out")
    lineage: dict[str, Any] = Field(description="extension: run, step, hashes of weights, tokenizer and config")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]
