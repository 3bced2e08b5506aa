// What a person can set: model, sampling, system text, light or dark. A value that nobody set is the model's own.

const CONTROLS = {
  temperature: { label: "Temperature", min: 0, max: 2, step: 0.05, help: "0 always takes the likeliest token" },
  top_k: { label: "Top-k", min: 0, max: 200, step: 1, help: "choose among so many tokens; 0: all" },
  top_p: { label: "Top-p", min: 0.01, max: 1, step: 0.01, help: "choose among the likeliest that make up this share" },
  max_tokens: { label: "Longest answer", min: 1, max: 4096, step: 1, help: "in tokens" },
  seed: { label: "Seed", min: 0, max: 2 ** 32 - 1, step: 1, help: "empty: another one every time" },
};
const FALLBACK = { temperature: 0.8, top_k: 50, top_p: 1, max_tokens: 512 };
const stored = readItem("settings");
const settings = stored && typeof stored === "object" ? stored : {};
let models = [];

const currentModel = () => models.find((model) => model.id === settings.model) ?? models.find((model) => model.chat) ?? models[0];

/** The value in force: set here, or the model's own; null for a seed that nobody set. */
function setting(name) {
  return settings[name] ?? currentModel()?.defaults?.[name] ?? FALLBACK[name] ?? null;
}

function limits(name) {
  const context = currentModel()?.context;
  return name === "max_tokens" && context ? { ...CONTROLS[name], max: context } : CONTROLS[name];
}

/** Set a control to text or a number; null takes the value back. Returns what is wrong, or null. */
function change(name, value) {
  if (value !== null) {
    const { min, max, step, label } = limits(name);
    const number = typeof value === "string" && !value.trim() ? NaN : Number(value);
    if (!(number >= min && number <= max)) return `${label} must be a number from ${min} to ${max}.`;
    if (step === 1 && !Number.isInteger(number)) return `${label} must be a whole number.`;
    value = number;
  }
  settings[name] = value;
  keepSettings();
  return null;
}

function keepSettings() {
  writeItem("settings", settings);
  showSettings();
}

function samplingOf(turnSeed) {
  const names = ["temperature", "top_k", "top_p", "max_tokens"];
  const values = Object.fromEntries(names.map((name) => [name, setting(name)]));
  return { ...values, max_tokens: Math.min(values.max_tokens, limits("max_tokens").max), seed: turnSeed };
}

const fields = {};

function buildSettings() {
  for (const [name, { label, min, max, step, help }] of Object.entries(CONTROLS)) {
    const complaint = el("small", { class: "wrong", role: "alert" });
    const enter = (event) => {
      const text = event.target.value;
      complaint.textContent = (text === "" && event.target.validity.valid ? change(name, null) : change(name, text)) ?? "";
    };
    const number = el("input", { type: "number", id: `set-${name}`, name, min, max, step: step < 1 ? "any" : step, onchange: enter });
    const slider = max <= 2 && el("input", { type: "range", min, max, step, "aria-label": `${label}, slider`, oninput: enter });
    const top = el("span", { class: "top" }, el("label", { for: `set-${name}` }, label), number);
    page.controls.append(el("div", { class: "field" }, top, slider, el("small", {}, help), complaint));
    fields[name] = { number, slider };
  }
  page.system.addEventListener("change", () => ((settings.system = page.system.value.trim()), keepSettings()));
  page.tools.addEventListener("change", () => ((settings.tools = page.tools.checked), keepSettings()));
  page.settingsReset.addEventListener("click", () => {
    for (const name of [...Object.keys(CONTROLS), "system", "tools"]) delete settings[name];
    for (const complaint of page.controls.querySelectorAll(".wrong")) complaint.textContent = "";
    keepSettings();
  });
  page.model.addEventListener("change", () => {
    settings.model = page.model.value;
    keepSettings();
  });
}

function showSettings() {
  for (const [name, { number, slider }] of Object.entries(fields)) {
    const value = setting(name);
    number.value = value ?? "";
    number.max = limits(name).max;
    if (slider) slider.value = value;
  }
  fields.seed.number.placeholder = "random";
  page.system.value = settings.system ?? "";
  page.tools.checked = settings.tools ?? true;
  page.settingsOpen.classList.toggle("set", Object.keys(CONTROLS).some((name) => settings[name] != null) || Boolean(settings.system));
  showModel();
}

function showModel() {
  const model = currentModel();
  page.model.disabled = models.length < 1;
  page.model.replaceChildren(
    ...(models.length ? models : [{ id: "no model", chat: true }]).map((one) =>
      el("option", { value: one.id, selected: one === model }, one.chat === false ? `${one.id} (continues text)` : one.id),
    ),
  );
  const base = model?.chat === false;
  page.input.placeholder = base ? "Text to go on with" : "Message";
  page.welcomeTitle.textContent = base ? "How does it begin?" : "What shall we talk about?";
  page.welcomeText.textContent = !model
    ? ""
    : base
      ? `${model.id} is a base model: it knows no conversation, it continues your text.`
      : `You are talking to ${model.id}, a small language model. Conversations are kept in this browser.`;
  const examples = base
    ? ["The capital of France is", "Once upon a time, an old lighthouse keeper", "The chemical symbol of gold is"]
    : ["Why is the sky blue?", "What is 1234 * 56?", "How many r are in strawberry?", "Write a short poem about the sea."];
  page.examples.replaceChildren(
    ...examples.map((text) => el("button", { type: "button", onclick: () => proposeText(text) }, text)),
  );
  const facts = model ? { Model: model.id, Context: model.context && `${model.context.toLocaleString("en")} tokens`, ...flat(model.lineage) } : {};
  page.lineage.replaceChildren(
    ...Object.entries(facts).filter(([, value]) => value != null && value !== "").flatMap(([name, value]) => [
      el("dt", {}, name),
      el("dd", { title: String(value) }, String(value).slice(0, 40)),
    ]),
  );
}

/** The values of a small record of any shape, by their own names. */
function flat(record) {
  return Object.fromEntries(Object.entries(record ?? {}).filter(([, value]) => ["string", "number"].includes(typeof value)));
}

function proposeText(text) {
  page.input.value = text;
  page.input.dispatchEvent(new Event("input"));
  page.input.focus();
}

// ---- light and dark

const darkSystem = matchMedia("(prefers-color-scheme: dark)");

function showTheme() {
  document.documentElement.dataset.theme = settings.theme ?? "system";
}

function toggleTheme() {
  const dark = settings.theme ? settings.theme === "dark" : darkSystem.matches;
  settings.theme = dark === darkSystem.matches ? (dark ? "light" : "dark") : null; // back to the system's: follow it
  writeItem("settings", settings);
  showTheme();
}
