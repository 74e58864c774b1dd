"use strict";
// Draws the page from the JSON in it. Names come from files of users: they are only ever set as text.

const data = JSON.parse(document.getElementById("data").textContent);
const main = d3.select("main");
const root = document.documentElement;
const NODE = {width: 226, height: 48}, JOIN = {width: 96, height: 26};
const MANY = 1500; // Layers that are not laid out any more, since that would take too long.
const LONG = 4000; // Rows that all edges may cross together, for the same reason.

// ---------------------------------------------------------------- words and colours

const count = (n, word, words = word + "s") => `${d3.format(",")(n)} ${n === 1 ? word : words}`;
const short = d3.format(".3~g");
const fixed = (x) => (x === null || x === undefined ? "–" : d3.format(".2f")(x));
const tail = (text, most) => (text.length > most ? "…" + text.slice(1 - most) : text);
// As many numbers as there is room for along an axis.
const ticks = (width) => Math.max(2, Math.floor(width / 90));
// The golden angle keeps the hues of neighbouring classes apart.
const hue = (n) => (250 + n * 137.508) % 360;
const dark = () => getComputedStyle(root).colorScheme === "dark" ||
  (getComputedStyle(root).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);

function colour(selection, n) {
  return selection.classed("class", true).style("--h", hue(n));
}

function section(title, note) {
  const found = main.append("section");
  found.append("h2").text(title);
  if (note) found.append("p").attr("class", "soft").text(note);
  return found;
}

function table(parent, caption, head, rows) {
  const own = parent.append("table");
  own.append("caption").text(caption);
  own.append("thead").append("tr").selectAll("th").data(head).join("th").attr("scope", "col")
    .attr("class", (h) => h.kind ?? null).text((h) => h.text);
  own.append("tbody").selectAll("tr").data(rows).join("tr").each(function (row) {
    d3.select(this).selectAll("td").data(row).join("td").attr("class", (_, i) => head[i].kind ?? null)
      .each(function (cell) {
        const td = d3.select(this);
        typeof cell === "function" ? cell(td) : td.text(cell);
      });
  });
  return own;
}

// Draws now, and again when the width or the colours change.
const drawings = [];
function figure(parent, caption, draw) {
  const own = parent.append("figure");
  const place = own.append("div");
  if (caption) own.append("figcaption").text(caption);
  const again = () => place.node().isConnected && place.node().replaceChildren(draw(Math.max(place.node().clientWidth, 120)));
  again();
  drawings.push(again);
  return own;
}
function redraw() {
  for (const again of drawings) again();
}

// ---------------------------------------------------------------- what was made

function summary() {
  if (data.warnings.length) {
    const box = main.append("div").attr("class", "warnings").attr("role", "note");
    box.append("h2").text(count(data.warnings.length, "warning"));
    box.append("ul").selectAll("li").data(data.warnings).join("li").text((text) => text);
  }
  const two = main.append("div").attr("class", "two");
  const own = section("What was made");
  const right = [data.nearness && nearness(), data.line && between()].filter(Boolean);
  const left = right.length ? [own, costs()] : [own];
  for (const sections of [left, right.length ? right : [costs()]]) {
    const column = two.append("div").attr("class", "column");
    for (const one of sections) column.append(() => one.node());
  }
  const list = own.append("dl").attr("class", "facts");
  for (const [name, text] of data.facts) {
    list.append("dt").text(name);
    list.append("dd").text(text);
  }
}

function nearness() {
  const {what, rows} = data.nearness;
  const own = section(rows.length > 1 ? "How near to the ensemble" : "How near to the model");
  own.append("p").attr("class", "soft").text(what[0].toUpperCase() + what.slice(1) + ". Shorter is nearer.");
  const known = rows.filter((row) => row.error !== null);
  figure(own, null, (width) => Plot.plot({
    width, height: 44 + 34 * known.length, marginLeft: 96, marginRight: 52, marginBottom: 34,
    ariaLabel: what, style: {background: "transparent", fontSize: "13px"},
    x: {label: null, grid: true, ticks: ticks(width - 148), nice: true, zero: true},
    y: {label: null, type: "band", domain: d3.range(known.length), tickSize: 0, tickFormat: (i) => tail(known[i].name, 12)},
    marks: [
      Plot.barX(known, {x: "error", y: (_, i) => i, fill: (row) => (row.result ? "var(--accent)" : "var(--second)"), rx: 3, insetTop: 3, insetBottom: 3}),
      Plot.text(known, {x: "error", y: (_, i) => i, text: (row) => short(row.error), textAnchor: "start", dx: 6}),
      Plot.ruleX([0]),
    ],
  }));
  return own;
}

// ---------------------------------------------------------------- the architecture

// One square for every axis of a parameter; several in one, if units of several classes lie along it.
function squares(parent, parameter) {
  const own = parent.append("span");
  for (const [dim, axis] of parameter.axes.entries()) {
    const parts = axis.parts.length ? axis.parts : [{why: "", count: axis.size}];
    own.append("span").attr("class", "axis").attr("title", `${parameter.name}[${dim}]: ${parts.map(told).join("; ")}`)
      .selectAll("span").data(parts.slice(0, 4)).join("span").each(function (part) {
        const square = d3.select(this).text(part.class === undefined ? "·" : data.classes[part.class].letter);
        part.class === undefined ? square.classed("still", true) : colour(square, part.class);
      });
  }
}
const told = (part) => part.class === undefined
  ? `${count(part.count, "index", "indices")} stay${part.why ? ": " + part.why : ""}`
  : `${count(part.count, "unit")} of class ${data.classes[part.class].letter}`;

function architecture(parent) {
  const own = section("Architecture", `${count(data.layers.length, "node")}. Every square is an axis of a parameter, in the colour and with the letter of its class. Grey axes do not move.`);
  parent.append(() => own.node());
  if (data.layers.length > MANY) {
    own.append("p").text(`The graph has more than ${d3.format(",")(MANY)} nodes, and is not drawn.`);
    return;
  }
  const tools = own.append("div").attr("class", "tools").attr("role", "toolbar").attr("aria-label", "Zoom");
  const box = own.append("div").attr("class", "box");
  const edges = drawn();
  const all = d3.sum(data.layers, (layer) => layer.inputs.length);
  if (edges.length < all) own.append("p").attr("class", "soft").text(`The ${d3.format(",")(all - edges.length)} longest of ${d3.format(",")(all)} edges are not drawn; the panel of a layer lists all.`);
  const {width, height} = graph(box.append("div").attr("class", "graph"), edges);
  const canvas = box.select(".graph").style("width", width + "px").style("height", height + "px");
  let zoom = 1;
  const set = (next) => {
    const at = box.node().scrollTop / zoom;
    zoom = Math.min(Math.max(next, 0.08), 2.5);
    canvas.style("zoom", zoom);
    box.node().scrollTop = at * zoom;
  };
  const fit = () => Math.min(1, (box.node().clientWidth - 8) / width);
  const button = (text, label, act) => tools.append("button").attr("type", "button").attr("aria-label", label).text(text).on("click", act);
  button("−", "Zoom out", () => set(zoom / 1.3));
  button("+", "Zoom in", () => set(zoom * 1.3));
  button("Width", "Fit the width", () => set(fit()));
  button("All", "Fit all", () => set(Math.min(fit(), (box.node().clientHeight - 8) / height)));
  tools.append("span").attr("class", "soft wide").text("arrow keys move, Enter opens");
  box.on("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    set(zoom * Math.exp(-event.deltaY / 300));
  }, {passive: false});
  requestAnimationFrame(() => {
    set(Math.max(fit(), 0.6)); // Smaller letters cannot be read.
    const first = document.getElementById("node-0");
    box.node().scrollLeft = zoom * (first.offsetLeft + first.offsetWidth / 2) - box.node().clientWidth / 2;
  });
}

// The edges that are drawn: of every node the shortest, and others as long as there is room.
function drawn() {
  const shortest = data.layers.map((layer) => d3.max(layer.inputs));
  const edges = data.layers.flatMap((layer, to) => layer.inputs.map((from) => ({from, to})));
  let room = LONG;
  return d3.sort(edges, (edge) => edge.to - edge.from).filter(({from, to}) => (room -= to - from) > 0 || from === shortest[to]);
}

// Lays the layers out, with a link for each, and draws which reads which.
function graph(canvas, edges) {
  const layout = new dagre.graphlib.Graph();
  layout.setGraph({nodesep: 22, ranksep: 22, edgesep: 12, marginx: 14, marginy: 14});
  layout.setDefaultEdgeLabel(() => ({}));
  data.layers.forEach((layer, i) => {
    layout.setNode(String(i), {...(layer.parameters.length ? NODE : JOIN)});
  });
  for (const {from, to} of edges) layout.setEdge(String(from), String(to));
  dagre.layout(layout);
  const {width, height} = layout.graph();
  const line = d3.line((p) => p.x, (p) => p.y).curve(d3.curveMonotoneY);
  canvas.append("svg").attr("width", width).attr("height", height).attr("aria-hidden", "true")
    .selectAll("path").data(layout.edges()).join("path").attr("d", (edge) => line(layout.edge(edge).points));
  const nodes = canvas.selectAll("a").data(data.layers).join("a").attr("class", (layer) => "node" + (layer.parameters.length ? "" : " join"))
    .attr("href", (_, i) => `#layer-${i}`).attr("tabindex", (_, i) => (i ? -1 : 0)).attr("id", (_, i) => `node-${i}`)
    .each(function (layer, i) {
      const {x, y, width: w, height: h} = layout.node(String(i));
      const own = d3.select(this).style("left", x - w / 2 + "px").style("top", y - h / 2 + "px").style("width", w + "px").style("height", h + "px");
      if (!layer.parameters.length) {
        own.text(layer.op === "input" ? layer.name : layer.op);
        return;
      }
      const head = own.append("b").attr("title", layer.name);
      head.append("span").append("bdi").text(layer.name);
      head.append("em").text(layer.op);
      const axes = own.append("span").attr("class", "axes");
      for (const parameter of layer.parameters) squares(axes, parameter);
    });
  roving(nodes, layout);
  return {width, height};
}

// One layer at a time can be reached by Tab; arrow keys go along the edges, and to the next layer in the same row.
function roving(nodes, layout) {
  const go = (event, i) => {
    const at = layout.node(String(i));
    const beside = () => data.layers.map((_, j) => j).filter((j) => j !== i && Math.abs(layout.node(String(j)).y - at.y) < 2)
      .filter((j) => (layout.node(String(j)).x > at.x) === (event.key === "ArrowRight"))
      .sort((a, b) => Math.abs(layout.node(String(a)).x - at.x) - Math.abs(layout.node(String(b)).x - at.x));
    const next = {
      ArrowDown: () => data.layers.map((_, j) => j).filter((j) => data.layers[j].inputs.includes(i)),
      ArrowUp: () => data.layers[i].inputs,
      ArrowLeft: beside,
      ArrowRight: beside,
      Home: () => [0],
      End: () => [data.layers.length - 1],
    }[event.key]?.();
    if (!next) return;
    event.preventDefault();
    if (next.length) document.getElementById(`node-${next[0]}`).focus();
  };
  nodes.on("keydown", (event, layer) => go(event, data.layers.indexOf(layer)))
    .on("focus", function () {
      nodes.attr("tabindex", -1);
      this.tabIndex = 0;
    });
}

// ---------------------------------------------------------------- classes

const meanOf = (c, key) => (c.similarities.length ? d3.mean(c.similarities, (s) => s[key]) : null);

function classes(parent) {
  const total = d3.sum(data.classes, (c) => c.size);
  const own = section("Classes of units", `${count(data.classes.length, "class", "classes")} with ${count(total, "unit")}. The units of a class may be exchanged with each other, in all of its axes at once.`);
  parent.append(() => own.node());
  const space = data.classes.flatMap((c) => c.similarities).map((s) => s.space)[0];
  const head = [
    {text: ""}, {text: "class", kind: "name"}, {text: "units", kind: "number"}, {text: "group", kind: "wide"},
    {text: "before", kind: "number"}, {text: "after", kind: "number"},
  ];
  const box = own.append("div").attr("class", "classes scroll").attr("tabindex", 0).attr("role", "region").attr("aria-label", "Classes of units");
  box.style("max-height", "none");
  const rows = data.classes.map((c, i) => [
    (td) => colour(td.append("span").attr("class", "tag"), i).text(c.letter),
    (td) => td.append("a").attr("href", `#class-${i}`).text(c.name),
    c.size === c.merged ? d3.format(",")(c.size) : `${d3.format(",")(c.size)} → ${d3.format(",")(c.merged)}`,
    c.group, fixed(meanOf(c, "mean_before")), fixed(meanOf(c, "mean_after")),
  ]);
  const caption = space ? `The mean similarity of a unit and the one in its place, by their ${space}, before and after matching.` : "No similarities were computed.";
  const found = table(box, caption, head, rows);
  found.selectAll("tbody tr").attr("data-class", (_, i) => i)
    .on("mouseenter focusin", (_, row) => light(rows.indexOf(row))).on("mouseleave focusout", () => light(null));
  own.append("p").attr("class", "none").attr("hidden", "").text("No class has this in its name.");
}

// Dims the layers that have no axis of a class.
function light(n) {
  d3.selectAll(".node").classed("dim", (layer) => n !== null && !reads(layer, n));
}
const reads = (layer, n) => layer.parameters.some((p) => p.axes.some((axis) => axis.parts.some((part) => part.class === n)));

// ---------------------------------------------------------------- layers, line, time

function fits() {
  const rows = data.layers.map((layer, i) => ({...layer.fit, name: layer.name, i})).filter((row) => row.before !== undefined && row.before !== null);
  if (!rows.length) return;
  const own = section("Layers before and after the fit", "The squared error of a layer's outputs, as a share of the square of its targets. Every layer is fitted after those before it.");
  const key = own.append("ul").attr("class", "key");
  for (const [kind, text] of [["", "before"], ["full", "after"]]) key.append("li").call((li) => li.append("i").attr("class", kind)).append("span").text(text);
  const names = new Map(rows.map((row) => [String(row.i), row.name]));
  const box = own.append("div").attr("class", "scroll").attr("tabindex", 0).attr("role", "region").attr("aria-label", "Errors of layers");
  figure(box, null, (width) => {
    const left = Math.min(260, width * 0.4), letters = Math.floor(left / 7.4);
    return Plot.plot({
      width, height: 50 + 19 * rows.length, marginLeft: left, marginTop: 26, marginRight: 24, ariaLabel: "Errors of layers before and after the fit",
      style: {background: "transparent", fontSize: "12px"},
      x: {axis: "top", label: null, grid: true, zero: true, nice: true, ticks: ticks(width - left)},
      y: {type: "band", label: null, tickSize: 0, domain: [...names.keys()], tickFormat: (i) => tail(names.get(i), letters)},
      marks: [
        Plot.link(rows, {x1: "before", x2: "after", y1: (r) => String(r.i), y2: (r) => String(r.i), stroke: "var(--second)", strokeWidth: 2}),
        Plot.dot(rows, {x: "before", y: (r) => String(r.i), r: 4, stroke: "var(--edge)", strokeWidth: 2, fill: "var(--card)"}),
        Plot.dot(rows, {x: "after", y: (r) => String(r.i), r: 4.5, fill: "var(--accent)"}),
        Plot.tip(rows, Plot.pointerY({x: "after", y: (r) => String(r.i), title: (r) => `${r.name}\nbefore ${short(r.before)}\nafter ${short(r.after)}` + (r.held_out == null ? "" : `\nheld out ${short(r.held_out)}`)})),
      ],
    });
  });
  numbers(own, "The numbers", ["layer", "before", "after", "held out", "rows"], rows.map((r) => [r.name, short(r.before), short(r.after), r.held_out == null ? "–" : short(r.held_out), r.rows === undefined ? "–" : d3.format(",")(r.rows)]));
}

function numbers(parent, title, head, rows) {
  const own = parent.append("details");
  own.append("summary").text(title);
  const box = own.append("div").attr("class", "scroll").attr("tabindex", 0).attr("role", "region").attr("aria-label", title);
  table(box, "", head.map((text, i) => ({text, kind: i ? "number" : "name"})), rows);
}

function between() {
  const {what, fractions, before, after, seconds} = data.line;
  const own = section("On the line between the parents", `${what[0].toUpperCase() + what.slice(1)}, of networks with weighted means of both parents' parameters. It took ${short(seconds)} s.`);
  const key = own.append("ul").attr("class", "key");
  for (const [kind, text] of [["", "units as they are"], ["full", "units aligned"]]) key.append("li").call((li) => li.append("i").attr("class", kind)).append("span").text(text);
  const points = (values) => fractions.map((x, i) => ({x, y: values[i]})).filter((p) => p.y !== null);
  figure(own, null, (width) => Plot.plot({
    width, height: 240, marginLeft: 48, marginBottom: 44, ariaLabel: what, style: {background: "transparent", fontSize: "12px"},
    x: {label: "from the first parent to the second", labelAnchor: "center", labelArrow: "none", labelOffset: 38, ticks: 5}, y: {label: null, grid: true, zero: true, nice: true},
    marks: [
      Plot.lineY(points(before), {x: "x", y: "y", stroke: "var(--edge)", strokeWidth: 2}),
      Plot.dot(points(before), {x: "x", y: "y", stroke: "var(--edge)", strokeWidth: 2, fill: "var(--card)"}),
      Plot.lineY(points(after), {x: "x", y: "y", stroke: "var(--accent)", strokeWidth: 2.5}),
      Plot.dot(points(after), {x: "x", y: "y", fill: "var(--accent)", r: 4}),
    ],
  }));
  numbers(own, "The numbers", ["fraction", "as they are", "aligned"], fractions.map((x, i) => [short(x), short(before[i]), short(after[i])]));
  return own;
}

function costs() {
  const rows = Object.entries(data.seconds).map(([stage, seconds]) => ({stage, seconds}));
  const own = section("Time and memory", `${short(d3.sum(rows, (row) => row.seconds))} seconds` +
    (data.memory === null ? "." : `, and ${short(data.memory / 2 ** 30)} GiB of memory that the process had in use at most when the result was ready, with all that was loaded before.`));
  figure(own, null, (width) => Plot.plot({
    width, height: 40 + 25 * rows.length, marginLeft: 96, marginRight: 56, ariaLabel: "Seconds by stage", style: {background: "transparent", fontSize: "13px"},
    x: {label: null, grid: true, ticks: ticks(width - 152), zero: true}, y: {label: null, domain: rows.map((row) => row.stage), tickSize: 0},
    marks: [
      Plot.barX(rows, {x: "seconds", y: "stage", fill: "var(--second)", rx: 3, insetTop: 3, insetBottom: 3}),
      Plot.text(rows, {x: "seconds", y: "stage", text: (row) => `${short(row.seconds)} s`, textAnchor: "start", dx: 6}),
    ],
  }));  return own;
}

function pinned() {
  if (!data.pinned.length) return;
  const own = section("What does not move", `${count(data.pinned.length, "axis of a parameter has", "axes of parameters have")} indices that stay where they are.`);
  const fold = own.append("details");
  fold.append("summary").text("Show the causes");
  const box = fold.append("div").attr("class", "scroll").attr("tabindex", 0).attr("role", "region").attr("aria-label", "Pinned axes");
  table(box, "", [{text: "axis", kind: "name"}, {text: "indices", kind: "number"}, {text: "cause"}],
    data.pinned.map((p) => [`${p.parameter}[${p.dim}]`, d3.format(",")(p.count), p.why]));
}

function missing() {
  if (!data.missing.length) return;
  section("What is not on this page").append("ul").attr("class", "plain").selectAll("li").data(data.missing).join("li").text((text) => text);
}

// ---------------------------------------------------------------- the panel of a class or a layer

const panel = d3.select("#panel");

function head(title, kind) {
  panel.node().replaceChildren();
  panel.node().scrollTop = 0;
  const own = panel.append("div").attr("class", "panel-head");
  const text = own.append("div");
  text.append("div").attr("class", "soft").text(kind);
  text.append("h2").attr("id", "panel-title").attr("tabindex", -1).text(title);
  own.append("button").attr("type", "button").text("Close").on("click", () => panel.node().close());
  return text.select("h2");
}

function facts(pairs) {
  const list = panel.append("dl").attr("class", "facts");
  for (const [name, text] of pairs.filter((pair) => pair[1])) {
    list.append("dt").text(name);
    list.append("dd").text(text);
  }
}

function showClass(i) {
  const c = data.classes[i];
  const title = head("", "class of units");
  colour(title.append("span").attr("class", "tag"), i).text(c.letter);
  title.append("span").text(` ${c.name}`);
  const stays = c.axes.flatMap((axis) => data.pinned.filter((p) => p.parameter === axis.parameter && p.dim === axis.dim));
  facts([
    ["units", c.size === c.merged ? d3.format(",")(c.size) : `${d3.format(",")(c.size)} in a model, ${d3.format(",")(c.merged)} merged`],
    ["may move as", c.group],
    ["structure", c.structure + (c.inside.length ? `, inside of ${c.inside.join(" × ")}` : "")],
    ["matched by", c.basis ? `a change of basis (${c.basis})` : ""],
    ["match quality", Object.entries(c.quality).map(([space, value]) => `${fixed(value)} in ${space}`).join(", ")],
    ["merged units with several units of one model", c.several ? d3.format(",")(c.several) : ""],
  ]);
  for (const s of c.similarities) similarity(s);
  if (!c.similarities.length) panel.append("p").attr("class", "soft").style("margin-top", "14px").text("No similarities of its units were computed.");
  panel.append("h3").text(count(c.axes.length, "axis", "axes"));
  if (c.axes.length) {
    const owner = new Map(data.layers.flatMap((layer, n) => layer.parameters.map((p) => [p.name, n])));
    table(panel, "", [{text: "axis", kind: "name"}, {text: "indices", kind: "number"}, {text: "layer", kind: "name"}], c.axes.map((axis) => [
      `${axis.parameter}[${axis.dim}]`, d3.format(",")(axis.count),
      (td) => owner.has(axis.parameter) && td.append("a").attr("href", `#layer-${owner.get(axis.parameter)}`).text(data.layers[owner.get(axis.parameter)].name),
    ]));
  } else panel.append("p").text("It has none: its units are blocks of the units of other classes.");
  if (stays.length) {
    panel.append("h3").text("What does not move on these axes");
    table(panel, "", [{text: "axis", kind: "name"}, {text: "indices", kind: "number"}, {text: "cause"}], stays.map((p) => [`${p.parameter}[${p.dim}]`, d3.format(",")(p.count), p.why]));
  }
}

function matrix(text) {
  return Int8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function similarity(s) {
  const k = s.units.length, most = Math.max(d3.max(matrix(s.after), Math.abs), d3.max(matrix(s.before), Math.abs), 1) / 127;
  panel.append("h3").text(`Units of ${s.reference} and ${s.model}, by their ${s.space}`);
  const some = k < s.size ? `${k} of ${d3.format(",")(s.size)} units, evenly spaced` : `all ${k} units`;
  panel.append("p").attr("class", "soft").text(`Similarity of ${some}. On average a unit and the one in its place are alike by ${fixed(s.mean_before)} before and ${fixed(s.mean_after)} after matching.`);
  const pair = panel.append("div").attr("class", "pair");
  const ramp = () => d3.interpolateRgbBasis(dark() ? ["#ffb38a", "#a0542f", "#20242b", "#20242b", "#2f6ead", "#b3dbff"] : ["#a63603", "#f0a36b", "#f8f8f6", "#f8f8f6", "#6aa5d8", "#08407d"]);
  for (const [title, key] of [["as they are", "before"], ["matched", "after"]]) {
    const own = pair.append("div");
    own.append("h4").text(title);
    const values = Array.from(matrix(s[key]), (v) => v / 127);
    figure(own, null, (width) => {
      const axis = {ticks: [0, k - 1].map((i) => i + 0.5), tickFormat: (x) => String(s.units[Math.floor(x)]), tickSize: 2};
      return Plot.plot({
        width, height: width, marginLeft: 34, marginBottom: 32, marginTop: 6, marginRight: 8, ariaLabel: `Similarities ${title}`,
        style: {background: "transparent", fontSize: "11px"},
        x: {...axis, label: s.model, labelAnchor: "center", labelArrow: "none", tickFormat: (x) => (key === "before" ? String(s.units[Math.floor(x)]) : "")},
        y: {...axis, reverse: true, label: s.reference, labelAnchor: "center", labelArrow: "none"},
        color: {type: "diverging", domain: [-most, most], pivot: 0, interpolate: ramp()},
        marks: [Plot.raster(values, {width: k, height: k, imageRendering: "pixelated"})],
      });
    });
  }
  const scale = panel.append("div").attr("class", "scale").attr("aria-hidden", "true");
  scale.append("span").text(fixed(-most));
  const bar = scale.append("i"), paint = () => bar.style("background", `linear-gradient(to right, ${d3.range(0, 1.01, 0.125).map(ramp()).join(",")})`);
  scale.append("span").text(`+${fixed(most)}`);
  paint();
  drawings.push(paint);
}

function showLayer(i) {
  const layer = data.layers[i];
  head(layer.name, layer.op === layer.name ? "node of the graph" : layer.op);
  facts([
    ["reads", layer.inputs.map((n) => data.layers[n].name).join(", ")],
    ["read by", data.layers.filter((own) => own.inputs.includes(i)).map((own) => own.name).join(", ")],
    ["not fitted", layer.left],
  ]);
  for (const parameter of layer.parameters) {
    panel.append("h3").append("code").text(parameter.name);
    table(panel, `shape (${parameter.axes.map((axis) => axis.size).join(", ")})`, [{text: "axis", kind: "number"}, {text: "what lies along it"}],
      parameter.axes.map((axis, dim) => [String(dim), (td) => {
        if (!axis.parts.length) td.append("span").attr("class", "soft").text(`${count(axis.size, "index", "indices")}, in no class`);
        for (const part of axis.parts) {
          const line = td.append("div");
          if (part.class === undefined) line.attr("class", "soft").text(told(part));
          else {
            colour(line.append("span").attr("class", "tag"), part.class).text(data.classes[part.class].letter);
            line.append("span").text(` ${count(part.count, "unit")} of `);
            line.append("a").attr("href", `#class-${part.class}`).attr("class", "mono").text(data.classes[part.class].name);
          }
        }
      }]));
  }
  if (layer.fit) {
    panel.append("h3").text("The fit");
    const words = {before: "error before", after: "error after", held_out: "error on rows held out", rows: "equations", features: "features", rank: "directions left free", ridge: "ridge", seconds: "seconds"};
    facts(Object.entries(layer.fit).filter(([, v]) => v !== null).map(([name, value]) => [words[name] ?? name.replaceAll("_", " "), Number.isInteger(value) ? d3.format(",")(value) : short(value)]));
  }
}

// What is open is in the address, so that links and the back button work.
function open() {
  const [, kind, number] = /^#(class|layer)-(\d+)$/.exec(location.hash) ?? [];
  const i = Number(number), list = {class: data.classes, layer: data.layers}[kind];
  if (!list || !list[i]) {
    if (panel.node().open) panel.node().close();
    return;
  }
  if (!panel.node().open) panel.node().showModal();
  kind === "class" ? showClass(i) : showLayer(i);
  panel.select("h2").node().focus();
}
panel.on("close", () => location.hash && history.pushState(null, "", location.pathname + location.search));
panel.on("click", (event) => event.target === panel.node() && event.offsetX < 0 && panel.node().close());

// ---------------------------------------------------------------- search, keys and colours

function find(text) {
  const wanted = text.trim().toLowerCase();
  const has = (...names) => names.some((name) => name.toLowerCase().includes(wanted));
  const inClass = (c) => has(c.name, ...c.axes.map((axis) => axis.parameter)) || c.letter === wanted;
  const inLayer = (layer) => has(layer.name, layer.op, ...layer.parameters.map((p) => p.name));
  const hits = data.classes.map(inClass);
  d3.selectAll("tr[data-class]").attr("hidden", (_, i) => (wanted && !hits[i] ? "" : null));
  d3.select(".none").attr("hidden", wanted && !hits.includes(true) ? null : "");
  d3.selectAll(".node").classed("dim", (layer) => wanted !== "" && !inLayer(layer)).classed("hit", (layer) => wanted !== "" && inLayer(layer));
  const layer = data.layers.findIndex(inLayer);
  d3.select("#hits").text(wanted ? `${count(hits.filter(Boolean).length, "class", "classes")}, ${count(data.layers.filter(inLayer).length, "layer")}` : "");
  if (wanted && layer >= 0) {
    const box = document.querySelector(".box"), node = document.getElementById(`node-${layer}`);
    if (box && node) box.scrollTop += node.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
  }
  return {first: hits.indexOf(true), layer};
}

d3.select("#search").on("input", (event) => find(event.target.value)).on("keydown", (event) => {
  if (event.key !== "Enter" || !event.target.value.trim()) return;
  event.preventDefault(); // Else the same key would act on what has the focus next.
  const {first, layer} = find(event.target.value);
  if (first >= 0) location.hash = `class-${first}`;
  else if (layer >= 0) location.hash = `layer-${layer}`;
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(input|textarea)$/i.test(event.target.tagName) && !panel.node().open) {
    event.preventDefault();
    document.getElementById("search").focus();
  }
});

function theme() {
  d3.select("#theme").text(dark() ? "Light" : "Dark").attr("aria-label", dark() ? "Light colours" : "Dark colours");
}
d3.select("#theme").on("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  theme();
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  theme();
  redraw();
});
let waiting;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(redraw, 120);
});
addEventListener("hashchange", open);
addEventListener("popstate", open);

summary();
const explorer = main.append("div").attr("class", "explorer");
architecture(explorer);
classes(explorer);
fits();
pinned();
missing();
theme();
redraw(); // Sections have their width only now.
open();
