"""Draws the pictures of the concepts page: `python docs/draw_figures.py` writes docs/figures/*.svg."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "figures"

FILLS = {
    "given": "#dbe4ee",
    "marker": "#c3c9d1",
    "thought": "#f6c667",
    "written": "#bfe0c5",
    "pad": "#ffffff",
    "plain": "#ffffff",
    "gradient": "#f2b8b5",
}
INK, FAINT = "#22303c", "#5f6b76"


class Drawing:
    """An SVG on a light ground of its own, so that it can be read in a dark theme, too.

    Args:
      width: in pixels.
      height: likewise.
      title: what is seen, for those who cannot.
    """

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="system-ui, sans-serif" role="img">',
            f"<title>{html.escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#fafbfc"/>',
        ]

    def box(self, x: float, y: float, width: float, text: str, kind: str, *, height: float = 30) -> None:
        """A box with a word in it. Thoughts are round."""
        radius = height / 2 if kind == "thought" else 4
        dashes = ' stroke-dasharray="3 3"' if kind == "pad" else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{FILLS[kind]}" '
            f'stroke="{FAINT if kind == "pad" else INK}" stroke-width="1"{dashes}/>'
        )
        self.text(x + width / 2, y + height / 2 + 4.5, text, anchor="middle", faint=kind == "pad")

    def text(
        self, x: float, y: float, text: str, *, size: int = 13, anchor: str = "start", faint: bool = False
    ) -> None:
        """A line of text."""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{FAINT if faint else INK}">'
            f"{html.escape(text)}</text>"
        )

    def arrow(self, path: str, *, dashed: bool = False) -> None:
        """An arrow along an SVG path."""
        dashes = ' stroke-dasharray="5 3"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.4"{dashes} marker-end="url(#tip)"/>'
        )

    def brace(self, x: float, y: float, width: float, text: str) -> None:
        """A line below some boxes, and what they are."""
        self.parts.append(f'<path d="M{x} {y}v5h{width}v-5" fill="none" stroke="{FAINT}"/>')
        self.text(x + width / 2, y + 20, text, anchor="middle")

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])


def row(drawing: Drawing, x: float, y: float, cells: Sequence[tuple[str, str, float]], gap: float = 4) -> list[float]:
    """Boxes beside each other: (text, kind, width) each. Returns where each begins, and where the last one ends."""
    starts = []
    for text, kind, width in cells:
        starts.append(x)
        drawing.box(x, y, width, text, kind)
        x += width + gap
    return [*starts, x - gap]


def spans() -> Drawing:
    """One question as spans, and where each thought comes from."""
    drawing = Drawing(760, 250, "A row of columns: a question, three thoughts fed back, and the text behind them")
    cells = [("is", "given", 40), ("6", "given", 36), ("below", "given", 52), ("0?", "given", 36)]
    cells += [("<start>", "marker", 62), ("thought 1", "thought", 84), ("thought 2", "thought", 84)]
    cells += [("thought 3", "thought", 84), ("<end>", "marker", 56), ("###", "written", 44), ("6", "written", 36)]
    cells += [("<eos>", "written", 52)]
    top, bottom = 46, 136
    starts = row(drawing, 18, bottom, cells)
    drawing.box(18, top, starts[-1] - 18, "the decoder, and its state after the last norm at each column", "plain")
    for index, (_, kind, width) in enumerate(cells):
        middle = starts[index] + width / 2
        drawing.arrow(f"M{middle} {bottom - 2}V{top + 33}")
        if kind == "thought":
            before = starts[index - 1] + cells[index - 1][2] / 2
            drawing.arrow(
                f"M{before + 6} {top + 31}C{before + 8} {top + 62} {middle - 26} {top + 58} {middle - 12} {bottom - 2}",
                dashed=True,
            )
    drawing.text(18, 26, "dashed: the state of the column before becomes the input; no word is written in between")
    for first, last, name in ((0, 4, "Language(5)"), (5, 7, "Latent(3)"), (8, 11, "Language(4, scored=3)")):
        drawing.brace(starts[first], 174, starts[last] + cells[last][2] - starts[first], name)
    drawing.text(18, 232, "green: what the loss is of. The end marker is given, and predicts the first word behind it.")
    return drawing


def alignment() -> Drawing:
    """Rows of a batch share columns."""
    drawing = Drawing(700, 200, "Three rows of one batch, padded so that their thoughts stand below each other")
    question = [("", "given", 40)] * 4
    rows = [
        [("pad", "pad", 40)] * 2 + question[:2],
        question,
        [("pad", "pad", 40), *question[:3]],
    ]
    thoughts = [3, 3, 2]
    answers = [2, 3, 3]
    for index, (left, count, answer) in enumerate(zip(rows, thoughts, answers, strict=True)):
        cells = [*left, ("<start>", "marker", 62)]
        cells += [("thought", "thought", 72)] * count + [("pad", "pad", 72)] * (3 - count)
        cells += [("<end>", "marker", 56)]
        cells += [("", "written", 40)] * answer + [("pad", "pad", 40)] * (3 - answer)
        row(drawing, 18, 40 + 38 * index, cells)
    drawing.text(18, 26, "Rows of one batch: thoughts stand in the same columns, so that all rows think at once.")
    drawing.text(18, 178, "Nobody attends to padding, and positions do not count it: a row gives what it gives alone.")
    return drawing


def curriculum() -> Drawing:
    """The stages of the curriculum."""
    drawing = Drawing(760, 290, "The stages of the curriculum: thoughts take the place of steps, one stage at a time")
    steps = [("step 1", "written", 70), ("step 2", "written", 70), ("step 3", "written", 70)]
    question, answer = ("question", "given", 84), ("answer", "written", 70)
    begin, end = ("<s>", "marker", 36), ("<e>", "marker", 36)
    for stage in range(4):
        y = 44 + 42 * stage
        drawing.text(18, y + 20, f"stage {stage}")
        thoughts = [("thought", "thought", 70)] * stage
        row(drawing, 84, y, [question, begin, *thoughts, end, *steps[stage:], answer])
    y = 44 + 42 * 4
    drawing.text(18, y + 20, "final")
    row(drawing, 84, y, [question, begin, *[("thought", "thought", 70)] * 3, end, answer])
    drawing.text(18, 26, "c_thought = 1, max_latent_stage = 3: each stage turns one more step into thoughts.")
    drawing.text(
        18,
        272,
        "Questions with more than three steps keep the others until the final stage, which leaves out all steps.",
    )
    return drawing


def gradient() -> Drawing:
    """How the exact gradient is made."""
    drawing = Drawing(760, 342, "Thoughts are made one after the other; the gradient of each weight is formed once")

    def part(y: float, title: str, note: str, kinds: Sequence[str], arrows: str, texts: Sequence[str]) -> None:
        drawing.text(18, y, title)
        x = 18.0
        for index, (kind, text) in enumerate(zip(kinds, texts, strict=True)):
            width = 120 if text in ("question", "text behind") else 84
            drawing.box(x, y + 12, width, text, kind)
            if index and arrows == "forward":
                drawing.arrow(f"M{x - 22} {y + 27}h20")
            if index and arrows == "backward":
                drawing.arrow(f"M{x - 2} {y + 27}h-20")
            x += width + 24
        drawing.text(18, y + 62, note, faint=True)

    names = ("question", "thought 1", "thought 2", "thought 3", "text behind")
    kinds = ("given", "thought", "thought", "thought", "written")
    part(
        26,
        "1. Forward: one thought after the other.",
        "The last thought runs together with the text behind it: K thoughts wait for K - 1 passes.",
        kinds,
        "forward",
        names,
    )
    part(
        118,
        "2. Backward, from thought to thought, activations alone: what reaches each thought, G = g + JᵀG.",
        "J is strictly triangular (a thought depends on earlier ones alone), so one walk backward solves this exactly.",
        ("plain", "gradient", "gradient", "gradient", "written"),
        "backward",
        names,
    )
    part(
        210,
        "3. All thoughts at once, as one parallel pass: their inputs are known now.",
        "Its gradient at G is that of the whole, and forms the gradient of each weight once.",
        kinds,
        "",
        names,
    )
    drawing.text(
        18, 306, "Autodiff through the loop forms the gradient of each weight once a thought, and keeps all of them."
    )
    drawing.text(18, 324, "Both agree to rounding; tests compare them in float64.")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {
    "spans": spans,
    "alignment": alignment,
    "curriculum": curriculum,
    "gradient": gradient,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(str(figure()))
