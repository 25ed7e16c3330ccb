// One question: what the model holds after each thought, what its thoughts would say and look at, and interventions.

const current = () => questions[chosen.question];
const chosenAfter = () => Math.max(0, Math.min(chosen.after, current().after.length - 1));
/** How many thoughts are chosen: 0 before the first. */
const chosenThoughts = () => current().after[chosenAfter()]?.thoughts ?? 0;

function moveThought(by) {
  chooseAfter(Math.max(0, Math.min(chosenAfter() + by, current().after.length - 1)));
}

function chooseAfter(after) {
  chosen.after = after;
  showThought();
}

function showPlace() {
  const place = listed.indexOf(chosen.question);
  at("previous").disabled = place <= 0;
  at("next").disabled = place < 0 || place === listed.length - 1;
}

function showQuestion() {
  const question = current();
  at("question-title").textContent = `Question ${chosen.question + 1} of ${questions.length}`;
  at("question-text").textContent = question.question;
  const pairs = [["Expected", question.expected], ["Answer", question.answer, " ", mark(question.right)]];
  if (isGiven(question.thoughts)) pairs.push(["Thoughts", `${question.thoughts}`]);
  facts(at("question-facts"), pairs);
  at("slider").max = Math.max(0, question.after.length - 1);
  at("slide").hidden = question.after.length < 2;
  at("after-panel").hidden = !question.after.length;
  at("graph-panel").hidden = !question.graph;
  at("lens-panel").hidden = !question.lens;
  at("attention-panel").hidden = !(question.attention && question.tokens);
  showPlace();
  showInterventions();
  fillLayers();
  showThought();
}

function thoughtsInWords(count) {
  return count === 1 ? "1 thought" : `${count} thoughts`;
}

function showThought() {
  const question = current();
  const held = question.after[chosenAfter()];
  const last = question.after.at(-1)?.thoughts ?? 0;
  at("slider").value = chosenAfter();
  at("slider-label").textContent = `After ${chosenThoughts()} of ${thoughtsInWords(last)}`;
  const verdict = isGiven(held?.right) ? (held.right ? ", right" : ", wrong") : "";
  at("slider").setAttribute("aria-valuetext", `after ${thoughtsInWords(chosenThoughts())}: ${held?.text ?? ""}${verdict}`);
  showAfter();
  if (question.graph) showGraph(held);
  if (question.lens) showLens();
  if (question.attention && question.tokens) showAttention();
}

function showAfter() {
  const { after } = current();
  const hasClass = after.some((held) => held.class);
  const names = ["Thoughts", "Answer", "", ...(hasClass ? ["Kind"] : [])];
  const rows = after.map((held, index) => {
    const button = make("button", { type: "button", "aria-pressed": index === chosenAfter(), "data-after": index,
      "aria-label": `After ${thoughtsInWords(held.thoughts)}` }, `${held.thoughts}`);
    return make("tr", { class: index === chosenAfter() ? "chosen" : null },
      make("td", {}, button), make("td", { class: "text" }, held.text ?? "–"), make("td", {}, mark(held.right)),
      hasClass ? make("td", {}, held.class ?? "–") : null);
  });
  const focused = at("after-table").contains(document.activeElement);
  const head = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
  at("after-table").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
  if (focused) at("after-table").querySelector("[aria-pressed=true]").focus();
}

/** The largest shares in words: "12 (63.2 %), 4 (20.1 %)". */
function highest(names, shares, count) {
  const order = shares.map((_, index) => index).sort((one, other) => shares[other] - shares[one]);
  return order.slice(0, count).map((index) => `${visible(names[index].trim() || names[index])} (${percent(shares[index])})`).join(", ");
}

function showGraph(held) {
  const { graph } = current();
  const belief = held?.belief;
  const when = `after ${thoughtsInWords(chosenThoughts())}`;
  at("graph-title").textContent = belief ? `Which of ${graph.symbols.length} nodes it would name next, ${when}` : "Graph";
  const most = belief ? `Highest: ${highest(graph.symbols, belief, 3)}` : "";
  at("graph-highest").textContent = most;
  const [root, target, negative] = [graph.root, graph.target, graph.negative].map((node) => graph.symbols[node]);
  const label = `Graph of ${graph.symbols.length} nodes and ${graph.edges.length} edges. Root ${root}, right option ` +
    `${target}, wrong option ${negative}. ${most}`;
  const width = drawGraph(at("graph"), graph, belief, label);
  at("graph-panel").parentElement.classList.toggle("wide", width > 480); // Nothing stands beside a wide one.
}

function showLens() {
  const { lens } = current();
  const ranks = Math.max(0, ...lens.map((tokens) => tokens.length));
  const here = (index) => (index + 1 === chosenThoughts() ? "chosen" : null);
  const head = lens.map((_, index) => make("th", { scope: "col", class: here(index) }, `Thought ${index + 1}`));
  const rows = Array.from({ length: ranks }, (_, rank) =>
    make("tr", {}, make("th", { scope: "row" }, `${rank + 1}`), ...lens.map((tokens, index) => {
      if (!tokens[rank]) return make("td", { class: here(index) });
      const [token, share] = tokens[rank];
      const cell = make("td", { class: here(index) }, make("span", { class: "token" }, visible(token)), " ",
        make("span", { class: "quiet" }, percent(share)));
      cell.style.setProperty("--share", percent(share).replace(" ", ""));
      return cell;
    })));
  const table = at("lens-table");
  table.replaceChildren(make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Rank"), ...head)), make("tbody", {}, ...rows));
  const all = lens.flat().map(([token]) => token).join("");
  at("lens-signs").textContent = (all.includes(" ") ? " · is a space." : "") + (all.includes("\n") ? " ⏎ is a line's end." : "");
  const column = table.querySelector("th.chosen");
  if (column) table.parentElement.scrollLeft = column.offsetLeft - table.parentElement.clientWidth / 2;
}

// --- Attention ---

function fillLayers() {
  const { attention } = current();
  if (!attention) return;
  const before = at("layer").value;
  const options = attention.layers.map((_, index) => make("option", { value: `${index}` }, `${index + 1}`));
  at("layer").replaceChildren(make("option", { value: "all" }, "all (mean)"), ...options);
  if (before && Number(before) < attention.layers.length) at("layer").value = before; // The choice stays between questions.
}

/** The weights of one thought on the question's tokens, in the chosen layer; null where there are none. */
function attentionOf(thought) {
  const { layers } = current().attention;
  const used = at("layer").value === "all" ? layers : [layers[Number(at("layer").value)]];
  const weights = used.map((layer) => layer[thought - 1]);
  if (!weights.length || !weights.every(Boolean)) return null;
  return weights[0].map((_, token) => weights.reduce((sum, row) => sum + row[token], 0) / weights.length);
}

function showAttention() {
  const { tokens } = current();
  const thought = chosenThoughts();
  const weights = thought ? attentionOf(thought) : null;
  at("attention-title").textContent = weights ? `Attention of thought ${thought} to the question` : "Attention to the question";
  at("attention-tokens").classList.toggle("apart", !tokens.some((token) => /\s/.test(token)));
  const most = weights ? Math.max(...weights) : 0;
  at("attention-tokens").replaceChildren(...tokens.flatMap((token, index) => {
    const word = token.trim() ? token.trimStart() : visible(token);
    const made = make("span", { class: "token", title: weights ? percent(weights[index]) : null }, word);
    made.style.setProperty("--share", weights && most ? `${((100 * weights[index]) / most).toFixed(1)}%` : "0%");
    return [token.slice(0, token.length - token.trimStart().length), made]; // Space in front of a word has no colour.
  }));
  const total = weights ? weights.reduce((sum, weight) => sum + weight, 0) : 0;
  at("attention-share").textContent = weights
    ? `${percent(total)} of its attention goes to the question's ${tokens.length} tokens, mean over heads. The strongest colour is ${percent(most)}.`
    : thought ? "Not measured for this thought." : "No thought is chosen yet: move the slider to 1 or further.";
  at("attention-highest").textContent = weights ? `Highest: ${highest(tokens, weights, 5)}` : "";
}

// --- Interventions ---

function showInterventions() {
  const results = current().interventions ?? {};
  const names = Object.keys(results);
  at("interventions-panel").hidden = !names.length;
  if (!names.includes(chosen.intervention)) chosen.intervention = null;
  const button = (name, words) =>
    make("button", { type: "button", "aria-pressed": name === chosen.intervention, "data-name": name }, ...words);
  const flag = () => make("span", { class: "changed" }, " ⇄", make("span", { class: "unseen" }, " changes the answer"));
  const buttons = names.map((name) => button(name, [name, results[name].flipped ? flag() : null]));
  at("interventions").replaceChildren(...buttons);
  showIntervened();
}

function showIntervened() {
  const question = current();
  for (const button of at("interventions").children) {
    button.setAttribute("aria-pressed", button.dataset.name === chosen.intervention);
  }
  const result = question.interventions?.[chosen.intervention];
  facts(at("intervened"), result ? [
    ["Unchanged thoughts", question.answer, " ", mark(question.right)],
    [chosen.intervention, result.text, " ", mark(result.right)],
    ["Effect", result.flipped ? "⇄ another answer" : "the same answer"],
  ] : []);
}

