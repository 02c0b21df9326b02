// The numbers of the live view, once a second.

import { h, setText, svg } from "./dom.js";
import { GraphsView } from "./graphs.js";

const POINTS = 120;
const STATES = {
  loading: "Loading", serving: "Serving", silent: "Not answering", draining: "Shutting down",
  lost: "The engine is gone",
};

function seconds(value) {
  if (value === null) return "-";
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms`;
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

const count = (value) => value.toLocaleString("en");
const percent = (part) => `${(part * 100).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;

// A number with a name, a line below it, and the last two minutes as a curve if it is one.
class Tile {
  constructor(name, curve = false) {
    this.value = h("dd", {}, "-");
    this.more = h("span", { class: "more" });
    this.points = [];
    this.line = curve ? svg("path", { class: "stroke" }) : null;
    this.area = curve ? svg("path", { class: "area" }) : null;
    const chart = curve
      ? svg("svg", { viewBox: `0 0 ${POINTS} 32`, preserveAspectRatio: "none", "aria-hidden": "true" }, this.area, this.line)
      : null;
    this.element = h("div", { class: curve ? "tile wide-tile" : "tile" }, h("dt", {}, name), this.value, h("dd", { class: "below" }, this.more), chart && h("dd", { class: "curve" }, chart));
  }

  show(value, more = "", point = null) {
    setText(this.value, value);
    setText(this.more, more);
    if (!this.line || point === null) return;
    this.points.push(point);
    if (this.points.length > POINTS) this.points.shift();
    const top = Math.max(...this.points, 1);
    const x = (n) => POINTS - this.points.length + n;
    const path = this.points.map((each, n) => `${n ? "L" : "M"}${x(n)} ${30 - (each / top) * 28}`).join("");
    this.line.setAttribute("d", path);
    this.area.setAttribute("d", `${path}L${POINTS - 1} 32L${x(0)} 32Z`);
  }
}

export class Live {
  constructor(container) {
    this.state = h("p", { class: "state" }, "Connecting");
    this.about = h("p", { class: "about" });
    this.tiles = {
      generated: new Tile("Generated tokens/s", true),
      prompt: new Tile("Prompt tokens/s", true),
      running: new Tile("Running"),
      waiting: new Tile("Waiting"),
      finished: new Tile("Finished"),
      prefix: new Tile("Prefix cache"),
      drafts: new Tile("Drafts accepted"),
    };
    this.latency = new Latency();
    this.caches = h("div", { class: "meters" });
    this.graphs = new GraphsView();
    container.append(
      h(
        "div",
        { class: "inside" },
        h("div", { class: "title" }, h("h1", {}, "Live"), this.state, this.about),
        this.graphs.verdict,
        h("dl", { class: "tiles" }, ...Object.values(this.tiles).map((each) => each.element)),
        h(
          "div",
          { class: "two" },
          this.latency.element,
          h("section", { class: "card" }, h("h2", {}, "Cache by lifetime"), this.caches),
        ),
        this.graphs.element,
      ),
    );
  }

  disconnected(why) {
    setText(this.state, why);
    this.state.dataset.state = "off";
  }

  show(view) {
    setText(this.state, view.message ? `${STATES[view.state]}: ${view.message}` : STATES[view.state]);
    this.state.dataset.state = view.state;
    const { engine } = view;
    const about = [view.model, engine.device, engine.dtype, engine.max_model_len && `context ${count(engine.max_model_len)}`, engine.version && `Reprise ${engine.version}`];
    setText(this.about, about.filter(Boolean).join(" · "));
    if (view.requests === null) return;
    this.numbers(view);
    this.latency.show(view.latencies);
    this.meters(view.caches);
    this.graphs.show(view);
  }

  numbers({ requests, tokens, prefix, drafts }) {
    const { generated, prompt, running, waiting, finished } = this.tiles;
    const rate = (value) => (value < 10 ? value.toFixed(1) : count(Math.round(value)));
    generated.show(rate(tokens.generated_per_second), `${count(tokens.generated)} since the start`, tokens.generated_per_second);
    prompt.show(rate(tokens.prompt_per_second), `${count(tokens.prompt)} since the start`, tokens.prompt_per_second);
    running.show(count(requests.running), requests.preemptions ? `${count(requests.preemptions)} preempted` : "requests");
    waiting.show(count(requests.waiting), "requests");
    const all = Object.entries(requests.finished).filter(([, number]) => number);
    const total = all.reduce((sum, [, number]) => sum + number, 0);
    finished.show(count(total), all.map(([reason, number]) => `${count(number)} ${reason}`).join(", ") || "requests");
    this.tiles.prefix.show(prefix.queries ? percent(prefix.hits / prefix.queries) : "-", "of prompt tokens found");
    this.tiles.drafts.element.hidden = drafts === null;
    if (drafts) {
      const length = 1 + drafts.accepted / drafts.drafts;
      this.tiles.drafts.show(percent(drafts.accepted / Math.max(1, drafts.drafted)), `${length.toFixed(2)} tokens a step; by place ${drafts.by_place.map(percent).join(", ")}`);
    }
  }

  meters(caches) {
    const several = new Set(caches.map((each) => each.engine)).size > 1;
    if (this.caches.childElementCount !== caches.length) {
      this.caches.replaceChildren(
        ...caches.map(() => h("div", { class: "meter" }, h("span"), h("meter", { min: 0, max: 1 }), h("b"))),
      );
    }
    caches.forEach(({ engine, lifetime, used, total }, index) => {
      const [name, meter, told] = this.caches.children[index].children;
      const unit = lifetime === "state" ? "slots" : "blocks";
      setText(name, several ? `${lifetime}, engine ${engine}` : lifetime);
      meter.setAttribute("aria-label", `${name.textContent}: ${used} of ${total} ${unit}`);
      meter.value = total ? used / total : 0;
      setText(told, `${percent(total ? used / total : 0)}, ${count(used)} of ${count(total)} ${unit}`);
    });
  }
}

class Latency {
  constructor() {
    this.over = h("span", { class: "soft" });
    const names = { first_token: "First token", inter_token: "Between tokens", total: "Whole request" };
    this.rows = {};
    const body = Object.entries(names).map(([name, told]) => {
      const made = ["p50", "p90", "p99", "count"].map(() => h("td", {}, "-"));
      this.rows[name] = made;
      return h("tr", {}, h("th", { scope: "row" }, told), ...made);
    });
    const head = ["", "p50", "p90", "p99", "values"].map((each) => h(each ? "th" : "td", each ? { scope: "col" } : {}, each));
    this.element = h(
      "section",
      { class: "card" },
      h("h2", {}, "Latency ", this.over),
      h("table", { class: "numbers" }, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...body)),
    );
  }

  show(latencies) {
    const since = latencies.seconds === null ? "since the start" : `requests that ended in the last ${latencies.seconds.toFixed(0)} s`;
    setText(this.over, since);
    for (const [name, fields] of Object.entries(this.rows)) {
      const { p50, p90, p99, count: values } = latencies[name];
      [seconds(p50), seconds(p90), seconds(p99), count(values)].forEach((text, n) => setText(fields[n], text));
    }
  }
}
