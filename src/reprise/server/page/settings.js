// What goes with every message; kept in this browser.

import { byId } from "./dom.js";

const KEPT = "reprise.settings";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const form = () => byId("settings").querySelector("form");

export function settings() {
  const fields = form().elements;
  const found = { system: fields.system.value.trim(), parameters: {} };
  for (const name of NUMBERS) {
    const value = fields[name].value.trim();
    if (value !== "") found.parameters[name] = Number(value);
  }
  return found;
}

export function setUpSettings() {
  const dialog = byId("settings");
  const fields = form().elements;
  const names = ["system", ...NUMBERS];
  const kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
  for (const name of names) fields[name].value = kept[name] ?? "";
  const changed = () => {
    const values = Object.fromEntries(names.map((name) => [name, fields[name].value]));
    localStorage.setItem(KEPT, JSON.stringify(values));
    const count = names.filter((name) => values[name].trim() !== "").length;
    byId("settings-count").hidden = count === 0;
    byId("settings-count").textContent = ` ${count} set`;
  };
  form().addEventListener("input", changed);
  byId("settings-button").addEventListener("click", () => dialog.showModal());
  byId("settings-reset").addEventListener("click", () => {
    for (const name of names) fields[name].value = "";
    changed();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog && form().checkValidity()) dialog.close(); // beside it
  });
  changed();
}
