// One answer of the model while it is written, and behind it.

import { copyButton, h, setText } from "./dom.js";
import { show } from "./markdown.js";

export class Answer {
  constructor(retry) {
    this.text = "";
    this.thought = "";
    this.tokens = null;
    this.finish = null;
    this.suspect = false;
    this.began = performance.now();
    this.firstAt = null;
    this.thoughtAt = null;
    this.frame = null;
    this.body = h("div", { class: "text", dir: "auto" });
    this.thoughts = h("div", { class: "text", dir: "auto" });
    this.summary = h("summary", {}, "Thinking");
    this.folded = h("details", { class: "thought", hidden: true }, this.summary, this.thoughts);
    this.note = h("span", { class: "note" });
    this.warning = h("p", { class: "alert", role: "alert", hidden: true });
    this.retry = h("button", { type: "button", class: "quiet small", onclick: retry }, "Try again");
    this.actions = h("div", { class: "under", hidden: true }, copyButton(() => this.text), this.retry, this.note);
    this.waiting = h("p", { class: "waiting" }, h("i"), h("i"), h("i"), h("span", { class: "hidden" }, "Waiting for the first token"));
    this.element = h(
      "article",
      { class: "message answer", "aria-label": "Answer" },
      this.folded, this.body, this.waiting, this.warning, this.actions,
    );
  }

  // One that was written before the page was loaded.
  static of({ content, thought, note, warning }, retry) {
    const made = new Answer(retry);
    Object.assign(made, { text: content, thought, finish: "kept" });
    made.draw();
    made.close(note, warning);
    return made;
  }

  // What is kept of it.
  get kept() {
    const [note, warning] = [this.note.textContent, this.warning.textContent];
    return { role: "assistant", content: this.text, thought: this.thought, note, warning };
  }

  // A chunk of /v1/chat/completions.
  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { content, reasoning } = choice.delta;
    if (content || reasoning) this.firstAt ??= performance.now();
    if (reasoning) this.thought += reasoning;
    if (content) {
      if (this.thought) this.thoughtAt ??= performance.now();
      this.text += content;
    }
    if (choice.finish_reason) this.finish = choice.finish_reason;
    if (choice.suspect_from !== undefined && choice.suspect_from !== null) this.suspect = true;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = null;
    const log = this.element.parentElement;
    const follows = log && log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    this.waiting.hidden = Boolean(this.text || this.thought);
    this.folded.hidden = !this.thought;
    if (this.thought) {
      show(this.thoughts, this.thought);
      const seconds = ((this.thoughtAt ?? performance.now()) - this.firstAt) / 1000;
      const open = this.thoughtAt === null && this.finish === null;
      const took = this.firstAt === null ? "Thought" : `Thought for ${seconds.toFixed(1)} s`;
      setText(this.summary, open ? "Thinking" : took);
    }
    show(this.body, this.text);
    if (follows) log.scrollTop = log.scrollHeight;
  }

  // It is over, for a reason that people are told; null: it came to its own end.
  end(reason, failed = false) {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.finish ??= "stopped";
    this.draw();
    const told = [];
    if (!failed && reason) told.push(reason);
    if (this.finish === "length") told.push("Cut off at the most tokens");
    if (this.tokens !== null) {
      told.push(`${this.tokens} token${this.tokens === 1 ? "" : "s"}`);
      const seconds = (performance.now() - this.firstAt) / 1000;
      if (this.tokens > 1 && seconds > 0) told.push(`${((this.tokens - 1) / seconds).toFixed(0)} tokens/s`);
    }
    if (this.firstAt !== null) told.push(`first after ${duration(this.firstAt - this.began)}`);
    const warnings = [];
    if (failed) warnings.push(reason);
    if (this.suspect) {
      warnings.push("Some of these tokens may be wrong: a graph that drew them was found wrong later.");
    }
    this.close(told.join(" · "), warnings.join(" "));
  }

  close(note, warning) {
    this.waiting.hidden = true;
    setText(this.note, note);
    this.warning.hidden = !warning;
    setText(this.warning, warning);
    this.actions.hidden = false;
  }
}

const duration = (ms) => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`);
