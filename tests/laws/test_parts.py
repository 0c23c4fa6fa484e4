"""The notation, the maps, depth, refusals and option texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bert2bert.algebra import axes
from bert2bert.algebra.maps import Gather, copies, corner, identity, scalar
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth.compose import then
from bert2bert.operators.decisions import Pair
from bert2bert.operators.depth import stack
from bert2bert.operators.width_bert2bert import fpi
from bert2bert.tables import table_for
from tests.planning import plan_growth
from tests.rounding import ROUNDING, gap
from tests.tiny import bert_config


def test_notation() -> None:
    spec = axes.parse("(tau heads qk | heads ~qk) <- embed")
    assert [[(a.axis, a.reads) for a in p] for p in spec[0]] == [
        [("tau", False), ("heads", False), ("qk", False)],
        [("heads", False), ("qk", True)],
    ]
    assert [[(a.axis, a.reads) for a in p] for p in spec[1]] == [[("embed", True)]]
    assert axes.parse("vocab -> embed")[0][0][0].reads and not axes.parse("vocab -> embed")[1][0][0].reads
    assert axes.parse("~embed")[0][0][0].reads
    assert axes.parse("~(heads ~v)")[0][0] == (axes.Atom("heads", True), axes.Atom("v", False))
    assert axes.shape("embed <- (heads v)", {"embed": 6, "heads": 2, "v": 3}) == (6, 6)
    for bad in ("a <- b <- c", "a + b", "()", ""):
        with pytest.raises(ValueError):
            axes.parse(bad)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return gap(torch.from_numpy(a), torch.from_numpy(b)) <= ROUNDING


def test_maps_are_left_inverses() -> None:
    rng = np.random.default_rng(0)
    a = copies([0, 1, 2, 2, 0, 0], 3)
    b = copies([0, 1, 2, 3, 4, 5, 1, 1], 6, rng.uniform(0.5, 1.5, 8))
    for m in (a, b, identity(4), a * identity(2), a | b, scalar(3.0)):
        spread, collect = m.dense()
        assert same(collect @ spread, np.eye(m.source))
    ea, la = a.dense()
    eb, lb = b.dense()
    assert same((a * b).dense()[0], np.kron(ea, eb)) and same((a * b).dense()[1], np.kron(la, lb))
    assert same((~a).dense()[0], la.T) and same((~a).dense()[1], ea.T)
    assert (a | b).dense()[0].shape == (14, 9)
    assert not a.is_uniform and copies([0, 1, 0, 1], 2).is_uniform
    assert a.is_even and not b.is_even and identity(3).is_identity and not a.is_identity
    assert corner(2, 4).index.tolist() == [0, 1, -1, -1]
    with pytest.raises(ValueError, match="needs a copy"):
        copies([0, 0], 2)


def test_silent_maps_multiply() -> None:
    half = Gather(np.array([0, 1, -1, -1]), 2)
    assert (half * identity(2)).index.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    assert (half | half).index.tolist() == [0, 1, -1, -1, 2, 3, -1, -1]


def test_mixtures_are_rows_beyond_the_source() -> None:
    mean = Gather(np.array([0, 1, 2]), 2, share=np.array([1.0, 1.0, 0.0]), mix=np.full((1, 2), 0.5))
    spread, collect = mean.dense()
    assert spread.tolist() == [[1, 0], [0, 1], [0.5, 0.5]] and same(collect @ spread, np.eye(2))
    assert not mean.is_uniform and mean.counts.tolist() == [1, 1]
    doubled = scalar(2.0) * mean
    assert same(doubled.dense()[0], 2 * spread) and same(doubled.dense()[1], collect / 2)
    with pytest.raises(ValueError, match="size one"):
        _ = mean * identity(2)
    with pytest.raises(ValueError, match="concatenate"):
        _ = mean | identity(2)


@pytest.mark.parametrize(
    "source,target,expected",
    [
        (5, 12, [0, 1, 2, 3, 4] * 2 + [3, 4]),
        (3, 6, [0, 1, 2] * 2),
        (12, 12, list(range(12))),
        (6, 9, [*range(6), 3, 4, 5]),
    ],
)
def test_stack_with_the_papers_remainder(source: int, target: int, expected: list[int]) -> None:
    pair = _pair(bert_config(layers=source), bert_config(layers=target))
    assert stack(pair, source, target) == expected


def _pair(small: dict, large: dict, seed: int = 0) -> Pair:
    table = table_for(small)
    return Pair(table, small, large, table.axis_sizes(small), table.axis_sizes(large), seed)


def test_choices() -> None:
    small, large = bert_config(8, 2, 5, layers=2), bert_config(20, 5, 9, layers=2)
    for choice in ("balanced", "random", "left"):
        width = fpi(_pair(small, large, 3), choice=choice)
        again = fpi(_pair(small, large, 3), choice=choice)
        other = fpi(_pair(small, large, 4), choice=choice)
        m = width.maps["embed"]
        assert isinstance(m, Gather) and m.index[:8].tolist() == list(range(8)) and len(m) == 20
        assert np.array_equal(m.index, again.maps["embed"].index)
        same = np.array_equal(m.index, other.maps["embed"].index)
        assert same == (choice == "left")
        if choice != "random":
            assert set(m.counts.tolist()) == {2, 3}
        assert len(width.maps["ffn"]) == 2 and len(width.maps["heads"]) == 2 and "qk" not in width.maps
    assert m.index.tolist() == [*range(8), *range(8), 0, 1, 2, 3]


REFUSALS = [
    (dict(hidden=4, heads=1), {}, "smaller than the source's 8"),
    (dict(layers=2), {}, "smaller than the source's 3"),
    (dict(hidden=16, heads=2), {}, "head size would change from 4 to 8"),
    (dict(hidden=16, heads=2), {}, "num_attention_heads=4"),
    (dict(hidden=16, heads=4, hidden_act="relu"), {}, "hidden_act is 'gelu' in the source and 'relu'"),
    (dict(hidden=16, heads=4, tie_word_embeddings=False), {}, "tie_word_embeddings"),
    (dict(hidden=16, heads=4), {"width": "fpo"}, "did you mean 'fpi'"),
    (dict(hidden=16, heads=4), {"depth": "stak"}, "did you mean 'stack'"),
    (dict(hidden=16, heads=4), {"breaker": "noize"}, "did you mean 'noise'"),
    (dict(hidden=16, heads=4), {"breaker": ""}, "'': unknown operator"),
    (dict(hidden=16, heads=4), {"width": "direct", "breaker": "noise"}, "makes no even copies"),
]


@pytest.mark.parametrize("sizes,how,text", REFUSALS)
def test_refusals(sizes: dict, how: dict, text: str) -> None:
    with pytest.raises(UnsupportedGrowth, match=text):
        plan_growth(bert_config(), bert_config(**sizes), **how)


@pytest.mark.parametrize(
    "how,text",
    [
        ({"width": "fpi:chioce=left"}, "did you mean 'choice'"),
        ({"width": "fpi:choice=lefty"}, "did you mean 'left'"),
        ({"width": "direct:choice=left"}, "takes no options"),
        ({"breaker": "noise:scale=0"}, "positive number"),
        ({"breaker": "noise:scale=x"}, "positive number"),
        ({"breaker": "noise:scale=inf"}, "positive number"),
        ({"breaker": "noise", "width": "hyperclone:noise=0.1"}, "which has noise already"),
        ({"width": "fpi:choice"}, "give choice a value"),
        ({"width": "fpi:choice=left,choice=random"}, "choice is there twice"),
    ],
)
def test_bad_options(how: dict, text: str) -> None:
    with pytest.raises(InvalidConfig, match=text):
        plan_growth(bert_config(), bert_config(16, 4), **how)


def test_bad_seed() -> None:
    with pytest.raises(InvalidConfig, match="--seed is -1"):
        plan_growth(bert_config(), bert_config(16, 4), seed=-1)


def test_bad_configs() -> None:
    with pytest.raises(InvalidConfig, match="does not divide"):
        plan_growth(bert_config(), bert_config() | {"num_attention_heads": 3})
    with pytest.raises(InvalidConfig, match="intermediate_size is None"):
        plan_growth(bert_config(), bert_config() | {"intermediate_size": None})
    with pytest.raises(InvalidConfig, match="hidden_size is missing"):
        plan_growth({key: value for key, value in bert_config().items() if key != "hidden_size"}, bert_config())
    silent = {key: value for key, value in bert_config().items() if key != "hidden_act"}
    with pytest.raises(UnsupportedGrowth, match="hidden_act is 'gelu' in the source and 'relu'"):
        plan_growth(silent, bert_config(hidden_act="relu"))
    with pytest.raises(UnsupportedGrowth, match="model_type 'xlnet'"):
        plan_growth(bert_config() | {"model_type": "xlnet"}, bert_config())
    with pytest.raises(UnsupportedGrowth, match="choose how it grows with --vocab"):
        plan_growth(bert_config(), bert_config() | {"vocab_size": 64})


def test_digest_tells_plans_apart() -> None:
    small, large = bert_config(), bert_config(16, 4, 31)
    base = plan_growth(small, large, seed=1).digest()
    assert base == plan_growth(small, large, seed=1).digest()
    others = [dict(seed=2), dict(seed=1, width="aki"), dict(seed=1, breaker="noise"), dict(seed=1, breaker="uneven")]
    assert len({base, *(plan_growth(small, large, **o).digest() for o in others)}) == 5


def test_warnings_name_the_breakers_and_the_first_step() -> None:
    small, large = bert_config(), bert_config(16, 4, 24)
    assert "--break-symmetry noise | uneven, or --moments asymmetric" in plan_growth(small, large).warnings[0]
    assert "dropout, which" in plan_growth(small, large | {"hidden_dropout_prob": 0.1}).warnings[0]
    (warning,) = plan_growth(small, large, width="aki").warnings
    assert "copies on heads, ffn in the source's top layer" in warning and "--width aki" not in warning
    assert plan_growth(small, large, width="aki", breaker="noise").warnings == ()
    one = plan_growth(bert_config(layers=1), bert_config(16, 4, 24, layers=1), width="aki")
    assert "copies on embed, heads, ffn are even" in one.warnings[0]  # a single layer borrows nothing
    for how in (dict(width="direct"), dict(moments="asymmetric")):
        assert any("3.16x" in w for w in plan_growth(small, large, **how).warnings)
    assert plan_growth(small, large, width="random").warnings == ()  # a fresh optimizer at step 0


def test_growths_compose_from_the_left_and_must_fit() -> None:
    a, b, c = bert_config(), bert_config(16, 4, 24, layers=5), bert_config(32, 8, 48, layers=5)
    one, two = plan_growth(a, b), plan_growth(b, c)
    both = then(one, two)
    assert both.recipe == {"first": one.recipe, "then": two.recipe} and both.before == (one,)
    assert both.exactness.function == one.exactness.function and not two.exactness.function
    with pytest.raises(UnsupportedGrowth, match=r"layer\.3.*which the first does not make"):
        then(plan_growth(a, a), two)
    with pytest.raises(UnsupportedGrowth, match="compose from the left"):
        then(one, both)


def test_notes_say_what_adam_does_with_mapped_moments() -> None:
    small, large = bert_config(), bert_config(16, 4, 24)
    (note,) = plan_growth(small, large).notes
    for text in (
        "2 on embed",
        "factors on learning rate, weight decay and epsilon",
        "epsilon weighs",
        "global gradient norm",
    ):
        assert text in note
    (fresh,) = plan_growth(small, large, moments="reset").notes
    assert "whole learning rate in its first step" in fresh
    assert plan_growth(small, bert_config(layers=6)).notes == ()


def test_no_zeroed_moment_without_the_size_of_its_first_step() -> None:
    """Tensors drawn at random may share an optimizer group, and its step count, with old ones."""
    small = bert_config()
    for how in ({"depth": "random"}, {"depth": "insert_identity"}, {"width": "msg"}, {"width": "sparkling"}):
        plan = plan_growth(small, bert_config(16, 4, 24, layers=5), **how)
        zero = [t for t in plan.tensors.values() if not t.terms or t.fill or any(m is not None for m in t.fresh)]
        assert zero and any("3.16x" in w and "0.45x" in w for w in plan.warnings), how
        assert not any("3.16x" in w for w in plan_growth(small, small, **how).warnings)
        reset = plan_growth(small, bert_config(16, 4, 24, layers=5), **how, moments="reset")
        assert all(t.reset for t in reset.tensors.values()) and not any("3.16x" in w for w in reset.warnings)
