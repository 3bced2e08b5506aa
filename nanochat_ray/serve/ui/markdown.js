// Markdown to nodes: a small part of it, built with text nodes only, so that no answer can bring HTML along. Whatever
// is not understood stays as it is written. Every search is bounded or remembers that it failed, so time is linear.

const MAX_DEPTH = 6;
const MAX_COLUMNS = 16;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+([^]*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?([^]*)$/;
const ITEM = /^( {0,8})([-*+]|\d{1,9}[.)]) +([^]*)$/;
const TABLE_RULE = /^[ |:-]+$/;

/** Show `text` in `root`. Blocks that are as they were keep their nodes, so that an answer can grow cheaply. */
function renderMarkdown(root, text) {
  const blocks = splitBlocks(text.replace(/\r\n?/g, "\n").split("\n"));
  blocks.forEach((block, k) => {
    const raw = block.lines.join("\n");
    const old = root.children[k];
    if (old && old.markdown === raw) return;
    const node = renderBlock(block, 0);
    node.markdown = raw;
    if (old) old.replaceWith(node);
    else root.append(node);
  });
  while (root.children.length > blocks.length) root.lastElementChild.remove();
}

/** Top-level blocks of lines: {type, lines}. Together they hold every line that is not blank. */
function splitBlocks(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const type = blockType(lines, i);
    const end = blockEnd(type, lines, i);
    blocks.push({ type, lines: lines.slice(i, end) });
    i = end;
  }
  return blocks;
}

function blockType(lines, i) {
  const line = lines[i];
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  return isTable(lines, i) ? "table" : "paragraph";
}

function isTable(lines, i) {
  const rule = lines[i + 1];
  if (!rule || !lines[i].includes("|") || !rule.includes("-") || !TABLE_RULE.test(rule)) return false;
  const columns = cells(lines[i]).length;
  return columns <= MAX_COLUMNS && columns === cells(rule).length;
}

function blockEnd(type, lines, start) {
  let i = start + 1;
  if (type === "heading" || type === "rule") return i;
  if (type === "code") {
    const mark = FENCE.exec(lines[start])[1];
    while (i < lines.length && !closesFence(lines[i], mark)) i += 1;
    return Math.min(i + 1, lines.length);
  }
  if (type === "list") return listEnd(lines, start);
  while (i < lines.length && lines[i].trim()) {
    if (type === "quote" ? !QUOTE.test(lines[i]) : type === "table" ? !lines[i].includes("|") : interrupts(lines, i)) break;
    i += 1;
  }
  return i;
}

function closesFence(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length);
}

/** Whether a paragraph ends before this line. A number begins a list there only if it is 1: years end sentences. */
function interrupts(lines, i) {
  const type = blockType(lines, i);
  return type === "list" ? /^ {0,8}(?:[-*+]|1[.)]) +\S/.test(lines[i]) : type !== "paragraph";
}

/** A list goes on over indented lines, further items, and single blank lines before those. */
function listEnd(lines, start) {
  const ordered = /\d/.test(ITEM.exec(lines[start])[2]);
  let i = start + 1;
  for (; i < lines.length; i += 1) {
    const at = lines[i].trim() ? i : i + 1;
    if (at >= lines.length) break;
    const item = ITEM.exec(lines[at]);
    const sibling = item && /\d/.test(item[2]) === ordered && !RULE.test(lines[at]);
    const indented = /^ {2,}\S/.test(lines[at]);
    const lazy = at === i && !item && !interrupts(lines, i);
    if (!sibling && !indented && !lazy) break;
    i = at;
  }
  return i;
}

function renderBlock({ type, lines }, depth) {
  if (depth > MAX_DEPTH) return el("p", {}, lines.join("\n"));
  if (type === "code") return renderCode(lines);
  if (type === "rule") return el("hr");
  if (type === "list") return renderList(lines, depth);
  if (type === "table") return renderTable(lines);
  if (type === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return el(`h${Math.min(marks.length + 1, 6)}`, {}, ...inline(text.trimEnd())); // h1 is the page's own
  }
  if (type === "quote") return el("blockquote", {}, ...renderBlocks(lines.map((line) => QUOTE.exec(line)[1]), depth + 1));
  return el("p", {}, ...inline(lines.join("\n").trim()));
}

function renderBlocks(lines, depth) {
  return splitBlocks(lines).map((block) => renderBlock(block, depth));
}

function renderCode(lines) {
  const [, mark, info] = FENCE.exec(lines[0]);
  const closed = lines.length > 1 && closesFence(lines.at(-1), mark);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const language = info.trim().split(/\s/)[0].slice(0, 24);
  return el(
    "figure",
    { class: "code" },
    el("figcaption", {}, el("span", {}, language || "code"), copyButton("Copy code", () => text)),
    el("pre", { tabindex: "0" }, el("code", {}, ...highlighted(text, language))),
  );
}

function renderList(lines, depth) {
  const [, indent, marker] = ITEM.exec(lines[0]);
  const items = [];
  let inner = 0; // columns that lines of the current item are indented by
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length < indent.length + 2 && !(items.length && item[1].length >= inner)) {
      inner = item[1].length + item[2].length + 1;
      items.push([item[3]]);
    } else {
      const space = line.length - line.trimStart().length;
      items.at(-1).push(line.slice(Math.min(space, inner)));
    }
  }
  const ordered = /\d/.test(marker);
  return el(
    ordered ? "ol" : "ul",
    ordered ? { start: parseInt(marker, 10) } : {},
    ...items.map((item) => el("li", {}, ...renderBlocks(item, depth + 1))),
  );
}

function cells(line) {
  const row = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return row.split("|").map((cell) => cell.trim());
}

function renderTable(lines) {
  const row = (line, tag) => el("tr", {}, ...cells(line).slice(0, MAX_COLUMNS).map((cell) => el(tag, {}, ...inline(cell))));
  return el(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    el("table", {}, el("thead", {}, row(lines[0], "th")), el("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")))),
  );
}

const LINK = /!?\[([^[\]\n]{1,500})\]\((https?:\/\/[^\s()<>]{1,1000}(?:\([^\s()<>]{0,200}\)[^\s()<>]{0,200}){0,3})\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`]{1,1000}/y;
const ORDINARY = /[^\\`*_~[!h]+/y;
const EMPHASIS = { "**": "strong", "__": "strong", "~~": "del", "*": "em", "_": "em" };
const wordAt = (text, i) => i >= 0 && i < text.length && /[\p{L}\p{N}]/u.test(text[i]);
const spaceAt = (text, i) => i < 0 || i >= text.length || /\s/.test(text[i]);

/** Nodes of a line of text: code, bold, italic, struck out, links. */
function inline(text, depth = 0) {
  const nodes = [];
  const missing = new Set(); // closing marks that do not come any more
  let plain = "";
  const push = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  for (let i = 0; i < text.length; ) {
    const ordinary = matchAt(ORDINARY, text, i);
    if (ordinary) {
      plain += ordinary[0];
      i += ordinary[0].length;
      continue;
    }
    const found = depth <= MAX_DEPTH && special(text, i, missing, depth);
    if (found) {
      if (typeof found.node === "string") plain += found.node;
      else push(found.node);
      i = found.end;
    } else {
      const run = /[`*_~]/.test(text[i]) ? runLength(text, i) : 1; // a mark that opens nothing is not tried in parts
      plain += text.slice(i, i + run);
      i += run;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

function matchAt(pattern, text, i) {
  pattern.lastIndex = i;
  return pattern.exec(text);
}

function runLength(text, i) {
  let end = i + 1;
  while (text[end] === text[i]) end += 1;
  return end - i;
}

/** What begins at `i` with a mark: {node, end}, or null. */
function special(text, i, missing, depth) {
  const char = text[i];
  if (char === "\\") {
    const next = text[i + 1] ?? "";
    return /[!-/:-@[-`{-~]/.test(next) ? { node: next, end: i + 2 } : null;
  }
  if (char === "`") return codeSpan(text, i, missing);
  if (char === "[" || char === "!") {
    const link = matchAt(LINK, text, i);
    return link && { node: anchor(link[2], inline(link[1], depth + 1)), end: i + link[0].length };
  }
  if (char === "h") {
    const address = wordAt(text, i - 1) ? null : matchAt(ADDRESS, text, i);
    if (!address) return null;
    const href = address[0].replace(/[.,;:!?)\]*_]{1,50}$/, "");
    return { node: anchor(href, [href]), end: i + href.length };
  }
  return emphasis(text, i, missing, depth);
}

function codeSpan(text, i, missing) {
  const size = runLength(text, i);
  const mark = "`".repeat(size);
  if (missing.has(mark)) return null;
  for (let j = text.indexOf(mark, i + size); j >= 0; ) {
    const run = runLength(text, j);
    if (run === size) return { node: el("code", {}, text.slice(i + size, j).replace(/\n/g, " ")), end: j + size };
    j = text.indexOf(mark, j + run);
  }
  missing.add(mark);
  return null;
}

/** Single marks count only at the edges of words, so that 2*3*4 and snake_case_names stay as they are. */
function emphasis(text, i, missing, depth) {
  const char = text[i];
  const mark = runLength(text, i) > 1 ? char + char : char;
  const start = i + mark.length;
  if (!EMPHASIS[mark] || missing.has(mark) || spaceAt(text, start) || (mark !== "**" && wordAt(text, i - 1))) return null;
  for (let j = text.indexOf(mark, start + 1); j >= 0; ) {
    const run = runLength(text, j);
    const end = j + run;
    const fits = mark.length === 1 ? run !== 2 : run >= 2;
    if (fits && !spaceAt(text, j - 1) && (mark === "**" || !wordAt(text, end))) {
      const inner = text.slice(start, end - mark.length); // of a longer run the last marks close
      return { node: el(EMPHASIS[mark], {}, ...inline(inner, depth + 1)), end };
    }
    j = text.indexOf(mark, end);
  }
  missing.add(mark);
  return null;
}

function anchor(address, children) {
  let url = null;
  try {
    url = new URL(address);
  } catch {
    // no address after all
  }
  if (!url || !["http:", "https:"].includes(url.protocol)) return el("span", {}, ...children);
  return el("a", { href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}
