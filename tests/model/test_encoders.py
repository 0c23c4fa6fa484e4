"""The encoders by themselves: masked places, who sees whom, dropout, fresh weights, old configs, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from bert2bert.errors import UserError
from bert2bert.model import registry
from bert2bert.model.batch import IGNORE
from bert2bert.model.rotary import rotate
from tests import tiny
from tests.model.test_cores import ENCODERS, ROPE, core_of, flat, pair, theirs
from tests.rounding import ROUNDING, WRONG, allowed, gap

KINDS = ["roberta", "modernbert"]
DROPOUT = {
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "modernbert": ("attention_dropout", "embedding_dropout", "mlp_dropout"),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_head_sees_the_masked_places(name: str) -> None:
    """Logits and loss there are transformers', spare places (label -100) are left out, next-sentence labels refused."""
    core, model = pair(name, ENCODERS[name])
    batch = replace(flat(), targets=torch.tensor([2, 7, 9, 20, 0]), labels=torch.tensor([5, 4, 22, 9, IGNORE]))
    found, expected = core(batch, return_logits=True), theirs(model, batch)[batch.targets]
    limits = allowed(lambda: [(x := theirs(model, batch)[batch.targets]), F.cross_entropy(x, batch.labels)])
    assert gap(found.logits, expected, limits[0]) <= ROUNDING
    assert gap(found.loss, F.cross_entropy(expected, batch.labels), limits[1]) <= ROUNDING
    assert found.predicted == 4 and found.correct == (expected.argmax(-1) == batch.labels).sum()
    with pytest.raises(UserError, match="no next-sentence head"):
        core(replace(batch, nsp_labels=torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize("name", KINDS)
def test_a_sequence_sees_itself_alone_and_all_of_itself(name: str) -> None:
    core, _ = pair(name, ENCODERS[name])
    batch, other = flat(), flat()
    other.tokens[12] = (batch.tokens[12] - 1).clamp(min=2)  # the fifth token of the third sequence
    before, after = (core(b, return_logits=True).logits for b in (batch, other))
    assert torch.equal(before[:8], after[:8]) and torch.equal(before[17:], after[17:])
    assert (before != after).any(-1)[8:17].all()


@pytest.mark.parametrize("size", [1, 4, 5, 30])
def test_a_window_reaches_half_its_size_both_ways(size: int) -> None:
    changes = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "local_attention": size}
    core, _ = pair("modernbert", changes)
    batch, other = flat(), flat()
    other.tokens[12] = (batch.tokens[12] - 1).clamp(min=2)
    before, after = (core(b, return_logits=True).logits for b in (batch, other))
    seen = (before != after).any(-1).nonzero()[:, 0].tolist()
    assert seen == [i for i in range(8, 17) if abs(i - 12) <= size // 2]


@pytest.mark.parametrize("name, rate", [(name, rate) for name, rates in DROPOUT.items() for rate in rates])
def test_dropout_is_where_transformers_has_it(name: str, rate: str) -> None:
    """One sequence draws the same random numbers in both, so training mode agrees from one seed, gradients too."""
    config = tiny.config_of(name) | {rate: 0.3}
    model = tiny.build(config)
    tiny.scramble(model)
    core, batch = core_of(config, model.state_dict()), flat((9,))
    plain = core(batch, return_logits=True).logits
    core.train(), model.train()

    def run(which: str) -> list[torch.Tensor]:
        torch.manual_seed(4)
        logits = core(batch, return_logits=True).logits if which == "core" else theirs(model, batch)
        used = core if which == "core" else model
        slopes = torch.autograd.grad(F.cross_entropy(logits, batch.labels), list(used.parameters()))
        return [logits, *slopes]

    limits = allowed(lambda: run("core"))
    ours, expected = run("core"), run("transformers")
    assert all(gap(*parts) <= ROUNDING for parts in zip(ours, expected, limits, strict=True))
    assert gap(ours[0], plain, limits[0]) > WRONG


@torch.no_grad()
@pytest.mark.parametrize("name", ["roberta", "modernbert", "modernbert-untied"])
def test_fresh_weights_are_distributed_as_transformers_own(name: str) -> None:
    config = tiny.config_of(
        name, vocab_size=500, hidden_size=48, intermediate_size=200, max_position_embeddings=60, initializer_range=0.05
    )
    torch.manual_seed(0)
    core, model = registry.build(config), tiny.build(config)
    for (parameter, ours), other in zip(core.named_parameters(), model.parameters(), strict=True):
        spread = other.std(correction=0)
        error = spread * (2 / ours.numel()) ** 0.5  # standard error of the difference of two means
        assert abs(ours.mean() - other.mean()) <= 4 * error, parameter
        assert abs(ours.std(correction=0) - spread) <= 4 * error, parameter
        if ours.numel() > 2000:  # truncated or not
            assert (ours.abs().max() > 3 * spread) == (other.abs().max() > 3 * spread), parameter

    def zero(built: torch.nn.Module) -> list[bool]:
        tables = [m for m in built.modules() if isinstance(m, torch.nn.Embedding) and m.padding_idx is not None]
        return [not m.weight[m.padding_idx].any() for m in tables]

    assert zero(core) == zero(model) == ([True, True] if name == "roberta" else [False])


OLD = [
    {"global_rope_theta": 50.0, "local_rope_theta": 20.0},
    {"global_rope_theta": 50.0, "rope_scaling": {**ROPE["yarn"], "type": "yarn"}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}},
]


@pytest.mark.parametrize("old", OLD)
def test_rotary_settings_of_older_configs(old: dict[str, Any]) -> None:
    base = tiny.VARIANTS["modernbert"].base
    model = tiny.build(tiny.config_of("modernbert", **old))
    tiny.scramble(model)
    core = core_of({**base, "architectures": ["ModernBertForMaskedLM"], **old}, model.state_dict())
    batch = flat()
    expected = theirs(model, batch)
    limit = allowed(lambda: theirs(model, batch))
    assert gap(core(batch, return_logits=True).logits, expected, limit) <= ROUNDING
    plain, _ = pair("modernbert", {})
    plain.load_weights(model.state_dict())
    assert gap(plain(batch, return_logits=True).logits, expected, limit) > WRONG


@pytest.mark.parametrize("name", KINDS)
def test_recomputing_changes_nothing(name: str) -> None:
    """Activation checkpointing: the same gradients from the same draws, bit for bit."""
    config = tiny.config_of(name) | dict.fromkeys(DROPOUT[name], 0.3)
    core, batch = registry.build(config).train(), flat()

    def slopes() -> list[torch.Tensor]:
        torch.manual_seed(2)
        return list(torch.autograd.grad(core(batch).loss, list(core.parameters())))

    plain, core.recompute = slopes(), True
    assert all(map(torch.equal, slopes(), plain))


@pytest.mark.parametrize("name", KINDS)
def test_16_bit_is_near(name: str) -> None:
    core, _ = pair(name, ENCODERS[name])
    batch = flat()
    exact, limit = core(batch).loss, allowed(lambda: core(batch).loss, torch.bfloat16, spare=32)
    near = core.bfloat16()(batch).loss
    assert near.dtype == torch.float32 and 0 < gap(near, exact, limit) <= ROUNDING
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < gap(core.float()(batch).loss, exact, limit) <= ROUNDING


def test_turned_heads_keep_their_dtype_under_wider_tables() -> None:
    """As under autocast, where queries and keys are narrower than what enters the blocks; the kernel mixes none."""
    heads, tables = torch.randn(3, 2, 4).bfloat16(), (torch.randn(3, 4), torch.randn(3, 4))
    assert rotate(heads, tables).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name, changes, text",
    [
        ("modernbert", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ("modernbert", {"layer_types": ["full_attention"]}, "transformers refuses it as a modernbert"),
        ("modernbert", {"local_attention": -2}, "local_attention is -2"),
        ("modernbert", {"classifer_bias": True}, "did you mean 'classifier_bias'"),
        ("modernbert", {"hidden_activation": "gleu"}, "did you mean 'gelu'"),
        ("modernbert", {"architectures": ["ModernBertModel"]}, "expected one of ModernBertForMaskedLM"),
        ("modernbert", {"embedding_dropout": 1.5}, "embedding_dropout is 1.5"),
        ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor is 0.5; a modernbert turns whole heads"),
        ("modernbert", {"rope_scaling": {"rope_type": "liner", "factor": 2.0}}, "did you mean 'linear'"),
        ("roberta", {"pad_token_id": 0}, "pad_token_id is 0"),
        ("roberta", {"is_decoder": True}, "is_decoder is True"),
        ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("roberta", {"num_attention_heads": 3}, "num_attention_heads"),
        ("roberta", {"hidden_dropout_prob": -0.1}, "hidden_dropout_prob is -0.1"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(name: str, changes: dict[str, Any], text: str) -> None:
    config = {**tiny.VARIANTS[name].base, "architectures": [tiny.VARIANTS[name].cls], **changes}
    with pytest.raises(UserError, match=text):
        registry.check(config)


def test_configs_of_published_checkpoints() -> None:
    """Keys that older versions of transformers wrote, and anybody's, are no reason to refuse."""
    roberta = tiny.config_of("roberta") | {"gradient_checkpointing": False, "position_embedding_type": "absolute"}
    modern = tiny.VARIANTS["modernbert"].base | {
        "architectures": ["ModernBertForMaskedLM"], "layer_norm_eps": 1e-05, "position_embedding_type": "absolute",
        "gradient_checkpointing": False, "reference_compile": True, "repad_logits_with_grad": False,
        "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "sparse_prediction": False,
        "torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "_attn_implementation_autoset": True,
        "my_note": "trained twice",
    }  # fmt: skip
    for config in (roberta, modern):
        built = registry.build(config)
        again = getattr(transformers, built.name)(transformers.AutoConfig.for_model(**built.hf_config))
        again.load_state_dict(built.state_dict())
