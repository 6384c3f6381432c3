// Tiles of workers: small ones where there are many. What is wrong shows by shape and word, too.

import { at, duration, element, number, numbers, put, short } from "./words.js";

const SIGNS = {
  starting: ["○", "starting"], working: ["●", "working"], slow: ["▼", "slow"],
  silent: ["?", "silent"], dead: ["✕", "dead"], stopped: ["■", "stopped"], left: ["→", "left"],
  ended: ["✓", "done"], unknown: ["…", "no news"],
};
const ORDER = Object.keys(SIGNS);
const TROUBLE = ["dead", "silent", "slow"];
const PARTS = ["compute", "exchange", "waiting", "data"];
const FULL = 48, COMPACT = 240, LISTED = 12;

export class Workers {
  constructor() {
    this.tiles = new Map(); // number -> what the server says of it
    this.nodes = new Map(); // number -> elements
    this.numbers = [];
    this.forgotten = 0;
    this.crewed = false;
    this.chosen = null;
    this.focused = null;
    this.list = at("tiles");
    this.list.addEventListener("keydown", (event) => this.key(event));
    this.list.addEventListener("click", (event) => {
      const node = event.target.closest("button");
      if (node) this.choose(Number(node.dataset.number));
    });
  }

  clear() {
    this.tiles.clear();
    this.nodes.clear();
    this.numbers = [];
    this.chosen = this.focused = null;
    this.list.replaceChildren();
  }

  take(news) {
    for (const tile of news.tiles ?? []) {
      this.tiles.set(tile.number, { ...this.tiles.get(tile.number), ...tile });
    }
    if (news.lineup) {
      this.numbers = news.lineup.numbers;
      this.forgotten = news.lineup.forgotten;
      const there = new Set(this.numbers);
      for (const each of [...this.tiles.keys()]) {
        if (!there.has(each)) this.tiles.delete(each);
      }
    }
    for (const [phrase, seen, span] of news.doing ?? []) {
      for (const each of numbers(span)) {
        const tile = this.tiles.get(each);
        if (tile) Object.assign(tile, { doing: phrase, seen });
      }
    }
    if (news.lineup || news.tiles || news.doing) this.draw(news);
  }

  get name() {
    return this.crewed ? "worker" : "rank";
  }

  draw(news) {
    const count = this.numbers.length;
    const size = count <= FULL ? "full" : count <= COMPACT ? "compact" : "cell";
    if (this.list.dataset.size !== size) {
      this.list.dataset.size = size;
      this.nodes.clear();
      this.list.replaceChildren();
    }
    if (news.lineup || this.nodes.size !== count) this.arrange();
    const changed = news.doing && size !== "cell" ? this.numbers
      : (news.tiles ?? []).map((tile) => tile.number);
    for (const each of new Set([...changed, ...this.fresh])) this.fill(each);
    this.fresh = [];
    this.summarise();
    this.show();
  }

  // An element for each worker, in their order.
  arrange() {
    const there = new Set(this.numbers);
    for (const [each, node] of this.nodes) {
      if (!there.has(each)) {
        node.item.remove();
        this.nodes.delete(each);
      }
    }
    this.fresh = this.numbers.filter((each) => !this.nodes.has(each));
    const added = document.createDocumentFragment();
    for (const each of this.fresh) {
      const node = this.make(each);
      this.nodes.set(each, node);
      added.append(node.item);
    }
    this.list.append(added);
    if (!this.nodes.has(this.focused)) this.focused = this.numbers[0] ?? null;
    this.nodes.get(this.focused)?.button.setAttribute("tabindex", "0");
  }

  make(each) {
    const button = element("button", { type: "button", class: "tile", tabindex: "-1" });
    button.dataset.number = each;
    const node = { item: element("li", {}, button), button };
    const size = this.list.dataset.size;
    const piece = (key, name) => (node[key] = element("span", { class: name }));
    if (size === "cell") {
      button.append(piece("sign", "sign"));
    } else {
      button.append(element("span", { class: "top" }, piece("rank", "rank"),
        element("span", { class: "condition" }, piece("sign", "sign"), piece("word", "word"))));
      if (size === "full") {
        button.append(piece("place", "place dim"), piece("doing", "doing"));
      }
      button.append(element("span", { class: "top" }, piece("speed", "speed"),
        piece("seen", "seen dim")));
      if (size === "full") {
        node.bar = element("span", { class: "bar" },
          ...PARTS.map((part) => (node[part] = element("span", { class: part }))));
        button.append(node.bar);
      }
    }
    return node;
  }

  fill(each) {
    const tile = this.tiles.get(each), node = this.nodes.get(each);
    if (!tile || !node) return;
    const [sign, word] = SIGNS[tile.condition] ?? SIGNS.unknown;
    node.button.dataset.condition = tile.condition;
    put(node.sign, sign);
    if (!node.rank) {
      node.button.setAttribute("aria-label", `${this.name} ${each}, ${word}`);
      return;
    }
    put(node.rank, `${this.name} ${each}`);
    const full = this.list.dataset.size === "full";
    put(node.word, tile.condition === "slow" ? `${full ? "slow " : ""}×${tile.slower}` : word);
    put(node.speed, speed(tile));
    if (!node.place) return;
    put(node.place, [tile.host, tile.device].filter(Boolean).join(" · ") || "–");
    put(node.doing, sentence(tile));
    node.doing.title = sentence(tile);
    const whole = (tile.times ?? []).reduce((sum, part) => sum + part, 0);
    node.bar.hidden = !whole;
    if (whole) {
      PARTS.forEach((part, index) => {
        node[part].style.flexGrow = tile.times[index] / whole;
      });
      node.bar.title = split(tile);
    }
  }

  // Times since each was seen go on by themselves.
  tick(now) {
    this.now = now;
    for (const [each, node] of this.nodes) {
      if (node.seen) put(node.seen, seen(this.tiles.get(each), now));
    }
    this.show();
  }

  summarise() {
    const counts = new Map();
    for (const each of this.numbers) {
      const condition = this.tiles.get(each)?.condition;
      counts.set(condition, (counts.get(condition) ?? 0) + 1);
    }
    const parts = ORDER.filter((each) => counts.has(each))
      .map((each) => `${counts.get(each)} ${SIGNS[each][1]}`);
    if (this.forgotten) parts.push(`${this.forgotten} more gone before`);
    put(at("counts"), parts.join(" · "));
    at("legend").hidden = this.list.dataset.size !== "full" ||
      ![...this.tiles.values()].some((tile) => tile.times);
    const found = this.numbers.filter((each) => TROUBLE.includes(this.tiles.get(each)?.condition));
    const grade = (each) => TROUBLE.indexOf(this.tiles.get(each).condition);
    found.sort((one, other) => grade(one) - grade(other) || one - other);
    const lines = found.slice(0, LISTED).map((each) => {
      const tile = this.tiles.get(each);
      return [tile.condition, `${SIGNS[tile.condition][0]} ${this.name} ${each}` +
        `${tile.host ? ` on ${tile.host}` : ""}: ${trouble(tile)}`];
    });
    if (found.length > LISTED) lines.push(["more", `and ${found.length - LISTED} more`]);
    const text = JSON.stringify(lines);
    if (text === this.told) return;
    this.told = text;
    at("troubles").replaceChildren(...lines.map(([condition, words]) =>
      element("li", { "data-condition": condition, text: words })));
  }

  key(event) {
    const tops = this.numbers.map((each) => this.nodes.get(each)?.item.offsetTop);
    const columns = Math.max(1, tops.filter((top) => top === tops[0]).length);
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
      Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const now = this.numbers.indexOf(this.focused);
    const next = Math.min(Math.max(now + move, 0), this.numbers.length - 1);
    this.nodes.get(this.focused)?.button.setAttribute("tabindex", "-1");
    this.focused = this.numbers[next];
    const { button } = this.nodes.get(this.focused);
    button.setAttribute("tabindex", "0");
    button.focus();
    if (this.chosen !== null) this.choose(this.focused);
  }

  choose(each) {
    const same = each === this.chosen && document.activeElement?.dataset.number === String(each);
    this.nodes.get(this.chosen)?.button.removeAttribute("aria-pressed");
    this.chosen = same ? null : each;
    this.nodes.get(this.chosen)?.button.setAttribute("aria-pressed", "true");
    this.show();
  }

  // All that is known of the chosen one.
  show() {
    const tile = this.tiles.get(this.chosen);
    at("detail").hidden = !tile;
    if (!tile) return;
    const lines = [
      `${this.name} ${tile.number}: ${SIGNS[tile.condition][1]}` +
        `${tile.why ? `, ${tile.why}` : ""}`,
      [tile.host && `host ${tile.host}`, tile.device].filter(Boolean).join(", "),
      sentence(tile), speed(tile), tile.times ? split(tile) : "", seen(tile, this.now),
    ].filter(Boolean);
    put(at("detail"), lines.join(" · "));
  }
}

function sentence(tile) {
  return tile.doing || (tile.condition === "starting" ? "starting" : "–");
}

function trouble(tile) {
  if (tile.condition === "slow") return `${tile.slower} times slower than the others`;
  const doing = tile.doing ? `, last seen ${tile.doing}` : "";
  if (tile.condition === "silent") return `not heard of for a while${doing}`;
  return `${tile.why || "dead"}${doing}`;
}

function speed(tile) {
  if (tile.rate !== null && tile.rate !== undefined) return `${number(tile.rate)} samples/s`;
  if (tile.times) return `${short(tile.times[0] + tile.times[3])} a step`;
  return "–";
}

function split(tile) {
  const [compute, exchange, waiting, data] = tile.times.map(short);
  return `computing ${compute}, exchange ${exchange}, waiting ${waiting}, data ${data}`;
}

function seen(tile, now) {
  if (!tile?.seen || !now) return "";
  const ago = Math.max(0, now - tile.seen);
  return ago < 2 ? "seen now" : `seen ${duration(ago)} ago`;
}

// Shards of parameter servers: what each has still to do.
export function drawShards(table, shards) {
  const longest = Math.max(10, ...shards.map((shard) => shard.behind));
  const heads = ["shard", "state", "queue", "updates", "busy", "last seen"];
  table.replaceChildren(
    element("thead", {}, element("tr", {},
      ...heads.map((text) => element("th", { scope: "col", text })))),
    element("tbody", {}, ...shards.map((shard, index) => {
      const condition = shard.ready ? "working" : "dead";
      const queue = element("td", { class: "queue" });
      const fill = element("span", { class: "fill" });
      fill.style.width = `${(60 * shard.behind) / longest}px`;
      queue.append(fill, ` ${shard.behind}`);
      return element("tr", { "data-condition": condition, "data-behind": shard.behind },
        element("th", { scope: "row", text: String(index) }),
        element("td", { text: shard.ready ? "● working" : "✕ away" }), queue,
        element("td", { text: shard.applied.toLocaleString("en-US") +
          (shard.lost ? ` (${shard.lost} lost)` : "") }),
        element("td", { text: duration(shard.busy) }),
        element("td", { text: shard.silent === null ? "–"
          : shard.silent < 2 ? "now" : `${duration(shard.silent)} ago` }));
    })));
}

// How many gradients were how stale.
export function drawStaleness(place, { counts, open }) {
  const all = counts.reduce((sum, [, count]) => sum + count, 0);
  if (!all) return;
  const mean = counts.reduce((sum, [stale, count]) => sum + stale * count, 0) / all;
  const most = Math.max(...counts.map(([, count]) => count));
  const last = Math.max(...counts.map(([stale]) => stale));
  const by = new Map(counts);
  const bars = [];
  for (let stale = 0; stale <= last; stale++) {
    const count = by.get(stale) ?? 0;
    const bar = element("span", { class: "column", "data-count": count,
      title: `${stale}${stale === open ? " or more" : ""}: ${count}` });
    const fill = element("span", { class: "fill" });
    fill.style.height = `${count ? Math.max(2, (96 * count) / most) : 0}px`;
    bar.append(fill, element("span", { class: "dim",
      text: last < 24 || stale % 8 === 0 ? String(stale) : "" }));
    bars.push(bar);
  }
  const words = `Staleness of ${all.toLocaleString("en-US")} updates: mean ${number(mean, 3)}, ` +
    `at most ${last}${last === open ? " or more" : ""}`;
  place.replaceChildren(element("p", { class: "caption", text: words }),
    element("div", { class: "histogram", role: "img", "aria-label": words }, ...bars));
}

