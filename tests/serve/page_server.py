"""The real HTTP application with scripted answers, a network that can fail, and a browser with a person's actions."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import uvicorn
from pydantic import SecretStr
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from nanochat_ray.messages import SamplingParams
from nanochat_ray.serve.api import create_app
from nanochat_ray.serve.settings import HttpSettings
from tests.serve.scripted import TOKENIZER, Scripted, call_tokens, served

CONTEXT = 2048
MARKDOWN = """## A *small* tour

Some **bold** text, `inline code`, ~~old~~ and a [link](https://example.org/a_(b)?q=1), also https://example.org/x.
Names like snake_case_name and 2*3*4 stay.

1. First, with a list in it:
   - inner one
   - inner **two**
2. Second

> A quote,
> of two lines.

| City | River |
| --- | --- |
| Ulm | Danube |

```python
def square(x):
    return x * x  # <b>not bold</b>
```
The end."""
HOSTILE = """<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b>x</b>
[click](javascript:window.hacked=1) [data](data:text/html,x) [quote](https://e.org/"onclick="window.hacked=1)
![picture](https://example.org/p.png)

# <iframe srcdoc="x"></iframe>

| <i>a</i> | b |
| --- | --- |
| <svg onload="window.hacked=1"> | &lt;kept&gt; |

```"><script>window.hacked=1</script>
</code></pre><svg onload="window.hacked=1">
```"""
Mishap = Literal["bytes", "cut", "no_done", "silent"]


class Network:
    """ASGI middleware: notes the headers of posts, and does to answers what networks do."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.mishap: Mishap | None = None
        self.headers: list[dict[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        self.headers.append(dict(scope["headers"]))
        mishap = self.mishap
        sent = 0

        async def through(message: Any) -> None:
            nonlocal sent
            body = message.get("body", b"")
            sent += len(body)
            if mishap == "cut" and sent > 3000:
                raise ConnectionError("the cable was pulled")
            if mishap == "silent" and sent > 3000:
                await asyncio.sleep(3600)
            if mishap == "bytes" and body:
                for k in range(0, len(body), 5):
                    await send({"type": "http.response.body", "body": body[k : k + 5], "more_body": True})
                    await asyncio.sleep(0)
                message = {**message, "body": b""}
            if mishap == "no_done" and body:
                message = {**message, "body": body.replace(b"data: [DONE]\n\n", b"")}
            await send(message)

        await self._app(scope, receive, through)


class PageServer:
    """uvicorn in a thread, which may be stopped and started again on its port.

    `answers` maps words of a question to replies; other questions are echoed.
    """

    def __init__(self, key: str | None = None) -> None:
        self.backend = Scripted()
        self.reset()
        settings = HttpSettings(api_keys=(SecretStr(key),) if key else ())
        self.network = Network(create_app(self.backend, settings))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/"
        self.start()

    def reset(self) -> None:
        models = [served("d6-sft", context=CONTEXT, max_tokens=1024), served("d6-base", chat=False, context=CONTEXT)]
        self.answers: dict[str, str | list[int]] = {
            "calculate": [
                *TOKENIZER.encode("Let me see.\n\n"),
                *call_tokens("12*7", "84"),
                *TOKENIZER.encode("\n\nIt is **84**."),
            ]
        }
        self.backend.__init__(self._reply, models)  # type: ignore[misc]

    def _reply(self, prompt: Sequence[int], params: SamplingParams) -> str | list[int]:
        text = TOKENIZER.decode(prompt)
        if "<|user_start|>" not in text:
            return " and so on."
        question = text.rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
        found = (answer for word, answer in self.answers.items() if word in question)
        return next(found, f"You said: {question}")

    @property
    def prompts(self) -> list[str]:
        """What the model was given, with its control tokens by name."""
        return [TOKENIZER.decode(prompt) for _, prompt, _ in self.backend.asked]

    @property
    def params(self) -> list[SamplingParams]:
        return [params for _, _, params in self.backend.asked]

    def start(self) -> None:
        config = uvicorn.Config(
            self.network, "127.0.0.1", self._port, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@contextmanager
def chromium() -> Iterator[Any]:
    """Headless Chromium. Without one the test is skipped, or fails where NANOCHAT_RAY_NEED_BROWSER says it must be."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        message = f"no browser: chromium {binary}, chromedriver {driver}"
        if os.environ.get("NANOCHAT_RAY_NEED_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,860"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield started
    finally:
        started.quit()


class Person:
    """What somebody does on the page, and what they see."""

    def __init__(self, browser: Any, server: PageServer) -> None:
        self.browser, self.server = browser, server

    def open(self, url: str | None = None) -> None:
        """The page as in a fresh browser."""
        self.browser.get(url or self.server.url)
        self.browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        self.reload()

    def reload(self) -> None:
        self.browser.refresh()
        self.wait(lambda: self.one("#model").is_enabled() or self.all(".problem"))

    def wait(self, condition: Callable[[], Any], seconds: float = 8.0) -> Any:
        until = time.monotonic() + seconds
        while True:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass  # the page has drawn anew in between
            assert time.monotonic() < until, f"nothing within {seconds} s; the page says: {self.one('body').text}"
            time.sleep(0.02)

    def all(self, selector: str) -> list[WebElement]:
        return [node for node in self.browser.find_elements(By.CSS_SELECTOR, selector) if node.is_displayed()]

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Of all matches, at one moment."""
        shown = "[...document.querySelectorAll(arguments[0])].filter(n => n.checkVisibility())"
        return self.browser.execute_script(f"return {shown}.map(n => n.innerText)", selector)

    def click(self, selector: str) -> None:
        self.wait(lambda: self.all(selector))[-1].click()

    def button(self, name: str, within: str = "body") -> None:
        """Press the last button with this name."""

        script = "return [...document.querySelectorAll(arguments[0])].filter(n => n.checkVisibility())"

        def found() -> list[WebElement]:
            buttons = self.browser.execute_script(script, f"{within} button")
            return [one for one in buttons if one.accessible_name.startswith(name)]

        self.browser.execute_script("arguments[0].click()", self.wait(found)[-1])

    def keys(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def write(self, text: str) -> None:
        self.one("#input").send_keys(text)

    def say(self, text: str, wait: bool = True) -> None:
        self.write(text + Keys.ENTER)
        if wait:
            self.idle()

    def idle(self) -> None:
        """Until nothing is being written."""
        self.wait(lambda: not self.all("#stop"))

    @property
    def questions(self) -> list[str]:
        return self.texts(".bubble")

    @property
    def replies(self) -> list[str]:
        return self.texts(".answer .parts")

    @property
    def chats(self) -> list[str]:
        return self.texts("#chats .open")

    @property
    def field(self) -> str:
        return self.one("#input").get_property("value")

    def console(self) -> str:
        return "\n".join(line["message"] for line in self.browser.get_log("browser"))

    def screen(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def system(self, **features: str) -> None:
        """What the operating system prefers, such as prefers_color_scheme."""
        pairs = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": pairs})
