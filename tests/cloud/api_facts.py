"""What the tests take from Lambda's API description: paths, fields, patterns, codes, limits, and no sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("api_facts.json")
REQUESTS = (  # all that the client sends
    ("get", "/api/v1/instances"), ("get", "/api/v1/instance-types"), ("get", "/api/v1/ssh-keys"),
    ("get", "/api/v1/file-systems"), ("post", "/api/v1/instance-operations/launch"),
    ("post", "/api/v1/instance-operations/terminate"),
)  # fmt: skip
PROSE = {"description", "title", "example", "examples", "default", "writeOnly"}
PROPERTIES = "properties"
JSON = "application/json"


def bare(schema: Any, names: bool = False) -> Any:
    """A schema without its sentences; `names`: the keys of this level are names of fields, whatever they look like."""
    if isinstance(schema, dict):
        return {k: bare(v, not names and k == PROPERTIES) for k, v in schema.items() if names or k not in PROSE}
    return [bare(each) for each in schema] if isinstance(schema, list) else schema


def of(description: dict[str, Any]) -> dict[str, Any]:
    """The facts of a whole API description."""
    requests = {}
    for method, path in REQUESTS:
        operation = description["paths"][path][method]
        body = operation.get("requestBody", {}).get("content", {}).get(JSON, {}).get("schema")
        answers = {code: bare(each["content"][JSON]["schema"]) for code, each in operation["responses"].items()}
        requests[f"{method} {path}"] = {"body": bare(body), "answers": answers}
    schemas = bare(description["components"]["schemas"], names=True)
    wanted = set(mentioned(requests))
    while more := {name for each in wanted for name in mentioned(schemas[each])} - wanted:
        wanted |= more
    said = " ".join(description["info"]["description"].split())
    limits = {"request_gap_s": 1, "launch_gap_s": 12}
    assert "one request per second" in said and "one request per 12 seconds" in said
    return {
        "version": description["info"]["version"], "limits": limits, "requests": requests,
        "components": {"schemas": {name: schemas[name] for name in sorted(wanted)}},
    }  # fmt: skip


def mentioned(value: Any) -> list[str]:
    """Names of the schemas that it refers to."""
    if isinstance(value, dict):
        own = [value["$ref"].rpartition("/")[2]] if isinstance(value.get("$ref"), str) else []
        return own + [name for each in value.values() for name in mentioned(each)]
    return [name for each in value for name in mentioned(each)] if isinstance(value, list) else []


def load() -> dict[str, Any]:
    return json.loads(FACTS.read_text())
