// Numbers as text, and text as elements: three significant digits, real units, a dash where nothing is known.

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const exactJoules = new Intl.NumberFormat("en", { minimumFractionDigits: 3, maximumFractionDigits: 3 });

export const UNKNOWN = "–";

export const isKnown = (value) => value !== null && value !== undefined;

export function number(value) {
  if (!isKnown(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size >= 1000) return grouped.format(value);
  if (size === 0) return "0";
  if (size < 0.001) return value.toExponential(1);
  // 999.6 would come out as 1.00e+3.
  return size >= 999.5 ? grouped.format(value) : value.toPrecision(3);
}

// For what somebody chose, and for axes: no zeros at the end.
export const short = (value) => (Math.abs(value) >= 1000 ? grouped.format(value) : String(Number(value.toPrecision(3))));

export const count = (value) => (isKnown(value) ? grouped.format(value) : UNKNOWN);
export const percent = (ratio) => (isKnown(ratio) ? `${(ratio * 100).toFixed(1)} %` : UNKNOWN);
export const joules = (millijoules) => (isKnown(millijoules) ? exactJoules.format(millijoules / 1000) : UNKNOWN);

export function milliseconds(value) {
  if (!isKnown(value)) return UNKNOWN;
  return value >= 1000 ? `${number(value / 1000)} s` : `${number(value)} ms`;
}

export const shortMilliseconds = (value) => (value >= 1000 ? `${short(value / 1000)} s` : `${short(value)} ms`);

export function duration(seconds) {
  const whole = Math.floor(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

// Where joules come from, in words. `factor`: the truth lies within value / factor .. value * factor.
const SOURCES = {
  counter: ["measured", "the device's own energy counter"],
  power_integrated: ["measured", "the device's power readings, integrated over time"],
  shared: ["measured", "a device shared with others; our part is inferred"],
  model_calibrated: ["estimated", "a power model calibrated on this machine"],
  model_table: ["estimated", "a power model from a table of processors"],
  tdp: ["estimated", "rated power and how busy the processor is"],
  fake: ["simulated", "a scripted meter, for trials without hardware"],
};

// `isSilent`: it counted, and says nothing now.
export function provenance(source, factor, isSilent) {
  const [kind, words] = SOURCES[source] ?? ["unknown", "no meter has spoken yet"];
  const within = isKnown(factor) && factor > 1 ? `, ×${short(factor)}` : "";
  const range = within ? ` The true value lies between the number divided by ${short(factor)} and times ${short(factor)}.` : "";
  const text = source ? `${kind} (${source}${within})${isSilent ? ", silent now" : ""}` : "energy unknown";
  const silence = isSilent ? " It has said nothing for some seconds: power is unknown until it speaks again." : "";
  return { kind: isSilent ? "silent" : kind, text, tip: `Source: ${words}.${range}${silence}` };
}

// Example: 1.06×.
export const times = (ratio) => (isKnown(ratio) ? `${ratio.toFixed(2)}×` : UNKNOWN);

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString("en-GB");
}

// Text nodes only, so nothing a server says can become markup.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
