// One question's graph as inline SVG: nodes coloured and sized by a belief, edges as arrows.

const WRITTEN = 0.05; // The least belief that is written as a number.

/** The part of a graph that its root reaches, as an array of booleans. */
function reached(graph) {
  const seen = graph.symbols.map(() => false);
  const waiting = [graph.root];
  while (waiting.length) {
    const node = waiting.pop();
    if (seen[node]) continue;
    seen[node] = true;
    for (const [parent, child] of graph.edges) if (parent === node) waiting.push(child);
  }
  return seen;
}

/** The special nodes differ in shape, outline colour and outline width. */
function roleOf(graph, node) {
  return node === graph.root ? "root" : node === graph.target ? "target" : node === graph.negative ? "negative" : "node";
}

function shapeOf(role, x, y, radius) {
  const sides = { root: 4, target: 4, negative: 5 }[role];
  if (!sides) return make("circle", { class: role, cx: x, cy: y, r: radius });
  const turn = role === "root" ? Math.PI / 4 : 0;
  const size = radius * (sides === 4 ? 1.3 : 1.2);
  const corners = Array.from({ length: sides }, (_, corner) => {
    const angle = turn - Math.PI / 2 + (2 * Math.PI * corner) / sides;
    return `${(x + size * Math.cos(angle)).toFixed(1)},${(y + size * Math.sin(angle)).toFixed(1)}`;
  });
  return make("polygon", { class: role, points: corners.join(" ") });
}

/** The middle of a curve from one place to another that stays clear of the other nodes, bent as little as that takes. */
function bendOf(start, end, others) {
  let best = null;
  for (const bend of [0, 0.15, -0.15, 0.3, -0.3, 0.45, -0.45]) {
    const middle = [
      (start[0] + end[0]) / 2 + bend * (end[1] - start[1]),
      (start[1] + end[1]) / 2 - bend * (end[0] - start[0]),
    ];
    let clear = Infinity;
    for (let step = 1; step < 16; step++) {
      const t = step / 16;
      const at = [0, 1].map((i) => (1 - t) ** 2 * start[i] + 2 * t * (1 - t) * middle[i] + t ** 2 * end[i]);
      for (const other of others) clear = Math.min(clear, Math.hypot(at[0] - other[0], at[1] - other[1]));
    }
    if (!best || clear > best.clear) best = { middle, clear };
    if (clear > 24) return middle;
  }
  return best.middle;
}

function towards(from, to, distance) {
  const length = Math.hypot(to[0] - from[0], to[1] - from[1]) || 1;
  return [0, 1].map((i) => (from[i] + ((to[i] - from[i]) * distance) / length).toFixed(1)).join(" ");
}

function arrowHead(id) {
  const tip = make("path", { d: "M0 0L8 4L0 8z", class: id });
  return make("marker", { id, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, tip);
}

/** Draws the graph into `svg`, and returns its width in pixels; without a belief the nodes are plain. */
function drawGraph(svg, graph, belief, label) {
  const named = graph.symbols.some((symbol) => symbol.length > 3); // Too long to stand within a node.
  const [column, layer, margin] = named ? [84, 84, 46] : [62, 76, 40];
  const left = Math.min(...graph.positions.map(([x]) => x));
  const top = Math.max(...graph.positions.map(([, y]) => y));
  const places = graph.positions.map(([x, y]) => [margin + (x - left) * column, margin + (top - y) * layer]);
  const width = margin + Math.max(...places.map(([x]) => x));
  const height = margin + Math.max(...places.map(([, y]) => y));
  const share = (node) => (belief ? belief[node] || 0 : 0);
  const radius = (node) => 13 + 8 * share(node);
  const below = reached(graph);

  svg.replaceChildren(make("defs", {}, arrowHead("arrow"), arrowHead("arrow-faint")));
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", label);
  // As large as it is drawn where there is room; where there is little, it shrinks to two thirds, then it scrolls.
  Object.assign(svg.style, { width: `${width}px`, maxWidth: "100%", minWidth: `${Math.round(0.66 * width)}px` });

  for (const [parent, child] of graph.edges) {
    const [start, end] = [places[parent], places[child]];
    const middle = bendOf(start, end, places.filter((_, node) => node !== parent && node !== child));
    const kind = below[parent] ? "arrow" : "arrow-faint";
    const ends = [towards(start, middle, radius(parent)), middle.join(" "), towards(end, middle, radius(child) + 4)];
    svg.append(make("path", { class: `edge ${kind}-edge`, d: `M${ends[0]}Q${ends[1]} ${ends[2]}`, "marker-end": `url(#${kind})` }));
  }
  graph.symbols.forEach((symbol, node) => {
    const [x, y] = places[node];
    const role = roleOf(graph, node);
    const shape = shapeOf(role, x, y, radius(node));
    if (role === "node" && !below[node]) shape.classList.add("faint");
    shape.style.setProperty("--share", percent(share(node)).replace(" ", ""));
    const kind = named ? "symbol beneath" : share(node) > 0.6 ? "symbol on-belief" : "symbol";
    const text = make("text", { class: kind, x, y: named ? y + radius(node) + 15 : y + 4.5 }, symbol);
    const group = make("g", {}, make("title", {}, `${symbol}: ${percent(share(node))}`), shape, text);
    if (share(node) >= WRITTEN) {
      // On the side that no edge from above comes from.
      const lean = graph.edges.reduce((sum, [parent, child]) => sum + (child === node ? places[parent][0] - x : 0), 0);
      const [side, anchor] = lean > 0 ? [-1, "end"] : [1, "start"];
      const away = radius(node) * 0.8;
      const place = { class: "share", x: x + side * away, y: y - away, "text-anchor": anchor };
      group.append(make("text", place, percent(share(node), 0)));
    }
    svg.append(group);
  });
  return width;
}

/** What the shapes mean, as items of a list. */
function legendItems() {
  const roles = { root: "root asked about", target: "right option", negative: "wrong option" };
  const items = Object.entries(roles).map(([role, words]) => {
    const drawing = make("svg", { viewBox: "0 0 24 24", class: "sample", "aria-hidden": "true" }, shapeOf(role, 12, 12, 8));
    return make("li", {}, drawing, words);
  });
  const scale = make("span", { class: "scale", "aria-hidden": "true" });
  items.push(make("li", {}, "probability 0 % ", scale, " 100 %"));
  const line = make("line", { class: "edge arrow-faint-edge", x1: 1, y1: 12, x2: 23, y2: 12 });
  items.push(make("li", {}, make("svg", { viewBox: "0 0 24 24", class: "sample", "aria-hidden": "true" }, line), "not reached from the root"));
  return items;
}
