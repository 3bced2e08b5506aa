"""The chat page in a real browser against the real HTTP application: what a person does and what they see."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

from nanochat_ray.serve.backend import EngineFailed, Overloaded

if not os.environ.get("NANOCHAT_RAY_NEED_BROWSER"):
    pytest.importorskip("selenium", reason="no selenium, which drives the browser")
from tests.serve.page_server import CONTEXT, HOSTILE, MARKDOWN, By, Keys, PageServer, Person, chromium

SLOW = " ".join(f"word{n}" for n in range(60))


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    started = PageServer()
    yield started
    started.stop()


@pytest.fixture
def person(browser, server) -> Iterator[Person]:
    server.reset()
    server.network.mishap = None
    server.network.headers.clear()
    someone = Person(browser, server)
    someone.open()
    someone.console()
    yield someone
    assert "Content Security Policy" not in (said := someone.console()) and "Uncaught" not in said


def test_answers_stream_and_the_conversation_goes_along(person, server):
    server.answers["slowly"] = SLOW
    server.backend.step_s = 0.004
    person.write("slowly" + Keys.ENTER)
    person.wait(lambda: "word3" in "".join(person.replies))
    assert SLOW not in person.replies and person.all("#stop")
    person.idle()
    assert person.replies == [SLOW]
    assert re.fullmatch(r"[\d.]+ tokens/s · first token [\d.]+ m?s · \d+ tokens · d6-sft", person.texts(".facts")[0])
    person.say("Line one" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "line two")
    assert person.questions == ["slowly", "Line one\nline two"]
    assert f"slowly<|user_end|><|assistant_start|>{SLOW}<|assistant_end|>" in server.prompts[1]
    assert server.prompts[1].endswith("<|user_start|>Line one\nline two<|user_end|><|assistant_start|>")
    sessions = {headers[b"x-session-id"] for headers in server.network.headers}
    assert len(sessions) == 1 and all(sessions)


def test_stop_keeps_what_is_there_and_frees_the_server(person, server):
    server.answers["slowly"] = SLOW
    server.backend.step_s = 0.01
    person.say("slowly", wait=False)
    person.wait(lambda: "word1" in "".join(person.replies))
    person.keys(Keys.ESCAPE)
    person.idle()
    kept = person.replies[0]
    assert SLOW.startswith(kept.strip()) and kept != SLOW
    assert person.texts(".facts")[0].startswith("stopped")
    person.wait(lambda: server.backend.closed == 1)
    server.backend.step_s = 0.0
    person.say("and?")
    assert f"<|assistant_start|>{kept[:5]}" in server.prompts[1]


def test_stop_before_the_first_word_gives_the_text_back(person, server):
    server.backend.step_s = 30.0
    person.say("A question worth keeping", wait=False)
    person.wait(lambda: server.backend.opened == 1)
    person.click("#stop")
    person.idle()
    assert person.field == "A question worth keeping"
    assert person.questions == [] and person.chats == []


def test_regenerate_and_edit_replace_what_follows(person, server):
    for text in ("one", "two", "three"):
        person.say(text)
    seeds = {params.seed for params in server.params}
    assert len(seeds) == 3, "each request has a seed of its own"
    server.answers["two"] = "Another answer."
    second = person.browser.find_elements(By.CSS_SELECTOR, ".turn")[1]
    second.find_element(By.CSS_SELECTOR, '[aria-label="Regenerate answer"]').click()
    person.wait(lambda: len(person.questions) == 2)
    person.idle()
    assert person.replies == ["You said: one", "Another answer."]

    person.write("half a thought")
    person.button("Edit message", within=".turn:first-child")
    assert person.field == "one" and person.all("#editing")
    person.keys(Keys.ESCAPE)
    assert person.field == "half a thought" and not person.all("#editing")
    person.button("Edit message", within=".turn:first-child")
    person.keys(" more" + Keys.ENTER)
    person.wait(lambda: person.replies == ["You said: one more"])
    person.idle()
    assert person.questions == ["one more"] and person.field == "half a thought"


def test_arrow_up_edits_the_last_message(person):
    person.say("one")
    person.keys(Keys.ARROW_UP)
    assert person.field == "one"
    person.keys(" and two" + Keys.ENTER)
    person.wait(lambda: person.replies == ["You said: one and two"])


def test_conversations_stay_in_the_browser(person, server):
    person.say("First of all")
    person.keys(Keys.CONTROL + Keys.SHIFT + "n")
    assert person.questions == []
    person.say("Second thing")
    assert person.chats == ["Second thing", "First of all"]
    person.reload()
    assert person.questions == ["Second thing"] and person.replies == ["You said: Second thing"]
    person.button("First of all")
    assert person.replies == ["You said: First of all"]

    person.button("Rename First of all")
    person.keys(Keys.CONTROL + "a" + Keys.NULL + "Better name" + Keys.ENTER)
    person.wait(lambda: "Better name" in person.chats)
    person.button("Delete Second thing")
    person.reload()
    assert person.chats == ["Better name"] and person.questions == ["First of all"]
    person.button("Delete Better name")
    assert person.chats == [] and person.questions == []
    person.button("Undo")
    assert person.chats == ["Better name"] and person.questions == ["First of all"]
    person.say("Still there?")
    assert "First of all" in server.prompts[-1]


def test_tabs_do_not_write_over_each_other(person):
    person.say("in the first tab")
    first = person.browser.current_window_handle
    person.browser.switch_to.new_window("tab")
    try:
        person.browser.get(person.server.url)
        person.wait(lambda: person.chats == ["in the first tab"])
        person.say("in the second tab")
    finally:
        person.browser.close()
        person.browser.switch_to.window(first)
    person.wait(lambda: person.chats == ["in the second tab", "in the first tab"])
    person.say("and on")
    person.button("in the second tab")
    assert person.replies == ["You said: in the second tab"]


def test_two_conversations_are_answered_at_once(person, server):
    server.answers["slowly"] = SLOW
    server.backend.step_s = 0.003
    person.say("slowly", wait=False)
    person.button("New chat")
    person.say("quick", wait=False)
    person.wait(lambda: person.replies == ["You said: quick"])
    assert server.backend.opened == 2 and server.backend.closed < 2
    person.wait(lambda: server.backend.closed == 2)
    person.button("slowly")
    person.wait(lambda: person.replies == [SLOW])


def test_controls_and_commands_reach_the_server(person, server):
    person.say("/temperature 0.25")
    person.say("/topk 0")
    person.say("/topk 201")
    person.say("/nonsense 5")
    said = person.texts(".console")
    assert "Temperature: 0.25" in said[0] and "Top-k: 0" in said[1] and "from 0 to 200" in said[2]
    assert "Unknown command /nonsense" in said[3]
    assert person.field == "/nonsense 5" and server.backend.asked == []
    person.one("#input").clear()

    person.click("#settingsOpen")
    for name, value in (("top_p", "0.9"), ("max_tokens", "9"), ("seed", "123"), ("temperature", "7")):
        person.one(f"#set-{name}").send_keys(Keys.CONTROL + "a" + Keys.NULL + value + Keys.TAB)
    assert "from 0 to 2" in "".join(person.texts(".wrong"))
    person.one("#system").send_keys("You are a ferry." + Keys.TAB)
    person.click("#tools")
    person.keys(Keys.ESCAPE)
    person.say("hello there")
    asked = server.params[0]
    assert (asked.temperature, asked.top_k, asked.top_p) == (0.25, 0, 0.9) or asked.top_k is None
    assert (asked.max_tokens, asked.seed, asked.use_tools) == (9, 123, False)
    assert "<|user_start|>You are a ferry.\n\nhello there<|user_end|>" in server.prompts[0]
    assert person.replies == ["You said:"] and person.texts(".facts")[0].startswith("stopped at the longest answer")
    person.reload()
    assert person.one("#set-seed").get_property("value") == "123"
    person.say("/clear")
    assert person.questions == [] and len(person.chats) == 1


def test_a_base_model_goes_on_with_text(person, server):
    person.one("#model").send_keys("d6-base")
    person.wait(lambda: "base model" in person.one("#welcomeText").text)
    person.say("It began")
    assert server.prompts == ["<|bos|>It began"]
    assert person.texts(".answer.base .given") == ["It began"] and person.replies == [" and so on."]
    person.button("Go on writing")
    person.wait(lambda: person.replies == [" and so on. and so on."])
    assert server.prompts[1] == "<|bos|>It began and so on."
    person.idle()
    server.backend.failure = Overloaded("Full.", retry_after_s=1)
    person.button("Go on writing")
    person.wait(lambda: person.texts(".problem"))
    server.backend.failure = None
    person.button("Try again")
    person.wait(lambda: person.replies == [" and so on. and so on. and so on."])
    person.idle()
    person.one("#model").send_keys("d6-sft")
    person.say("hello")
    assert "It began" not in server.prompts[-1]


def test_tool_calls_fold_and_go_back_as_calls(person, server):
    person.say("calculate this")
    assert "Calculator" in person.texts("details.tool summary")[0] and "12*7 = 84" in person.texts("details.tool")[0]
    assert person.texts("details.tool .inside") == []
    person.click("details.tool summary")
    assert person.texts("details.tool pre") == ["12*7", "84"]
    assert person.one(".prose strong").text == "84"
    person.say("thanks")
    call = "<|python_start|>12*7<|python_end|><|output_start|>84<|output_end|>"
    assert f"Let me see.\n\n{call}\n\nIt is **84**.<|assistant_end|>" in server.prompts[1]


def test_markdown_and_copying(person, server):
    server.answers["tour"] = MARKDOWN
    person.say("a tour")
    prose = ".answer .prose "
    assert person.one(prose + "h3 em").text == "small" and person.one(prose + "strong").text == "bold"
    assert person.one(prose + "p code").text == "inline code" and person.one(prose + "del").text == "old"
    links = person.all(prose + "a")
    addresses = [link.get_attribute("href") for link in links]
    assert addresses == ["https://example.org/a_(b)?q=1", "https://example.org/x"]
    assert {link.get_attribute("rel") for link in links} == {"noopener noreferrer"}
    assert "snake_case_name and 2*3*4 stay." in person.one(prose + "p").text
    assert person.texts(prose + "> ol > li > ul > li") == ["inner one", "inner two"]
    assert len(person.all(prose + "> ol > li")) == 2
    assert person.one(prose + "blockquote").text == "A quote,\nof two lines."
    assert person.texts(prose + "th") == ["City", "River"] and person.texts(prose + "td") == ["Ulm", "Danube"]
    code = "def square(x):\n    return x * x  # <b>not bold</b>"
    assert person.texts(prose + "pre code") == [code]
    assert person.texts(prose + "> p:last-child") == ["The end."]
    person.button("Copy code")
    person.one("#input").send_keys(Keys.CONTROL + "v")
    person.wait(lambda: person.field == code)
    person.one("#input").clear()
    person.button("Copy answer")
    person.one("#input").send_keys(Keys.CONTROL + "v")
    person.wait(lambda: person.field == MARKDOWN)


def test_no_answer_can_bring_html_along(person, server):
    server.answers["html"] = HOSTILE
    person.say('html <img src=x onerror="window.hacked=1">')
    assert person.all("#thread figure.code")
    strange = person.browser.find_elements(By.CSS_SELECTOR, "#thread :is(img, script, iframe, b, i, u)")
    assert strange == []
    hrefs = [link.get_attribute("href") for link in person.browser.find_elements(By.CSS_SELECTOR, "#thread a")]
    assert all(href.startswith("https://") for href in hrefs)
    attributes = "return [...thread.querySelectorAll('*')].flatMap(n => [...n.attributes]).map(a => a.name)"
    assert not [name for name in person.browser.execute_script(attributes) if name.startswith("on")]
    assert '<img src=x onerror="window.hacked=1"><script>' in person.replies[0] and "&lt;kept&gt;" in person.replies[0]
    assert "<img src=x" in person.questions[0] and "<img src=x" in person.chats[0]
    person.reload()
    assert person.browser.execute_script("return window.hacked") is None


@pytest.mark.parametrize("mark", ["*", "[", "> ", "`a``b```", "- ", "|-", "_a *b ", "**a", "[a](", "1. a\n  ", "# "])
def test_strange_markdown_does_not_hang_the_page(person, mark):
    text = mark * (12_000 // len(mark)) + "\n\nthe end"
    store = """
        const answer = {parts: [{type: "text", text: arguments[0]}], status: "done"};
        const turns = [{id: "t", text: "q", base: false, error: null, answer}];
        const chat = {id: "x", title: "strange", updated: 1, from: 0, turns};
        localStorage.setItem("nanochat-ray/chat/x", JSON.stringify(chat));"""
    person.browser.execute_script(store, text)
    person.reload()
    person.button("strange")
    shown = person.wait(lambda: person.one(".prose").get_property("textContent"))
    assert re.sub(r"\W|\d", "", shown).startswith(re.sub(r"\W|\d", "", text)[:5000]) and "the end" in shown


def test_events_may_be_split_anywhere(person, server):
    answer = "A wave \N{WATER WAVE}, ümlaut, 漢字, and the end."
    server.answers["wave"] = answer
    server.network.mishap = "bytes"
    person.say("wave")
    assert person.replies == [answer] and person.texts(".problem") == []


def test_a_busy_server_says_when_and_a_retry_is_one_click(person, server):
    person.say("before")
    server.backend.failure = Overloaded("64 requests wait already.", retry_after_s=7)
    person.say("now please")
    problem = person.texts(".problem")[0]
    assert "The server is busy." in problem and "64 requests wait already." in problem
    assert re.search(r"Try again \(asked to wait [67] s\)", problem)
    server.backend.failure = None
    person.button("Try again")
    person.wait(lambda: person.replies == ["You said: before", "You said: now please"])
    person.idle()
    assert person.texts(".problem") == [] and person.questions == ["before", "now please"]


def test_a_failed_question_is_not_part_of_the_conversation(person, server):
    server.backend.failure = Overloaded("Full.", retry_after_s=1)
    person.say("lost")
    server.backend.failure = None
    person.say("found")
    assert "lost" not in server.prompts[-1] and person.replies[-1] == "You said: found"
    server.backend.failure = Overloaded("Full.", retry_after_s=1)
    person.button("Regenerate answer")
    person.wait(lambda: person.texts(".problem")[1:])
    person.idle()
    assert person.replies[-1] == "You said: found", "the old answer is still there"
    person.reload()
    assert person.replies[-1] == "You said: found" and len(person.texts(".problem")) == 2


def test_a_server_that_is_gone_and_comes_back(person, server):
    server.stop()
    try:
        person.say("anybody?")
        assert "cannot be reached" in person.texts(".problem")[0]
    finally:
        server.start()
    person.button("Try again")
    person.wait(lambda: person.replies == ["You said: anybody?"])


@pytest.mark.parametrize("mishap", ["cut", "no_done", "silent", "engine"])
def test_a_stream_that_breaks_keeps_its_part_and_is_marked(person, server, mishap):
    server.answers["slowly"] = SLOW
    server.backend.step_s = 0.001  # a browser may drop what came just before a connection broke
    if mishap == "engine":
        server.backend.failure, server.backend.fail_at = EngineFailed("its process died"), 40
    else:
        server.network.mishap = mishap
    person.browser.execute_script("document.documentElement.dataset.silenceS = 1")
    person.say("slowly")
    kept = person.replies[0]
    assert kept.startswith("word0 word1") and SLOW.startswith(kept.strip())
    assert "The answer was cut off." in person.texts(".problem")[0] and person.texts(".facts")[0].startswith("cut off")
    person.reload()
    assert person.replies == [kept]
    server.backend.failure = server.network.mishap = None
    person.button("Try again")
    person.wait(lambda: person.replies == [SLOW])
    person.idle()
    assert person.texts(".problem") == [] and person.questions == ["slowly"]


def test_a_page_closed_in_the_middle_keeps_what_there_was(person, server):
    server.answers["slowly"] = SLOW
    server.backend.step_s = 0.01
    person.say("slowly", wait=False)
    person.wait(lambda: "word4" in "".join(person.replies))
    person.reload()
    kept = person.replies[0]
    assert kept.startswith("word0 word1") and SLOW.startswith(kept.strip()) and kept != SLOW
    assert "The answer was cut off." in person.texts(".problem")[0] and person.texts(".facts")[0].startswith("cut off")
    person.wait(lambda: server.backend.closed == 1)
    server.backend.step_s = 0.0
    person.button("Try again")
    person.wait(lambda: person.replies == [SLOW])


def test_a_conversation_longer_than_the_context_can_leave_out_its_beginning(person, server):
    server.answers["story"] = "x" * 700
    for n in range(2):
        person.say(f"story {n}")
    person.say("y" * (CONTEXT - 900))
    assert "more than the model can read" in person.texts(".problem")[0]
    person.button("Leave out older turns")
    person.wait(lambda: len(person.replies) == 3)
    person.idle()
    assert "story 0" not in server.prompts[-1] and "story 1" in server.prompts[-1]
    assert person.texts(".divider") == ["The model does not read what is above."]


def test_a_server_with_keys_asks_for_one(person, browser):
    guarded = PageServer(key="a-key-of-sixteen-or-more")
    try:
        person.open(guarded.url)
        assert "asks for an API key" in person.texts("#banner")[0]
        person.one("#banner input").send_keys("wrong-but-long-enough" + Keys.ENTER)
        person.wait(lambda: "not one of this server's" in person.texts("#banner")[0])
        person.one("#banner input").send_keys("a-key-of-sixteen-or-more" + Keys.ENTER)
        person.wait(lambda: not person.texts(".problem"))
        person.say("hello")
        assert person.replies == ["You said: hello"]
        assert "sixteen" not in browser.execute_script("return JSON.stringify(localStorage)")
    finally:
        guarded.stop()


def test_a_full_storage_is_said_and_the_chat_goes_on(person):
    fill = """
        for (let size = 1 << 21, k = 0; size; k += 1)
            try { localStorage.setItem("filler" + k, "x".repeat(size)) } catch { size >>= 1 }"""
    person.browser.execute_script(fill)
    person.say("hello")
    assert person.replies == ["You said: hello"] and "storage is full" in person.texts("#notices")[0]
    person.button("New chat")
    person.button("hello")
    assert person.replies == ["You said: hello"]


def test_keyboard_and_names(person):
    person.say("hello")
    person.keys(Keys.SHIFT + Keys.TAB)
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert person.browser.execute_script(outline) == "solid"
    nameless = [
        node.get_attribute("outerHTML")
        for node in person.browser.find_elements(By.CSS_SELECTOR, "button, input, textarea, select")
        if node.is_displayed() and not node.accessible_name
    ]
    assert nameless == []
    person.wait(lambda: person.one("#live").get_property("textContent") == "You said: hello")
    person.one("body").send_keys("/")
    assert person.browser.switch_to.active_element == person.one("#input")


def test_phone_dark_and_calm(person):
    person.screen(360, 740)
    person.system(prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    try:
        person.reload()
        person.server.answers["tour"] = MARKDOWN + "\n\n```\n" + "wide " * 60 + "\n```\n" + "w" * 300
        person.say("tour " + "x" * 90)
        assert person.browser.execute_script("return document.documentElement.scrollWidth") == 360
        assert person.browser.execute_script("return scroller.scrollWidth <= scroller.clientWidth")
        assert not person.all("#sidebar")
        person.button("Conversations")
        person.wait(lambda: person.all("#sidebar"))
        person.keys(Keys.ESCAPE)
        person.wait(lambda: not person.all("#sidebar"))

        def brightness() -> int:
            return int(re.findall(r"\d+", person.one("body").value_of_css_property("background-color"))[0])

        assert brightness() < 60
        person.click("#theme")
        assert brightness() > 200
        person.reload()
        assert brightness() > 200
        durations = "return getComputedStyle(document.querySelector('#sidebar')).transitionProperty"
        assert person.browser.execute_script(durations) == "none"
    finally:
        person.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        person.system()
