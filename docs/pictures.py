"""Draws the pictures of the docs: ``python docs/pictures.py`` writes docs/img/*.svg.

Each is one function that returns the text of an SVG file: rectangles, lines, polygons and text on a light panel of its
own, so that it looks the same on white and on dark pages. Depth lists come from the operators themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import bert2bert.operators  # noqa: F401  (registers them)
from bert2bert.model.program import Step
from bert2bert.operators.registry import OPERATORS
from bert2bert.recipe import Draw, Full, SubModels

FOLDER = Path(__file__).resolve().parent / "img"
INK, QUIET, LINE, PANEL = "#1f2933", "#5b6770", "#9aa5ae", "#fbfaf7"
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#5b9bd5", "#f2a93b", "#58b368", "#d982b5", "#9fd3ee", "#e0694f"
HUES = (BLUE, ORANGE, GREEN, PINK)
PALE = "#e6e9ec"


class Sheet:
    """A picture under construction: shapes are added, `svg` is the file."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" role="img">',
            f"<title>{escape(title)}</title>",
        ]
        self.box(1, 1, width - 2, height - 2, PANEL, line="#d9d6cc", round=10)

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, *, line: str = INK, dash: bool = False, round: int = 3
    ) -> None:
        more = ' stroke-dasharray="4 3"' if dash else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round}" fill="{fill}" stroke="{line}"{more}/>'
        )

    def text(
        self, x: float, y: float, words: str, *, size: int = 14, at: str = "middle", ink: str = INK, bold: bool = False
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{at}" fill="{ink}"{weight}>'
            f"{escape(words)}</text>"
        )

    def line(self, x: float, y: float, x2: float, y2: float, *, ink: str = QUIET, width: float = 1.5) -> None:
        self.parts.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{x2:g}" y2="{y2:g}" stroke="{ink}" stroke-width="{width:g}"/>'
        )

    def arrow(self, x: float, y: float, x2: float, y2: float, *, ink: str = QUIET) -> None:
        """A line from (x, y) with its head at (x2, y2)."""
        length = ((x2 - x) ** 2 + (y2 - y) ** 2) ** 0.5
        dx, dy = (x2 - x) / length, (y2 - y) / length
        back, side = (x2 - 9 * dx, y2 - 9 * dy), (-4.5 * dy, 4.5 * dx)
        self.line(x, y, *back, ink=ink)
        corners = [(x2, y2), (back[0] + side[0], back[1] + side[1]), (back[0] - side[0], back[1] - side[1])]
        self.parts.append(f'<polygon points="{" ".join(f"{a:.4g},{b:.4g}" for a, b in corners)}" fill="{ink}"/>')

    @property
    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def matrix() -> str:
    """y = W x with three inputs and outputs, made five wide by copies: first the outputs, then the inputs."""
    sheet, cell = Sheet(900, 372, "A weight matrix grows: outputs are copied, inputs are copied and shared"), 38
    rows, names = (0, 1, 2, 0, 1), ("abc", "def", "ghi")
    top = 128

    def made(x: float, title: str, under: str, outs: tuple[int, ...], ins: tuple[int, ...]) -> None:
        sheet.text(x + cell * len(ins) / 2, 34, title, bold=True)
        for j, source in enumerate(ins):
            sheet.box(x + j * cell, top - 54, cell, 28, HUES[source])
            sheet.text(x + (j + 0.5) * cell, top - 35, f"x{source + 1}")
            for i, out in enumerate(outs):
                sheet.box(x + j * cell, top + i * cell, cell, cell, HUES[source])
                share = "/2" if len(ins) > 3 and ins.count(source) > 1 else ""
                sheet.text(x + (j + 0.5) * cell, top + (i + 0.62) * cell, names[out][source] + share)
        for i, out in enumerate(outs):
            new = i >= 3
            sheet.box(x + len(ins) * cell + 14, top + i * cell, 32, cell, "#ffffff" if not new else "#fff1d6", dash=new)
            sheet.text(x + len(ins) * cell + 30, top + (i + 0.62) * cell, f"y{out + 1}")
        sheet.text(x + cell * len(ins) / 2, 342, under, size=13, ink=QUIET)

    old = (0, 1, 2)
    made(40, "the source: y = W x", "", old, old)
    made(330, "outputs copied", "rows 4 and 5 repeat rows 1 and 2", rows, old)
    made(620, "inputs copied and shared", "x1 and x2 come twice: their weights are halved", rows, rows)
    for x in (222, 512):
        sheet.arrow(x, top + 57, x + 88, top + 57)
    sheet.text(266, top + 46, "write: E", size=13)
    sheet.text(556, top + 46, "read: L", size=13)
    sheet.text(97, 342, "a colour is an input", size=13, ink=QUIET)
    return sheet.svg


DEPTHS = (
    ("stack", 4, 8), ("interleave", 4, 8), ("insert_identity", 4, 8), ("top", 4, 6), ("middle", 4, 6),
    ("upscale", 4, 6), ("interpolate", 4, 6), ("random", 4, 6),
)  # fmt: skip


def depth() -> str:
    """For each depth operator: which source layer every target layer comes from."""
    cell, left, high = 62, 190, 46
    sheet = Sheet(
        left + 8 * cell + 40, 92 + high * (len(DEPTHS) + 1) + 44, "Which source layer a target layer comes from"
    )
    sheet.text(left, 34, "bottom layer", size=13, at="start", ink=QUIET)
    sheet.text(left + 8 * cell, 34, "top layer", size=13, at="end", ink=QUIET)
    sheet.arrow(left + 90, 30, left + 8 * cell - 68, 30)
    sheet.text(left - 16, 68, "source, 4 layers", at="end", bold=True)
    for i in range(4):
        sheet.box(left + i * cell, 48, cell - 6, 32, HUES[i])
        sheet.text(left + (i + 0.5) * cell - 3, 69, str(i))
    for row, (name, source, target) in enumerate(DEPTHS):
        y = 106 + row * high
        sheet.text(left - 16, y + 21, f"{name} → {target}", at="end")
        layers = OPERATORS["depth"][name].make(None, source, target)
        for i, layer in enumerate(layers):
            of = layer if isinstance(layer, int) else layer.source
            identity = not isinstance(layer, int) and layer.identity
            x = left + i * cell
            sheet.box(
                x, y, cell - 6, 32, "#ffffff" if of is None or identity else HUES[of], dash=of is None or identity
            )
            if identity:
                sheet.box(x + 5, y + 5, cell - 16, 6, HUES[of], line=HUES[of], round=2)
            words = "new" if of is None else f"{of} + 0" if identity else str(of)
            sheet.text(x + cell / 2 - 3, y + (27 if identity else 21), words, size=12 if identity or of is None else 14)
    y = 106 + len(DEPTHS) * high
    sheet.text(
        left,
        y + 14,
        "a colour and its number: the source layer;   new: drawn at random",
        size=13,
        at="start",
        ink=QUIET,
    )
    sheet.text(left, y + 34, "n + 0: a copy of layer n that adds nothing yet", size=13, at="start", ink=QUIET)
    return sheet.svg


def stages() -> str:
    """bert2BERT's two stages of training, step by step: which layers run, which learn."""
    sheet, cell, left, top = (
        Sheet(880, 452, "Two stages of training: which layers run and learn in each step"),
        40,
        130,
        84,
    )
    layers = 6
    parts = tuple(f"layer.{i}" for i in range(layers))
    first = [SubModels(2).step(Draw(step, step, 0, parts)) for step in range(7)]
    second = [Full().step(Draw(step, step, 0, parts)) for step in range(5)]
    rows = ["head", *[f"layer {i}" for i in reversed(range(layers))], "embeddings"]
    for i, name in enumerate(rows):
        sheet.text(left - 14, top + (i + 0.62) * cell, name, at="end", size=13)

    def column(x: float, program: Step) -> None:
        learn = {part.replace(".", " ") for part in program.learn}
        run = {"head", "embeddings", *(f"layer {i}" for i in program.run)}
        for i, name in enumerate(rows):
            fill = ORANGE if name in learn else SKY if name in run else PANEL
            y, line = top + i * cell + 2, INK if name in run else LINE
            sheet.box(x, y, cell - 6, cell - 4, fill, line=line, dash=name not in run)

    for step, program in enumerate(first):
        column(left + step * cell, program)
        sheet.text(left + (step + 0.43) * cell, top + 8 * cell + 20, f"d = {len(program.run)}", size=12, ink=QUIET)
    start = left + len(first) * cell + 50
    for step, program in enumerate(second):
        column(start + step * cell, program)
    sheet.text(left + 3.5 * cell, 34, "stage 1: sub-models", bold=True)
    sheet.text(left + 3.5 * cell, 58, "each step draws a depth d; its top 2 layers learn", size=13, ink=QUIET)
    sheet.text(start + 2.5 * cell, 34, "stage 2: full", bold=True)
    sheet.text(start + 2.5 * cell, 58, "everything learns", size=13, ink=QUIET)
    sheet.arrow(left, top + 8 * cell + 34, start + len(second) * cell, top + 8 * cell + 34)
    sheet.text(start + len(second) * cell + 8, top + 8 * cell + 38, "steps", at="start", size=13, ink=QUIET)
    x = start + len(second) * cell + 24
    for i, (fill, words) in enumerate(((ORANGE, "runs and learns"), (SKY, "runs"), (PANEL, "does not run"))):
        sheet.box(x, top + 20 + i * 40, 26, 26, fill, dash=fill == PANEL, line=LINE if fill == PANEL else INK)
        sheet.text(x + 36, top + 38 + i * 40, words, at="start", size=13)
    return sheet.svg


def shards() -> str:
    """Source shards, the rows in them, and a target shard made of the few rows that it needs."""
    sheet, wide, high, left, gap = Sheet(900, 420, "Source shards, rows, target shards"), 22, 36, 160, 18
    columns, old, new, rank = 5, 4, (0, 1, 2, 3, 0, 1), 1

    def flat(y: float, rows: tuple[int, ...], ranks: int, label: float) -> Callable[[int], float]:
        """A flattened tensor, coloured by row, cut into equal shards; where an element stands."""
        total = len(rows) * columns
        size = -(-total // ranks)

        def place(element: int) -> float:
            return left + element * wide + gap * (element // size)

        for element in range(total):
            sheet.box(place(element), y, wide, high, HUES[rows[element // columns]], line="#ffffff", round=0)
        for r in range(ranks):
            width = (min(size, total - r * size)) * wide
            sheet.box(place(r * size), y, width, high, "none", round=0)
            sheet.text(place(r * size) + width / 2, label, f"rank {r}", size=13, ink=QUIET)
        return place

    above, below = flat(66, tuple(range(old)), 3, 58), flat(326, new, 4, 382)
    size = -(-len(new) * columns // 4)
    mine = range(rank * size, (rank + 1) * size)  # the elements of the target's rank
    sheet.box(below(mine[0]) - 5, 321, size * wide + 10, high + 10, "none", line=RED, round=6)
    for y, words in ((90, "source shards"), (216, "rows read"), (350, "target shards")):
        sheet.text(24, y, words, at="start", bold=True)
    for row in range(old):
        x = left + row * 165
        parts = [e for e in mine if new[e // columns] == row]
        sheet.box(
            x, 194, columns * wide, high, HUES[row] if parts else PALE, line=INK if parts else LINE, dash=not parts
        )
        sheet.text(x + columns * wide / 2, 217, f"row {row}", ink=INK if parts else QUIET)
        if parts:
            middle = x + columns * wide / 2
            sheet.arrow(above(row * columns + columns // 2) + wide / 2, 108, middle, 188)
            sheet.arrow(middle, 236, (below(parts[0]) + below(parts[-1]) + wide) / 2, 318)
    sheet.text(450, 28, "Each target shard is made of the few source rows that it needs.", bold=True)
    return sheet.svg


ROOMS: dict[str, tuple[int, int, str]] = {
    "commands": (0, 1, "grow, plan, verify, …"),
    "measure": (1, 0, "drift, cost"),
    "train": (1, 2, "engine, loop, resume"),
    "report": (1, 3, "runs compared"),
    "growth": (2, 0, "a whole growth planned"),
    "operators": (3, 0, "one function each"),
    "tables": (4, 0, "architectures as data"),
    "algebra": (5, 0, "maps, plans, numbers"),
    "checkpoints": (3, 1, "zero, universal, hub"),
    "ranks": (4, 1, "MPI, torch, forked"),
    "files": (5, 1, "torch files, digests"),
    "recipe": (3, 2, "phases, settings"),
    "data": (3, 3, "text, bins, rows"),
    "model": (4, 2, "BERT, layer programs"),
    "terminal": (5, 3, "arguments, signals"),
    "errors": (6, 0, "what a user can cause; all rooms use it"),
}
ARROWS = (
    ("commands", "measure"), ("commands", "report"), ("measure", "growth"), ("growth", "operators"),
    ("growth", "checkpoints"), ("operators", "tables"), ("tables", "algebra"), ("checkpoints", "ranks"),
    ("ranks", "files"), ("train", "checkpoints"), ("train", "recipe"), ("train", "data"), ("recipe", "model"),
    ("data", "model"), ("data", "terminal"),
)  # fmt: skip


def house() -> str:
    """The package's rooms; an arrow leads from a room to one that it uses."""
    wide, high, across, down = 190, 54, 226, 88
    sheet = Sheet(4 * across + 20, 7 * down + 44, "The rooms of the package, and who uses whom")
    place = {room: (28 + c * across, 24 + r * down) for room, (r, c, _) in ROOMS.items()}
    for user, used in ARROWS:
        (x, y), (x2, y2) = place[user], place[used]
        if x == x2:
            sheet.arrow(x + wide / 2, y + high, x2 + wide / 2, y2)
        elif y == y2:
            sheet.arrow(x + wide if x < x2 else x, y + high / 2, x2 if x < x2 else x2 + wide, y2 + high / 2)
        else:
            side = 1 if x2 > x else -1
            sheet.arrow(x + wide / 2 + side * 50, y + high, x2 + wide / 2 - side * 50, y2)
    colour = {0: SKY, 1: "#f7d9a0", 2: "#bfe3c4", 3: "#ecc9de"}
    for room, (_, c, words) in ROOMS.items():
        x, y = place[room]
        w = 3 * across + wide if room == "errors" else wide
        sheet.box(x, y, w, high, "#ffffff" if room in ("commands", "errors") else colour[c], round=6)
        sheet.text(x + w / 2, y + 23, room, bold=True)
        sheet.text(x + w / 2, y + 42, words, size=12, ink=QUIET)
    sheet.text(
        28, 7 * down + 24, "An arrow leads to a room that is used; arrows only lead down. The main ones are drawn.",
        size=13, at="start", ink=QUIET,
    )  # fmt: skip
    return sheet.svg


PICTURES: dict[str, Callable[[], str]] = {
    "matrix": matrix, "depth": depth, "two-stages": stages, "shards": shards, "house": house,
}  # fmt: skip


def main() -> int:
    for name, picture in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
