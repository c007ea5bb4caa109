// The page: joins the stream to tiles, charts and tables. Start reading here.

import { installCopying, installTheme, installTips } from "./chrome.js";
import { readyOf, showEvents, showReplicas } from "./fleet.js";
import { clock, duration, element } from "./format.js";
import { Panels } from "./panels.js";
import { Stream } from "./stream.js";
import { showEnergy, showRequests, showTiles, showTotals } from "./tables.js";

const byId = (id) => document.getElementById(id);
const ATTAINMENT_SPAN_S = 900;

let chosenModel = null;
let spanSeconds = 300;

const panels = new Panels({
  grid: byId("charts"), powerBox: byId("chart-power"), imbalanceBox: byId("chart-imbalance"), readyBox: byId("chart-replicas"),
  heatCanvas: byId("heat"), heatWords: byId("heat-words"), span: () => spanSeconds,
});
const stream = new Stream({ onChange: show, onState: showLink });

function show() {
  const { snapshot } = stream;
  if (!snapshot) return;
  const { models, replicas, events, requests, router } = snapshot;
  showModels(models);
  markShort(models);
  const model = models.find((one) => one.name === chosenModel) ?? models[0];
  byId("router-id").textContent = `${router.id} · ${router.version}`;
  byId("router-uptime").textContent = ` · up ${duration(router.uptime_s)}`;
  showNotice(snapshot, model);
  showTiles(model, attainment(model));
  showEnergy(model);
  showReplicas(replicas, models);
  byId("replicas-model").textContent = model.name;
  showEvents(events);
  showRequests(requests);
  showTotals(models);
  panels.show(stream, model);
  document.documentElement.dataset.ready = "true";
}

function showModels(models) {
  const names = models.map((model) => model.name);
  const box = byId("model-choice");
  if (box.dataset.names === names.join()) return;
  box.dataset.names = names.join();
  if (!names.includes(chosenModel)) chosenModel = names[0];
  box.hidden = names.length < 2;
  box.querySelectorAll("label").forEach((label) => label.remove());
  for (const name of names) {
    const input = element("input", { type: "radio", name: "model", value: name });
    input.checked = name === chosenModel;
    input.addEventListener("change", () => { chosenModel = name; show(); });
    box.append(element("label", {}, input, element("span", {}, name)));
  }
}

// A dot at the tab of a model that lacks replicas: the others are not on the screen.
function markShort(models) {
  const labels = byId("model-choice").querySelectorAll("label");
  models.forEach((model, i) => {
    const isShort = model.replicas.ready < model.replicas.min;
    labels[i].toggleAttribute("data-short", isShort);
    labels[i].title = isShort ? readyOf(model) : "";
  });
}

// Kept by all answers of the last quarter of an hour.
function attainment(model) {
  const [, met, missed] = stream.columns(model.name, ["slo_met", "slo_missed"], ATTAINMENT_SPAN_S);
  const isWhole = stream.points.length < ATTAINMENT_SPAN_S;
  const good = model.slo.met - (isWhole ? 0 : met[0]);
  const all = good + model.slo.missed - (isWhole ? 0 : missed[0]);
  return all > 0 ? good / all : null;
}

function showNotice({ models, replicas, events }, model) {
  const [text, command] = notice({ models, replicas: replicas.filter((one) => one.model === model.name), events, model }) ?? [];
  byId("notice").hidden = !text;
  if (!text || byId("notice-text").textContent === text) return;
  byId("notice-text").textContent = text;
  byId("notice-command").textContent = command;
}

// What to do next: words and a command; undefined while all is well.
function notice({ models, replicas, events, model }) {
  const watch = "wattline status --watch";
  if (!replicas.length) {
    const last = events.find((one) => one.model === model.name && (one.kind === "lost" || one.kind === "drained"));
    return last
      ? [`No replica of ${model.name} is attached. The last one was ${last.kind} at ${clock(last.at)}: ${last.reason}. Watch for the next one:`, watch]
      : [`No replica of ${model.name} is attached yet. Models take from seconds to minutes to load; watch for them, or start them:`, `${watch}\nwattline up -f wattline.yaml`];
  }
  if (!replicas.some((one) => one.state === "ready")) {
    const stands = replicas.slice(0, 3).map((one) => `${one.id} is ${one.last_event?.kind ?? one.state}`).join(", ");
    return [`No replica of ${model.name} takes new work: ${stands}. What happened is told below; watch for another:`, watch];
  }
  if (model.replicas.ready < model.replicas.min) return shortage(model, replicas, events, watch);
  if (models.every((one) => one.totals.requests === 0)) {
    return ["Everything is ready and nothing has been asked yet. Send a request:", `wattline chat --model ${model.name} "Who are you?"`];
  }
  return undefined;
}

// Answers go on, with less behind them. The newest word of a replica that is not ready is the reason.
function shortage(model, replicas, events, watch) {
  const ready = new Set(replicas.filter((one) => one.state === "ready").map((one) => one.id));
  const last = events.find((one) => one.model === model.name && !ready.has(one.replica));
  const why = last ? ` ${last.replica ?? model.name}, ${last.kind} at ${clock(last.at)}: ${last.reason}.` : " The others are loading.";
  return [`${readyOf(model)}.${why} Watch for the next one:`, watch];
}

function showLink(state, text) {
  const link = byId("link");
  if (link.dataset.state === state && link.textContent === text) return;
  link.dataset.state = state;
  document.documentElement.dataset.link = state;
  link.textContent = text;
}

byId("span-choice").addEventListener("change", (event) => {
  spanSeconds = Number(event.target.value);
  show();
});
installTips();
installCopying();
installTheme(() => { panels.recolor(); show(); });
