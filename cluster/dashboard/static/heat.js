// The load of a model's experts: a row per layer, a column per expert. One canvas, and keys that walk over it.

import { color } from "./charts.js";
import { element, times } from "./format.js";

const LEFT = 30;
const RIGHT = 2;
const BOTTOM = 16;
const RANKS_TOP = 16;
const MAP_HEIGHT = 264;
const ROW_HEIGHTS = [4, 56];
const FONT = "11px system-ui, sans-serif";
const STOPS = ["heat-0", "heat-1", "heat-2", "heat-3"];
const NUM_SHADES = 96;
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

// 0, an even share, 3 and 7 times as much are equally far apart: most of a map lies below 3.
const position = (percent) => Math.min(1, Math.log2(1 + percent / 100) / 3);

export class HeatMap {
  constructor(canvas, words) {
    Object.assign(this, { canvas, words, experts: null, at: null, shades: null });
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.walk(null));
    canvas.addEventListener("blur", () => this.walk(null));
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  show(experts) {
    this.experts = experts;
    this.rows = Math.ceil(experts.num_layers / experts.layers_per_row);
    this.columns = Math.ceil(experts.num_experts / experts.experts_per_column);
    this.copied = new Set(experts.copied_cells);
    const { load, layer, expert } = experts.hottest;
    this.canvas.setAttribute("aria-label",
      `Load of ${experts.num_experts} experts in ${experts.num_layers} layers; the hottest is expert ${expert} of layer ${layer} with ${times(load)} an even share. Arrow keys walk over the map.`);
    this.draw();
    this.tell();
  }

  recolor() {
    this.shades = null;
    this.draw();
  }

  // Where experts live: the first `num_experts / num_ranks` on rank 0, and so on. 0: columns hold experts of several.
  columnsPerRank() {
    const { num_experts, num_ranks, experts_per_column } = this.experts;
    const columns = num_experts / num_ranks / experts_per_column;
    return num_ranks > 1 && Number.isInteger(columns) ? columns : 0;
  }

  measure() {
    const width = this.canvas.parentElement.clientWidth;
    const perRank = this.columnsPerRank();
    const top = perRank ? RANKS_TOP : 2;
    const rowHeight = Math.round(Math.max(ROW_HEIGHTS[0], Math.min(ROW_HEIGHTS[1], MAP_HEIGHT / this.rows)));
    const cellWidth = (width - LEFT - RIGHT) / this.columns;
    const x = (column) => Math.round(LEFT + column * cellWidth);
    const y = (row) => top + row * rowHeight;
    return { width, height: y(this.rows) + BOTTOM, perRank, top, rowHeight, cellWidth, x, y };
  }

  draw() {
    const { clientWidth } = this.canvas.parentElement;
    if (!this.experts || !clientWidth) return;
    const size = this.measure();
    this.size = size;
    const scale = devicePixelRatio || 1;
    this.canvas.width = size.width * scale;
    this.canvas.height = size.height * scale;
    this.canvas.style.height = `${size.height}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = FONT;
    this.drawCells(pen, size);
    this.drawLabels(pen, size);
    if (this.at) this.drawCursor(pen, size);
  }

  drawCells(pen, { x, y, rowHeight, cellWidth, perRank }) {
    this.shades ??= makeShades(STOPS.map(color));
    const gap = Math.min(cellWidth, rowHeight) >= 6 ? 1 : 0;
    for (let cell = 0; cell < this.experts.load_percent.length; cell += 1) {
      const row = Math.floor(cell / this.columns);
      const column = cell % this.columns;
      const isEdge = perRank && column && column % perRank === 0;
      const left = x(column) + (isEdge ? 2 : 0);
      const shade = Math.round(position(this.experts.load_percent[cell]) * (NUM_SHADES - 1));
      pen.fillStyle = this.shades[shade];
      pen.fillRect(left, y(row), x(column + 1) - left - gap, rowHeight - gap);
      if (!this.copied.has(cell)) continue;
      pen.fillStyle = color("copy");
      pen.fillRect(left, y(row), Math.max(2, Math.min(4, cellWidth / 3)), rowHeight - gap);
    }
  }

  drawLabels(pen, { x, y, perRank, cellWidth }) {
    const { num_layers, num_experts, layers_per_row, experts_per_column, num_ranks } = this.experts;
    pen.fillStyle = color("quiet");
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const row of ticks(this.rows, 5)) pen.fillText(String(Math.min(num_layers - 1, row * layers_per_row)), LEFT - 6, (y(row) + y(row + 1)) / 2);
    pen.textAlign = "center";
    for (const column of ticks(this.columns, Math.max(2, Math.floor((this.columns * cellWidth) / 60)))) {
      pen.fillText(String(Math.min(num_experts - 1, column * experts_per_column)), x(column) + cellWidth / 2, y(this.rows) + BOTTOM / 2 + 2);
    }
    if (!perRank || perRank * cellWidth < 44) return;
    pen.textAlign = "left";
    for (let rank = 0; rank < num_ranks; rank += 1) pen.fillText(`rank ${rank}`, x(rank * perRank) + 2, RANKS_TOP / 2 - 1);
  }

  drawCursor(pen, { x, y, rowHeight }) {
    const [row, column] = this.at;
    pen.strokeStyle = color("ink");
    pen.lineWidth = 2;
    pen.strokeRect(x(column), y(row), x(column + 1) - x(column), rowHeight);
  }

  point(event) {
    if (!this.size) return;
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - LEFT) / this.size.cellWidth);
    const row = Math.floor((event.clientY - box.top - this.size.top) / this.size.rowHeight);
    const isInside = row >= 0 && row < this.rows && column >= 0 && column < this.columns;
    this.walk(isInside ? [row, column] : null);
  }

  key(event) {
    const move = MOVES[event.key];
    if (!move || !this.experts) return;
    event.preventDefault();
    const [row, column] = this.at ?? [0, 0];
    const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
    this.walk(this.at ? [clamp(row + move[0], this.rows), clamp(column + move[1], this.columns)] : [0, 0]);
  }

  walk(at) {
    this.at = at;
    this.draw();
    this.tell();
  }

  tell() {
    const { load, layer, expert } = this.experts?.hottest ?? {};
    if (!this.experts) return;
    if (!this.at) {
      this.words.replaceChildren("hottest ", element("b", {}, times(load)), ` layer ${layer}, expert ${expert}`);
      return;
    }
    const [row, column] = this.at;
    const { num_layers, num_experts, layers_per_row, experts_per_column, load_percent } = this.experts;
    const cell = row * this.columns + column;
    const rank = this.size.perRank ? `, rank ${Math.floor(column / this.size.perRank)}` : "";
    const copied = this.copied.has(cell) ? ", copied" : "";
    const layers = range("layer", row * layers_per_row, layers_per_row, num_layers);
    const experts = range("expert", column * experts_per_column, experts_per_column, num_experts);
    this.words.replaceChildren(element("b", {}, times(load_percent[cell] / 100)), ` ${layers}, ${experts}${rank}${copied}`);
  }
}

// Example: "layer 3", "layers 4–5".
function range(word, first, width, count) {
  const last = Math.min(count, first + width) - 1;
  return first === last ? `${word} ${first}` : `${word}s ${first}–${last}`;
}

// Evenly spread, the first and nearly the last among them.
function ticks(count, most) {
  const step = Math.max(1, Math.ceil(count / most));
  return Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step);
}

function makeShades(stops) {
  const points = stops.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return Array.from({ length: NUM_SHADES }, (_, i) => {
    const exact = (i / (NUM_SHADES - 1)) * (points.length - 1);
    const low = Math.min(points.length - 2, Math.floor(exact));
    const mix = points[low].map((value, k) => Math.round(value + (points[low + 1][k] - value) * (exact - low)));
    return `rgb(${mix.join()})`;
  });
}
