// One turn on the page: the question, the answer with its tool calls, what it took, and what went wrong.

const views = new Map(); // turn id -> {root, update}

function viewOf(turn) {
  if (!views.has(turn.id)) views.set(turn.id, makeView(turn));
  return views.get(turn.id);
}

function makeView(turn) {
  const body = el("div", { class: "parts" });
  const facts = el("span", { class: "facts" });
  const edit = iconButton("edit", turn.base ? "Edit text" : "Edit message", () => editTurn(turn));
  const copy = copyButton("Copy answer", () => plainText(turn.answer));
  const again = iconButton("again", "Regenerate answer", () => regenerate(turn));
  const goOn = turn.base && iconButton("more", "Go on writing", () => continueTurn(turn));
  const foot = el("div", { class: "foot" }, copy, again, goOn, turn.base && edit, facts);
  const trouble = el("div", { class: "trouble", role: "alert" });
  const given = turn.base && el("span", { class: "given" }, turn.text);
  const question = !turn.base && el(
    "div",
    { class: "question" },
    el("div", { class: "actions" }, copyButton("Copy message", () => turn.text), edit),
    el("div", { class: "bubble" }, turn.text),
  );
  const answer = el("div", { class: turn.base ? "answer base" : "answer" }, given, body, foot, trouble);
  const root = el("article", { class: "turn", "data-id": turn.id }, question, answer);
  let shownError = null;

  function update() {
    const writing = turn.answer?.status === "writing";
    root.classList.toggle("writing", writing);
    root.classList.toggle("waiting", writing && isEmpty(turn.answer));
    root.classList.toggle("unanswered", isEmpty(turn.answer) && !writing);
    answer.setAttribute("aria-busy", String(writing));
    if (turn.answer) renderParts(body, turn);
    else body.replaceChildren();
    foot.hidden = writing || !turn.answer;
    if (!foot.hidden) showFacts(facts, turn.answer);
    if (turn.error !== shownError) {
      shownError = turn.error;
      trouble.replaceChildren(...(turn.error ? [problemBox(turn.error, remedies(turn))] : []));
    }
  }
  update();
  return { root, update };
}

/** Text runs and tool calls of an answer: [{type: "text", text} or {type: "tool", call, result}]. */
function groupsOf(parts) {
  const groups = [];
  for (const { type, text } of parts) {
    const last = groups.at(-1);
    if (type === "python_output" && last?.type === "tool" && last.result === null) last.result = text;
    else if (type === "text") groups.push({ type, text });
    else groups.push({ type: "tool", call: type === "python" ? text : "", result: type === "python" ? null : text });
  }
  return groups;
}

function renderParts(body, turn) {
  const { answer } = turn;
  const groups = groupsOf(answer.parts);
  groups.forEach((group, k) => {
    let node = body.children[k];
    if (node?.groupType !== group.type) {
      const made = group.type === "tool" ? makeTool() : el("div", { class: turn.base ? "plain-text" : "prose" });
      made.groupType = group.type;
      if (node) node.replaceWith(made);
      else body.append(made);
      node = made;
    }
    if (group.type === "tool") node.show(group, answer.status === "writing");
    else if (!turn.base) renderMarkdown(node, group.text);
    else if (node.textContent !== group.text) node.textContent = group.text;
  });
  while (body.children.length > groups.length) body.lastElementChild.remove();
}

function makeTool() {
  const line = el("code", {});
  const call = el("pre", {}, el("code", {}));
  const result = el("pre", {}, el("code", {}));
  const node = el(
    "details",
    { class: "tool" },
    el("summary", {}, el("span", { class: "name" }, "Calculator"), line),
    el("div", { class: "inside" }, el("span", {}, "Expression"), call, el("span", {}, "Result"), result),
  );
  node.show = (group, writing) => {
    const shown = group.result ?? (writing ? "…" : "no result");
    const parts = [group.call, shown];
    if (node.shown === parts.join("\n")) return;
    node.shown = parts.join("\n");
    line.textContent = group.result === null ? `${group.call}   ${shown}` : `${group.call} = ${shown}`;
    call.firstChild.textContent = group.call;
    result.firstChild.textContent = shown;
  };
  return node;
}

const ENDINGS = { length: "stopped at the longest answer", full: "the model's context is full", stopped: "stopped", cut: "cut off" };

function showFacts(node, answer) {
  const seconds = (ms) => (ms < 100 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
  const facts = [
    isEmpty(answer) && answer.status === "done" && "empty answer",
    ENDINGS[answer.status],
    answer.tokensPerS != null && `${answer.tokensPerS < 10 ? answer.tokensPerS.toFixed(1) : Math.round(answer.tokensPerS)} tokens/s`,
    answer.ttftMs != null && `first token ${seconds(answer.ttftMs)}`,
    answer.tokens != null && `${answer.tokens} tokens`,
    answer.model,
  ].filter(Boolean);
  node.replaceChildren(...facts.flatMap((fact, k) => [k > 0 && " · ", el("span", {}, fact)]).filter(Boolean));
  const cached = answer.cached ? `, ${answer.cached} of ${answer.prompt} tokens before it from the cache` : "";
  node.title = `seed ${answer.seed}${cached}`;
  node.dataset.status = answer.status;
}

// ---- what went wrong

/** Title of an error for a person. */
function titleOfError({ kind, status, code }) {
  if (kind === "gone") return "The server cannot be reached.";
  if (kind === "stopped") return "Stopped before the first word.";
  if (["cut", "silent", "server", "closed"].includes(kind)) return "The answer was cut off.";
  if (code === "context_length_exceeded") return "This is more than the model can read at once.";
  if (status === 429) return "The server is busy.";
  if (status === 401) return "The server asks for an API key.";
  if (status === 403) return "The server does not answer this page.";
  if (status === 503) return "The model is not ready yet.";
  return status >= 500 ? "The server failed." : "The server refused this.";
}

/** Buttons for a turn's error: [label, act, needed]. */
function remedies(turn) {
  const { conversation, index } = placeOf(turn);
  const tooLong = turn.error.code === "context_length_exceeded" && conversation && index > conversation.from;
  return {
    retry: () => (turn.error.goOn ? continueTurn(turn) : regenerate(turn, turn.error.text ?? turn.text)),
    more: [
      tooLong && ["Leave out older turns", () => leaveOutOlder(turn)],
      ["Edit", () => editTurn(turn, turn.error?.text ?? turn.text)],
    ].filter(Boolean),
  };
}

function problemBox(error, { retry, more = [] }) {
  const title = titleOfError(error);
  const again = el("button", { class: "primary", type: "button", onclick: retry }, "Try again");
  const others = more.map(([label, act]) => el("button", { class: "plain", type: "button", onclick: act }, label));
  const said = error.message !== title && (error.status !== 401 || apiKey()); // without a key the title says it all
  if (error.retryAt) countDown(again, error.retryAt);
  return el(
    "div",
    { class: "problem" },
    el("strong", {}, title),
    said && el("p", {}, error.message),
    error.text && el("p", {}, `Not answered: “${titleOf(error.text)}”`),
    el("div", { class: "row" }, ...(error.status === 401 ? keyField(retry) : [again]), ...others),
  );
}

function keyField(retry) {
  const field = el("input", { type: "password", "aria-label": "API key", placeholder: "API key", autocomplete: "off" });
  const use = () => {
    if (!field.value.trim()) return field.focus();
    setApiKey(field.value.trim());
    loadModels();
    if (retry !== loadModels) retry();
  };
  field.addEventListener("keydown", (event) => event.key === "Enter" && use());
  return [field, el("button", { class: "primary", type: "button", onclick: use }, "Use this key")];
}

/** Show on the button how long the server asks to wait; it can be pressed all the same. */
function countDown(button, until) {
  const show = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.textContent = left > 0 ? `Try again (asked to wait ${left} s)` : "Try again";
    if (left <= 0 || (button.wasShown && !button.isConnected)) clearInterval(timer);
    button.wasShown = button.isConnected;
  };
  const timer = setInterval(show, 500);
  show();
}
