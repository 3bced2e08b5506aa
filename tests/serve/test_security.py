"""Who is answered: without keys this machine alone, whatever the bind; with keys their holders; the page's headers."""

from __future__ import annotations

import base64
import hashlib
import re

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr, ValidationError

from nanochat_ray.serve import security
from nanochat_ray.serve.api import create_app
from nanochat_ray.serve.security import is_local_host, is_loopback
from nanochat_ray.serve.settings import HttpSettings
from tests.serve.scripted import Scripted, running

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
KEY, OTHER = "a-key-that-is-long-enough", "another-key-that-is-long"
KEYS = HttpSettings(api_keys=(SecretStr(OTHER), SecretStr(KEY)))
PRIVATE = ["/v1/models", "/v1/models/tiny-sft", "/stats", "/health", "/readyz", "/openapi.json", "/nothing"]
OPEN = ["/", "/logo.svg", "/healthz"]


def client_from(peer: str, settings: HttpSettings | None = None, host: str = "localhost") -> TestClient:
    app = create_app(Scripted(), settings)
    return TestClient(app, base_url=f"http://{host}", client=(peer, 40_000), raise_server_exceptions=False)


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_without_keys_this_machine_is_answered(peer):
    client = client_from(peer)
    assert client.post(CHAT, json=HI).status_code == 200
    assert all(client.get(path).status_code == 200 for path in OPEN)


@pytest.mark.parametrize(
    "peer", ["10.0.0.5", "192.168.1.9", "2001:db8::1", "::ffff:10.0.0.5", "0.0.0.0", "testclient", ""]
)
def test_without_keys_nobody_else_is(peer):
    client = client_from(peer)
    for path in PRIVATE + OPEN:
        assert client.get(path).status_code == 403, path
    response = client.post(CHAT, json=HI)
    assert response.status_code == 403 and response.json()["error"]["type"] == "permission_error"
    assert client.post("/chat/completions", json=HI).json()["detail"]


def test_a_peer_without_an_address_is_not_answered():
    app = create_app(Scripted())

    async def without_client(scope, receive, send):
        await app({**scope, "client": None}, receive, send)

    client = TestClient(without_client, base_url="http://localhost")
    assert client.get("/").status_code == 403


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Real-IP", "x-forwarded-host"])
def test_without_keys_no_proxy_is_answered(header):
    assert client_from("127.0.0.1").get("/", headers={header: "127.0.0.1"}).status_code == 403
    bearer = {"Authorization": f"Bearer {KEY}", header: "203.0.113.9"}
    assert client_from("127.0.0.1", KEYS).get("/stats", headers=bearer).status_code == 200


def test_behind_a_proxy_on_this_machine_over_a_real_socket():
    """uvicorn believes a local proxy's X-Forwarded-For and puts it in the peer's place, in both directions."""
    with running(create_app(Scripted())) as url:
        assert httpx.get(f"{url}/healthz").status_code == 200
        for told in ("203.0.113.9", "127.0.0.1"):
            assert httpx.get(f"{url}/healthz", headers={"X-Forwarded-For": told}).status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1"]
)
def test_without_keys_another_name_is_not_answered(host):
    assert client_from("127.0.0.1").get("/", headers={"host": host}).status_code == 403
    assert client_from("127.0.0.1", KEYS).get("/", headers={"host": host}).status_code == 200


def test_names_of_this_machine():
    for name in ("localhost", "LOCALHOST:8000", "localhost.", "a.localhost:1", "127.0.0.1:80", "[::1]:8000", "[::1]"):
        assert is_local_host(name), name
    others = ("", "local", "[::2]", "0.0.0.0", "localhost:80:90", "localhost:x", "[::1", "[::1]x", "[::1]x:80", "::1")
    for name in others:
        assert not is_local_host(name), name
    assert not is_loopback("::ffff:127.0.0.1.evil") and not is_loopback("localhost") and is_loopback("::1%lo")


@pytest.mark.parametrize("peer", ["127.0.0.1", "203.0.113.9"])
def test_with_keys_their_holders_are_answered(peer):
    client = client_from(peer, KEYS, host="chat.example.org")
    for key in (KEY, OTHER):
        headers = {"Authorization": f"Bearer {key}"}
        assert client.post(CHAT, json=HI, headers=headers).status_code == 200
        assert client.get("/stats", headers=headers).status_code == 200
    wrong = [
        {}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {KEY} {KEY}"},
        {"Authorization": b"Bearer \xff\xfe"}, {"X-Api-Key": KEY},
    ]  # fmt: skip
    for headers in wrong:
        for path in PRIVATE:
            response = client.get(path, headers=headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer", path
        response = client.post(CHAT, json=HI, headers=headers)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in response.text
    assert all(client.get(path).status_code == 200 for path in OPEN), "a person can open the page"
    assert client.post("/", json=HI).status_code == 405 and client.get("//v1/models").status_code == 401


def test_the_openai_client_and_a_wrong_key():
    with running(create_app(Scripted(), KEYS)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
        assert client.models.list().data[0].id == "tiny-sft"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()


def test_keys_are_compared_by_digest_and_all_of_them(monkeypatch):
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(security.hmac, "compare_digest", compare)
    client = client_from("127.0.0.1", KEYS)
    for key in (KEY, OTHER, "x", "x" * 500):
        client.get("/stats", headers={"Authorization": f"Bearer {key}"})
    assert compared == [(32, 32)] * 8


def test_keys_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# mine\n{KEY}\n\n{OTHER}\n")
    client = client_from("203.0.113.9", HttpSettings(api_keys_file=str(file)))
    assert client.get("/stats", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert client.get("/stats").status_code == 401
    with pytest.raises(FileNotFoundError, match="one key per line"):
        create_app(Scripted(), HttpSettings(api_keys_file=str(tmp_path / "none")))
    file.write_text("# none yet\n")
    with pytest.raises(ValueError, match="has no key"):
        create_app(Scripted(), HttpSettings(api_keys_file=str(file)))
    file.write_text("short\n")
    with pytest.raises(ValueError, match="at least 16") as failed:
        create_app(Scripted(), HttpSettings(api_keys_file=str(file)))
    assert "short\n" not in str(failed.value)


@pytest.mark.parametrize("key", ["", "short", "with a space in the middle", "ümlaut-ümlaut-ümlaut"])
def test_keys_that_protect_nothing_are_refused(key):
    with pytest.raises(ValidationError, match="at least 16 visible ASCII characters"):
        HttpSettings(api_keys=(SecretStr(key),))


def test_settings_do_not_show_keys():
    assert KEY not in repr(KEYS) + str(KEYS.model_dump()) + KEYS.model_dump_json()


def test_cors_is_closed_unless_opened():
    asks = {"Origin": "https://chat.example.org", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}  # fmt: skip
    closed = client_from("127.0.0.1")
    assert closed.options(CHAT, headers=asks).status_code == 405
    assert "access-control-allow-origin" not in closed.get("/v1/models", headers={"Origin": asks["Origin"]}).headers
    open_to = KEYS.model_copy(update={"allow_origins": (asks["Origin"],)})
    client = client_from("203.0.113.9", open_to, host="api.example.org")
    preflight = client.options(CHAT, headers=asks)
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == asks["Origin"]
    refused = client.post(CHAT, json=HI, headers={"Origin": asks["Origin"]})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == asks["Origin"]
    other = client.options(CHAT, headers={**asks, "Origin": "https://evil.example"})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


def test_origins_that_open_too_much_or_nothing_are_refused():
    for origin in ("chat.example.org", "https://example.org/", "https://*.example.org", "null"):
        with pytest.raises(ValidationError, match="an origin is scheme, host"):
            HttpSettings(allow_origins=(origin,))
    with pytest.raises(ValueError, match="without keys"):
        create_app(Scripted(), HttpSettings(allow_origins=("*",)))
    create_app(Scripted(), KEYS.model_copy(update={"allow_origins": ("*",)}))


@pytest.mark.parametrize("root", ["", "/chat"])
def test_open_paths_below_a_prefix(root):
    """Serve names the application's prefix in root_path."""
    app = create_app(Scripted(), KEYS)

    async def mounted(scope, receive, send):
        await app({**scope, "root_path": root, "path": root.rstrip("/") + scope["path"]}, receive, send)

    client = TestClient(mounted, base_url="http://localhost", client=("203.0.113.9", 1))
    assert [client.get(path).status_code for path in OPEN] == [200] * 3
    assert [client.get(path).status_code for path in PRIVATE] == [401] * len(PRIVATE)


def test_a_simple_request_of_another_sites_page_does_nothing():
    """Browsers send these three types without asking first."""
    backend = Scripted()
    client = TestClient(create_app(backend), base_url="http://localhost", client=("127.0.0.1", 1))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        body = '{"messages":[{"role":"user","content":"hi"}]}'
        assert client.post(CHAT, content=body, headers={"content-type": kind}).status_code == 415
    assert backend.opened == 0


def test_the_page_runs_its_own_scripts_only():
    response = client_from("127.0.0.1").get("/")
    assert response.headers["content-type"].startswith("text/html") and "<!-- include" not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(rule.strip().partition(" ")[::2] for rule in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'" and "unsafe" not in policy["script-src"] + policy["style-src"]
    for tag in ("script", "style"):
        blocks = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", response.text, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        assert hashes and policy[f"{tag}-src"].split() == [f"'sha256-{digest}'" for digest in hashes]
    # What the policy would block: attributes with code or style, files from elsewhere.
    markup = re.sub(r"<(script|style).*?</\1>", "", response.text, flags=re.DOTALL)
    assert not re.search(r"\s(on\w+|style)=|(src|href)=\"(https?:)?//", markup)
    logo = client_from("127.0.0.1").get("/logo.svg")
    assert logo.headers["content-type"] == "image/svg+xml"
    assert "default-src 'none'" in logo.headers["content-security-policy"]
