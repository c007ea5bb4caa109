// The charts of the page: what each shows, in which unit, from which series of the stream.

import { Chart, stack } from "./charts.js";
import { element, times } from "./format.js";
import { HeatMap } from "./heat.js";

const byId = (id) => document.getElementById(id);

// From the bottom of the stack up: the first four are the meter's, the host's own meter stands on top of them.
const PARTS = ["prefill_w", "decode_w", "idle_w", "unattributed_w", "host_w"];
const SLO_WINDOW = 60;
const REPLICA_ROLES = ["l0", "l1", "l2", "l3", "l4", "l5"];

const NO_ANSWER = "no answer ended in this time";
const NO_REPLICA = "no replica in this time";
const NO_OBJECTIVE = "no objective set: slo in wattline.yaml";

const SIMPLE = [
  {
    id: "ttft", title: "Time to first token", unit: "ms", empty: NO_ANSWER,
    tip: "From a request's arrival at the router to the first token of its answer, over the last 30 s. Half of the answers were faster than p50, 95 of 100 faster than p95.",
    lines: [{ name: "p50", role: "a", series: "ttft_p50_ms" }, { name: "p95", role: "b", series: "ttft_p95_ms" }],
    objective: "ttft_ms",
  },
  {
    id: "tpot", title: "Time per later token", unit: "ms", empty: NO_ANSWER,
    tip: "Mean time between the tokens of an answer after the first (TPOT), over the answers of the last 30 s.",
    lines: [{ name: "p50", role: "a", series: "tpot_p50_ms" }, { name: "p95", role: "b", series: "tpot_p95_ms" }],
    objective: "tpot_ms",
  },
  {
    id: "speed", title: "Output speed", unit: "tok/s",
    tip: "Tokens sent per second, all answers together, over the last ten seconds.",
    lines: [{ name: "output", role: "c", series: "output_tokens_per_s" }],
  },
  {
    id: "cost", title: "Energy per token", unit: "J", empty: "no joules billed in this time",
    tip: "Joules of the requests billed in the last 30 s, divided by their tokens: of the answers alone, and of prompts and answers.",
    lines: [
      { name: "per output token", role: "l1", series: "j_per_output_token" },
      { name: "per total token", role: "l5", series: "j_per_total_token" },
    ],
  },
  {
    id: "batch", title: "Batch and queue", unit: "", isWhole: true,
    tip: "Requests the engines work on together in a step, and requests that wait for a place.",
    lines: [{ name: "in the batch", role: "a", series: "running" }, { name: "waiting", role: "warn", series: "waiting" }],
  },
  {
    id: "kv", title: "KV cache use", unit: "%", max: 100, empty: NO_REPLICA,
    tip: "Part of the cache of keys and values that requests hold. At 100 % new requests wait.",
    lines: [{ name: "used", role: "l4", series: "kv_used_ratio", scale: 100 }],
  },
];

const REPLICAS = [
  { name: "ready", role: "good", series: "replicas_ready" },
  { name: "wanted", role: "warn", dash: true, series: "replicas_wanted" },
];

const IMBALANCE = [
  { name: "as placed", role: "a", series: "expert_imbalance" },
  { name: "without copies", role: "warn", dash: true, series: "expert_imbalance_without_copies" },
];

export class Panels {
  constructor({ grid, powerBox, imbalanceBox, readyBox, heatCanvas, heatWords, span }) {
    this.span = span;
    this.charts = new Map();
    this.power = new Chart(powerBox, { label: "Power by purpose", unit: "W", empty: "no meter has spoken in this time", lines: powerLines(false), span });
    for (const spec of SIMPLE) this.charts.set(spec.id, this.add(grid, spec));
    this.imbalance = new Chart(imbalanceBox, { label: "Imbalance of the ranks", unit: "×", empty: "no work in this time", lines: IMBALANCE, min: 1, span });
    this.ready = new Chart(readyBox, { label: "Ready replicas", unit: "", empty: NO_REPLICA, lines: REPLICAS, isWhole: true, span });
    this.heat = new HeatMap(heatCanvas, heatWords);
    this.slo = this.add(grid, {
      title: "Answers in time", unit: "%", empty: NO_ANSWER, max: 104, lines: [{ name: "kept the objective", role: "good" }],
      tip: "Of the answers of the last minute, the part that kept the model's time objectives (slo in wattline.yaml).",
    });
    this.replicas = this.add(grid, {
      title: "Power per replica", unit: "W", empty: "no meter has spoken in this time", lines: [], tip: "What the devices of each replica draw, averaged over a second. All models.",
    });
  }

  add(grid, { title, unit, tip, lines, empty, max, isWhole }) {
    const figure = document.createElement("figure");
    figure.className = "panel";
    figure.style.margin = "0";
    const head = document.createElement("figcaption");
    head.className = "panel-head";
    const name = document.createElement("h2");
    const term = document.createElement("span");
    term.className = "term";
    term.tabIndex = 0;
    term.dataset.tip = tip;
    term.textContent = title;
    name.append(term);
    const unitText = document.createElement("span");
    unitText.className = "quiet";
    unitText.textContent = unit;
    head.append(name, unitText);
    const box = document.createElement("div");
    box.className = "chart";
    figure.append(head, box);
    grid.append(figure);
    return new Chart(box, { label: title, unit, lines, empty, max, isWhole, span: this.span });
  }

  recolor() {
    for (const chart of [this.power, this.imbalance, this.ready, this.slo, this.replicas, ...this.charts.values()]) chart.reset();
    this.heat.recolor();
  }

  show(stream, model) {
    this.showPower(stream, model);
    for (const spec of SIMPLE) this.showSimple(stream, model, spec);
    this.showExperts(stream, model);
    this.slo.empty = model.slo.ttft_ms || model.slo.tpot_ms ? NO_ANSWER : NO_OBJECTIVE;
    this.showSlo(stream, model);
    this.showReplicas(stream);
    this.ready.show(stream.columns(model.name, REPLICAS.map((line) => line.series), this.span()));
  }

  showPower(stream, model) {
    const [times, ...columns] = stream.columns(model.name, [...PARTS, "static_w", "meter_w"], this.span());
    const hasHost = columns[PARTS.indexOf("host_w")].some((value) => value !== null);
    if (hasHost !== this.power.lines.some((line) => line.role === "host")) this.power.reset(powerLines(hasHost));
    const parts = columns.slice(0, hasHost ? 5 : 4);
    const rest = columns.slice(PARTS.length);
    this.power.show([times, ...stack(parts), ...rest], [times, ...parts.toReversed(), ...rest]);
  }

  showSimple(stream, model, spec) {
    const chart = this.charts.get(spec.id);
    const names = spec.lines.map((line) => line.series);
    const [times, ...columns] = stream.columns(model.name, names, this.span());
    const scaled = columns.map((column, i) => {
      const scale = spec.lines[i].scale ?? 1;
      return column.map((value) => (value === null ? null : value * scale));
    });
    const objective = spec.objective ? model.slo[spec.objective] : null;
    if (Boolean(objective) !== chart.lines.some((line) => line.isObjective)) {
      chart.reset(objective ? [...spec.lines, { name: "objective", role: "warn", dash: true, width: 1, isObjective: true }] : spec.lines);
    }
    if (objective) scaled.push(times.map(() => objective));
    chart.show([times, ...scaled]);
  }

  // Nothing is drawn of a model without experts, and until they worked.
  showExperts(stream, model) {
    const { experts } = model;
    byId("experts").hidden = !experts;
    if (!experts) return;
    this.heat.show(experts);
    const hasRanks = experts.imbalance !== null;
    byId("imbalance").hidden = !hasRanks;
    byId("one-rank").hidden = hasRanks;
    if (!hasRanks) return;
    this.imbalance.show(stream.columns(model.name, IMBALANCE.map((line) => line.series), this.span()));
    const copies = experts.num_copies === 1 ? "1 copy" : `${experts.num_copies} copies`;
    const worst = experts.num_replicas > 1 ? ` The most uneven of ${experts.num_replicas} replicas.` : "";
    const words = experts.num_copies
      ? ["Copies of hot experts in spare slots took the busiest of ", `${experts.num_ranks} ranks from `, strong(experts.imbalance_without_copies), " to ",
        strong(experts.imbalance), ` the mean (${copies}).${worst}`]
      : [`The busiest of ${experts.num_ranks} ranks has `, strong(experts.imbalance), ` the mean; no expert has a copy.${worst}`];
    byId("imbalance-words").replaceChildren(...words);
  }

  showSlo(stream, model) {
    const [times, met, missed] = stream.columns(model.name, ["slo_met", "slo_missed"], this.span() + SLO_WINDOW);
    const first = times.findIndex((time) => times.at(-1) - time <= this.span());
    const ratios = [];
    for (let i = first, from = 0; i >= 0 && i < times.length; i += 1) {
      while (times[i] - times[from] > SLO_WINDOW) from += 1;
      const good = met[i] - met[from];
      const all = good + missed[i] - missed[from];
      ratios.push(all > 0 ? (100 * good) / all : null);
    }
    this.slo.show([times.slice(Math.max(0, first)), ratios]);
  }

  showReplicas(stream) {
    const { ids, data } = stream.replicaPower(this.span());
    if (ids.join() !== this.replicas.lines.map((line) => line.id).join()) {
      this.replicas.reset(this.colored(ids));
    }
    this.replicas.show(data);
  }

  // A replica keeps its colour while others come and go.
  colored(ids) {
    const kept = new Map(this.replicas.lines.map((line) => [line.id, line.role]));
    const free = REPLICA_ROLES.filter((role) => !ids.some((id) => kept.get(id) === role));
    return ids.map((id, i) => ({ id, name: id, role: kept.get(id) ?? free.shift() ?? REPLICA_ROLES[i % REPLICA_ROLES.length] }));
  }
}

const strong = (ratio) => element("b", {}, times(ratio));

// In the order they are painted: the top of the stack first. Nothing is said of a host that no meter counts.
// The legend reads as the sum they are: prefill + decode + idle + unattributed = meter.
function powerLines(hasHost) {
  return [
    ...(hasHost ? [{ name: "host, beside it", role: "host", fill: true, place: 6 }] : []),
    { name: "unattributed", role: "unattributed", fill: true, place: 3, sign: "+" },
    { name: "idle", role: "idle", fill: true, place: 2, sign: "+" },
    { name: "decode", role: "decode", fill: true, place: 1, sign: "+" },
    { name: "prefill", role: "prefill", fill: true, place: 0 },
    { name: "of it static", role: "static", dash: true, width: 1.2, place: 5 },
    { name: "meter", role: "meter", width: 2, place: 4, sign: "=" },
  ];
}
