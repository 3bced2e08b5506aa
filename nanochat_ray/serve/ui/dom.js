// Making and finding nodes. Text of models and people becomes text nodes only; nothing here or later parses HTML.

const page = Object.fromEntries([...document.querySelectorAll("body [id]")].map((node) => [node.id, node]));

/** A new element. Attributes named on... are listeners; true, false and null switch an attribute on and off. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child != null && child !== false));
  return node;
}

function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A small button that is only an icon; `label` is its name and its tooltip. */
function iconButton(name, label, onclick) {
  return el("button", { class: "icon small", type: "button", "aria-label": label, title: label, onclick }, icon(name));
}

async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // not allowed: the old way may still be
    }
  }
  const field = el("textarea", { class: "unseen" }); // pages that do not come from https or this machine
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  return copied;
}

/** A button that copies what `text()` gives, and says for a moment that it did. */
function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copyText(text());
    button.replaceChildren(icon(copied ? "done" : "close"));
    say(copied ? "Copied" : "Could not copy");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** For people who listen: a screen reader speaks this. */
function say(text) {
  page.live.textContent = text;
}

/** A line above the message field. The button, if any, acts and takes the line away; `ms` 0 stays until closed. */
function notice(key, text, { action = null, act = null, ms = 0 } = {}) {
  dropNotice(key);
  const line = el("div", { class: "notice", "data-key": key }, el("span", {}, text));
  const close = () => line.remove();
  if (action) line.append(el("button", { class: "plain", type: "button", onclick: () => (close(), act()) }, action));
  line.append(iconButton("close", "Dismiss", close));
  page.notices.append(line);
  if (ms) setTimeout(close, ms);
}

function dropNotice(key) {
  for (const line of [...page.notices.children]) if (line.dataset.key === key) line.remove();
}

/** 128 random bits as text. `crypto.randomUUID` exists only on pages from https or this machine. */
function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
