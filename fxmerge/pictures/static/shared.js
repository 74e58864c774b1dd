"use strict";
// What all parts of the page share: its data, words, colours, tables and figures.
// Names come from files of users: they are only ever set as text.

const data = JSON.parse(document.getElementById("data").textContent);
const main = d3.select("main");
const root = document.documentElement;

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
  if (caption) own.append("caption").text(caption);
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
