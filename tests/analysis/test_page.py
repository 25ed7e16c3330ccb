"""The page of one run: what it embeds survives, and it works in a real browser, where the machine has one."""

import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coconut.analysis.page import write_page
from coconut.errors import CoconutError
from tests.analysis.made_up_pages import INTERVENTIONS, graph_content, text_content

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is neither Chromium nor Chrome on the PATH")
HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \u2028 🥥 \ud800 \"'\\ ${style} &amp;"


class Elements(HTMLParser):
    """The elements of a page: their tags with attributes, and the text of each that has an id."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._open: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs).get("id")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open] = self.texts.get(self._open, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._open = None


def embedded(path: Path) -> Any:
    return json.loads(Elements(path.read_text("utf-8")).texts["content"])


def with_question(**fields: Any) -> dict[str, Any]:
    """Text content of one question, some of whose fields are others."""
    content = text_content(1)
    content["questions"][0] |= fields
    return content


# --- What is written ----------------------------------------------------------------------------------------------


def test_hostile_strings_stay_strings(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    content = with_question(question=HOSTILE, tokens=None, attention=None, interventions={HOSTILE: {"text": HOSTILE}})
    write_page(content | {"title": HOSTILE.replace("\ud800", "")}, path)
    page = embedded(path)
    assert page["title"] == HOSTILE.replace("\ud800", "")
    assert page["questions"][0]["question"] == HOSTILE
    assert page["questions"][0]["interventions"] == {HOSTILE: {"text": HOSTILE}}
    tags = [tag for tag, _ in Elements(path.read_text("utf-8")).tags]
    assert tags.count("script") == 2 and "img" not in tags
    assert "\u2028" not in Elements(path.read_text("utf-8")).texts["content"]


def test_nothing_is_asked_of_a_network(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    write_page(text_content(2), path)
    text = path.read_text("utf-8")
    assert "://" not in text and "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    tags = Elements(text).tags
    assert [values for _, values in tags if "src" in values] == []
    assert [values["href"] for _, values in tags if "href" in values] == ["data:,"]
    policy = next(values["content"] for _, values in tags if values.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';")


def test_numbers_are_json(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    content = text_content(1)
    content["interventions"][0] |= {"kl": math.nan, "p_value": np.float32(1 / 3), "log_probability_change": -math.inf}
    content["questions"][0]["right"] = np.bool_(True)
    content["run"]["step"] = np.int64(1234567)
    content["questions"][0]["attention"] = {"layers": np.full((1, 6, 42), 1 / 42)}
    write_page(content, path)
    page = embedded(path)
    assert (
        page["interventions"][0] | {"kl": None, "p_value": 0.33333, "log_probability_change": None}
        == (page["interventions"][0])
    )
    assert page["questions"][0]["right"] is True and page["run"]["step"] == 1234567
    assert page["questions"][0]["attention"] == {"layers": [[[0.02381] * 42] * 6]}


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    write_page(text_content(1), path)
    old = path.read_bytes()
    with pytest.raises(CoconutError):
        write_page(with_question(answer=None), path)
    with pytest.raises(CoconutError, match="No such file"):
        write_page(text_content(1), tmp_path / "missing" / "index.html")
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]


GRAPH = graph_content(1)["questions"][0]
HELD = GRAPH["after"][1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"questions": []}, "content.title is missing"),
        (with_question(expected=None), r"questions\[0\].expected is missing"),
        (with_question(tokens=["one"]), r"questions\[0\].attention.layers\[0\]\[0\] has 42 values: must be 1"),
        (with_question(tokens=None), r"must be 0"),
        (with_question(after=[HELD]), r"questions\[0\].after\[0\].belief has 12 values: must be 0"),
        (
            with_question(after=[HELD | {"belief": [0.5, 0.5]}], graph=GRAPH["graph"]),
            r"after\[0\].belief has 2 values: must be 12",
        ),
        (with_question(graph=GRAPH["graph"] | {"positions": [[0, 0]]}), "graph.positions has 1 values: must be 12"),
        *(
            (text_content(1) | {"figures": [{"file": file, "caption": ""}]}, f"figures.file = '{file}'")
            for file in ("/a.png", "../a.png", "https://a.org/a.png", "//a.org/a.png")
        ),
    ],
)
def test_what_the_page_could_not_show_is_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CoconutError, match=message):
        write_page(content, tmp_path / "index.html")
    assert list(tmp_path.iterdir()) == []


# --- In a browser -------------------------------------------------------------------------------------------------

WATCH = """<script>
const troubles = [];
for (const kind of ["error", "securitypolicyviolation", "unhandledrejection"]) {
  addEventListener(kind, (event) => troubles.push(`${kind} ${event.message ?? event.blockedURI ?? ""}`), true);
}
</script>"""
ACT = """<pre id="findings"></pre><script>
const element = (id) => document.getElementById(id);
const text = (id) => element(id).textContent.trim();
const shown = (id) => element(id).checkVisibility();
const press = (key, target = document.body) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const pick = (id, value) => {
  element(id).value = value;
  element(id).dispatchEvent(new Event("input", { bubbles: true }));
};
const items = () => [...document.querySelectorAll("#list li")].filter((item) => item.checkVisibility());
const findings = {};
SCRIPT
addEventListener("load", () => {
  findings.asked = performance.getEntriesByType("resource").map((entry) => entry.name);
  findings.troubles = troubles;
  element("findings").textContent = JSON.stringify(findings);
});
</script>"""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Opens a page of some content, runs a script in it, and returns the ``findings`` that the script has noted."""

    def opened(content: dict[str, Any], script: str, *, width: int = 1280) -> dict[str, Any]:
        assert BROWSER is not None
        path = tmp_path / "index.html"
        write_page(content, path)
        page = path.read_text("utf-8")
        # At the last </body>: a question may hold another one.
        start, _, end = page.replace("<head>", f"<head>{WATCH}", 1).rpartition("</body>")
        path.write_text(f"{start}{ACT.replace('SCRIPT', script)}</body>{end}", "utf-8")
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--window-size={width},900",
        ]
        command = [BROWSER, *options, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        # Not by `Elements`, which is slow with a large page.
        _, _, noted = done.stdout.rpartition('<pre id="findings">')
        findings = json.loads(html.unescape(noted.partition("</pre>")[0]))
        assert findings.pop("troubles") == [] and findings.pop("asked") == []
        return findings

    return opened


ON_GRAPHS = """
const first = element("list").firstChild;
findings.items = items().length;
findings.measures = text("measures");
items()[3].click();
findings.clicked = text("question-title");
press("ArrowDown");
findings.down = text("question-title");
press("ArrowUp"); press("ArrowUp");
findings.up = [text("question-title"), document.querySelectorAll("[aria-selected=true]").length];

pick("slider", "1");
findings.slid = [text("graph-title"), element("slider").getAttribute("aria-valuetext")];
findings.shares = [...document.querySelectorAll("#graph g > :nth-child(2)")]
  .map((shape) => parseFloat(shape.style.getPropertyValue("--share")));
findings.attention = text("attention-title");
press("ArrowLeft"); press("ArrowLeft");
findings.left = [text("slider-label"), text("attention-share")];
press("ArrowRight", element("slider"));
findings.right = text("slider-label");
press("ArrowRight", element("filter-text")); // Arrows within a text move its cursor.
findings.typing = text("slider-label");
document.querySelectorAll("#after-table tbody tr")[2].click();
findings.row = text("slider-label");
pick("layer", "1");
findings.layer = text("attention-highest");

pick("filter-answer", "wrong");
findings.wrong = [text("count"), items().map((item) => Number(item.dataset.index)), text("question-title")];
pick("filter-answer", "all"); pick("filter-flip", "by noise (2)");
findings.changed = items().map((item) => Number(item.dataset.index));
pick("filter-flip", "any");
findings.any = items().length;
items()[0].click();
const button = element("interventions").querySelector("button:has(.changed)");
findings.before = text("intervened");
button.click();
findings.pressed = [button.dataset.name, button.getAttribute("aria-pressed"), text("intervened")];
pick("filter-text", "nothing holds this");
findings.none = [text("count"), shown("detail")];
pick("filter-text", ""); pick("filter-flip", "");

element("show-summary").click();
press("ArrowDown");
findings.summary = [shown("questions"), shown("effects"), shown("figures")];
const rows = [...element("effects-table").tBodies[0].rows];
findings.effects = rows.map((row) => [...row.cells].map((cell) => cell.innerText));
findings.kept = element("list").firstChild === first;
"""


def best(shares: np.ndarray, names: list[str], count: int) -> str:
    return ", ".join(
        f"{names[index]} ({shares[index]:.1%})".replace("%", " %") for index in np.argsort(-shares)[:count]
    )


@needs_browser
@pytest.mark.slow
def test_a_person_looks_at_graphs(browse: Callable[..., dict[str, Any]]) -> None:
    content = graph_content(500)
    found = browse(content, ON_GRAPHS)
    questions = content["questions"]
    right = sum(question["right"] for question in questions)
    assert found["items"] == 500
    assert found["measures"].startswith(f"{right} of 500 questions right: {right / 5:.1f} % (95 % interval ")
    assert [found["clicked"], found["down"]] == ["Question 4 of 500", "Question 5 of 500"]
    assert found["up"] == ["Question 3 of 500", 1]

    third = questions[2]
    held = third["after"][1]
    assert found["slid"] == [
        "Which of 12 nodes it would name next, after 1 thought",
        f"after 1 thought: {held['text']}, {'right' if held['right'] else 'wrong'}",
    ]
    np.testing.assert_allclose(found["shares"], 100 * held["belief"], atol=0.06)
    assert found["attention"] == "Attention of thought 1 to the question"
    assert found["left"] == ["After 0 of 3 thoughts", "No thought is chosen yet: move the slider to 1 or further."]
    assert [found["right"], found["typing"], found["row"]] == [
        "After 1 of 3 thoughts",
        "After 1 of 3 thoughts",
        "After 2 of 3 thoughts",
    ]
    assert found["layer"] == f"Highest: {best(third['attention']['layers'][1, 1], third['tokens'], 5)}"

    wrong = [index for index, question in enumerate(questions) if not question["right"]]
    assert found["wrong"] == [f"{len(wrong)} of 500 questions", wrong, f"Question {wrong[0] + 1} of 500"]
    flips = [[question["interventions"][name]["flipped"] for name in INTERVENTIONS] for question in questions]
    assert found["changed"] == [index for index, flipped in enumerate(flips) if flipped[3]]
    assert found["any"] == sum(any(flipped) for flipped in flips)
    pressed = next(question for question, flipped in zip(questions, flips, strict=True) if any(flipped))
    name = next(name for name in INTERVENTIONS if pressed["interventions"][name]["flipped"])
    assert found["before"] == ""
    assert found["pressed"][:2] == [name, "true"]
    result = f"{name}{pressed['interventions'][name]['text']} ✗ wrong"
    assert result in found["pressed"][2] and "another answer" in found["pressed"][2]
    assert found["none"] == ["None of 500 questions fits", False]

    assert found["summary"] == [False, True, False]
    noise = content["interventions"][0]
    assert len(found["effects"]) == 4 and found["effects"][0][:3] == ["noise", "all", "kept"]
    low, high = noise["flips_interval_95"]
    changed = f"{sum(flipped[0] for flipped in flips)} of 500 ({noise['flips']:.1%})"
    assert found["effects"][0][5].split("\n") == [
        part.replace("%", " %") for part in (changed, f"{low:.1%} to {high:.1%}")
    ]
    assert found["kept"]  # 500 items are made once.


ON_TEXT = """
findings.document = document.title;
findings.question = element("question-text").textContent;
findings.lens = element("lens-table").rows[1].cells[6].innerText;
findings.tokens = element("attention-tokens").textContent;
findings.strange = document.querySelectorAll("img, main script").length;
const panels = ["graph-panel", "after-panel", "lens-panel", "attention-panel", "interventions-panel"];
findings.panels = panels.map(shown);
press("ArrowDown");
findings.bare = ["slide", ...panels].map(shown);
findings.elsewhere = ["made", "show-summary", "filter-flip"].map(shown);
findings.sideways = document.documentElement.scrollWidth - innerWidth;
findings.beneath = element("detail").getBoundingClientRect().top >= element("choose").getBoundingClientRect().bottom;
"""


@needs_browser
def test_what_is_missing_leaves_no_hole_and_hostile_text_is_shown_on_a_narrow_screen(
    browse: Callable[..., dict[str, Any]],
) -> None:
    hostile = HOSTILE.replace("\ud800", "")
    content = text_content(1)
    full = content["questions"][0] | {"question": hostile, "interventions": None}
    full["tokens"] = [hostile, *full["tokens"][1:]]
    full["lens"][5][0] = [hostile, 0.5]
    bare = {"question": "2 + 2?", "expected": "4", "answer": "5", "right": False, "after": []}
    found = browse({"title": hostile, "questions": [full, bare]}, ON_TEXT, width=390)
    assert found["document"] == " ".join(re.sub(r"[ \t\n]+", " ", hostile).split(" "))
    assert found["question"] == hostile
    assert found["lens"] == f"{hostile.replace(' ', '·')} 50.0 %"
    assert found["tokens"] == "".join(full["tokens"])
    assert found["strange"] == 0
    assert found["panels"] == [False, True, True, True, False]
    assert found["bare"] == [False] * 6
    assert found["elsewhere"] == [False] * 3
    assert found["sideways"] <= 0 and found["beneath"]
