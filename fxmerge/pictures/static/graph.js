"use strict";
// The architecture: layers as a graph, with every axis in the colour of its class.

const NODE = {width: 226, height: 48}, JOIN = {width: 96, height: 26};
const MANY = 1500; // Layers that are not laid out any more, since that would take too long.
const LONG = 4000; // Rows that all edges may cross together, for the same reason.

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
    .attr("aria-label", (layer) => (layer.name === layer.op ? layer.op : `${layer.name}, ${layer.op}`))
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
