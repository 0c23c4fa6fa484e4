"""The strings of every table are in their grammars: what a reader of one does not understand, it would pass over."""

from __future__ import annotations

import re

import pytest

from bert2bert.tables import TABLES
from bert2bert.tables.expressions import asks, depth_axis, numbered, present, products, referred, weight_and_bias
from bert2bert.tables.table import Table

WHEN = re.compile(r"(!?\w+(=.+)?)?")


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_string_is_in_its_grammar(table: Table) -> None:
    sizes, compatible, named = table.sizes, table.compatible, (*table.rows, *table.names.ties)
    for size in sizes.axes.values():
        assert size == "|".join("".join(sign + name for sign, name in product) for product in products(size))
        assert all(not product[0].sign and all(term.sign for term in product[1:]) for product in products(size))
    known = {*sizes.axes, *sizes.constants, "range"}
    assert all(term.isdigit() or term in known for std in table.stds.values() for term in std.split())
    heads = frozenset.union(*table.names.classes.values())
    assert {head.lstrip("!") for row in named for one in row.needs.split() for head in one.split("|")} <= heads
    whens = [row.when for row in table.rows] + [when for many in compatible.agree_when.values() for when in many]
    assert all(WHEN.fullmatch(when) for when in whens)
    assert compatible.agree_when.keys() <= compatible.must_agree.keys()
    assert {referred(default) for default in compatible.must_agree.values()} - {""} <= compatible.must_agree.keys()
    for row in table.rows:
        assert row.depth in (*sizes.depth, "")
        assert not any(set("{}") & set(numbered(name, 3)) for name in weight_and_bias(row.name).values() if row.depth)
        assert row.depth or "{" not in "".join(weight_and_bias(row.name).values())


def test_readers() -> None:
    assert products("n_inner|n_embd*4/heads") == ((("", "n_inner"),), (("", "n_embd"), ("*", "4"), ("/", "heads")))
    assert [present("decoder !lm", frozenset(h.split())) for h in ("decoder", "decoder lm", "")] == [True, False, False]
    assert [needs for needs in ("lm", "decoder lm", "lm|qa", "!lm", "") if asks(needs, "lm")] == ["lm", "decoder lm"]
    assert [referred(value) for value in ("=pad", "pad", None, {"=": 1})] == ["pad", "", "", ""]
    assert weight_and_bias("h.{layers}.{weight,bias}") == {"weight": "h.{layers}.weight", "bias": "h.{layers}.bias"}
    assert depth_axis("h.{layers}.{weight,bias}") == "layers" and depth_axis("wte.{weight,bias}") == ""
    assert numbered("h.{layers}.w", 12) == "h.12.w" and numbered("wte.weight", None) == "wte.weight"
