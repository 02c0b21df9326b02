// What is known of every graph: the verdict, quarantines with their reasons, and the kinds proven.

import { h, setText } from "./dom.js";

const MARKS = {
  s: ["●", "start", "proven at start on this graph"],
  f: ["◐", "family", "proven on the graphs that stand for its family"],
  l: ["◆", "live", "proven on a live step"],
  ".": ["·", "unmet", "not yet met: the first such step is compared with eager execution, or runs eagerly"],
  x: ["✗", "refused", "the graph was refused"],
  "-": ["-", "unused", "no graph: it gains nothing over eager execution, or there is none"],
};

const plural = (number, name) => `${number.toLocaleString("en")} ${name}${number === 1 ? "" : "s"}`;

function summary(view) {
  const all = view.graphs.flatMap((each) => each.graphs.map((graph) => ({ ...graph, engine: each.engine })));
  return {
    bad: all.filter((each) => each.quarantined !== null),
    used: all.filter((each) => each.executor !== "none" && each.quarantined === null),
    failures: view.graphs.reduce((sum, each) => sum + each.canary_failures, 0),
  };
}

// For the header: the same on every view.
// ``short`` stands for ``text`` where there is little room.
export function health(view) {
  if (view.requests === null || view.state === "lost") {
    return { mark: view.state === "lost" ? "✗" : "…", state: view.state === "lost" ? "bad" : "off", text: view.state };
  }
  const { bad, used, failures } = summary(view);
  if (bad.length) return { mark: "✗", state: "bad", short: `${bad.length} wrong`, text: `${plural(bad.length, "graph")} quarantined` };
  if (failures) return { mark: "✗", state: "bad", short: `${failures} failed`, text: plural(failures, "failed canary").replace("canarys", "canaries") };
  if (view.state !== "serving") return { mark: "…", state: "off", text: view.state };
  if (!used.length) return { mark: "-", state: "off", short: "eager", text: "eager, no graphs" };
  return { mark: "✓", state: "good", short: `${used.length} right`, text: `${plural(used.length, "graph")}, none wrong` };
}

export class GraphsView {
  constructor() {
    this.mark = h("span", { class: "mark", "aria-hidden": "true" });
    this.headline = h("strong");
    this.detail = h("span", { class: "soft" });
    this.verdict = h("div", { class: "verdict", role: "status", id: "verdict" }, this.mark, h("div", {}, this.headline, this.detail));
    this.bad = h("div", { class: "quarantines" });
    this.engines = h("div");
    this.shown = [];
    this.element = h(
      "section",
      { class: "graphs", "aria-labelledby": "graphs-title" },
      h("h2", { id: "graphs-title" }, "Graphs"),
      h("p", { class: "soft" }, "A captured graph is a cache of a computation. It is replayed unseen only in steps of which every fact, and every pair of facts, was proven on it."),
      this.bad,
      this.engines,
    );
  }

  show(view) {
    this.tell(view);
    const several = view.graphs.length > 1;
    while (this.shown.length < view.graphs.length) {
      const made = new EngineGraphs();
      this.shown.push(made);
      this.engines.append(made.element);
    }
    view.graphs.forEach((each, index) => this.shown[index].show(each, several));
  }

  tell(view) {
    const { bad, used, failures } = summary(view);
    const total = (name) => view.graphs.reduce((sum, each) => sum + each[name], 0);
    const proven = used.filter((each) => each.verified).length;
    const wrong = bad.length > 0 || failures > 0;
    this.verdict.dataset.state = wrong ? "bad" : used.length ? "good" : "off";
    setText(this.mark, wrong ? "✗" : used.length ? "✓" : "-");
    let headline = `Nothing is wrong: ${plural(used.length, "graph")} in use`;
    if (!used.length) headline = "No graphs: every step runs eagerly";
    if (failures) headline = `Wrong: ${plural(failures, "comparison")} found a difference`;
    if (bad.length) headline = `Wrong: ${plural(bad.length, "graph")} quarantined`;
    setText(this.headline, headline);
    setText(
      this.detail,
      `${proven} of ${used.length} proven on every planned probe · ${plural(total("replays"), "replay")} · ` +
        `${plural(total("canaries"), "comparison")} on live steps, ${failures} failed · ${plural(total("eager_steps"), "eager step")}`,
    );
    const several = view.graphs.length > 1;
    const key = JSON.stringify(bad.map((each) => [each.engine, each.name, each.quarantined, each.executor]));
    if (key === this.badShown) return;
    this.badShown = key;
    this.bad.replaceChildren(
      ...bad.map((each) =>
        h(
          "article",
          { class: "quarantine" },
          h("p", {}, h("b", {}, "✗ Quarantined: "), h("code", {}, each.name), several ? ` of engine ${each.engine}` : "", `, planned as ${each.planned}, ${each.executor === "none" ? "its steps run eagerly" : `now ${each.executor}`}`),
          h("p", { class: "reason" }, each.quarantined),
        ),
      ),
    );
  }
}

// One engine's graphs. Tables are made anew when there are other graphs or facts only.
class EngineGraphs {
  constructor() {
    this.title = h("h3");
    this.plan = h("p", { class: "soft" });
    this.tables = h("div", { class: "tables" });
    this.element = h("div", { class: "engine" }, this.title, this.plan, this.tables);
    this.made = null;
  }

  show(given, several) {
    setText(this.title, `Engine ${given.engine}`);
    this.title.hidden = !several;
    const plan = Object.entries(given.plan).map(([phase, executor]) => `${phase}: ${executor}`);
    setText(this.plan, [`Plan ${given.requested} (${plan.join(", ")})`, `verified by ${given.verify}`, ...given.downgrades].join(" · "));
    const key = JSON.stringify([given.facts, given.graphs.map((each) => [each.name, each.marks, state(each)])]);
    if (key !== this.made) {
      this.made = key;
      this.cells = new Map();
      const groups = new Map();
      for (const each of given.graphs) {
        const name = `${each.owner} ${each.phase}`.trim();
        groups.set(name, [...(groups.get(name) ?? []), each]);
      }
      const cards = [...groups].map(([name, graphs]) =>
        h("section", { class: "card" }, h("h3", {}, name, h("span", { class: "soft" }, ` ${plural(graphs.length, "graph")} by ${BUCKET_OF[graphs[0].phase]}`)), this.list(name, graphs), kinds(name, graphs, given.facts)),
      );
      this.tables.replaceChildren(...cards, given.graphs.length ? legend() : "");
    }
    for (const graph of given.graphs) {
      const texts = [
        graph.replays, graph.canaries, graph.canary_every === null ? "-" : `1 in ${graph.canary_every.toLocaleString("en")}`,
        graph.eager_steps, `${graph.probes}/${graph.planned_probes}`,
      ];
      this.cells.get(graph.name).forEach((cell, n) => setText(cell, texts[n].toLocaleString("en")));
    }
  }

  list(name, graphs) {
    const rows = graphs.map((graph) => {
      const [tone, mark, word] = state(graph);
      const cells = ["replays", "canaries", "every", "eager", "probes"].map(() => h("td"));
      this.cells.set(graph.name, cells);
      const told = h("span", { class: `tone ${tone}`, title: graph.quarantined ?? graph.dropped }, h("b", { "aria-hidden": "true" }, mark), ` ${word}`);
      return h("tr", {}, h("th", { scope: "row" }, h("code", {}, graph.name)), h("td", { class: "left" }, told), h("td", { class: "left" }, graph.executor === "none" ? "eager" : graph.executor), ...cells);
    });
    const head = ["Graph", "State", "Runs as", "Replays", "Compared", "At random", "Unproven steps", "Probes"];
    const made = head.map((each, n) => h("th", { scope: "col", class: n < 3 ? "left" : undefined }, each));
    return wide(`Graphs of ${name}`, h("table", { class: "numbers list" }, h("thead", {}, h("tr", {}, ...made)), h("tbody", {}, ...rows)));
  }
}

const BUCKET_OF = { decode: "requests", mixed: "tokens" };

function wide(label, table) {
  return h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": label }, table);
}

// A row is a fact about a step or about one of its requests, a column a graph.
function kinds(name, graphs, facts) {
  const met = (n) => graphs.some((graph) => !" .".includes(graph.marks[n] ?? " "));
  const known = facts.map((_, n) => n).filter(met);
  const unknown = facts.filter((fact, n) => !met(n) && graphs.some((graph) => (graph.marks[n] ?? " ") !== " "));
  const columns = graphs.map((graph) => h("th", { scope: "col" }, short(graph.bucket)));
  let last = null;
  const rows = known.map((n) => {
    const [attribute, value] = facts[n].split(": ");
    const first = attribute !== last;
    last = attribute;
    return h(
      "tr",
      { class: first ? "first" : undefined },
      h("th", { scope: "row" }, h("span", { class: first ? "of" : "of hidden" }, `${attribute} `), value),
      ...graphs.map((graph) => h("td", {}, mark(markOf(graph, n), `${graph.name}, ${facts[n]}`))),
    );
  });
  if (!rows.length) return h("p", { class: "soft" }, "No kind of step is proven.");
  const table = h("table", { class: "kinds" }, h("thead", {}, h("tr", {}, h("td", {}, "Kinds of steps"), ...columns)), h("tbody", {}, ...rows));
  const note = unknown.length ? h("p", { class: "soft small-text" }, `Not yet met by any of these graphs: ${unknown.join("; ")}.`) : "";
  return h("div", {}, wide(`Kinds of steps of ${name}`, table), note);
}

function markOf(graph, n) {
  if (graph.quarantined !== null && graph.executor === "none") return "x";
  if (graph.executor === "none") return "-";
  return graph.marks[n] === " " || graph.marks[n] === undefined ? "." : graph.marks[n];
}

function mark(letter, about) {
  const [sign, tone, meaning] = MARKS[letter];
  return h("span", { class: `fact ${tone}`, role: "img", "aria-label": meaning, title: `${about}: ${meaning}` }, sign);
}

function legend() {
  return h("div", { class: "legend" }, ...Object.values(MARKS).map(([sign, tone, meaning]) => h("span", {}, h("span", { class: `fact ${tone}`, "aria-hidden": "true" }, sign), meaning)));
}

const short = (bucket) => (bucket >= 1024 && bucket % 1024 === 0 ? `${bucket / 1024}K` : String(bucket));

function state(graph) {
  if (graph.quarantined !== null) return ["bad", "✗", "quarantined"];
  if (graph.executor === "none") return ["off", "-", graph.proof];
  if (graph.verified) return ["good", "✓", "verified"];
  return ["some", "◐", graph.proof];
}
