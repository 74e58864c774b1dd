"use strict";
// Puts the sections together, and minds the search, keys and colours.

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
