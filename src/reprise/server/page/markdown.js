// Markdown into elements. Never into HTML text: see dom.js. The time it takes grows with the length
// of the text, whatever is in it: look-ups have an end, and so has nesting.

import { copyButton, h } from "./dom.js";
import { inline } from "./inline.js";

const DEEPEST = 12;

// Shows `text` in `container`. Called again with more text, it makes anew what has changed only.
export function show(container, text) {
  const blocks = parse(text.replaceAll("\r\n", "\n").split("\n"), 0);
  const old = container.children;
  blocks.forEach((block, index) => {
    const there = old[index];
    if (there && there.shows === block.source) return;
    const made = block.make();
    made.shows = block.source;
    if (there) there.replaceWith(made);
    else container.append(made);
  });
  while (old.length > blocks.length) container.lastChild.remove();
}

function parse(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const reader = depth < DEEPEST && READERS.find((each) => each.begins(lines, at));
    const [end, make] = (reader || paragraph).read(lines, at, depth);
    blocks.push({ source: lines.slice(at, end).join("\n"), make });
    at = end;
  }
  return blocks;
}

function children(lines, depth) {
  return parse(lines, depth + 1).map((block) => block.make());
}

const indent = (line) => line.length - line.trimStart().length;

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;

const fence = {
  begins: (lines, at) => FENCE.test(lines[at]),
  read(lines, at) {
    const [, marks, info] = FENCE.exec(lines[at]);
    const shift = indent(lines[at]);
    let end = at + 1;
    const closes = (line) => {
      const text = line.trim();
      return text.length >= marks.length && text === marks[0].repeat(text.length);
    };
    while (end < lines.length && !closes(lines[end])) end += 1;
    const code = lines
      .slice(at + 1, end)
      .map((line) => line.slice(Math.min(shift, indent(line))))
      .join("\n");
    const language = info.trim().split(" ")[0];
    return [Math.min(end + 1, lines.length), () => codeBlock(code, language)];
  },
};

function codeBlock(code, language) {
  return h(
    "div",
    { class: "code" },
    h("div", { class: "code-bar" }, h("span", {}, language || "text"), copyButton(() => code)),
    h("pre", { tabindex: "0", "aria-label": "Code" }, h("code", {}, code)),
  );
}

const heading = {
  begins: (lines, at) => /^ {0,3}#{1,6}( |\t|$)/.test(lines[at]),
  read(lines, at) {
    const text = lines[at].trim();
    const level = text.length - text.replace(/^#+/, "").length;
    let end = text.length;
    while (end > level && text[end - 1] === "#") end -= 1;
    if (end > level && text[end - 1] !== " ") end = text.length; // "C#" is no closing mark
    // Inside of a page with headings of its own.
    const tag = `h${Math.min(6, level + 2)}`;
    return [at + 1, () => h(tag, {}, ...inline(text.slice(level, end).trim()))];
  },
};

const rule = {
  begins(lines, at) {
    const marks = lines[at].replaceAll(" ", "");
    return marks.length > 2 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
  },
  read: (lines, at) => [at + 1, () => h("hr")],
};

const quote = {
  begins: (lines, at) => /^ {0,3}>/.test(lines[at]),
  read(lines, at, depth) {
    let end = at;
    while (end < lines.length && /^ {0,3}>/.test(lines[end])) end += 1;
    const inner = lines.slice(at, end).map((line) => line.replace(/^ {0,3}> ?/, ""));
    return [end, () => h("blockquote", {}, ...children(inner, depth))];
  },
};

const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;

const list = {
  begins: (lines, at) => ITEM.test(lines[at]),
  read(lines, at, depth) {
    const [, before, first] = ITEM.exec(lines[at]);
    const ordered = /\d/.test(first);
    const items = [];
    let end = at;
    const nextItem = (line) => {
      const found = ITEM.exec(line);
      const shift = found && found[1].length - before.length;
      return found && /\d/.test(found[2]) === ordered && shift >= 0 && shift < 2 ? found : null;
    };
    while (end < lines.length) {
      const line = lines[end];
      const found = nextItem(line);
      if (found) {
        items.push([line.slice(found[0].length)]);
      } else if (!line.trim()) {
        // A blank line is the list's if the list goes on behind it.
        let next = end + 1;
        while (next < lines.length && !lines[next].trim()) next += 1;
        if (next === lines.length) break;
        if (indent(lines[next]) < before.length + 2 && !nextItem(lines[next])) break;
        items.at(-1).push("");
        end = next;
        continue;
      } else if (indent(line) >= before.length + 2) {
        items.at(-1).push(line.slice(Math.min(indent(line), before.length + first.length + 1)));
      } else if (READERS.some((each) => each.begins(lines, end)) || !items.at(-1).at(-1)) {
        break;
      } else {
        items.at(-1).push(line.trim()); // a paragraph goes on without an indent
      }
      end += 1;
    }
    while (end > at + 1 && !lines[end - 1].trim()) end -= 1;
    const start = ordered ? String(parseInt(first, 10)) : undefined;
    const make = () =>
      h(
        ordered ? "ol" : "ul",
        { start: start === "1" ? undefined : start },
        ...items.map((item) => {
          const inner = children(item, depth);
          // Of an item that is one paragraph the text alone.
          const tight = inner[0]?.tagName === "P" && !item.includes("");
          return h("li", {}, ...(tight ? [...inner[0].childNodes, ...inner.slice(1)] : inner));
        }),
      );
    return [end, make];
  },
};

function cells(line) {
  const text = line.trim().replace(/^\|/, "");
  const found = [""];
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\" && text[at + 1] === "|") found[found.length - 1] += text[(at += 1)];
    else if (text[at] === "|") found.push("");
    else found[found.length - 1] += text[at];
  }
  if (found.length > 1 && !found.at(-1).trim()) found.pop();
  return found.map((each) => each.trim());
}

const table = {
  begins(lines, at) {
    if (!lines[at].includes("|") || at + 1 === lines.length) return false;
    if (!lines[at + 1].includes("-")) return false;
    const marks = cells(lines[at + 1]);
    const isMark = (each) => /^:?-+:?$/.test(each);
    return marks.every(isMark) && marks.length === cells(lines[at]).length;
  },
  read(lines, at) {
    const align = cells(lines[at + 1]).map((each) =>
      each.endsWith(":") ? (each.startsWith(":") ? "center" : "right") : undefined,
    );
    let end = at + 2;
    while (end < lines.length && lines[end].includes("|")) end += 1;
    const row = (line, tag) => {
      const given = cells(line);
      const made = align.map((side, n) =>
        h(tag, { class: side, scope: tag === "th" ? "col" : undefined }, ...inline(given[n] ?? "")),
      );
      return h("tr", {}, ...made);
    };
    const make = () =>
      h(
        "div",
        { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" },
        h(
          "table",
          {},
          h("thead", {}, row(lines[at], "th")),
          h("tbody", {}, ...lines.slice(at + 2, end).map((line) => row(line, "td"))),
        ),
      );
    return [end, make];
  },
};

const READERS = [fence, heading, rule, quote, list, table];

const paragraph = {
  read(lines, at) {
    let end = at + 1;
    const goesOn = () =>
      lines[end].trim() && !READERS.some((each) => each.begins(lines, end) && !numbered(lines[end]));
    while (end < lines.length && goesOn()) end += 1;
    const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
    return [end, () => h("p", {}, ...inline(text))];
  },
};

// "1986. A great year" at the start of a line is no list in the midst of a paragraph.
const numbered = (line) => /^ *\d+[.)] /.test(line) && !/^ *1[.)] /.test(line);
