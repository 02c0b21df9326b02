// What both views share: which one is shown, the theme, the key, and the stream of events.

import { ApiError, events, hasKey, request, setKey } from "./api.js";
import { setUpChat } from "./chat.js";
import { byId, setText } from "./dom.js";
import { health } from "./graphs.js";
import { Live } from "./live.js";
import { setUpSettings } from "./settings.js";

const RETRY_MS = [500, 1000, 2000, 5000];

function showView() {
  const live = location.hash === "#live";
  byId("chat").hidden = live;
  byId("live").hidden = !live;
  for (const each of document.querySelectorAll("nav a")) {
    if (each.hash === (live ? "#live" : "#chat")) each.setAttribute("aria-current", "page");
    else each.removeAttribute("aria-current");
  }
}

function setUpTheme() {
  const root = document.documentElement;
  const button = byId("theme-button");
  const label = () => {
    const other = root.dataset.theme === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `${other} theme`);
    button.title = `${other} theme`;
  };
  button.addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("reprise.theme", root.dataset.theme);
    label();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
    if (localStorage.getItem("reprise.theme") === null) {
      root.dataset.theme = event.matches ? "dark" : "light";
      label();
    }
  });
  label();
}

// The dialog for the key. ``wait`` ends when there is a new one.
class Keys {
  constructor() {
    this.dialog = byId("key");
    this.waiters = [];
    byId("key-button").addEventListener("click", () => this.ask("Another key for this server."));
    byId("key-cancel").addEventListener("click", () => this.dialog.close(""));
    this.dialog.addEventListener("close", () => {
      if (this.dialog.returnValue !== "use") return;
      setKey(byId("key-field").value.trim());
      byId("key-field").value = "";
      for (const each of this.waiters.splice(0)) each();
    });
  }

  ask(why) {
    byId("key-button").hidden = false;
    setText(byId("key-why"), why);
    this.dialog.returnValue = "";
    if (!this.dialog.open) this.dialog.showModal();
  }

  wait() {
    return new Promise((resolve) => this.waiters.push(resolve));
  }
}

async function follow(live, keys) {
  for (let failures = 0; ; failures += 1) {
    try {
      for await (const data of events(await request("live"))) {
        failures = 0;
        showAll(live, JSON.parse(data));
      }
      tell({ mark: "…", state: "off", short: "offline", text: "disconnected" });
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) {
        tell({ mark: "?", state: "off", short: "no key", text: "needs a key" });
        live.disconnected("This server wants an API key.");
        keys.ask(hasKey() ? "The server does not take this key." : "This server wants one.");
        await keys.wait();
        failures = -1;
        continue;
      }
      tell({ mark: "…", state: "off", short: "offline", text: "disconnected" });
    }
    live.disconnected("The server does not answer. Trying again.");
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(failures, 3)]));
  }
}

function showAll(live, view) {
  try {
    setText(byId("model"), view.model);
    tell(health(view));
    live.show(view);
  } catch (error) {
    reportError(error); // a defect of this page is none of the connection
  }
}

function tell({ mark, state, text, short = text }) {
  const pill = byId("health");
  pill.dataset.state = state;
  setText(pill.firstElementChild, mark);
  setText(pill.querySelector(".long"), text);
  setText(pill.querySelector(".short"), short);
  pill.setAttribute("aria-label", text);
  document.title = state === "bad" ? `${mark} ${text} - Reprise` : "Reprise";
}

setUpTheme();
setUpSettings();
const keys = new Keys();
byId("key-button").hidden = !hasKey();
setUpChat((why) => keys.ask(why));
addEventListener("hashchange", () => {
  showView();
  byId("main").focus();
});
showView();
follow(new Live(byId("live")), keys);
