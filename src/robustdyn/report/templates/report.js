"use strict";
// The run table's filters and sorting, and the curves above the figures. Without it the page shows everything.
(() => {
  const data = JSON.parse(document.getElementById("curves-data").textContent);
  const table = document.getElementById("run-table"); // none for a single run that is done
  const order = table ? [...table.tBodies[0].rows] : []; // as the page came
  const form = document.getElementById("filters");
  const colouring = document.getElementById("colour");
  const shown = document.getElementById("shown");
  const chosen = new Map(); // what a filter is called in the address -> values ticked
  const colourNames = new Set(["", ...data.factors.map((factor) => factor.name)]);
  let sorted = null; // {column, descending}
  let focus = null; // name of the curve in focus
  const MOST_NAMES = 24; // in the legend

  const passes = (i) => {
    const row = data.rows[i];
    const values = [["state", row.state], ...data.factors.map((factor, k) => [factor.name, row.factors[k]])];
    return values.every(([name, value]) => !chosen.has(name) || chosen.get(name).has(value));
  };

  // ------------------------------------------------------------------ the address holds what is chosen

  const read = () => {
    const text = location.hash.slice(1);
    if (text && !text.includes("=")) return; // a place on the page
    const asked = new URLSearchParams(text);
    chosen.clear();
    for (const box of form.querySelectorAll("input[type=checkbox]")) {
      box.checked = asked.getAll(box.name).includes(box.value);
      if (box.checked) chosen.set(box.name, (chosen.get(box.name) || new Set()).add(box.value));
    }
    const colour = asked.has("colour") ? asked.get("colour") : data.colour;
    colouring.value = colourNames.has(colour) ? colour : data.colour;
    const sort = /^(-?)(\d+)$/.exec(asked.get("sort") || "");
    sorted = sort && heads[sort[2]] ? { column: +sort[2], descending: sort[1] === "-" } : null;
  };

  const write = () => {
    const said = new URLSearchParams();
    for (const [name, values] of chosen) for (const value of values) said.append(name, value);
    if (colouring.value !== data.colour) said.set("colour", colouring.value);
    if (sorted) said.set("sort", (sorted.descending ? "-" : "") + sorted.column);
    const hash = said.toString();
    try {
      history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
    } catch {
      location.hash = hash;
    }
  };

  // ------------------------------------------------------------------ the table

  const heads = table ? [...table.tHead.rows[0].cells] : [];
  heads.forEach((head, column) => {
    if (!head.hasAttribute("data-sortable")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => {
      if (!sorted || sorted.column !== column) sorted = { column, descending: false };
      else sorted = sorted.descending ? null : { column, descending: true };
      write();
      show();
    });
    head.append(button);
  });

  const value = (row, column) => row.cells[column].dataset.value ?? "";

  const compare = (a, b) => {
    const x = value(a, sorted.column);
    const y = value(b, sorted.column);
    if (x === "" || y === "") return (x === "") - (y === ""); // what has no value is last either way
    const sign = sorted.descending ? -1 : 1;
    const numbers = Number(x) - Number(y);
    return sign * (Number.isNaN(numbers) ? x.localeCompare(y, "en", { numeric: true }) : numbers);
  };

  const showTable = () => {
    if (!table) return;
    const now = sorted ? order.slice().sort(compare) : order;
    table.tBodies[0].append(...now);
    heads.forEach((head, column) => {
      if (!head.hasAttribute("data-sortable")) return;
      const mine = sorted && sorted.column === column;
      head.setAttribute("aria-sort", mine ? (sorted.descending ? "descending" : "ascending") : "none");
    });
    order.forEach((row, i) => (row.hidden = !passes(i)));
    const count = order.filter((row) => !row.hidden).length;
    shown.textContent = `${count} of ${order.length} runs shown`;
  };

  // ------------------------------------------------------------------ the curves

  const WIDTH = 480, HEIGHT = 280, LEFT = 54, RIGHT = 12, TOP = 12, BOTTOM = 38;
  const svg = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, given] of Object.entries(attributes)) element.setAttribute(key, given);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  const ticks = (low, high, count, whole) => {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    let step = [1, 2, 5, 10].find((n) => n * power >= rough) * power;
    if (whole) step = Math.max(1, Math.round(step));
    const first = Math.ceil(low / step - 1e-9);
    const found = [];
    for (let k = first; k * step <= high + 1e-9 * step; k++) found.push(k * step);
    const decimals = Math.min(8, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
    return found.map((tick) => [tick, Math.abs(tick) >= 1e6 || step < 1e-6 ? tick.toExponential(1) : tick.toFixed(decimals)]);
  };

  const number = (given) => {
    const size = Math.abs(given);
    return given === 0 || (size >= 1e-3 && size < 1e6) ? String(+given.toPrecision(4)) : given.toExponential(2);
  };

  // Mean over the runs that are done (all, if none is), at the epochs that all of these have.
  const mean = (members, panel) => {
    const own = members.filter((i) => panel.points[i]);
    const done = own.filter((i) => data.rows[i].state === "done");
    const of = done.length ? done : own;
    const sums = new Map();
    for (const i of of) {
      panel.points[i][0].forEach((epoch, k) => {
        const [n, sum] = sums.get(epoch) || [0, 0];
        sums.set(epoch, [n + 1, sum + panel.points[i][1][k]]);
      });
    }
    const epochs = [...sums.keys()].filter((epoch) => sums.get(epoch)[0] === of.length).sort((a, b) => a - b);
    return { n: of.length, points: [epochs, epochs.map((epoch) => sums.get(epoch)[1] / of.length)] };
  };

  // What is drawn: every run, and where runs share a colour the mean of each colour.
  const series = (panel, visible) => {
    const by = data.factors.findIndex((factor) => factor.name === colouring.value);
    const found = [];
    if (by < 0) {
      for (const i of visible) {
        if (panel.points[i]) found.push({ name: data.rows[i].name, colour: data.colours[i], dashes: data.dashes[i], points: panel.points[i], row: i, kind: "one" });
      }
      return found;
    }
    const factor = data.factors[by];
    factor.values.forEach((level, k) => {
      const look = { colour: factor.colours[k], dashes: factor.dashes[k] };
      const members = visible.filter((i) => data.rows[i].factors[by] === level && panel.points[i]);
      const thin = members.length > 1;
      for (const i of members) {
        found.push({ name: data.rows[i].name, ...look, points: panel.points[i], row: i, kind: thin ? "thin" : "one" });
      }
      if (thin) {
        const all = mean(members, panel);
        if (all.points[0].length) found.push({ name: `${factor.key}=${level}, mean of ${all.n}`, ...look, points: all.points, row: null, kind: "mean" });
      }
    });
    return found.sort((a, b) => (a.kind === "mean") - (b.kind === "mean"));
  };

  // As in the figures: the first tenth of the epochs is cut where it towers over the rest.
  const range = (drawn, last) => {
    const early = [], rest = [];
    for (const line of drawn) line.points[0].forEach((epoch, k) => (epoch < 0.1 * (last + 1) ? early : rest).push(line.points[1][k]));
    const all = early.concat(rest);
    let low = all.reduce((a, b) => Math.min(a, b), Infinity);
    let high = all.reduce((a, b) => Math.max(a, b), -Infinity);
    const limit = 2 * rest.reduce((a, b) => Math.max(a, b), -Infinity);
    const cut = early.length > 0 && rest.length > 0 && limit > 0 && limit < high ? high : null;
    if (cut !== null) high = limit;
    const room = 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
    return { low: low - room, high: cut === null ? high + room : high, cut };
  };

  // Dashed where every run that got so far lowers its rate.
  const decays = (visible, panel) => {
    const ends = visible.filter((i) => panel.points[i]).map((i) => [i, Math.max(...panel.points[i][0])]);
    const all = new Set(ends.flatMap(([i]) => data.rows[i].decays));
    return [...all].filter((epoch) => ends.every(([i, last]) => last < epoch || data.rows[i].decays.includes(epoch)));
  };

  class Panel {
    constructor(panel) {
      this.panel = panel;
      this.figure = document.createElement("figure");
      const title = document.createElement("h3");
      title.textContent = panel.title;
      this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: "0", role: "img" });
      this.label = document.createElement("div");
      this.label.className = "label";
      this.label.hidden = true;
      this.read = document.createElement("p"); // what the keyboard reads, for those who cannot see the label
      this.read.className = "unseen";
      this.read.setAttribute("aria-live", "polite");
      const frame = document.createElement("div");
      frame.className = "plot";
      frame.append(this.svg, this.label, this.read);
      this.figure.append(title, frame);
      this.svg.addEventListener("pointermove", (event) => this.near(event));
      this.svg.addEventListener("pointerleave", () => this.leave());
      this.svg.addEventListener("blur", () => this.leave());
      this.svg.addEventListener("keydown", (event) => this.step(event));
      this.line = 0;
      this.at = 0;
    }

    draw(visible) {
      this.leave();
      this.drawn = series(this.panel, visible);
      this.svg.replaceChildren();
      const names = this.drawn.filter((line) => line.kind !== "thin").map((line) => line.name);
      this.svg.setAttribute("aria-label", `${this.panel.title} over epochs, ${visible.length} runs. Arrow keys read values, up and down change the curve: ${names.slice(0, 12).join("; ")}`);
      if (!this.drawn.length) {
        this.svg.append(svg("text", { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "nothing recorded for these runs"));
        return;
      }
      const last = Math.max(1, ...this.drawn.map((line) => line.points[0][line.points[0].length - 1]));
      const band = this.panel.band; // of the reference: epochs, centre, low, high
      const { low, high, cut } = range(band ? [...this.drawn, ...band.slice(2).map((ends) => ({ points: [band[0], ends] }))] : this.drawn, last);
      this.x = (epoch) => LEFT + ((WIDTH - LEFT - RIGHT) * epoch) / last;
      this.y = (given) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * (given - low)) / (high - low);
      for (const [tick, text] of ticks(low, high, 5, false)) {
        this.svg.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: this.y(tick), y2: this.y(tick) }));
        this.svg.append(svg("text", { x: LEFT - 6, y: this.y(tick) + 4, "text-anchor": "end" }, text));
      }
      for (const [tick, text] of ticks(0, last, 6, true)) {
        this.svg.append(svg("line", { class: "grid", x1: this.x(tick), x2: this.x(tick), y1: TOP, y2: HEIGHT - BOTTOM }));
        this.svg.append(svg("text", { x: this.x(tick), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, text));
      }
      this.svg.append(svg("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "epoch"));
      for (const epoch of decays(visible, this.panel)) {
        this.svg.append(svg("line", { class: "decay", x1: this.x(epoch), x2: this.x(epoch), y1: TOP, y2: HEIGHT - BOTTOM }));
      }
      const clip = `clip-${this.panel.name}`;
      const frame = svg("clipPath", { id: clip });
      frame.append(svg("rect", { x: LEFT, y: TOP, width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM }));
      const curves = svg("g", { "clip-path": `url(#${clip})` });
      const places = (epochs, values) => epochs.map((epoch, k) => `${this.x(epoch).toFixed(1)},${this.y(values[k]).toFixed(1)}`);
      if (band) {
        const [centre, low, high] = band.slice(1).map((values) => places(band[0], values));
        curves.append(svg("polygon", { class: "band", points: [...high, ...low.reverse()].join(" ") }));
        curves.append(svg("polyline", { class: "centre", points: centre.join(" ") }));
      }
      for (const line of this.drawn) {
        const points = places(...line.points);
        line.element = svg("polyline", { class: `curve ${line.kind}`, points: points.join(" "), stroke: line.colour, "stroke-dasharray": line.dashes });
        curves.append(line.element);
        if (points.length < 16 && line.kind !== "thin") {
          for (const point of points) {
            const [cx, cy] = point.split(",");
            curves.append(svg("circle", { cx, cy, r: 2.5, fill: line.colour }));
          }
        }
      }
      this.svg.append(frame, curves);
      if (cut !== null) {
        this.svg.append(svg("text", { x: WIDTH - RIGHT - 4, y: TOP + 12, "text-anchor": "end" }, `first epochs reach ${number(cut)}`));
      }
      this.dot = svg("circle", { class: "dot", r: 4.5, cx: -9, cy: -9 });
      this.svg.append(this.dot);
    }

    near(event) {
      if (!this.drawn || !this.drawn.length) return;
      const box = this.svg.getBoundingClientRect();
      const px = ((event.clientX - box.left) * WIDTH) / box.width;
      const py = ((event.clientY - box.top) * HEIGHT) / box.height;
      let best = null, least = 40 ** 2;
      this.drawn.forEach((line, l) => {
        line.points[0].forEach((epoch, k) => {
          const distance = (this.x(epoch) - px) ** 2 + (this.y(line.points[1][k]) - py) ** 2;
          if (distance < least || (distance === least && line.kind === "mean")) [best, least] = [[l, k], distance];
        });
      });
      if (best) this.point(...best);
      else this.leave();
    }

    step(event) {
      if (!this.drawn || !this.drawn.length) return;
      const across = { ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0;
      const along = { ArrowUp: -1, ArrowDown: 1 }[event.key] || 0;
      if (event.key === "Escape") this.leave();
      if (!across && !along) return;
      event.preventDefault();
      const before = this.drawn[this.line].points[0][this.at];
      this.line = (this.line + along + this.drawn.length) % this.drawn.length;
      const epochs = this.drawn[this.line].points[0];
      if (along) this.at = Math.max(0, epochs.findIndex((epoch) => epoch >= before));
      this.at = Math.min(epochs.length - 1, Math.max(0, this.at + across));
      this.point(this.line, this.at);
      this.read.textContent = this.label.textContent;
    }

    point(l, k) {
      const line = this.drawn[l];
      [this.line, this.at] = [l, k];
      const [epoch, given] = [line.points[0][k], line.points[1][k]];
      const x = this.x(epoch);
      const y = Math.max(TOP, this.y(given));
      this.dot.setAttribute("cx", x);
      this.dot.setAttribute("cy", y);
      this.dot.setAttribute("fill", line.colour);
      this.label.textContent = `${line.name} · epoch ${epoch}: ${number(given)}${this.panel.unit === "%" ? " %" : ""}`;
      this.label.hidden = false;
      const right = x > WIDTH / 2;
      this.label.style.left = right ? "auto" : `${(100 * (x + 8)) / WIDTH}%`;
      this.label.style.right = right ? `${100 - (100 * (x - 8)) / WIDTH}%` : "auto";
      this.label.style.bottom = `${100 - (100 * (y - 8)) / HEIGHT}%`;
      if (y < 60) this.label.style.bottom = `${100 - (100 * (y + 44)) / HEIGHT}%`;
      emphasise(line.name, line.row);
    }

    leave() {
      this.label.hidden = true;
      if (this.dot) this.dot.setAttribute("cx", -9);
      emphasise(null, null);
    }
  }

  const panels = data.panels.map((panel) => new Panel(panel));
  const plots = document.getElementById("plots");
  plots.append(...panels.map((panel) => panel.figure));
  const legend = document.getElementById("legend");

  // The same curve stands out in all panels, and its run in the table.
  const emphasise = (name, row) => {
    if (name === focus) return;
    focus = name;
    for (const panel of panels) {
      for (const line of panel.drawn || []) {
        if (!line.element) continue;
        line.element.classList.toggle("on", name !== null && line.name === name);
        line.element.classList.toggle("off", name !== null && line.name !== name);
      }
    }
    order.forEach((given, i) => given.classList.toggle("on", row === i));
  };

  const showCurves = () => {
    const visible = data.rows.map((_, i) => i).filter(passes);
    for (const panel of panels) panel.draw(visible);
    const lines = new Map(); // name -> line, of all panels: the legend
    for (const panel of panels) for (const line of panel.drawn) if (line.kind !== "thin") lines.set(line.name, line);
    const named = lines.size > MOST_NAMES ? [] : [...lines.values()];
    legend.replaceChildren(
      ...named.map((line) => {
        const item = document.createElement("li");
        const swatch = svg("svg", { viewBox: "0 0 24 8", width: 24, height: 8, "aria-hidden": "true" });
        swatch.append(svg("line", { x1: 0, x2: 24, y1: 4, y2: 4, stroke: line.colour, "stroke-dasharray": line.dashes, "stroke-width": line.kind === "mean" ? 4 : 2.5 }));
        item.append(swatch, ` ${line.name}`);
        item.addEventListener("pointerenter", () => emphasise(line.name, line.row));
        item.addEventListener("pointerleave", () => emphasise(null, null));
        return item;
      }),
    );
    if (lines.size > named.length) {
      const item = document.createElement("li");
      item.textContent = `${lines.size} curves: point at one, or at a run in the table, to tell which is which`;
      legend.append(item);
    }
    if (data.reference) {
      const item = document.createElement("li");
      const swatch = svg("svg", { viewBox: "0 0 24 8", width: 24, height: 8, "aria-hidden": "true" });
      swatch.append(svg("rect", { class: "band", width: 24, height: 8 }));
      item.append(swatch, ` ${data.reference}, its band`);
      legend.append(item);
    }
  };

  const show = () => {
    showTable();
    showCurves();
  };

  order.forEach((row, i) => {
    row.addEventListener("pointerenter", () => emphasise(data.rows[i].name, i));
    row.addEventListener("pointerleave", () => emphasise(null, null));
  });
  form.addEventListener("change", () => {
    chosen.clear();
    for (const box of form.querySelectorAll("input[type=checkbox]:checked")) {
      chosen.set(box.name, (chosen.get(box.name) || new Set()).add(box.value));
    }
    write();
    show();
  });
  form.addEventListener("reset", () => {
    chosen.clear();
    sorted = null;
    setTimeout(() => {
      colouring.value = data.colour;
      write();
      show();
    });
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", () => {
    read();
    show();
  });

  document.documentElement.classList.add("script");
  read();
  show();
})();
