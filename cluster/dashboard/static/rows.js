// Tables whose rows stay: only what changed is written, so that a selection, a hover and a screen reader's place
// outlive the second. A row is { key, cells }, a cell what `cell` makes.

import { element } from "./format.js";

// `draw` makes the children of a cell that is more than a text; it is called when `text` changed.
export const cell = (text, kind = "", draw = null, title = "") => ({ text, kind, draw, title });
export const heading = (text, kind = "", title = "") => ({ ...cell(text, kind, null, title), tag: "th" });

// A text that a click, or Enter, copies `what` of.
export const copyable = (text, what) => cell(text, "", () => [element("button", { type: "button", class: "copy mono", "data-copy": what, "data-tip": `copy ${what}` }, text)]);

// A dot that says how it is, and the word for it.
export function state(word, is = word) {
  return cell(word, "", () => [element("span", { class: "state", "data-state": is }, word)]);
}

export function fill(body, rows, nothing) {
  const known = body.rowsByKey ?? new Map();
  const kept = new Map();
  if (!rows.length) {
    if (!body.querySelector(".none")) body.replaceChildren(element("tr", {}, element("td", { colspan: "99", class: "none" }, nothing)));
    body.rowsByKey = kept;
    return;
  }
  body.querySelector(".none")?.parentElement.remove();
  let next = body.firstElementChild;
  for (const { key, cells } of rows) {
    const row = known.get(key) ?? { box: element("tr"), texts: [] };
    known.delete(key);
    kept.set(key, row);
    write(row, cells);
    if (row.box === next) next = next.nextElementSibling;
    else body.insertBefore(row.box, next);
  }
  for (const { box } of known.values()) box.remove();
  body.rowsByKey = kept;
}

function write(row, cells) {
  cells.forEach(({ text, kind, draw, title, tag = "td" }, i) => {
    if (row.texts[i] === text) return;
    row.texts[i] = text;
    const box = row.box.children[i] ?? row.box.appendChild(element(tag, tag === "th" ? { scope: "row" } : {}));
    box.className = kind;
    box.title = title;
    box.replaceChildren(...(draw ? draw() : [text]));
  });
}
