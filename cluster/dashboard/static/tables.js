// Tiles and tables: text nodes only, so nothing a server says can become markup.

import { count, duration, element, isKnown, joules, milliseconds, number, percent, provenance, short, shortMilliseconds, UNKNOWN } from "./format.js";
import { cell, copyable, fill, state } from "./rows.js";

const byId = (id) => document.getElementById(id);

function term(text, tip) {
  return element("span", { class: "term", tabindex: "0", "data-tip": tip }, text);
}

// Tiles are made once and then only change their text: focus and tooltips stay where they are.
const tiles = new Map();

function tile(key, label, tip, value, unit, sub, tone = "") {
  if (!tiles.has(key)) {
    const parts = { big: element("dd", { class: "big" }), sub: element("dd", { class: "sub" }) };
    parts.box = element("div", { "data-tile": key }, element("dt", {}, term(label, tip)), parts.big, parts.sub);
    byId("tiles").append(parts.box);
    tiles.set(key, parts);
  }
  const { box, big, sub: below } = tiles.get(key);
  // A unit that comes with the number is as small as any other.
  const [figure, ...own] = value.split(" ");
  big.replaceChildren(figure, ...(value !== UNKNOWN ? [element("small", {}, [...own, unit].join(" "))] : []));
  below.textContent = sub;
  below.title = sub;
  box.dataset.tone = tone;
}

export function showTiles(model, attainment) {
  const { slo, power_w: power } = model;
  const tone = !isKnown(attainment) || attainment >= 0.99 ? "" : attainment >= 0.95 ? "warn" : "bad";
  tile("slo", "In time", "Part of the answers of the last 15 minutes that kept the model's time objectives, to the first token and for each later one: slo in wattline.yaml. Failed answers count as late; cancelled ones do not count. Orange below 99 %, red below 95 %.",
    attained(attainment), "%", objective(slo), tone);
  tile("ttft", "First token", "Time to first token, half of the answers of the last 30 s (p50), and 95 of 100 (p95).",
    milliseconds(model.ttft_ms.p50), "p50", `p95 ${milliseconds(model.ttft_ms.p95)}`);
  tile("tpot", "Later tokens", "Mean time per token after the first, half of the answers of the last 30 s (p50), and 95 of 100 (p95).",
    milliseconds(model.tpot_ms.p50), "p50", `p95 ${milliseconds(model.tpot_ms.p95)}`);
  tile("speed", "Output", "Tokens sent per second, all answers together, over the last ten seconds.",
    number(model.output_tokens_per_s), "tok/s", `${count(model.active)} under way`);
  tile("cost", "Energy per token", "Joules of the requests billed in the last 30 s, divided by the tokens of their answers (J/out); and by all their tokens, prompts included.",
    number(model.j_per_output_token), "J/out", `${number(model.j_per_total_token)} J/total token`);
  tile("power", "Power", "What the devices of this model's replicas draw now, by the meter.",
    number(power?.meter_w), "W", besidePower(model));
  tile("batch", "Batch", "Requests the engines work on together, and those that wait for a place. Orange when more wait than run.",
    count(model.running), "running", `${count(model.waiting)} waiting`, model.waiting > model.running && model.waiting > 4 ? "warn" : "");
  tile("kv", "KV cache", "Part of the cache of keys and values that requests hold. At 100 % new requests wait.",
    isKnown(model.kv_used_ratio) ? (100 * model.kv_used_ratio).toFixed(1) : UNKNOWN, "% used", replicasReady(model.replicas), model.replicas.ready < model.replicas.min ? "short" : "");
}

// Example: "≤ 500 / 100 ms": to the first token, and for each later one.
function objective({ ttft_ms: first, tpot_ms: later }) {
  if (!first && !later) return "no objective set";
  if (!first || !later) return `${first ? "first" : "later"} ≤ ${shortMilliseconds(first || later)}`;
  return `≤ ${(first < 1000 ? short : shortMilliseconds)(first)} / ${shortMilliseconds(later)}`;
}

// Two digits, rounded down: 100 is said only where no answer was late.
const attained = (ratio) => (!isKnown(ratio) ? UNKNOWN : ratio === 1 ? "100" : (Math.floor(ratio * 1e4) / 100).toFixed(2));

function replicasReady({ ready, min }) {
  if (ready < min) return `${ready} of ${min} replicas`;
  return ready === 1 ? "1 replica ready" : `${ready} replicas ready`;
}

function besidePower(model) {
  if (!model.power_w) return isMeterSilent(model) ? "the meter is silent" : "no meter yet";
  return isKnown(model.host?.power_w) ? `host ${number(model.host.power_w)} W beside it` : `${number(model.power_w.idle_w)} W of it idle`;
}

// It counted before, and nothing comes of it now.
const isMeterSilent = (model) => !model.power_w && model.energy.ledger.length > 0;

export function showEnergy(model) {
  const { source, confidence_factor: factor, ledger } = model.energy;
  const { kind, text, tip } = provenance(source, factor, isMeterSilent(model));
  const badge = byId("badge");
  badge.textContent = text;
  badge.dataset.kind = kind;
  badge.classList.add("term");
  badge.tabIndex = 0;
  badge.dataset.tip = tip;
  const sums = ledger.find((one) => one.source === source) ?? ledger[0];
  const body = byId("ledger");
  const check = byId("ledger-check");
  if (!sums) {
    body.replaceChildren(element("tr", {}, element("td", { colspan: "3", class: "none" }, "The ledger opens with the meter's first reading.")));
    check.textContent = "";
    delete check.dataset.ok;
    return;
  }
  const row = (name, key, kind = "") => ledgerRow({ name, key, amount: sums[key], whole: sums.meter_mj, kind, role: kind ? "" : name });
  body.replaceChildren(
    row("prefill", "prefill_mj"), row("decode", "decode_mj"), row("idle", "idle_mj"), row("unattributed", "unattributed_mj"),
    row("meter", "meter_mj", "sum"), row("of it static", "static_mj", "part"), row("of it wasted", "wasted_mj", "part"),
    ...(model.host ? hostRows(model.host) : []),
  );
  check.dataset.ok = String(sums.is_conserved);
  const others = ledger.filter((one) => one !== sums).map((one) => `${joules(one.meter_mj)} J from ${one.source}`);
  const apart = others.length ? `; beside it, never added: ${others.join(", ")}` : "";
  check.textContent = (sums.is_conserved ? "✓ the four parts equal the meter, to the millijoule" : "✗ the parts do not equal the meter") + apart;
}

// The host's own meter, and what it was for: an account beside that of the devices.
function hostRows(host) {
  const row = (name, key, kind, role) => ledgerRow({ name, key: `host_${key}`, amount: host[key], whole: host.meter_mj, kind, role });
  return [row("host, for requests", "requests_mj", "apart", "host"), row("host, the rest", "rest_mj", "", "host"), row("host meter", "meter_mj", "sum", "")];
}

// `amount` of `whole` in millijoules; `role` of its colour in the chart, empty where it has none there.
function ledgerRow({ name, key, amount, whole, kind, role }) {
  const swatch = element("span", { class: "swatch" });
  swatch.style.background = role ? `var(--${role})` : "transparent";
  const share = whole ? percent(amount / whole) : UNKNOWN;
  const value = element("td", { "data-ledger": key, "data-mj": String(amount) }, joules(amount));
  return element("tr", { class: kind }, element("th", { scope: "row" }, swatch, name), value, element("td", {}, share));
}

export function showRequests(requests) {
  const rows = requests.map((request) => {
    const isError = request.outcome === request.outcome.toUpperCase();
    const isOpen = isKnown(request.energy_mj) && !request.is_final;
    const host = isKnown(request.host_mj) ? `beside it ${joules(request.host_mj)} J of the host` : "";
    return {
      key: request.id,
      cells: [
        { ...copyable(request.id.slice(0, 8), `wattline why ${request.id}`), tag: "th" }, cell(request.model, "wide"), cell(duration(request.age_s), "num"),
        cell(count(request.prompt_tokens), "num"), cell(count(request.output_tokens), "num"),
        cell(`${joules(request.energy_mj)}${isOpen ? " ~" : ""}`, "num", null, [isOpen ? "not final yet" : "", host].filter(Boolean).join("; ")),
        cell(number(request.j_per_output_token), "num"),
        cell(milliseconds(request.ttft_ms), "num"), cell(milliseconds(request.total_ms), "num"), state(request.outcome, isError ? "error" : request.outcome),
        copyable(request.trace_id, request.trace_id),
      ],
    };
  });
  fill(byId("requests"), rows, "No request has ended yet.");
}

export function showTotals(models) {
  const sum = (key) => models.reduce((total, model) => total + model.totals[key], 0);
  const total = (key, text, words) => [element("b", { "data-total": key, "data-value": String(sum(key)) }, text(sum(key))), ` ${words} `];
  byId("totals").replaceChildren("Since the router started, all models: ",
    ...total("requests", count, "requests,"), ...total("refused", count, "refused,"), ...total("prompt_tokens", count, "tokens in,"),
    ...total("output_tokens", count, "tokens out,"), ...total("request_energy_mj", joules, "J billed to requests."));
}
