"""Models without a language-model head, on every class of every table: what they say is kept, as the plan says.

A bare model's output is its hidden state, in the grown coordinates: a copy, or nothing, in each new feature. A
fine-tuned head's logits stay what they were. Gradients follow the rule with the loss on these outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.algebra.realise import realise
from bert2bert.errors import UnsupportedGrowth
from bert2bert.tables import table_for
from tests import tiny
from tests.checkpoints.growths import GROWTHS, Growth
from tests.cover import families
from tests.laws.harness import Grown, reader
from tests.planning import plan_growth
from tests.rounding import ROUNDING, allowed, gap

HIDDEN = ("last_hidden_state", "encoder_last_hidden_state", "pooler_output")
SAME = {"mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"}  # Llama's rows: a few operators tell it all
PADDED, DEEPER, LARGER = (
    "width-lemon-embedx1.5-kvx1-ffnx1-sharedx1", "depth-insert_identity-depth+2",
    "width-hyperclone-embedx2-qkx2-headsx1-kvx1",
)  # fmt: skip
FEW = ("width-fpi-embedx2", PADDED, "breaker-uneven-embedx2")
MOST = (
    *FEW, DEEPER, LARGER, "width-lemon-embedx2", "width-staged-embedx2", "width-gesmundo-embedx2",
    "width-gesmundo-ffnx2-kvx2", "width-hyperclone:noise=0.1-embedx2", "vocab-zeros-vocab+5", "positions-normal-pos+5",
    "breaker-noise-embedx2",
)  # fmt: skip
BY_NAME = {str(growth): growth for growth in GROWTHS}
# that keep nothing of this kind of model, by what the plan says or in that they are not defined
LOST = {
    "bert": {PADDED, DEEPER, "width-gesmundo-embedx2"},
    "gpt2": {"width-gesmundo-embedx2"},
    "t5": {"positions-normal-pos+5"},
    "llama": {LARGER, "positions-normal-pos+5"},
    "modernbert": {PADDED, DEEPER, LARGER, "width-gesmundo-embedx2", "positions-normal-pos+5"},
}


def features(plan: GrowthPlan) -> Tensor:
    """For every feature of the grown hidden state the source's that it copies, -1 for none: by the last norm's gain."""
    gains = [t for t in plan.tensors.values() if t.spec in ("(rho normed)", "(rho embed)")]
    return torch.from_numpy(gains[-1].terms[0].dims[0].index)


def grown(x: Tensor, index: Tensor) -> Tensor:
    return torch.where(index >= 0, x[..., index.clamp(min=0)], 0.0)


def collected(x: Tensor, index: Tensor) -> Tensor:
    """The mean of a feature's copies."""
    kept = index >= 0
    sums = torch.zeros(*x.shape[:-1], int(index.max()) + 1, dtype=x.dtype).index_add(-1, index[kept], x[..., kept])
    return sums / torch.bincount(index[kept])


def gradients(model: torch.nn.Module, config: dict[str, Any], index: Tensor | None = None) -> dict[str, Tensor]:
    """Of a random sum of the outputs, hidden states read as by a head that has grown (index) too."""
    g = torch.Generator().manual_seed(7)
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for name, found in tiny.outputs(model, config).items():
        value = collected(found, index) if index is not None and name in HIDDEN else found
        total = total + (value * torch.randn(value.shape, generator=g, dtype=torch.float64)).sum()
    total.backward()
    return {n: p.grad.clone() for n, p in tiny.parameters(model, config).items() if p.grad is not None}


def check(config: dict[str, Any], growth: Growth) -> bool:
    """Whether the growth keeps the function by its plan; if so, that it does, and the rule of gradients if it holds."""
    heads = table_for(config).names.classes[config["architectures"][0]]
    try:
        plan = plan_growth(config, growth.target(config), heads=heads, **growth.options(Path()))
    except UnsupportedGrowth:
        return False
    if plan.exactness.function:
        return False
    model = Grown(config, plan)
    assert any("hidden state" in note for note in plan.notes) == (
        "embedx" in str(growth) and heads <= {"decoder", "pooler"}
    ), plan.notes
    old, new, index = tiny.outputs(model.source, config), tiny.outputs(model.target, plan.config), features(plan)
    assert old.keys() == new.keys() and old
    limits = allowed(lambda: tiny.outputs(model.target, plan.config), plain=new)
    for name, value in old.items():
        wanted = grown(value, index) if name in HIDDEN else value
        assert gap(new[name], wanted, limits[name]) <= ROUNDING, (str(growth), name)
    if plan.exactness.moments:
        return True
    g, measured = gradients(model.source, config), gradients(model.target, plan.config, index)
    limits = allowed(lambda: gradients(model.target, plan.config, index), plain=measured)
    states, checked = reader({"exp_avg": g}), 0
    for name, tensor in plan.tensors.items():
        if name in measured and all(s in g for s in tensor.sources):
            made = realise(tensor, "exp_avg", states, torch.float64)
            assert gap(made, measured[name], limits[name]) <= ROUNDING, (str(growth), name)
            checked += 1
    assert checked >= 0.8 * len(plan.tensors)
    return True


@pytest.mark.parametrize("cls", families(tiny.OTHERS))
def test_what_a_model_says_is_kept(cls: str) -> None:
    config = tiny.config_of(cls)
    kind = str(config["model_type"])
    lost = LOST["bert" if kind == "roberta" else "llama" if kind in SAME else kind]
    growths = FEW if kind in SAME else MOST
    assert {name for name in growths if not check(config, BY_NAME[name])} == lost & {*growths}


def test_a_head_that_is_not_there_is_not_read() -> None:
    """The last norm of a bare model writes the hidden state as it is, whatever the config says of tied embeddings."""
    config = tiny.config_of("GPT2Model")
    table = table_for(config)
    specs = {
        heads: table.parameters(config, frozenset(heads))["transformer.ln_f.weight"].spec
        for heads in ((), ("lm",), ("score",))
    }
    assert specs == {(): "(rho normed)", ("lm",): "(rho ~embed)", ("score",): "(rho normed)"}
