// The header, and the summary of all questions: effects of interventions, and figures.

function showHeader() {
  const { run, measures } = content;
  at("title").textContent = content.title;
  if (measures) {
    at("measures").textContent =
      `${measures.correct} of ${measures.examples} questions right: ${percent(measures.accuracy)}` +
      ` (95 % interval ${range(measures.interval_95)})`;
  }
  if (run) {
    const names = ["method", "task", "split", "seed", "step", "stage", "commit"];
    at("run").textContent = names.filter((name) => isGiven(run[name])).map((name) => `${name} ${run[name]}`).join(" · ");
    at("command").textContent = run.command ?? "";
  }
  at("made").hidden = !run?.command;
}

/** A share with its interval on a line from 0 to 1; `before` is marked by an upright line. */
function intervalDrawing(share, [low, high], before = null) {
  const x = (value) => 4 + 112 * value;
  const drawing = make("svg", { class: "interval", viewBox: "0 0 120 16", "aria-hidden": "true" });
  drawing.append(make("line", { class: "track", x1: x(0), x2: x(1), y1: 8, y2: 8 }));
  if (isGiven(before)) drawing.append(make("line", { class: "before", x1: x(before), x2: x(before), y1: 1, y2: 15 }));
  drawing.append(make("line", { class: "bar", x1: x(low), x2: x(high), y1: 8, y2: 8 }));
  drawing.append(make("circle", { class: "dot", cx: x(share), cy: 8, r: 4 }));
  return drawing;
}

function shareCell(share, examples, interval, before = null) {
  if (!isGiven(share)) return make("td", {}, "–");
  const drawing = interval ? intervalDrawing(share, interval, before) : null;
  return make("td", {}, counted(share, examples), drawing, make("span", { class: "quiet" }, range(interval)));
}

function showEffects() {
  const effects = content.interventions ?? [];
  at("effects").hidden = !effects.length;
  const names = ["Intervention", "Thoughts", "Later thoughts", "Right without", "Right with, 95 % interval",
    "Answer changed, 95 % interval", "p", "Log-probability", "KL"];
  const rows = effects.map((effect) =>
    make("tr", {},
      make("th", { scope: "row" }, effect.name),
      make("td", {}, `${effect.thoughts ?? "–"}`),
      make("td", {}, effect.later ?? "–"),
      make("td", {}, counted(effect.accuracy_before, effect.examples)),
      shareCell(effect.accuracy, effect.examples, effect.interval_95, effect.accuracy_before),
      shareCell(effect.flips, effect.examples, effect.flips_interval_95),
      make("td", {}, effect.p_value < 0.001 && isGiven(effect.p_value) ? "< 0.001" : number(effect.p_value)),
      make("td", {}, number(effect.log_probability_change)),
      make("td", {}, number(effect.kl))));
  const head = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
  at("effects-table").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

function showFigures() {
  const figures = content.figures ?? [];
  at("figures").hidden = !figures.length;
  at("figures-list").replaceChildren(...figures.map(({ file, caption }) => {
    // The figure's own caption says what is to be seen; a path may hold signs that mean something in an address.
    const source = file.split("/").map(encodeURIComponent).join("/");
    return make("figure", {}, make("img", { src: source, alt: caption, loading: "lazy" }), make("figcaption", {}, caption));
  }));
}

function showView(name) {
  for (const view of ["questions", "summary"]) {
    at(view).hidden = view !== name;
    at(`show-${view}`).setAttribute("aria-pressed", view === name);
  }
}

