// A curve on a canvas: the mean of each bucket as a line, least to largest as a band.

import { element, number } from "./words.js";

// Of one point that is drawn: what lies closer together is drawn as one, so that noise is a band.
const PIXELS = 3;

const LEFT = 58, RIGHT = 18, TOP = 10, BOTTOM = 24;

// Points of one curve, as the server sends them: [step, time, mean, low, high, weight].
export class Points {
  constructor() {
    this.rows = [];
  }

  take(news) {
    this.rows.length = news.from;
    this.rows.push(...news.points);
  }

  get last() {
    return this.rows[this.rows.length - 1];
  }
}

export class Chart {
  // describe(value) writes a value; series is a list of {name, points, dashed, dots}.
  constructor(title, describe) {
    this.describe = describe;
    this.series = [];
    this.level = null;
    this.fromZero = false; // whether the axis begins there, however little the curve changes
    this.options = { against: "step", logarithmic: false };
    this.cursor = null;
    this.canvas = element("canvas", { tabindex: "0", role: "img" });
    this.readout = element("span", { class: "readout dim" });
    this.title = title;
    this.figure = element("figure", {},
      element("figcaption", {}, element("span", { class: "caption", text: title }), this.readout),
      this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.choose(null));
    this.canvas.addEventListener("blur", () => this.choose(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  get main() {
    return this.series[0]?.points.rows ?? [];
  }

  x(row) {
    return this.options.against === "step" ? row[0] : row[1];
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    const count = this.main.length;
    if (event.key === "Escape") this.choose(null);
    else if (event.key === "Home") this.choose(0);
    else if (event.key === "End") this.choose(count - 1);
    else if (move !== undefined) this.choose((this.cursor ?? count) + move);
    else return;
    event.preventDefault();
  }

  point(position) {
    if (!this.scale) return;
    const wanted = this.scale.fromX(position);
    let low = 0, high = this.main.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.x(this.main[middle]) < wanted) low = middle + 1;
      else high = middle;
    }
    if (low > 0 && wanted - this.x(this.main[low - 1]) < this.x(this.main[low]) - wanted) low--;
    this.choose(low);
  }

  choose(index) {
    const count = this.main.length;
    this.cursor = index === null || !count ? null : Math.min(Math.max(index, 0), count - 1);
    this.draw();
  }

  // What is written above: the chosen point; whoever cannot see the curve is told of the last.
  write() {
    const row = this.main[this.cursor ?? this.main.length - 1];
    let text = "";
    if (row) {
      text = `step ${row[0].toLocaleString("en-US")}: ${this.describe(row[2])}`;
      if (row[3] !== row[4]) {
        text += ` (${this.describe(row[3])} to ${this.describe(row[4])})`;
      }
    }
    this.readout.textContent = this.cursor === null ? "" : text;
    this.canvas.setAttribute("aria-label", `${this.title}: ${text || "nothing yet"}`);
  }

  range() {
    let low = Infinity, high = -Infinity, left = Infinity, right = -Infinity;
    for (const { points } of this.series) {
      for (const row of points.rows) {
        const value = row[2];
        if (this.options.logarithmic && value <= 0) continue;
        if (value < low) low = value;
        if (value > high) high = value;
        const x = this.x(row);
        if (x < left) left = x;
        if (x > right) right = x;
      }
    }
    if (!(low <= high)) return null;
    if (this.level !== null && !this.options.logarithmic) {
      low = Math.min(low, this.level);
      high = Math.max(high, this.level);
    }
    if (this.options.logarithmic) {
      [low, high] = [Math.log10(low), Math.log10(high)];
    } else if (low > 0 && (this.fromZero || low < high / 2)) {
      low = 0;
    }
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    const bottom = low === 0 ? 0 : low - room;
    return { low: bottom, high: high + room, left, right: right > left ? right : left + 1 };
  }

  draw() {
    this.write();
    const ratio = window.devicePixelRatio || 1;
    const width = this.canvas.clientWidth, height = this.canvas.clientHeight;
    if (!width || !height || document.hidden) return;
    if (this.canvas.width !== Math.round(width * ratio)) this.canvas.width = width * ratio;
    if (this.canvas.height !== Math.round(height * ratio)) this.canvas.height = height * ratio;
    const pen = this.canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const range = this.range();
    this.scale = null;
    if (!range) return;
    const shaped = (value) => (this.options.logarithmic ? Math.log10(value) : value);
    const across = (width - LEFT - RIGHT) / (range.right - range.left);
    const up = (height - TOP - BOTTOM) / (range.high - range.low);
    const bound = (y) => Math.min(Math.max(y, TOP - 2), height - BOTTOM + 2);
    this.scale = {
      x: (value) => LEFT + (value - range.left) * across,
      y: (value) => bound(height - BOTTOM - (shaped(value) - range.low) * up),
      fromX: (position) => range.left + (position - LEFT) / across,
    };
    const style = getComputedStyle(this.canvas);
    const colour = (name) => style.getPropertyValue(name).trim();
    pen.font = `12px ${style.fontFamily}`;
    this.axes(pen, width, height, range, colour);
    if (this.level !== null) this.line(pen, width, colour("--dim"));
    this.series.forEach((series, index) => {
      this.curve(pen, series, colour(index ? "--second" : "--accent"), index === 0);
    });
    if (this.cursor !== null) this.mark(pen, height, colour("--text"));
  }

  axes(pen, width, height, range, colour) {
    pen.lineWidth = 1;
    pen.strokeStyle = colour("--grid");
    pen.fillStyle = colour("--dim");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const value of ticks(range.low, range.high, Math.max(2, height / 45))) {
      const shown = this.options.logarithmic ? 10 ** value : value;
      const y = Math.round(this.scale.y(shown)) + 0.5;
      pen.beginPath();
      pen.moveTo(LEFT, y);
      pen.lineTo(width - RIGHT, y);
      pen.stroke();
      pen.fillText(this.describe(shown, true), LEFT - 8, y);
    }
    pen.textBaseline = "top";
    for (const value of ticks(range.left, range.right, Math.max(2, width / 110))) {
      pen.textAlign = value === range.left ? "left" : "center";
      pen.fillText(this.along(value), this.scale.x(value), height - BOTTOM + 7);
    }
  }

  along(value) {
    if (this.options.against === "step") return value.toLocaleString("en-US");
    if (value < 120) return `${number(value)} s`;
    return value < 7200 ? `${number(value / 60)} min` : `${number(value / 3600)} h`;
  }

  line(pen, width, colour) {
    pen.strokeStyle = colour;
    pen.setLineDash([2, 4]);
    const y = this.scale.y(this.level);
    pen.beginPath();
    pen.moveTo(LEFT, y);
    pen.lineTo(width - RIGHT, y);
    pen.stroke();
    pen.setLineDash([]);
    pen.fillStyle = colour;
    pen.textAlign = "right";
    pen.textBaseline = "bottom";
    pen.fillText("foretold", width - RIGHT - 2, y - 2);
  }

  // Neighbours within a few pixels as one.
  drawn(rows) {
    const found = [];
    let column = null;
    for (const row of rows) {
      if (this.options.logarithmic && row[3] <= 0) continue;
      const here = Math.floor(this.scale.x(this.x(row)) / PIXELS);
      const last = found[found.length - 1];
      if (here !== column) {
        found.push([...row]);
        column = here;
        continue;
      }
      last[5] += row[5];
      last[2] += ((row[2] - last[2]) * row[5]) / last[5];
      last[3] = Math.min(last[3], row[3]);
      last[4] = Math.max(last[4], row[4]);
      [last[0], last[1]] = [row[0], row[1]];
    }
    return found;
  }

  curve(pen, series, colour, band) {
    const rows = this.drawn(series.points.rows);
    if (!rows.length) return;
    pen.strokeStyle = pen.fillStyle = colour;
    if (band && rows.length > 1) {
      pen.globalAlpha = 0.16;
      pen.beginPath();
      rows.forEach((row) => pen.lineTo(this.scale.x(this.x(row)), this.scale.y(row[4])));
      [...rows].reverse().forEach((row) =>
        pen.lineTo(this.scale.x(this.x(row)), this.scale.y(row[3])));
      pen.fill();
      pen.globalAlpha = 1;
    }
    pen.lineWidth = 1.75;
    pen.lineJoin = "round";
    pen.setLineDash(band ? [] : [6, 3]);
    pen.beginPath();
    rows.forEach((row) => pen.lineTo(this.scale.x(this.x(row)), this.scale.y(row[2])));
    pen.stroke();
    pen.setLineDash([]);
    if (!band || rows.length === 1) {
      const every = Math.ceil(rows.length / 60);
      rows.forEach((row, index) => {
        if ((rows.length - 1 - index) % every) return;
        pen.beginPath();
        pen.arc(this.scale.x(this.x(row)), this.scale.y(row[2]), 3, 0, 2 * Math.PI);
        pen.fill();
      });
    }
  }

  mark(pen, height, colour) {
    const row = this.main[this.cursor];
    if (!row) return;
    const x = this.scale.x(this.x(row));
    pen.strokeStyle = pen.fillStyle = colour;
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(x, TOP);
    pen.lineTo(x, height - BOTTOM);
    pen.stroke();
    pen.beginPath();
    pen.arc(x, this.scale.y(row[2]), 3.5, 0, 2 * Math.PI);
    pen.fill();
  }
}

// Round values between two, about so many.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let each = Math.ceil(low / step); each * step <= high; each++) {
    found.push(Number((each * step).toPrecision(12)));
  }
  return found;
}
