// Conversations in this browser: one entry of localStorage each, so that tabs do not write over each other's.
//
// conversation {id, title, named, updated, from, turns}   `from`: turns before this one are left out of requests
// turn         {id, text, base, answer, error}            `base`: text for a base model to go on with
// answer       {parts, status, model, seed, ...}          status: writing, done, length, full, stopped, cut

const PREFIX = "nanochat-ray/";
const changed = new Map(); // conversations of this page, by id: also those that the browser has no room for
let full = false; // whether that was so the last time

function readItem(key) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + key));
  } catch {
    return null; // no storage here, or a damaged entry
  }
}

function writeItem(key, value) {
  try {
    localStorage.setItem(PREFIX + key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function newConversation() {
  return { id: randomId(), title: "", named: false, updated: Date.now(), from: 0, turns: [] };
}

function newTurn(text, base) {
  return { id: randomId(), text, base, answer: null, error: null };
}

function saveConversation(conversation) {
  if (!conversation.turns.length) return;
  if (!conversation.named) conversation.title = titleOf(conversation.turns[0].text);
  changed.set(conversation.id, conversation);
  const wasFull = full;
  full = !writeItem(`chat/${conversation.id}`, conversation);
  if (!full) dropNotice("storage");
  else if (!wasFull) notice("storage", "The browser's storage is full: this conversation ends with this page. Delete old ones to keep it.");
}

function deleteConversation(id) {
  changed.delete(id);
  try {
    localStorage.removeItem(`${PREFIX}chat/${id}`);
  } catch {
    // no storage, nothing to delete
  }
}

function loadConversation(id) {
  const found = changed.get(id) ?? checked(readItem(`chat/${id}`));
  if (found) changed.set(id, found);
  return found;
}

/** {id, title, updated} of all, the newest first. */
function listConversations() {
  const all = new Map(changed);
  let keys = [];
  try {
    keys = Object.keys(localStorage);
  } catch {
    // no storage: those of this page are all there are
  }
  for (const key of keys) {
    if (!key.startsWith(`${PREFIX}chat/`) || all.has(key.slice(PREFIX.length + 5))) continue;
    const found = checked(readItem(key.slice(PREFIX.length)));
    if (found) all.set(found.id, found);
  }
  return [...all.values()].filter((one) => one.turns.length).sort((a, b) => b.updated - a.updated);
}

/** The conversation if it has its shape, else null. An answer that was being written when its page closed was cut. */
function checked(found) {
  const isText = (value) => typeof value === "string";
  if (!found || !isText(found.id) || !isText(found.title) || !Array.isArray(found.turns)) return null;
  for (const turn of found.turns) {
    if (!isText(turn?.id) || !isText(turn.text)) return null;
    const { answer } = turn;
    if (!answer) continue;
    if (!Array.isArray(answer.parts) || !answer.parts.every((part) => isText(part?.type) && isText(part.text))) return null;
    if (answer.status === "writing") {
      answer.status = "cut";
      turn.error = { kind: "closed", message: "The page was closed while this was written." };
    }
  }
  return found;
}

function titleOf(text) {
  const line = text.trim().split(/\s+/).slice(0, 12).join(" ");
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

const isEmpty = (answer) => !answer || !answer.parts.some((part) => part.text);
const plainText = (answer) => answer.parts.filter((part) => part.type === "text").map((part) => part.text).join("");
