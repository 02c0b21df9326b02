// Emphasis, code and links of one paragraph into nodes.

import { h } from "./dom.js";

const LONGEST_LABEL = 600;
const LONGEST_ADDRESS = 2000;
const DEEPEST = 16;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const WORD = /[\p{L}\p{N}]/u;

// Addresses that a click may open; none that runs anything or stays on this server.
export function safeAddress(text) {
  let url;
  try {
    url = new URL(text);
  } catch {
    return null;
  }
  return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
}

function link(address, ...label) {
  const safe = safeAddress(address);
  if (safe === null) return h("span", {}, ...label);
  const attributes = { href: safe, title: safe, target: "_blank", rel: "noopener noreferrer nofollow" };
  return h("a", attributes, ...label);
}

export function inline(text) {
  return new Inline(text).nodes();
}

class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.plain = "";
    this.unclosed = new Set(); // lengths of back tick runs that nothing closes
    this.stack = [{ mark: "", children: [] }];
  }

  nodes() {
    while (this.at < this.text.length) this.step();
    this.flush();
    this.flatten(0);
    return this.stack[0].children;
  }

  step() {
    const { text, at } = this;
    const sign = text[at];
    if (sign === "\\" && at + 1 < text.length && PUNCTUATION.test(text[at + 1])) {
      this.plain += text[at + 1];
      this.at += 2;
    } else if (sign === "\n") {
      this.node(h("br"), 1);
    } else if (
      (sign === "`" && this.code()) ||
      (sign === "[" && this.linked(at, "")) ||
      (sign === "!" && text[at + 1] === "[" && this.linked(at + 1, "image: ")) ||
      (sign === "<" && this.bracketed()) ||
      (sign === "h" && this.bare()) ||
      ("*_~".includes(sign) && this.marks())
    ) {
      return;
    } else {
      this.plain += sign;
      this.at += 1;
    }
  }

  flush() {
    if (this.plain) this.stack.at(-1).children.push(this.plain);
    this.plain = "";
  }

  node(made, length) {
    this.flush();
    this.stack.at(-1).children.push(made);
    this.at += length;
    return true;
  }

  code() {
    let size = 1;
    while (this.text[this.at + size] === "`") size += 1;
    if (!this.unclosed.has(size)) {
      let end = this.at + size;
      while (end < this.text.length) {
        end = this.text.indexOf("`", end);
        if (end < 0) break;
        let run = 1;
        while (this.text[end + run] === "`") run += 1;
        if (run === size) {
          const inner = this.text.slice(this.at + size, end).replaceAll("\n", " ");
          const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
          return this.node(h("code", {}, padded ? inner.slice(1, -1) : inner), end + run - this.at);
        }
        end += run;
      }
      this.unclosed.add(size);
    }
    this.plain += "`".repeat(size);
    this.at += size;
    return true;
  }

  // [label](address "title"), where ``open`` is the bracket.
  linked(open, before) {
    const { text } = this;
    let close = open + 1;
    for (let depth = 1; ; close += 1) {
      if (close >= text.length || close - open > LONGEST_LABEL) return false;
      if (text[close] === "\\") close += 1;
      else if (text[close] === "[") depth += 1;
      else if (text[close] === "]" && (depth -= 1) === 0) break;
    }
    if (text[close + 1] !== "(") return false;
    let end = close + 2;
    for (let depth = 1; ; end += 1) {
      if (end >= text.length || end - close > LONGEST_ADDRESS) return false;
      if (text[end] === "(") depth += 1;
      else if (text[end] === ")" && (depth -= 1) === 0) break;
    }
    const address = text.slice(close + 2, end).trim().split(/\s/)[0].replace(/^<|>$/g, "");
    const label = text.slice(open + 1, close);
    // A picture would tell its server that this was read: it becomes a link.
    const shown = before ? [before + (label || address)] : inlineOfLabel(label);
    return this.node(link(address, ...shown), end + 1 - this.at);
  }

  bracketed() {
    const ahead = this.text.slice(this.at + 1, this.at + LONGEST_ADDRESS);
    const address = ahead.slice(0, Math.max(0, ahead.indexOf(">")));
    if (/\s/.test(address) || safeAddress(address) === null) return false;
    return this.node(link(address, address), address.length + 2);
  }

  bare() {
    const { text, at } = this;
    if (!text.startsWith("http://", at) && !text.startsWith("https://", at)) return false;
    if (at && WORD.test(text[at - 1])) return false;
    let end = at;
    while (end < text.length && end - at < LONGEST_ADDRESS && !/[\s<>"`|*]/.test(text[end])) end += 1;
    while (/[.,;:!?'_~]/.test(text[end - 1])) end -= 1;
    if (text[end - 1] === ")" && !text.slice(at, end).includes("(")) end -= 1;
    const address = text.slice(at, end);
    return safeAddress(address) !== null && this.node(link(address, address), end - at);
  }

  // A run of *, _ or ~ opens or closes emphasis by what stands on either side of it.
  marks() {
    const { text, at } = this;
    const mark = text[at];
    let size = 1;
    while (text[at + size] === mark) size += 1;
    this.at += size;
    const before = text[at - 1] ?? " ";
    const behind = text[at + size] ?? " ";
    const edge = (one) => /\s/.test(one) || PUNCTUATION.test(one);
    let opens = !/\s/.test(behind) && (!PUNCTUATION.test(behind) || edge(before));
    let closes = !/\s/.test(before) && (!PUNCTUATION.test(before) || edge(behind));
    if (mark === "_") [opens, closes] = [opens && !WORD.test(before), closes && !WORD.test(behind)];
    const least = mark === "~" ? 2 : 1;
    while (closes && size >= least) {
      const index = this.stack.findLastIndex((each) => each.mark === mark && each.size <= size);
      if (index < 1) break;
      this.flush();
      this.flatten(index);
      const { children, size: used } = this.stack.pop();
      const tag = mark === "~" ? "s" : used === 2 ? "strong" : "em";
      this.stack.at(-1).children.push(h(tag, {}, ...children));
      size -= used;
    }
    while (opens && size >= least && size <= 3 && this.stack.length < DEEPEST) {
      const used = size >= 2 ? 2 : 1;
      this.flush();
      this.stack.push({ mark, size: used, children: [] });
      size -= used;
    }
    this.plain += mark.repeat(size);
    return true;
  }

  // What was opened above ``index`` and not closed is text.
  flatten(index) {
    while (this.stack.length > index + 1) {
      const { mark, size, children } = this.stack.pop();
      const into = this.stack.at(-1).children;
      into.push(mark.repeat(size));
      for (const each of children) into.push(each);
    }
  }
}

// Of a label: no links in links.
function inlineOfLabel(text) {
  const inner = new Inline(text);
  inner.linked = inner.bracketed = inner.bare = () => false;
  return inner.nodes();
}
