"""README and docs: links lead somewhere, lines are short, pages and pictures made by scripts are up to date."""

from __future__ import annotations

import re
import runpy
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from bert2bert.checkpoints.inspect import Architecture, Check, Inspection
from bert2bert.commands.plan_recipe import states
from bert2bert.measure.drift import Drift
from bert2bert.report.result import Heldout, Report, RunEntry, Saving
from bert2bert.tables import TABLES
from tests import test_architecture

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its code, in which brackets are no links and # is not a heading."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        again = sum(name == other or re.fullmatch(re.escape(name) + r"-\d+", other) is not None for other in found)
        found.add(f"{name}-{again}" if again else name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=[p.relative_to(ROOT).as_posix() for p in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() and there.is_relative_to(ROOT), f"{link}: there is no {there}"
        assert not anchor or anchor in anchors(there), f"{link}: {there.name} has {sorted(anchors(there))}"


def test_pictures_are_what_the_script_draws() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    again = "run: make docs"
    for name, draw in made["PICTURES"].items():
        assert (made["FOLDER"] / f"{name}.svg").read_text("utf-8") == draw(), again
    assert {p.stem for p in made["FOLDER"].glob("*.svg")} == set(made["PICTURES"]), again


def test_the_picture_of_the_house_is_true() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    files = {"api", "growths", "__init__", "__main__"}  # files of the top floor, no rooms
    assert set(made["ROOMS"]) == test_architecture.ROOMS - files
    for user, used in made["ARROWS"]:
        assert made["ROOMS"][user][0] < made["ROOMS"][used][0], "arrows lead down"
        allowed = test_architecture.ALLOWED.get(user)
        assert allowed is None or used in {room.partition(".")[0] for room in allowed}, (user, used)


def test_generated_pages_are_what_the_code_states() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    for name, page in made["PAGES"].items():
        assert (made["FOLDER"] / f"{name}.md").read_text("utf-8") == page(), "run: make docs"


HEADS = {
    "SequenceClassification": "sequences", "TokenClassification": "tokens", "QuestionAnswering": "answers",
    "MultipleChoice": "choices", "NextSentencePrediction": "next sentence",
}  # fmt: skip


def test_the_readme_knows_every_architecture_and_its_heads() -> None:
    rows = [line.split("|")[1:-1] for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line[:1] == "|"]
    found = {row[0].strip(): row for row in rows[2:]}
    assert found.keys() == TABLES.keys()
    for name, row in found.items():
        heads = {head for cls in TABLES[name].names.classes for end, head in HEADS.items() if cls.endswith(end)}
        assert {head.strip() for head in row[-1].split(",")} == heads, name


DOCS = [page for page in PAGES if page.name == "README.md" or page.is_relative_to(ROOT / "docs")]


@pytest.mark.parametrize("page", DOCS, ids=[p.relative_to(ROOT).as_posix() for p in DOCS])
def test_lines_are_short(page: Path) -> None:
    """120 characters; a row of a table cannot be broken, nor can a link."""
    lines = page.read_text("utf-8").splitlines()
    long = [n for n, line in enumerate(lines, 1) if len(line) > 120 and not line.startswith("|") and "](" not in line]
    assert not long, f"lines {long} of {page.name} are longer than 120 characters"


def test_every_page_is_linked() -> None:
    linked = {(p.parent / link.partition("#")[0]).resolve() for p in PAGES for link in LINK.findall(prose(p))}
    assert not set(DOCS) - linked - {ROOT / "README.md"}


def test_the_places_in_the_architecture_page_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = re.findall(r"`([a-z_0-9/]+\.py)`", text)
    here = [ROOT / "bert2bert", ROOT]
    assert len(named) > 10 and not [name for name in named if not any((root / name).is_file() for root in here)]


def test_the_memory_of_ranks_is_what_the_plan_says() -> None:
    """Each row of docs/clusters.md: parameters, then GB of a rank at stage 0, at 1 to 3 on 8 ranks, and on 64."""
    text, units = (ROOT / "docs" / "clusters.md").read_text("utf-8"), {"M": 1e6, "B": 1e9}
    rows = re.findall(r"^\| ([\d.]+) ([MB]) \|(.*)\|$", text, flags=re.MULTILINE)
    assert len(rows) >= 5
    for size, unit, cells in rows:
        for cell, (stage, ranks) in zip(
            cells.split("|"), [(0, 1), *((stage, ranks) for ranks in (8, 64) for stage in (1, 2, 3))], strict=True
        ):
            config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
            held = states(int(float(size) * units[unit]), config, ranks) / 1e9
            assert float(cell) == pytest.approx(held, rel=0.01), (size, unit, stage, ranks)


@pytest.mark.parametrize("result", [Architecture, Check, Drift, Heldout, Inspection, Report, RunEntry, Saving])
def test_the_json_page_has_every_key(result: type) -> None:
    words = set(re.findall(r"\w+", (ROOT / "docs" / "reference" / "json.md").read_text("utf-8")))
    assert not {field.name for field in fields(result)} - words
