"use strict";
// Elements, and values as text.

const SVG = document.querySelector("svg").namespaceURI;
const at = (id) => document.getElementById(id);
const isGiven = (value) => value !== null && value !== undefined;

/** An HTML or SVG element; text becomes text nodes, never HTML. */
function make(tag, attributes = {}, ...children) {
  const isDrawing = ["svg", "g", "defs", "marker", "path", "circle", "polygon", "line", "text", "title"].includes(tag);
  const made = isDrawing ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (isGiven(value)) made.setAttribute(name, value);
  }
  made.append(...children.filter(isGiven));
  return made;
}

function percent(share, digits = 1) {
  return isGiven(share) ? `${(100 * share).toFixed(digits)} %` : "–";
}

function mark(right) {
  if (!isGiven(right)) return "–";
  return make("span", { class: right ? "right" : "wrong" }, right ? "✓ right" : "✗ wrong");
}

function number(value, digits = 3) {
  return isGiven(value) ? value.toFixed(digits).replace("-", "−") : "–";
}

function range(interval) {
  return isGiven(interval) ? `${percent(interval[0])} to ${percent(interval[1])}` : "no interval";
}

/** "47 of 50 (94.0 %)"; the count is a whole number, which the share was made of. */
function counted(share, examples) {
  return isGiven(share) ? `${Math.round(share * examples)} of ${examples} (${percent(share)})` : "–";
}

function visible(token) {
  return token.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "(empty)";
}

function facts(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([name, ...value]) => [make("dt", {}, name), make("dd", {}, ...value)]));
}
