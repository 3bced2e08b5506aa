// Lines that begin with a slash: they set something here and are not sent to the model.

const COMMANDS = {
  temperature: ["[number]", "show or set the temperature", (rest) => setByCommand("temperature", rest)],
  topk: ["[number]", "show or set top-k; 0 takes all tokens", (rest) => setByCommand("top_k", rest)],
  topp: ["[number]", "show or set top-p", (rest) => setByCommand("top_p", rest)],
  max: ["[number]", "show or set the longest answer, in tokens", (rest) => setByCommand("max_tokens", rest)],
  seed: ["[number|off]", "show or set the seed; off takes another one every time", (rest) => setByCommand("seed", rest)],
  system: ["[text|off]", "show or set the system text", setSystem],
  clear: ["", "begin a new conversation", () => (startConversation(), "A new conversation.")],
  help: ["", "this list", helpText],
};

/** Do what a line says. False if it is a command that nobody knows: the line stays where it can be changed. */
function obey(line) {
  const [, name, rest] = /^\/(\S*)\s*([\s\S]*)$/.exec(line);
  const command = Object.hasOwn(COMMANDS, name.toLowerCase()) ? COMMANDS[name.toLowerCase()] : null;
  const answer = command ? command[2](rest.trim()) : `Unknown command /${name}. /help lists them; with a space in front the line is sent as a message.`;
  addConsoleLine(`${line}\n${answer}`);
  say(answer);
  return Boolean(command);
}

function setByCommand(name, rest) {
  const { label } = CONTROLS[name];
  const wrong = rest ? change(name, rest === "off" && name === "seed" ? null : rest) : null;
  return wrong ?? `${label}: ${setting(name) ?? "random"}`;
}

function setSystem(rest) {
  if (rest) {
    settings.system = rest === "off" ? "" : rest;
    keepSettings();
  }
  return `System text: ${settings.system || "none"}`;
}

function helpText() {
  return Object.entries(COMMANDS).map(([name, [form, what]]) => `${`/${name} ${form}`.padEnd(22)}${what}`).join("\n");
}
