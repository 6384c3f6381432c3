// The page: takes what the server sends, and shows it. It asks for nothing but /events.

import { Chart, Points } from "./chart.js";
import { Workers, drawShards, drawStaleness } from "./workers.js";
import { at, bytes, clock, date, duration, element, number, put, short, whole } from "./words.js";

const STATUS = {
  waiting: "○ waiting", running: "● running", silent: "? silent", failed: "✕ failed",
  ended: "✓ finished",
};
const LINES = 300, LATE = 25, AGAIN = 5;

const page = {
  about: {}, run: {}, now: {}, status: { status: "waiting", message: "" },
  curves: new Map(), charts: new Map(), workers: new Workers(), behind: 0, heard: 0, connected: false,
  over: false,
};
window.wagontrain = page; // for tests, and for whoever wants to look

// --- news from the server ------------------------------------------------------------------------

function take(news) {
  page.heard = performance.now();
  page.connected = true;
  page.behind = news.clock - Date.now() / 1e3;
  page.over = Boolean(news.over);
  if (news.whole) {
    page.curves.clear();
    page.charts.clear();
    for (const part of ["figures", "charts", "log", "shards", "staleness"]) at(part).replaceChildren();
    at("servers").hidden = true;
    page.workers.clear();
  }
  for (const key of ["run", "now", "status"]) if (news[key]) page[key] = news[key];
  if ("events" in news) page.about = news;
  if (news.run) page.workers.crewed = news.run.crewed;
  page.workers.take(news);
  if (news.run || news.status) drawHead();
  for (const [name, points] of Object.entries(news.curves ?? {})) {
    if (!page.curves.has(name)) page.curves.set(name, new Points());
    page.curves.get(name).take(points);
  }
  if (news.curves || news.run) drawCurves(Object.keys(news.curves ?? {}));
  if (news.now || news.run || news.curves) drawFigures();
  if (news.shards || news.staleness) drawServers(news);
  if (news.log) drawLog(news.log);
  tick();
}

function listen() {
  const stream = new EventSource("/events");
  stream.onmessage = (event) => {
    take(JSON.parse(event.data));
    if (page.over) stream.close();
  };
  stream.onerror = () => {
    page.connected = false;
    tick();
    // The browser tries again by itself, save where it was refused.
    if (stream.readyState === EventSource.CLOSED && !page.over) setTimeout(listen, AGAIN * 1e3);
  };
}

// --- what is shown -------------------------------------------------------------------------------

function drawHead() {
  const run = page.run;
  at("nothing").hidden = Boolean(run.strategy);
  for (const part of document.querySelectorAll(".begun")) part.hidden = !run.strategy;
  if (run.strategy) {
    const count = run.world_size;
    const where = run.hosts.length > 1 ? ` on ${run.hosts.length} hosts` : ` on ${run.hosts[0]}`;
    put(at("title"), `${run.strategy} over ${count} worker${count > 1 ? "s" : ""}`);
    const settings = Object.entries(run.settings).map(([key, value]) => `${key} = ${value}`);
    at("settings").hidden = !settings.length;
    put(at("all-settings"), settings.join(", "));
    put(at("subtitle"), [
      `${whole(run.samples)} samples in batches of ${whole(run.batch_size)}${where}, ${run.device}`,
      run.exact ? "exact" : "relaxed: not the same mathematics as one process",
    ].join(" · "));
    document.title = `${STATUS[page.status.status].slice(2)} – ${run.strategy} – wagontrain`;
  }
  const shown = at("status");
  put(shown, STATUS[page.status.status]);
  shown.dataset.status = page.status.status;
}

const figureAt = (name) => document.querySelector(`[data-figure="${CSS.escape(name)}"]`);

function figure(name, text, value) {
  let place = figureAt(name);
  if (!place) {
    place = element("dd", { "data-figure": name });
    at("figures").append(element("div", {}, element("dt", { text: name }), place));
  }
  put(place, text);
  place.dataset.value = value ?? "";
}

function drawFigures() {
  const { run, now } = page;
  if (!run.strategy) return;
  const steps = now.step === undefined ? run.first_step : now.step + 1;
  const percent = Math.floor((100 * steps) / run.steps);
  figure("step", `${whole(steps)} of ${whole(run.steps)}`, steps);
  figure("epoch", `${(now.epoch ?? 0) + 1} of ${run.epochs}`, now.epoch);
  for (const name of ["elapsed", "left"]) if (!figureAt(name)) figure(name, "–");
  figure("loss", number(now.loss), now.loss);
  for (const [name, value] of Object.entries(now.validation ?? {})) {
    figure(`validation ${name}`, number(value), value);
  }
  figure("samples/s", whole(now.samples_per_second), now.samples_per_second);
  figure("step time", short(now.step_seconds), now.step_seconds);
  const sent = page.curves.get("sent")?.last;
  if (sent) figure(run.crewed ? "sent by all" : "sent by rank 0", `${bytes(sent[2])}/s`, sent[2]);
  figure("samples seen", whole(now.samples), now.samples);
  at("progress").value = steps / run.steps;
  at("progress").title = `${percent} %`;
}

const CHARTS = {
  loss: ["Loss", (value) => number(value)],
  speed: ["Samples a second", (value) => number(value, 3)],
  sent: ["Sent by rank 0, a second", bytes],
};

function chartOf(name) {
  if (!page.charts.has(name)) {
    let [title, describe] = CHARTS[name] ?? [`Validation ${name}`, (value) => number(value)];
    if (name === "sent" && page.run.crewed) title = "Sent by all workers, a second";
    const chart = new Chart(title, describe);
    chart.options = optionsOf(name);
    chart.fromZero = name === "speed" || name === "sent";
    page.charts.set(name, chart);
    chart.place = name in CHARTS ? Object.keys(CHARTS).indexOf(name) : Infinity;
    const after = [...page.charts.values()].filter((other) => other.place > chart.place)
      .sort((one, other) => one.place - other.place)[0];
    at("charts").insertBefore(chart.figure, after?.figure ?? null);
  }
  return page.charts.get(name);
}

// Validation of the loss belongs to the loss; what else is measured has a chart of its own.
function drawCurves(changed) {
  const touched = new Set();
  for (const [name, points] of page.curves) {
    const measured = name.replace(/^validation\//, "");
    const chart = chartOf(name === "validation/loss" ? "loss" : measured);
    if (!chart.series.some((series) => series.points === points)) {
      const series = { name, points };
      if (name === "loss") chart.series.unshift(series);
      else chart.series.push(series);
      touched.add(chart);
    }
    if (name === "validation/loss") {
      const caption = chart.figure.querySelector(".caption");
      put(caption, "Loss; of validation dashed");
    }
    if (changed.includes(name)) touched.add(chart);
  }
  const speed = page.charts.get("speed");
  if (speed) speed.level = page.run.foretold?.samples_per_second ?? null;
  for (const chart of touched) later(chart);
}

const waiting = new Set();

function later(chart) {
  if (!waiting.size) {
    requestAnimationFrame(() => {
      for (const each of waiting) each.draw();
      waiting.clear();
    });
  }
  waiting.add(chart);
}

function drawServers(news) {
  const { shards, staleness } = news;
  if (shards?.length) {
    at("servers").hidden = false;
    drawShards(at("shards"), shards);
  }
  if (staleness?.counts.length) {
    at("servers").hidden = false;
    drawStaleness(at("staleness"), staleness);
  }
}

function drawLog({ lines, before }) {
  const list = at("log");
  for (const line of lines) {
    const first = list.firstElementChild;
    if (first && first.dataset.first === String(line.first)) first.remove();
    const times = line.times > 1 ? ` (${whole(line.times)} of these)` : "";
    const item = element("li", { "data-kind": line.kind },
      element("time", { text: clock(line.time) }),
      element("span", { text: `${line.trouble ? "! " : ""}${line.text}${times}` }));
    item.dataset.first = line.first;
    if (line.trouble) item.classList.add("trouble");
    list.prepend(item);
  }
  while (list.childElementCount > LINES) list.lastElementChild.remove();
  put(at("log-count"), before ? `and ${whole(before)} before these` : "");
}

// What goes on by itself: how long ago somebody was heard of.
function tick() {
  const { about, status, run } = page;
  const now = Date.now() / 1e3 + page.behind;
  const late = page.connected && performance.now() - page.heard > LATE * 1e3;
  const running = status.status === "running" || status.status === "silent";
  let alert = "";
  if (status.status === "failed") alert = status.message;
  else if (status.status === "silent") {
    alert = `Nothing has been written for ${duration(now - about.last)}: the run may have been ` +
      "killed, or its host is cut off.";
  }
  if (about.problem) alert = about.problem;
  if (page.over) alert ||= running
    ? "The page's server has ended before the run: start wagontrain dashboard to see on." : "";
  else if (!page.connected || late) {
    alert = `${alert ? `${alert} ` : ""}The page's server does not answer; trying again.`;
  }
  put(at("alert"), alert);
  at("alert").hidden = !alert;
  at("alert").dataset.status = status.status;
  put(at("heard"), about.last && running ? `last heard ${duration(Math.max(0, now - about.last))} ago`
    : about.last ? `at ${date(about.last)}` : "");
  if (run.started) {
    const until = running ? now : about.last;
    const elapsed = Math.max(0, until - run.started);
    figure("elapsed", duration(elapsed), elapsed);
    const left = (run.steps - ((page.now.step ?? run.first_step - 1) + 1)) * page.now.step_seconds;
    figure("left", running && Number.isFinite(left) ? duration(left) : "–", left);
  }
  put(at("folder"), about.folder ?? "");
  const odd = about.unreadable ? `, ${whole(about.unreadable)} not understood` : "";
  const rest = about.left ? `, ${bytes(about.left)} still to read` : "";
  put(at("reading"), about.folder ? `${whole(about.events)} events${odd}${rest}` : "");
  page.workers.tick(now);
}

function optionsOf(name) {
  const against = document.querySelector("[name=against]:checked").value;
  return { against, logarithmic: name === "loss" && at("logarithmic").checked };
}

for (const input of document.querySelectorAll(".choice input")) {
  input.addEventListener("change", () => {
    for (const [name, chart] of page.charts) {
      chart.options = optionsOf(name);
      later(chart);
    }
  });
}
const redraw = () => page.charts.forEach(later);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) redraw();
});
setInterval(tick, 1e3);
listen();
