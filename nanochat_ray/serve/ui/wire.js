// Talking to the server: requests, errors in one form, server-sent events.

const KEY = "nanochat-ray/key";

/** What went wrong, for a person: kind is one of gone, cut, silent, server (mid-stream), status. */
class ServerError extends Error {
  constructor(kind, message, { status = 0, code = null, retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, code, retryAfterS });
  }

  /** As plain data, which a conversation can keep. */
  record() {
    const retryAt = this.retryAfterS === null ? null : Date.now() + 1000 * this.retryAfterS;
    return { kind: this.kind, message: this.message, status: this.status, code: this.code, retryAt };
  }
}

function apiKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function setApiKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    notice("key", "This browser does not let the page keep the key.");
  }
}

/** A response with status 200, or a ServerError. Paths are relative: the page may live below a prefix. */
async function ask(path, { body = null, session = null, signal = null } = {}) {
  const headers = {};
  const key = apiKey();
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  if (session) headers["x-session-id"] = session;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (signal?.aborted) throw signal.reason;
    throw new ServerError("gone", "The server cannot be reached.");
  }
  if (response.ok) return response;
  let detail = null;
  try {
    detail = (await response.json()).error;
  } catch {
    // no JSON: a proxy's page; the status says enough
  }
  const after = parseFloat(response.headers.get("retry-after"));
  const message = detail?.message ?? `The server answered with status ${response.status}.`;
  const retryAfterS = Number.isFinite(after) ? after : null;
  throw new ServerError("status", message, { status: response.status, code: detail?.code ?? null, retryAfterS });
}

/** Text in pieces, cut anywhere, to the data of server-sent events. */
class EventParser {
  constructor() {
    this.rest = "";
    this.data = [];
  }

  /** The data of each event that `text` completes. */
  feed(text) {
    const held = this.rest + text;
    const usable = held.endsWith("\r") ? held.length - 1 : held.length; // its line feed may be on the way
    const lines = held.slice(0, usable).split(/\r\n|\n|\r/);
    this.rest = lines.pop() + held.slice(usable);
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.data.length) events.push(this.data.join("\n"));
        this.data = [];
      } else if (line.startsWith("data:")) {
        this.data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return events;
  }
}

/**
 * Post `body` and hand every chunk of the answer to `onChunk`. Returns when the server says [DONE]; throws a ServerError
 * when it fails, stops in between or is silent for long, or the reason with which `controller` was aborted.
 */
async function streamAnswer(path, body, session, controller, onChunk) {
  const { signal } = controller;
  const silenceS = Number(document.documentElement.dataset.silenceS); // the server sends something every 15 s
  let timer = 0;
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(() => controller.abort(new ServerError("silent", "The server has gone silent.")), 1000 * silenceS);
  };
  heard();
  try {
    const response = await ask(path, { body, session, signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const parser = new EventParser();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError("cut", "The connection ended before the answer did.");
      heard();
      for (const data of parser.feed(value)) {
        if (data === "[DONE]") return void reader.cancel().catch(() => {});
        const chunk = parseChunk(data);
        if (chunk.error) throw new ServerError("server", chunk.error.message ?? "The server failed.", { code: chunk.error.code });
        onChunk(chunk);
      }
    }
  } catch (error) {
    if (signal.aborted) throw signal.reason;
    controller.abort(); // lets the server know that nobody reads on
    throw error instanceof ServerError ? error : new ServerError("cut", "The connection broke before the answer ended.");
  } finally {
    clearTimeout(timer);
  }
}

function parseChunk(data) {
  try {
    const chunk = JSON.parse(data);
    if (chunk && typeof chunk === "object") return chunk;
  } catch {
    // said below
  }
  throw new ServerError("cut", "The server sent something that is not part of an answer.");
}
