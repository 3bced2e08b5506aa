// The conversation on the page and the requests that make it grow. Several conversations may be answered at once.

const STOPPED = Symbol("stopped by the person");
const running = new Map(); // conversation id -> {controller, turn}
let current = newConversation();
let editing = null; // the turn that the message field is about
let draft = ""; // what stood in the field before that
let following = true; // the end of the thread stays in view
let consoleLines = []; // {after: id of a turn or null, node}
let modelsTimer = 0;

// ---- the thread

function showThread() {
  const nodes = [];
  const addLines = (id) => nodes.push(...consoleLines.filter(({ after }) => after === id).map(({ node }) => node));
  addLines(null);
  current.turns.forEach((turn, k) => {
    if (k === current.from && k > 0) nodes.push(el("p", { class: "divider" }, "The model does not read what is above."));
    const view = viewOf(turn);
    view.update();
    view.root.classList.toggle("replaced", editing !== null && k >= current.turns.indexOf(editing));
    nodes.push(view.root);
    addLines(turn.id);
  });
  page.thread.replaceChildren(...nodes);
  page.welcome.hidden = nodes.length > 0;
  page.editing.hidden = editing === null;
  showComposer();
  follow();
}

function showTitle() {
  document.title = current.turns.length ? `${current.title} · nanochat-ray` : "nanochat-ray";
}

function addConsoleLine(text) {
  consoleLines.push({ after: current.turns.at(-1)?.id ?? null, node: el("pre", { class: "console" }, text) });
  following = true;
  showThread();
}

function follow() {
  if (following) page.scroller.scrollTop = page.scroller.scrollHeight;
  page.toEnd.hidden = following;
}

const waiting = new Set(); // turns to draw with the next frame

function drawSoon(turn) {
  if (!waiting.size) {
    requestAnimationFrame(() => {
      for (const one of waiting) viewOf(one).update();
      waiting.clear();
      follow();
    });
  }
  waiting.add(turn);
}

function openConversation(id) {
  const found = loadConversation(id);
  if (!found) return void showSidebar();
  current = found;
  arrive();
  if (narrow.matches) toggleSidebar(false);
}

function startConversation() {
  current = newConversation();
  arrive();
  if (narrow.matches && document.body.classList.contains("sidebar-open")) toggleSidebar(false);
  focusInput();
}

/** Not on a phone, where it would bring up the keyboard. */
function focusInput() {
  if (!narrow.matches) page.input.focus();
}

function arrive() {
  if (editing) leaveEditing();
  consoleLines = [];
  following = true;
  try {
    sessionStorage.setItem(`${PREFIX}open`, current.id);
  } catch {
    // then a reload begins with a new conversation
  }
  showThread();
  showSidebar();
  showTitle();
}

function placeOf(turn) {
  const owners = [current, ...[...running.keys()].map((id) => changed.get(id))];
  const conversation = owners.find((one) => one?.turns.includes(turn)) ?? null;
  return { conversation, index: conversation ? conversation.turns.indexOf(turn) : -1 };
}

// ---- sending

function send() {
  const line = page.input.value;
  if (!line.trim() || running.has(current.id)) return;
  if (line.startsWith("/")) {
    if (obey(line.trim())) setInput("");
    return;
  }
  if (!currentModel()) return void loadModels();
  const replaced = editing ? current.turns.splice(current.turns.indexOf(editing)) : [];
  if (editing) leaveEditing();
  setInput(draft);
  draft = "";
  const base = currentModel().chat === false;
  const turn = newTurn(base ? line : line.trim(), base); // a text to go on with may end in a blank or a new line
  current.turns.push(turn);
  run(current, turn, { replaced });
}

/** Answer a turn again. What follows it goes, but only when the new answer begins. */
function regenerate(turn, text = turn.text) {
  const { conversation, index } = placeOf(turn);
  if (!conversation || running.has(conversation.id) || !currentModel()) return;
  if (editing) cancelEditing();
  const replaced = conversation.turns.splice(index);
  const again = newTurn(text, currentModel().chat === false);
  conversation.turns.push(again);
  run(conversation, again, { replaced });
}

/** Let a base model go on where it stopped. */
function continueTurn(turn) {
  const { conversation } = placeOf(turn);
  if (!conversation || running.has(conversation.id)) return;
  if (currentModel()?.chat !== false) return void notice("goOn", "Choose a base model to go on with a text.", { ms: 6000 });
  run(conversation, turn, { goOn: true });
}

function leaveOutOlder(turn) {
  const { conversation, index } = placeOf(turn);
  conversation.from += Math.ceil((index - conversation.from) / 2);
  regenerate(turn, turn.error?.text ?? turn.text);
}

function requestOf(conversation, turn, model, seed) {
  const shared = { model: model.id, ...samplingOf(seed), stream: true, stream_options: { include_usage: true } };
  if (turn.base) return { ...shared, prompt: turn.text + (turn.answer ? plainText(turn.answer) : "") };
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const past of conversation.turns.slice(conversation.from, conversation.turns.indexOf(turn))) {
    if (past.base || isEmpty(past.answer)) continue; // so that questions and answers take turns
    const { parts } = past.answer;
    messages.push({ role: "user", content: past.text });
    const calls = parts.some((part) => part.type !== "text");
    messages.push({ role: "assistant", content: plainText(past.answer), ...(calls && { parts }) });
  }
  messages.push({ role: "user", content: turn.text });
  return { ...shared, messages, use_tools: settings.tools ?? true };
}

async function run(conversation, turn, { replaced = [], goOn = false }) {
  const model = currentModel();
  const seed = setting("seed") ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const body = requestOf(conversation, turn, model, seed);
  const parts = goOn ? turn.answer.parts : [];
  const answer = { parts, status: "writing", model: model.id, seed, ttftMs: null, tokens: null, tokensPerS: null };
  const controller = new AbortController();
  conversation.from = Math.min(conversation.from, conversation.turns.indexOf(turn));
  Object.assign(turn, { answer, error: null });
  conversation.updated = Date.now();
  running.set(conversation.id, { controller, turn });
  following = true;
  begin(conversation);
  const take = taker(conversation, turn, answer, performance.now());
  let failure = null;
  try {
    await streamAnswer(turn.base ? "v1/completions" : "v1/chat/completions", body, conversation.id, controller, take);
    const full = answer.prompt + answer.tokens >= model.context;
    answer.status = answer.finish !== "length" ? "done" : full ? "full" : "length";
  } catch (reason) {
    answer.status = reason === STOPPED ? "stopped" : "cut";
    if (reason !== STOPPED) failure = reason instanceof ServerError ? reason.record() : { kind: "cut", message: String(reason) };
  }
  running.delete(conversation.id);
  if (changed.get(conversation.id) !== conversation) return; // deleted while it was answered
  turn.error = failure && { ...failure, goOn };
  if (isEmpty(answer) && ["stopped", "cut"].includes(answer.status)) undo(conversation, turn, replaced);
  if (failure?.status === 404) loadModels();
  end(conversation, turn);
}

function begin(conversation) {
  saveConversation(conversation);
  if (conversation === current) showThread();
  showSidebar();
  showTitle();
}

function end(conversation, turn) {
  saveConversation(conversation);
  if (!conversation.turns.length) deleteConversation(conversation.id);
  if (conversation === current) {
    showThread();
    showTitle();
    if (turn.answer && !turn.error) say(plainText(turn.answer).slice(0, 2000));
  }
  showSidebar();
}

/** What takes the chunks of a stream into `answer`. */
function taker(conversation, turn, answer, begun) {
  let first = 0;
  let saved = begun;
  return (chunk) => {
    const now = performance.now();
    if (chunk.usage) {
      const { completion_tokens: tokens, prompt_tokens: prompt, prompt_tokens_details: details } = chunk.usage;
      Object.assign(answer, { tokens, prompt, cached: details?.cached_tokens ?? 0 });
      const span = answer.lastAt - first; // too short to measure with if the answer came in one go
      if (tokens) answer.tokensPerS = span > 100 ? (1000 * (tokens - 1)) / span : (1000 * tokens) / (answer.lastAt - begun);
      delete answer.lastAt;
    }
    const choice = chunk.choices?.[0];
    if (!choice) return;
    answer.finish = choice.finish_reason ?? answer.finish;
    const text = choice.text ?? choice.delta?.content;
    const pieces = [...(text ? [{ type: "text", text }] : []), ...(choice.delta?.parts ?? [])];
    if (!pieces.length) return;
    if (!first) {
      first = now;
      answer.ttftMs = now - begun;
    }
    answer.lastAt = now;
    for (const piece of pieces) addPiece(answer.parts, piece);
    if (now - saved > 1000) {
      saved = now;
      saveConversation(conversation); // a page that is closed keeps what there is
    }
    if (conversation === current) drawSoon(turn);
  };
}

function addPiece(parts, { type, text }) {
  if (type === "text" && parts.at(-1)?.type === "text") parts.at(-1).text += text;
  else parts.push({ type, text });
}

/** Nothing came: the conversation is as it was before, and the text is not lost. */
function undo(conversation, turn, replaced) {
  const index = conversation.turns.indexOf(turn);
  const worthKeeping = replaced.some((old) => !isEmpty(old.answer));
  const stopped = turn.answer.status === "stopped";
  turn.answer = null;
  if (worthKeeping) {
    const text = turn.text !== replaced[0].text || turn.base !== replaced[0].base ? turn.text : undefined;
    replaced[0].error = turn.error && { ...turn.error, text };
    conversation.turns.splice(index, 1, ...replaced);
    if (stopped && text && conversation === current) editTurn(replaced[0], text);
  } else if (stopped && conversation === current && !page.input.value.trim()) {
    conversation.turns.splice(index, 1);
    setInput(turn.text);
  } else if (stopped) {
    turn.error = { kind: "stopped", message: "The model has not read this message." };
  }
}

function stopRun(id = current.id) {
  running.get(id)?.controller.abort(STOPPED);
}

// ---- the message field

function setInput(text) {
  page.input.value = text;
  fitInput();
}

function fitInput() {
  page.input.style.height = "auto";
  page.input.style.height = `${Math.min(page.input.scrollHeight, 220)}px`;
  showComposer();
}

function showComposer() {
  const busy = running.has(current.id);
  page.send.hidden = busy;
  page.stop.hidden = !busy;
  page.send.disabled = !page.input.value.trim();
}

function editTurn(turn, text = turn.text) {
  if (running.has(current.id) || !current.turns.includes(turn)) return;
  if (!editing) draft = page.input.value;
  editing = turn;
  setInput(text);
  showThread();
  page.input.focus();
}

function leaveEditing() {
  editing = null;
  page.editing.hidden = true;
}

function cancelEditing() {
  leaveEditing();
  setInput(draft);
  draft = "";
  showThread();
  page.input.focus();
}

function onInputKey(event) {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !page.input.value && current.turns.length) {
    event.preventDefault();
    editTurn(current.turns.at(-1));
  }
}

function onPageKey(event) {
  const typing = event.target.closest?.("input, textarea, select");
  if (event.key === "Escape" && !page.settings.matches(":popover-open")) {
    if (document.body.classList.contains("sidebar-open")) toggleSidebar(false);
    else if (editing) cancelEditing();
    else stopRun();
  } else if (event.ctrlKey && event.shiftKey && ["n", "o"].includes(event.key.toLowerCase())) {
    event.preventDefault(); // some browsers keep Ctrl+Shift+N for themselves: O does the same
    startConversation();
  } else if (event.key === "/" && !typing) {
    page.input.focus();
  }
}

// ---- the server's models, and the beginning

async function loadModels() {
  clearTimeout(modelsTimer);
  try {
    models = (await (await ask("v1/models")).json()).data ?? [];
    page.banner.replaceChildren();
  } catch (reason) {
    const error = reason instanceof ServerError ? reason.record() : { kind: "gone", message: "This is not a server that the page knows." };
    if (page.banner.dataset.about !== error.message || !page.banner.firstChild) {
      page.banner.replaceChildren(problemBox(error, { retry: loadModels }));
      page.banner.dataset.about = error.message;
    }
    if (error.kind === "gone" || error.status >= 500) modelsTimer = setTimeout(loadModels, 3000);
  }
  showSettings();
}

function onOtherTab(event) {
  if (!event.key?.startsWith(`${PREFIX}chat/`)) return;
  const id = event.key.slice(PREFIX.length + 5);
  if (running.has(id) || event.newValue?.includes('"status":"writing"')) return; // there is more to come
  changed.delete(id);
  if (id !== current.id || editing) return void showSidebar();
  views.clear();
  if (loadConversation(id)) openConversation(id);
  else startConversation();
}

function start() {
  showTheme();
  buildSettings();
  buildSidebar();
  const listen = { newChat: startConversation, newChatSmall: startConversation, theme: toggleTheme, send, stop: () => stopRun(), editCancel: cancelEditing };
  for (const [id, act] of Object.entries(listen)) page[id].addEventListener("click", act);
  page.input.addEventListener("input", fitInput);
  page.input.addEventListener("keydown", onInputKey);
  page.toEnd.addEventListener("click", () => ((following = true), follow()));
  page.scroller.addEventListener("scroll", () => {
    const { scrollHeight, scrollTop, clientHeight } = page.scroller;
    following = scrollHeight - scrollTop - clientHeight < 48;
    page.toEnd.hidden = following;
  });
  document.addEventListener("keydown", onPageKey);
  window.addEventListener("storage", onOtherTab);
  window.addEventListener("pagehide", () => [...running.keys()].forEach((id) => saveConversation(changed.get(id))));
  let open = null;
  try {
    open = sessionStorage.getItem(`${PREFIX}open`);
  } catch {
    // begin anew
  }
  current = (open && loadConversation(open)) || current;
  arrive();
  loadModels();
  focusInput();
}

start();
