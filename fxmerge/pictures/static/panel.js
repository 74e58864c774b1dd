"use strict";
// The panel that opens beside the page: a class with its similarities, or a layer.

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
