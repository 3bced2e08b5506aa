"""The server keeps what its OpenAPI document says: schemathesis makes the requests, good and bad."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from pydantic import SecretStr
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from nanochat_ray.serve.api import create_app
from nanochat_ray.serve.settings import HttpSettings
from tests.serve.scripted import TOKENIZER, Scripted, call_tokens, running

KEY = "a-key-that-is-long-enough"
HEADERS = {"Authorization": f"Bearer {KEY}"}
# and how many requests of each kind
OPERATIONS = {
    "POST /v1/chat/completions": 100, "POST /v1/completions": 100, "POST /chat/completions": 60, "GET /v1/models": 3,
    "GET /v1/models/{model}": 15, "GET /healthz": 3, "GET /readyz": 3, "GET /health": 3, "GET /stats": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def operations() -> Iterator[dict[str, schemathesis.APIOperation]]:
    load_all_checks()
    backend = Scripted([*call_tokens("1+1", "2"), *TOKENIZER.encode("Hi \N{FISH}")])
    with running(create_app(backend, HttpSettings(api_keys=(SecretStr(KEY),)))) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=HEADERS)
        yield {found.ok().label: found.ok() for found in schema.get_all_operations()}
    assert backend.opened == backend.closed > 0


def within_the_models_limits(body: dict[str, Any]) -> dict[str, Any]:
    """What no schema can say: who speaks when, and what the context holds."""
    if "messages" in body:
        body["messages"] = [{"role": "user", "content": "hi"}]
    if "prompt" in body:
        body["prompt"] = "hi" if isinstance(body["prompt"], str) else ["hi", "ho"]
    for name, most in (("n", 4), ("max_tokens", 100), ("max_completion_tokens", 100)):
        if body.get(name):
            body[name] = int(body[name]) % most + 1
    if body.get("echo") or not body.get("logprobs"):
        body.pop("logprobs", None)
        body.pop("top_logprobs", None)
    body.pop("model", None)
    return body


def run(operation: schemathesis.APIOperation, mode: GenerationMode, tame: bool) -> list[int]:
    statuses: list[int] = []
    examples = settings(
        max_examples=OPERATIONS[operation.label], deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )

    @seed(4)
    @examples
    @given(case=operation.as_strategy(generation_mode=mode))
    def try_it(case: schemathesis.Case) -> None:
        if tame and isinstance(case.body, dict):
            case.body = within_the_models_limits(case.body)
        excluded = [] if tame else [positive_data_acceptance]
        statuses.append(case.call_and_validate(headers=HEADERS, excluded_checks=excluded, timeout=10).status_code)

    try_it()
    return statuses


def test_every_operation_is_tried(operations):
    assert operations.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("label", OPERATIONS)
def test_good_requests_are_answered(operations, label):
    statuses = run(operations[label], GenerationMode.POSITIVE, tame=True)
    assert set(statuses) == ({404} if "{model}" in label else {200})


@pytest.mark.parametrize("label", [label for label in OPERATIONS if label.startswith("POST")])
def test_what_the_schema_allows_gets_a_documented_answer(operations, label):
    run(operations[label], GenerationMode.POSITIVE, tame=False)


@pytest.mark.parametrize("label", [label for label in OPERATIONS if label != "GET /healthz"])  # takes all there is
def test_bad_requests_are_refused(operations, label):
    run(operations[label], GenerationMode.NEGATIVE, tame=False)
