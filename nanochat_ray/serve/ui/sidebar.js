// The list of conversations: open, rename, delete (and take that back). On a phone it slides in.

const narrow = matchMedia("(max-width: 760px)");

function showSidebar() {
  const groups = new Map();
  for (const one of listConversations()) {
    const age = (startOfDay(Date.now()) - startOfDay(one.updated)) / 86_400_000;
    const name = age < 1 ? "Today" : age < 7 ? "Last seven days" : "Older";
    groups.set(name, [...(groups.get(name) ?? []), chatItem(one)]);
  }
  page.chats.replaceChildren(
    ...[...groups].map(([name, items]) => el("section", {}, el("h2", {}, name), el("ul", {}, ...items))),
  );
  if (!groups.size) page.chats.append(el("p", { class: "none" }, "Conversations are kept in this browser."));
}

const startOfDay = (ms) => new Date(ms).setHours(0, 0, 0, 0);

function chatItem({ id, title }) {
  const open = el("button", { class: "open", type: "button", title, onclick: () => openConversation(id) }, title || "Untitled");
  const item = el(
    "li",
    { "data-id": id, class: running.has(id) && "running" },
    open,
    iconButton("edit", `Rename ${title}`, () => renameChat(item, id)),
    iconButton("trash", `Delete ${title}`, () => removeChat(id)),
  );
  if (id === current.id) open.setAttribute("aria-current", "true");
  return item;
}

function renameChat(item, id) {
  const conversation = loadConversation(id);
  if (!conversation) return showSidebar();
  const field = el("input", { class: "rename", "aria-label": "Name of the conversation", maxlength: 120 });
  field.value = conversation.title;
  let over = false;
  const finish = (keep) => {
    if (over) return;
    over = true;
    const title = field.value.trim();
    if (keep && title) {
      Object.assign(conversation, { title, named: true });
      saveConversation(conversation);
      showTitle();
    }
    showSidebar();
  };
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
  });
  field.addEventListener("blur", () => finish(true));
  item.replaceChildren(field);
  field.select();
}

function removeChat(id) {
  const conversation = loadConversation(id);
  stopRun(id);
  deleteConversation(id);
  conversation?.turns.forEach((turn) => views.delete(turn.id));
  if (id === current.id) startConversation();
  showSidebar();
  if (!conversation) return;
  notice("deleted", `Deleted “${conversation.title}”.`, {
    action: "Undo",
    ms: 10_000,
    act: () => {
      saveConversation(conversation);
      openConversation(id);
    },
  });
}

function toggleSidebar(open) {
  document.body.classList.toggle("sidebar-open", open);
  page.sidebar.inert = narrow.matches && !open;
  page.shell.inert = narrow.matches && open;
  page.sidebarOpen.setAttribute("aria-expanded", String(open));
  if (narrow.matches) (open ? page.newChat : page.sidebarOpen).focus();
}

function buildSidebar() {
  page.sidebarOpen.addEventListener("click", () => toggleSidebar(true));
  page.sidebarClose.addEventListener("click", () => toggleSidebar(false));
  page.scrim.addEventListener("click", () => toggleSidebar(false));
  narrow.addEventListener("change", () => {
    document.body.classList.remove("sidebar-open");
    page.sidebar.inert = narrow.matches;
    page.shell.inert = false;
  });
  page.sidebar.inert = narrow.matches;
}
