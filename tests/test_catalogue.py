"""The command ``operators``: every operator is listed, and has a page, for people and for programs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bert2bert.commands.cli import main
from bert2bert.operators.evidence import EVIDENCE
from bert2bert.operators.registry import FLAGS, OPERATORS

NAMES = sorted({name for known in OPERATORS.values() for name in known})


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["operators"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["operators", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["operators"]
    assert [(o["kind"], o["name"]) for o in listed] == [(kind, name) for kind in FLAGS for name in OPERATORS[kind]]
    for name in NAMES:
        assert any(line.startswith(f"  {name} ") for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_has_a_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["operators", name]) == 0
    page = capsys.readouterr().out
    assert "<class" not in page
    assert main(["operators", name, "--json"]) == 0
    for one in json.loads(capsys.readouterr().out)["operators"]:
        assert f"{FLAGS[one['kind']]} {name}" in page and one["formula"] and one["paper"] in page
        for key in one["options"]:
            assert f"option     {key}=" in page


def test_evidence_is_of_operators_that_exist() -> None:
    assert all(name in OPERATORS[kind] for kind, name in EVIDENCE)
    assert (
        OPERATORS["width"]["aki"].evidence.startswith("Paper: 38.4 %")
        and OPERATORS["width"]["centre"].evidence == "none"
    )


def test_what_must_be_given_has_no_default(capsys: pytest.CaptureFixture[str]) -> None:
    main(["operators", "copy"])
    assert "of=str (must be given)" in capsys.readouterr().out
    main(["operators", "copy", "--json"])
    assert json.loads(capsys.readouterr().out)["operators"][0]["options"] == {"of": None}


def test_no_operator_of_that_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["operators", "lemmon"]) == 2
    assert "did you mean 'lemon'" in capsys.readouterr().err


def test_the_documented_policies_are_those_of_the_operators() -> None:
    page = (Path(__file__).parents[1] / "docs" / "explanation" / "moments.md").read_text("utf-8")
    rows = {line.split("|")[1].strip(): line.split("|")[3] for line in page.splitlines() if line.count("|") == 4}
    known = {o.name: o for kind in ("depth", "width") for o in OPERATORS[kind].values()}
    for policy in ("asymmetric", "reset"):
        named = [name for name in re.findall(r"`([a-z_]+)`", rows[policy]) if name in known]
        assert named and {known[name].moments for name in named} == {policy}
