// The replicas, how they stand and how they came to, and what happened to them.

import { clock, count, element, milliseconds, number, percent } from "./format.js";
import { cell, fill, heading, state } from "./rows.js";

const byId = (id) => document.getElementById(id);

// Example: "llama 1 of 2 ready".
export const readyOf = ({ name, replicas: { ready, min } }) => `${name} ${ready} of ${min} ready`;

export function showReplicas(replicas, models) {
  const rows = replicas.map((replica) => ({
    key: replica.id,
    cells: [
      heading(replica.id, "mono", `${replica.id}, ${replica.model}`), cell(replica.model, "wide"), state(replica.state),
      cell(since(replica.last_event), "why", null, replica.last_event ? `${replica.last_event.kind}: ${replica.last_event.reason}` : ""),
      cell(`tp ${replica.tensor_parallel}, ep ${replica.expert_parallel}`), cell(devices(replica)),
      cell(number(replica.power_w), "num"),
      cell(percent(replica.kv_used_ratio), "num", () => [bar(replica.kv_used_ratio), percent(replica.kv_used_ratio)]),
      cell(count(replica.running), "num"), cell(count(replica.waiting), "num"), cell(milliseconds(replica.step_ms), "num"),
    ],
  }));
  fill(byId("replicas"), rows, "No replica is attached.");
  byId("replicas-note").textContent = models.map(readyOf).join(", ");
}

export function showEvents(events) {
  const rows = events.map((event) => ({
    key: `${event.at} ${event.replica} ${event.kind}`,
    cells: [
      heading(clock(event.at), "mono", new Date(event.at * 1000).toLocaleString()), cell(event.replica ?? event.model, "mono"),
      state(event.kind), cell(event.reason, "why"),
    ],
  }));
  fill(byId("events"), rows, "Nothing has happened yet.");
}

const since = (event) => (event ? `${event.kind} ${clock(event.at)}` : "");

// Example: "2 × cpu", or "cuda:0, cuda:1".
function devices({ ranks, device }) {
  const names = ranks.map((rank) => rank.device || device);
  const different = [...new Set(names)];
  if (different.length === 1) return names.length === 1 ? names[0] : `${names.length} × ${names[0]}`;
  return different.join(", ") || device;
}

function bar(ratio) {
  const filled = element("i");
  filled.style.width = `${Math.round(100 * (ratio ?? 0))}%`;
  return element("span", { class: "meter", "aria-hidden": "true" }, filled);
}
