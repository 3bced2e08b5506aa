// A little colour for code: comments, strings, numbers and common keywords, whatever the language.

const HASH_COMMENTS = new Set(["python", "py", "bash", "sh", "shell", "zsh", "yaml", "yml", "toml", "ruby", "rb", "r", "perl", "makefile"]);
const KEYWORDS = new Set(
  ("and as assert async await bool break case catch char class const continue def default del do double elif else end enum " +
    "except export extends false False final finally float fn for from func function global if impl import in instanceof " +
    "int interface is lambda let long match mod mut new nil None nonlocal not null or pass print private pub public raise " +
    "return self static string struct super switch then this throw trait true True try type typeof unless use var void " +
    "where while with yield SELECT FROM WHERE JOIN GROUP ORDER BY INSERT INTO UPDATE SET").split(" "),
);
const REST = // an unclosed string or comment goes on to the end, so that no search is made twice
  /("""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|`(?:[^`\\]|\\[\s\S])*`?)|(\b\d[\w.]*)|([A-Za-z_]\w*)/;
const withComments = (comment) => new RegExp(`(${comment.source})|${REST.source}`, "g");
const PATTERNS = { hash: withComments(/#[^\n]*/), slash: withComments(/\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)|--[^\n]*/) };

/** Nodes of a piece of code; of one without a language a single text. */
function highlighted(code, language) {
  if (!language || language === "text") return [code];
  const nodes = [];
  let plain = 0;
  for (const match of code.matchAll(HASH_COMMENTS.has(language.toLowerCase()) ? PATTERNS.hash : PATTERNS.slash)) {
    const [text, comment, string, number] = match;
    const kind = comment ? "c" : string ? "s" : number ? "n" : KEYWORDS.has(text) ? "k" : null;
    if (!kind) continue;
    nodes.push(code.slice(plain, match.index), el("span", { class: `hl-${kind}` }, text));
    plain = match.index + text.length;
  }
  return [...nodes, code.slice(plain)];
}
