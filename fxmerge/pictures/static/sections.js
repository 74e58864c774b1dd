"use strict";
// The sections of the page, but for the architecture.

// ---------------------------------------------------------------- what was made

function summary() {
  if (data.warnings.length) {
    const box = main.append("div").attr("class", "warnings").attr("role", "note");
    box.append("h2").text(count(data.warnings.length, "warning"));
    box.append("ul").selectAll("li").data(data.warnings).join("li").text((text) => text);
  }
  const two = main.append("div").attr("class", "two");
  const own = section("What was made");
  const near = data.nearness && nearness(), line = data.line && between(), cost = costs();
  for (const sections of line ? [[own, cost], [near, line]] : [[own], [near, cost]]) {
    const column = two.append("div").attr("class", "column");
    for (const one of sections.filter(Boolean)) column.append(() => one.node());
  }
  const list = own.append("dl").attr("class", "facts");
  for (const [name, text] of data.facts) {
    list.append("dt").text(name);
    list.append("dd").text(text);
  }
}

function nearness() {
  const {title, what, rows} = data.nearness;
  const own = section(title);
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

// ---------------------------------------------------------------- classes

const meanOf = (c, key) => (c.similarities.length ? d3.mean(c.similarities, (s) => s[key]) : null);

function classes(parent) {
  const total = d3.sum(data.classes, (c) => c.size);
  const own = section("Classes of units", `${count(data.classes.length, "class", "classes")} with ${count(total, "unit")}. The units of a class may be exchanged with each other, in all of its axes at once.`);
  parent.append(() => own.node());
  const space = [...new Set(data.classes.flatMap((c) => c.similarities).map((s) => s.space))].join(" or ");
  const head = [
    {text: ""}, {text: "class", kind: "name"}, {text: "units", kind: "number"}, {text: "group", kind: "wide"},
    {text: "before", kind: "number"}, {text: "after", kind: "number"},
  ];
  const box = own.append("div").attr("class", "classes").attr("tabindex", 0).attr("role", "region").attr("aria-label", "Classes of units");
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
