// uPlot, dressed: one look for all charts, legends of our own that show the value under the cursor.

import { count, element, number, short, UNKNOWN } from "./format.js";

const FONT = "11px system-ui, sans-serif";
export const color = (role) => getComputedStyle(document.documentElement).getPropertyValue(`--${role}`).trim();

const SHORTEST_SPAN_S = 60;
const STEPS_S = [10, 30, 60, 120, 300, 600];
const WHOLE_STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];

function clock(ticks) {
  const hasSeconds = ticks.some((tick) => tick % 60);
  const parts = { hour: "2-digit", minute: "2-digit", ...(hasSeconds && { second: "2-digit" }) };
  return ticks.map((tick) => new Date(tick * 1000).toLocaleTimeString("en-GB", parts));
}

// `lines`: { name, role, dash?, width?, fill?, isObjective?, place?, sign? }; the legend goes by `place`, with `sign`
// before the name. `data` is uPlot's: times, then one array per line; `raw` is what the legend says where the lines
// themselves are running sums. `empty` is said where nothing is known.
export class Chart {
  constructor(box, { label, unit, lines, empty, min = 0, max = null, isWhole = false, span }) {
    Object.assign(this, { box, label, unit, lines, empty, min, max, isWhole, span, data: null, plot: null });
    this.legend = document.createElement("ul");
    this.legend.className = "legend";
    box.after(this.legend);
    box.setAttribute("role", "img");
    this.observer = new ResizeObserver(() => this.plot?.setSize(this.size()));
    this.observer.observe(box);
  }

  size() {
    return { width: Math.max(120, this.box.clientWidth), height: this.box.clientHeight };
  }

  // New lines or new colours: the plot is made anew with the next data.
  reset(lines = this.lines) {
    this.lines = lines;
    this.plot?.destroy();
    this.plot = null;
  }

  show(data, raw = data) {
    this.data = data;
    this.raw = raw;
    if (!this.plot) this.make();
    this.isEmpty = data.slice(1).every((column, i) => this.lines[i]?.isObjective || column.every((value) => value === null));
    if (this.isEmpty) this.box.dataset.empty = this.empty;
    else delete this.box.dataset.empty;
    this.plot.setData(data);
    if (this.plot.cursor.idx === null || this.plot.cursor.idx === undefined) this.showValues(null);
  }

  make() {
    const axis = { stroke: color("quiet"), font: FONT, ticks: { show: false }, grid: { stroke: color("grid"), width: 1 } };
    const options = {
      ...this.size(),
      legend: { show: false },
      padding: [8, 26, 0, 0],
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 5 } },
      scales: {
        x: { time: true, range: () => this.timeRange() },
        y: { range: (_, low, high) => this.valueRange(high) },
      },
      axes: [
        { ...axis, grid: { show: false }, size: 24, space: 70, incrs: STEPS_S, values: (_, ticks) => clock(ticks) },
        { ...axis, size: 44, gap: 4, space: 32, ...(this.isWhole && { incrs: WHOLE_STEPS }), values: (_, ticks) => ticks.map((tick) => (this.isEmpty ? "" : short(tick))) },
      ],
      series: [{}, ...this.lines.map((line) => this.series(line))],
      hooks: { setCursor: [(plot) => this.showValues(plot.cursor.idx)] },
    };
    this.plot = new uPlot(options, this.data, this.box);
  }

  series({ role, dash, width = 1.6, fill }) {
    return {
      // Areas are told apart by a seam, whatever one sees of their colours.
      stroke: color(fill ? "panel" : role),
      width: fill ? 0.6 : width,
      dash: dash ? [4, 4] : undefined,
      fill: fill ? color(role) : undefined,
      points: { show: false },
      spanGaps: false,
    };
  }

  timeRange() {
    const times = this.data?.[0] ?? [];
    const last = times.at(-1) ?? Date.now() / 1000;
    return [Math.max(last - this.span(), Math.min(times[0] ?? last, last - SHORTEST_SPAN_S)), last];
  }

  valueRange(high) {
    if (this.max !== null) return [this.min, this.max];
    return [this.min, high > this.min ? this.min + (high - this.min) * 1.12 : this.min + 1];
  }

  text(value, line) {
    if (this.isWhole) return count(value);
    if (this.unit === "%") return value.toFixed(1);
    return line.isObjective ? short(value) : number(value);
  }

  showValues(index) {
    const at = index ?? (this.raw[0].length - 1);
    const texts = this.lines.map((line, i) => {
      const value = this.raw[i + 1]?.[at];
      return value === null || value === undefined ? UNKNOWN : `${this.text(value, line)} ${this.unit}`.trim();
    });
    const places = this.lines.map((_, i) => i).sort((a, b) => (this.lines[a].place ?? a) - (this.lines[b].place ?? b));
    this.legend.replaceChildren(
      ...places.map((i) => {
        const line = this.lines[i];
        const item = document.createElement("li");
        const mark = document.createElement("span");
        mark.className = line.fill ? "swatch" : `rule${line.dash ? " dash" : ""}`;
        mark.style[line.fill ? "background" : "borderColor"] = color(line.role);
        const value = document.createElement("b");
        value.textContent = texts[i];
        item.append(...(line.sign ? [element("span", { class: "sign" }, line.sign)] : []), mark, line.name, value);
        return item;
      }),
    );
    const words = this.lines.map((line, i) => `${line.name} ${texts[i]}`).join(", ");
    this.box.setAttribute("aria-label", `${this.label}: ${words}`);
  }
}

// Running sums, the largest first, so that each filled line is painted over the one before it.
export function stack(columns) {
  const sums = columns[0].map((_, i) => {
    let sum = 0;
    let isKnown = false;
    return columns.map((column) => {
      if (column[i] === null) return isKnown ? sum : null;
      isKnown = true;
      sum += column[i];
      return sum;
    });
  });
  return columns.map((_, k) => sums.map((row) => row[k])).reverse();
}
