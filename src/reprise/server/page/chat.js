// The conversation. It is kept until the tab is closed, or cleared.

import { Answer } from "./answer.js";
import { ApiError, events, request } from "./api.js";
import { byId, copyButton, h, setText } from "./dom.js";
import { settings } from "./settings.js";

const EXAMPLES = ["Tell me a story about a fox.", "What is 12 + 30?", "Repeat after me: I like tea."];

const log = byId("log");
const say = byId("say");
const KEPT = "reprise.chat";
let messages = []; // what the next request begins with, but for the system prompt; answers as they are kept
let running = null; // aborts the answer that is being written
let writing = null; // that answer
let leaving = false;
const LEFT = "Stopped: the page was left";
let onUnauthorized = () => {};

export function setUpChat(unauthorized) {
  onUnauthorized = unauthorized;
  restore();
  addEventListener("beforeunload", () => (leaving = true)); // connections break before the page is hidden
  addEventListener("pageshow", () => (leaving = false));
  addEventListener("pagehide", () => {
    if (writing?.text) keep([...messages, { ...writing.kept, note: LEFT }]);
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(say.value);
  });
  say.addEventListener("keydown", (event) => {
    // Enter also ends what an input method composes.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send(say.value);
    }
  });
  say.addEventListener("input", grow);
  byId("stop").addEventListener("click", stop);
  byId("clear").addEventListener("click", clear);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
  });
}

function grow() {
  say.style.height = "auto";
  say.style.height = `${Math.min(say.scrollHeight, 220)}px`;
}

function welcome() {
  const buttons = EXAMPLES.map((text) =>
    h("button", { type: "button", class: "example", onclick: () => send(text) }, text),
  );
  log.replaceChildren(
    h(
      "div",
      { class: "welcome" },
      h("h1", {}, "What shall it be?"),
      h("p", {}, "Answers stream from this server's own ", h("code", {}, "/v1/chat/completions"), ". Every graph that computes them is checked."),
      h("div", { class: "examples" }, ...buttons),
    ),
  );
}

function restore() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
  if (!kept.length) return welcome();
  for (const each of kept) {
    const asked = [...messages];
    if (each.role === "user") log.append(mine(each.content));
    else {
      const made = Answer.of(each, () => retry(made, asked));
      log.append(made.element);
    }
    messages.push(each);
  }
  log.scrollTop = log.scrollHeight;
}

function keep(all) {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(all));
  } catch {
    sessionStorage.removeItem(KEPT); // there is no room: rather nothing than the half of it
  }
}

function clear() {
  stop();
  messages = [];
  keep(messages);
  welcome();
  say.focus();
}

function stop() {
  running?.abort();
}

function send(text) {
  if (!text.trim() || running) return;
  say.value = "";
  grow();
  log.querySelector(".welcome")?.remove();
  messages.push({ role: "user", content: text });
  log.append(mine(text));
  answer();
}

function mine(text) {
  return h(
    "article",
    { class: "message mine", "aria-label": "You" },
    h("div", { class: "bubble", dir: "auto" }, text),
    h("div", { class: "under" }, copyButton(() => text)),
  );
}

async function answer() {
  keep(messages);
  const asked = [...messages];
  const made = new Answer(() => retry(made, asked));
  writing = made;
  log.append(made.element);
  log.scrollTop = log.scrollHeight;
  const abort = (running = new AbortController());
  busy(true);
  const { system, parameters } = settings();
  const said = asked.map(({ role, content }) => ({ role, content }));
  const body = {
    messages: system ? [{ role: "system", content: system }, ...said] : said,
    stream: true,
    stream_options: { include_usage: true },
    ...parameters,
  };
  let spoken = "The answer is complete.";
  try {
    const response = await request("v1/chat/completions", { body, signal: abort.signal });
    for await (const data of events(response)) {
      if (data !== "[DONE]") made.take(JSON.parse(data));
    }
    if (made.finish === null) throw new Error("The connection broke before the answer's end.");
    made.end(null);
  } catch (error) {
    if (abort.signal.aborted || leaving) {
      spoken = "Stopped.";
      made.end(leaving ? LEFT : "Stopped");
    } else {
      spoken = "The answer failed.";
      made.end(error.message || String(error), true);
      if (error instanceof ApiError && error.status === 401) onUnauthorized(error.message);
    }
  }
  // Cleared meanwhile, it belongs to no conversation.
  if (made.element.isConnected && made.text) {
    messages.push(made.kept);
    keep(messages);
  }
  if (running === abort) {
    running = writing = null;
    busy(false);
  }
  setText(byId("spoken"), spoken);
}

function retry(made, asked) {
  if (running) return;
  // What came behind it was an answer to it.
  while (log.lastChild !== made.element) log.lastChild.remove();
  made.element.remove();
  messages = asked;
  answer();
}

function busy(is) {
  const had = document.activeElement;
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  // Whoever had the button that is gone has the one in its place.
  if (had === byId("send") && is) byId("stop").focus();
  if (had === byId("stop") && !is) say.focus();
  setText(byId("spoken"), is ? "The model answers." : "");
}
