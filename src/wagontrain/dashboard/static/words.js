// Quantities as people read them, and elements with text in them: never markup from a file.

export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(digits)));
}

export function whole(value) {
  return Number.isFinite(value) ? Math.round(value).toLocaleString("en-US") : "–";
}

export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000) return `${unit === "B" ? Math.round(value) : value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} TB`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes}:${String(Math.floor(seconds % 60)).padStart(2, "0")} min`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")} h`;
}

export function short(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds >= 1) return `${Number(seconds.toPrecision(3))} s`;
  return `${Number((seconds * 1e3).toPrecision(3))} ms`;
}

export function clock(seconds) {
  return new Date(seconds * 1e3).toLocaleTimeString("en-GB");
}

export function date(seconds) {
  const when = new Date(seconds * 1e3);
  const day = when.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return `${clock(seconds)}, ${day}`;
}

// "0-3,7" as numbers.
export function numbers(text) {
  const found = [];
  for (const span of text.split(",")) {
    if (!span) continue;
    const [first, last] = span.split("-").map(Number);
    for (let each = first; each <= (last ?? first); each++) found.push(each);
  }
  return found;
}

export function element(name, fields = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(fields)) {
    if (key === "class") made.className = value;
    else if (key === "text") made.textContent = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// Writing what stands there already would cost the browser a layout.
export function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const at = (id) => document.getElementById(id);
