"""Vocabulary growth against transformers' own ``resize_token_embeddings``, on every family.

Its default draws new rows around the mean of the old ones, with a billionth of their covariance; without
``mean_resizing`` it draws them as for training from scratch. Old rows and everything else must be equal bit for bit.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import pytest
import torch

from bert2bert.algebra import axes
from bert2bert.tables import table_for
from tests import tiny
from tests.checkpoints.engines import hf_model
from tests.oracles.folders import grown, saved
from tests.rounding import ROUNDING, elementary, gap

OLD, NEW = 29, 34
FAMILIES = sorted(tiny.VARIANTS)
UNREAD = {"bert-untied": "cls.predictions.bias"}  # no output reads it; resizing puts the decoder's bias there


def by_vocabulary(name: str) -> set[str]:
    """The tensors, ties included, whose rows are tokens."""
    config = tiny.config_of(name)
    table = table_for(config)
    heads = next(iter(table.names.classes.values()))
    found = {n for n, p in table.parameters(config, heads).items() if "vocab" in axes.axes_of(p.spec)}
    return found | {absent for absent, kept in table.aliases(config, heads).items() if kept in found}


def test_every_family_has_rows_of_tokens() -> None:
    assert all(by_vocabulary(name) for name in FAMILIES)


@pytest.mark.parametrize("operator", ["mean", "normal"])
@pytest.mark.parametrize("name", FAMILIES)
def test_vocabulary(name: str, operator: str, tmp_path: Path) -> None:
    config = saved(tmp_path / "small", name)
    theirs = hf_model(config)
    theirs.config.tie_word_embeddings = config["tie_word_embeddings"]  # else a T5 ties itself when it is resized
    theirs.resize_token_embeddings(NEW, mean_resizing=operator == "mean")
    wanted = theirs.state_dict()
    options = ("--vocab", operator, "--no-measure")
    found = grown(tmp_path / "small", tmp_path / "large", {**config, "vocab_size": NEW}, *options)
    rows = by_vocabulary(name)
    assert found.keys() == wanted.keys() and rows <= found.keys()
    for n, ours in found.items():
        assert ours.shape == wanted[n].shape and (n not in rows or len(ours) == NEW)
        if n == UNREAD.get(name):
            continue
        assert torch.equal(ours[:OLD] if n in rows else ours, wanted[n][:OLD] if n in rows else wanted[n]), n
        if n not in rows:
            continue
        fresh, other = ours[OLD:], wanted[n][OLD:]
        if operator == "normal":
            assert fresh.any() == (ours.ndim > 1) == other.any(), n  # biases are zero
        elif ours.ndim > 1 or not config["tie_word_embeddings"]:
            few = 6 * sqrt(1e-9) * ours[:OLD].std()  # standard deviations of theirs
            assert (fresh - other).abs().max() <= few, n
        else:  # a tied head's bias they fill with zeros: new tokens then have more than the mean logit
            mean = ours[:OLD].mean().expand(NEW - OLD)
            assert not other.any() and gap(fresh, mean, elementary(ours)) <= ROUNDING, n
