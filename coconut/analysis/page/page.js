// What is chosen, the list of questions with its filters, and what a person does.

const content = JSON.parse(document.getElementById("content").textContent);
const questions = content.questions;
const chosen = { question: -1, after: Infinity, intervention: null }; // `after` is cut to what a question has.
let listed = []; // The questions that fit the filters, by index.

// --- The list and its filters ---

function interventionNames() {
  return [...new Set(questions.flatMap((question) => Object.keys(question.interventions ?? {})))];
}

function fillList() {
  const names = interventionNames();
  at("filter-flip-label").hidden = !names.length;
  at("filter-flip").append(...names.map((name) => make("option", { value: `by ${name}` }, name)));
  at("list").replaceChildren(...questions.map((question, index) =>
    make("li", { id: `question-${index}`, role: "option", "aria-selected": "false", "data-index": index },
      make("span", { class: question.right ? "right" : "wrong", "aria-hidden": "true" }, question.right ? "✓" : "✗"),
      make("span", { class: "number" }, `${index + 1}`),
      make("span", { class: "unseen" }, question.right ? "right: " : "wrong: "),
      make("span", { class: "start" }, startOf(question)))));
}

/** What tells a question from the others: questions about graphs all begin with the graph. */
function startOf({ question, graph }) {
  if (!graph) return question.slice(0, 200);
  const options = [graph.target, graph.negative].map((node) => graph.symbols[node]).sort();
  return `${graph.symbols[graph.root]}: ${options.join(" or ")}?`;
}

function fits(question, answer, flip, text) {
  if (answer !== "all" && question.right !== (answer === "right")) return false;
  const results = question.interventions ?? {};
  if (flip === "any" && !Object.values(results).some((result) => result.flipped)) return false;
  if (flip.startsWith("by ") && !results[flip.slice(3)]?.flipped) return false;
  return !text || [question.question, question.expected, question.answer].some((part) => part.toLowerCase().includes(text));
}

function applyFilters() {
  const [answer, flip, text] = ["filter-answer", "filter-flip", "filter-text"].map((id) => at(id).value);
  const items = at("list").children;
  listed = [];
  questions.forEach((question, index) => {
    const fit = fits(question, answer, flip, text.toLowerCase());
    items[index].hidden = !fit;
    if (fit) listed.push(index);
  });
  at("count").textContent = listed.length
    ? `${listed.length} of ${questions.length} questions`
    : `None of ${questions.length} questions fits`;
  at("detail").hidden = !listed.length;
  if (listed.length && !listed.includes(chosen.question)) chooseQuestion(listed[0]);
  else showPlace();
}

function chooseQuestion(index) {
  const items = at("list").children;
  items[chosen.question]?.setAttribute("aria-selected", "false");
  chosen.question = index;
  items[index].setAttribute("aria-selected", "true");
  at("list").setAttribute("aria-activedescendant", items[index].id);
  // Only the list moves, not the page.
  const list = at("list");
  const [above, beneath] = [items[index].offsetTop, items[index].offsetTop + items[index].offsetHeight];
  if (above < list.scrollTop) list.scrollTop = above;
  if (beneath > list.scrollTop + list.clientHeight) list.scrollTop = beneath - list.clientHeight;
  showQuestion();
}

function moveQuestion(by) {
  const place = listed.indexOf(chosen.question) + by;
  if (place >= 0 && place < listed.length) chooseQuestion(listed[place]);
}

// --- What a person does ---

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || at("questions").hidden || !listed.length) return;
  const { tagName, type } = event.target;
  if (tagName === "SELECT" || (tagName === "INPUT" && type !== "range")) return; // These have their own use for arrows.
  const moves = {
    ArrowUp: () => moveQuestion(-1),
    ArrowDown: () => moveQuestion(1),
    ArrowLeft: () => moveThought(-1),
    ArrowRight: () => moveThought(1),
  };
  if (!moves[event.key]) return;
  event.preventDefault();
  moves[event.key]();
}

function listen() {
  document.addEventListener("keydown", onKey);
  at("show-questions").addEventListener("click", () => showView("questions"));
  at("show-summary").addEventListener("click", () => showView("summary"));
  for (const id of ["filter-answer", "filter-flip", "filter-text"]) at(id).addEventListener("input", applyFilters);
  at("list").addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (item) chooseQuestion(Number(item.dataset.index));
  });
  at("previous").addEventListener("click", () => moveQuestion(-1));
  at("next").addEventListener("click", () => moveQuestion(1));
  at("slider").addEventListener("input", () => chooseAfter(Number(at("slider").value)));
  at("after-table").addEventListener("click", (event) => {
    const row = event.target.closest("tbody tr");
    if (row) chooseAfter(row.rowIndex - 1);
  });
  at("layer").addEventListener("input", showAttention);
  at("interventions").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    chosen.intervention = button.dataset.name === chosen.intervention ? null : button.dataset.name;
    showIntervened();
  });
}

showHeader();
showEffects();
showFigures();
at("show-summary").hidden = !(content.interventions?.length || content.figures?.length);
at("legend").replaceChildren(...legendItems());
fillList();
listen();
applyFilters();
