"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const NARROW = 560; // pixels, below which labels beside a figure find no room
  const PAPER = 680; // what a printed page is wide
  const GAP = 28; // between figures beside each other

  // "@name" is a colour of the style sheet, which differs by day and night.
  function coloured(value, style) {
    if (typeof value === "string") {
      if (!/^@[a-z0-9-]+$/.test(value)) return value;
      return style.getPropertyValue("--" + value.slice(1)).trim() || value;
    }
    if (Array.isArray(value)) {
      // Long ones are numbers.
      return value.length && typeof value[0] === "number" ? value : value.map((each) => coloured(each, style));
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, coloured(each, style)]));
    }
    return value;
  }

  function draw(width) {
    const style = getComputedStyle(root);
    const common = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: style.getPropertyValue("--soft").trim() },
      hoverlabel: { font: { size: 12 } },
    };
    for (const [id, figure] of Object.entries(figures)) {
      const place = document.getElementById(id);
      const beside = place.closest(".row").childElementCount;
      const own = width ? (width - GAP * (beside - 1)) / beside : place.clientWidth;
      const narrow = own < NARROW ? figure.narrow : {};
      const layout = coloured({ ...figure.layout, ...narrow, ...common }, style);
      if (width) layout.width = Math.min(own, parseFloat(getComputedStyle(place.parentElement).maxWidth) || own);
      Plotly.react(place, coloured(figure.data, style), layout, { responsive: !width, displaylogo: false, displayModeBar: false });
    }
  }

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  let wide = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === wide) return;
    wide = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(() => draw(), 150);
  });
  addEventListener("beforeprint", () => {
    root.classList.add("on-paper");
    draw(PAPER);
  });
  addEventListener("afterprint", () => {
    root.classList.remove("on-paper");
    draw();
  });
})();
