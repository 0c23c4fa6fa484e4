"""Every core against transformers' own model, in float64 on scrambled weights: packed sequences against padded rows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bert2bert.errors import InvalidConfig
from bert2bert.measure.transformers_models import Double
from bert2bert.model import registry
from bert2bert.model.batch import IGNORE, Batch, Decoder
from bert2bert.model.core import LanguageModel
from bert2bert.model.hosted import Hosted
from bert2bert.model.program import Step, full
from tests import tiny
from tests.rounding import ROUNDING, WRONG, allowed, gap
from tests.steps import some

LENGTHS = (7, 1, 9, 4)
ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 5.0], "factor": 2.0,
        "original_max_position_embeddings": 8,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    **{name: {} for name, v in tiny.VARIANTS.items() if v.base["model_type"] in ("gpt2", "llama", "qwen2", "qwen3")},
    "mistral": {"sliding_window": None},
    "llama mlp_bias": {"mlp_bias": True, "attention_bias": True},
    "mistral sliding_window": {"sliding_window": 3},
    "qwen3 attention_bias": {"attention_bias": True},
    **{f"llama {name}": {"rope_parameters": {"rope_theta": 100.0, **rope}} for name, rope in ROPE.items()},
    "llama short dynamic": {
        "rope_parameters": {"rope_theta": 100.0, **ROPE["dynamic"]}, "max_position_embeddings": 6,
    },
    "llama gelu": {"hidden_act": "gelu", "rms_norm_eps": 0.01},
}  # fmt: skip


def by_kind(**rope: Any) -> dict[str, Any]:
    """ModernBERT's rotary positions: each kind of layer has its own base."""
    rope = rope or {"rope_type": "default"}
    return {"full_attention": {"rope_theta": 100.0, **rope}, "sliding_attention": {"rope_theta": 30.0, **rope}}


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"architectures": ["BertForMaskedLM"]},
    "roberta": {"type_vocab_size": 1},
    "roberta untied": {"tie_word_embeddings": False, "hidden_act": "relu", "layer_norm_eps": 0.01},
    "modernbert": {"rope_parameters": by_kind()},
    "modernbert-untied": {"decoder_bias": False, "hidden_activation": "gelu_new", "classifier_activation": "silu"},
    # windows of itself alone, of two tokens on both sides, and longer than any sequence
    "modernbert windows": {"local_attention": 1, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "modernbert odd window": {"local_attention": 5, "layer_types": ["sliding_attention"] * 3},
    "modernbert wide window": {"local_attention": 30, "global_attn_every_n_layers": 3},
    "modernbert global": {"global_attn_every_n_layers": 1, "norm_bias": True, "norm_eps": 0.01},
    **{f"modernbert {name}": {"rope_parameters": by_kind(**rope)} for name, rope in ROPE.items()},
    "modernbert short dynamic": {"rope_parameters": by_kind(**ROPE["dynamic"]), "max_position_embeddings": 6},
}
CORES = DECODERS | ENCODERS
_BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
HOSTED: dict[str, dict[str, Any]] = {
    **{name: {} for name, v in tiny.VARIANTS.items() if v.base["model_type"] == "t5"},
    "t5-untied scaled": {"scale_decoder_outputs": True},
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _BALANCED),
    "mixtral sliding_window": {"sliding_window": 3},
    "qwen3_moe normed": {"norm_topk_prob": True},
}


def core_of(config: dict[str, Any], state: dict[str, torch.Tensor]) -> LanguageModel:
    """This project's model of a config in float64, eval mode, with a state by transformers' names."""
    core = registry.build(config, torch.float64)
    core.load_weights(state)
    return core.eval()


def flat(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Batch:
    """Sequences of random tokens; each token predicts the next one of its sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(tiny.TOKENS.start, tiny.TOKENS.stop, (sum(lengths),), generator=generator)
    labels = torch.cat([torch.cat((part[1:], torch.tensor([IGNORE]))) for part in tokens.split(lengths)])
    return Batch(
        tokens=tokens, positions=torch.cat([torch.arange(n) for n in lengths]), types=torch.zeros_like(tokens),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(), max_seqlen=max(lengths), targets=None, labels=labels,
        lengths=np.array(lengths),
    )  # fmt: skip


def theirs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """transformers' logits at every token, from one padded row a sequence."""
    rows = batch.tokens.split(batch.lengths.tolist())
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
    return model(input_ids=ids, attention_mask=mask.long()).logits[mask]


def pair(name: str, changes: dict[str, Any]) -> tuple[Any, torch.nn.Module]:
    config = tiny.config_of(name.split()[0], **changes)
    model = tiny.build(config)
    tiny.scramble(model)
    return core_of(config, model.state_dict()), model


@pytest.mark.parametrize("name", CORES)
def test_cores_are_transformers_own(name: str) -> None:
    """Logits, loss and the gradient of every parameter; the same parameters in the same order."""
    core, model = pair(name, CORES[name])
    assert [(n, p.shape) for n, p in core.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    batch = flat()
    # transformers makes these frequencies within its forward pass, where the casts to float32 are lifted
    with Double() if "short" in name or "longrope" in name else nullcontext():
        found = core(batch, return_logits=True)
    expected = theirs(model, batch)
    assert gap(found.logits, expected, allowed(lambda: theirs(model, batch))) <= ROUNDING
    loss = F.cross_entropy(expected, batch.labels)
    assert float(found.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-10)
    assert found.predicted == (batch.labels != IGNORE).sum()
    assert found.correct == (expected.argmax(-1) == batch.labels).sum()
    ours = torch.autograd.grad(found.loss, list(core.parameters()))

    def slopes() -> tuple[torch.Tensor, ...]:
        found = F.cross_entropy(theirs(model, batch), batch.labels)
        # an untied head of RoBERTa has a bias that nothing reads
        return torch.autograd.grad(found, list(model.parameters()), allow_unused=True, materialize_grads=True)

    for slope, other, room in zip(ours, slopes(), allowed(slopes), strict=True):
        assert gap(slope, other, room) <= ROUNDING


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral sliding_window"])
def test_a_sequence_sees_only_its_own_past(name: str) -> None:
    core, _ = pair(name, DECODERS[name])
    batch, other = flat(), flat()
    other.tokens = batch.tokens.clone()
    other.tokens[12] = (batch.tokens[12] - 1).clamp(min=2)  # the fifth token of the third sequence
    before, after = (core(b, return_logits=True).logits for b in (batch, other))
    assert torch.equal(before[:12], after[:12]) and torch.equal(before[17:], after[17:])
    assert (before != after).any(-1)[12:17].all()


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "roberta", "modernbert"])
def test_what_does_not_learn_gets_no_gradient(name: str) -> None:
    core, _ = pair(name, {})
    program = some(run=(0, 2), learn=(2,), embeddings_learn=False)
    core(flat(), program).loss.backward()
    grads = {n for n, p in core.named_parameters() if p.grad is not None}
    top = {n for n, p in core.known.items() if p.part in ("layer.2", "head")}
    assert grads == top


def test_some_places_only() -> None:
    """A batch may name the places at which is predicted, as an encoder's does."""
    core, _ = pair("llama", {})
    batch = flat()
    everywhere = core(batch, return_logits=True)
    batch.targets = torch.tensor([3, 0, 8])
    batch.labels = torch.tensor([5, IGNORE, 7])
    some = core(batch, return_logits=True)
    assert gap(some.logits, everywhere.logits[batch.targets]) <= ROUNDING and some.predicted == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_head_in_chunks(dtype: torch.dtype) -> None:
    """Loss and gradients are those of one product, whatever the size of a chunk; no label: zero, and no gradient."""
    from bert2bert.model.causal import LinearCrossEntropy

    torch.manual_seed(0)
    x, weight = (torch.randn(n, 6, dtype=dtype, requires_grad=True) for n in (11, 17))
    labels = torch.randint(0, 17, (11,))
    labels[[2, 7]] = IGNORE
    wide = torch.promote_types(dtype, torch.float32)
    loss = F.cross_entropy(F.linear(x, weight).to(wide), labels)
    expected = torch.autograd.grad(3 * loss, (x, weight))
    limit = {torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for chunk in (1, 40, 1 << 20):
        found, right, count = LinearCrossEntropy.apply(x, weight, labels, chunk)
        assert float(found.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
        assert (count, right) == (9, (F.linear(x, weight).argmax(-1) == labels).sum())
        for a, b in zip(torch.autograd.grad(3 * found, (x, weight)), expected, strict=True):
            assert a.dtype == dtype and (a - b).abs().max() <= limit * b.abs().max()
    nothing, _, count = LinearCrossEntropy.apply(x, weight, torch.full((11,), IGNORE), 40)
    assert nothing == 0 and count == 0 and not torch.autograd.grad(nothing, x)[0].any()


def test_no_tensor_holds_all_logits() -> None:
    """Neither forward nor backward makes a tensor of as many entries as tokens x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from bert2bert.model import causal

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.seen = max([self.seen, *sizes])
            return out

    x, weight = torch.randn(64, 4, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    with Largest() as watch:
        causal.LinearCrossEntropy.apply(x, weight, torch.zeros(64, dtype=torch.int64), 256)[0].backward()
    assert watch.seen <= 256


def test_other_weights_give_other_logits() -> None:
    """The guard of the laws above: one layer's norm left out is seen."""
    core, model = pair("llama", {})
    with torch.no_grad():
        core.layers[1].input_layernorm.weight.mul_(1.0001)
    batch = flat()
    expected = theirs(model, batch)
    assert gap(core(batch, return_logits=True).logits, expected, allowed(lambda: theirs(model, batch))) > WRONG


# ------------------------------------------------------------------------------- models that transformers computes


def asked(name: str, seed: int = 0) -> Batch:
    """`flat`; for a T5 with a decoder of other lengths, which predicts random tokens."""
    batch = flat(seed=seed)
    if not name.startswith("t5"):
        return batch
    other = flat((3, 5, 1, 8), seed=seed + 1)
    batch.decoder = Decoder(other.tokens, other.cu_seqlens, 8, other.lengths)
    batch.labels = torch.where(other.tokens % 5 == 0, IGNORE, other.tokens.flip(0))
    return batch


def rows_of(values: torch.Tensor, lengths: Any, filler: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(values.split(list(lengths))), True, filler)


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """What transformers' own training is given for a batch, its labels included."""
    mask = rows_of(torch.ones_like(batch.tokens), batch.lengths)
    given = {"input_ids": rows_of(batch.tokens, batch.lengths), "attention_mask": mask}
    if batch.decoder is None:  # it moves labels by one itself
        return given | {"labels": rows_of(batch.tokens, batch.lengths, IGNORE)}
    tokens, lengths = batch.decoder.tokens, batch.decoder.lengths
    given |= {"decoder_input_ids": rows_of(tokens, lengths), "labels": rows_of(batch.labels, lengths, IGNORE)}
    return given | {"decoder_attention_mask": rows_of(torch.ones_like(tokens), lengths)}


@pytest.mark.parametrize("name", HOSTED)
def test_hosted_models_are_transformers_own(name: str) -> None:
    """Logits, loss with the router's, gradients; parameters and their order; the tables' names and parts."""
    core, model = pair(name, HOSTED[name])
    assert [(n, p.shape) for n, p in core.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    assert set(core.known) == {n for n, _ in model.named_parameters()}
    assert set(core.parts) == {p.part for p in core.known.values() if "layer." in p.part}
    batch = asked(name)
    given = padded(batch)
    mask = given["decoder_attention_mask" if batch.decoder else "attention_mask"] == 1
    with Double():  # transformers' forward pass casts to float32
        found = core(batch, return_logits=True)
    assert gap(found.logits, model(**given).logits[mask], allowed(lambda: model(**given).logits)) <= ROUNDING
    theirs = model(**given)
    assert float(found.loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-12)
    assert found.predicted == (batch.labels != IGNORE).sum()
    assert found.correct == (theirs.logits[mask].argmax(-1) == batch.labels).sum()

    def slopes() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(**given).loss, list(model.parameters()))

    with Double():
        ours = torch.autograd.grad(core(batch).loss, list(core.parameters()))
        with torch.no_grad():
            plain = core(batch).loss
    for slope, other, room in zip(ours, slopes(), allowed(slopes), strict=True):
        assert gap(slope, other, room) <= ROUNDING
    head = F.cross_entropy(theirs.logits[mask], batch.labels)  # without gradients the loss is the head's alone
    assert float(plain) == pytest.approx(float(head.detach()), rel=1e-12)
    assert ("aux_loss" in theirs) == (float(plain) != pytest.approx(float(found.loss.detach()), rel=1e-6))


@pytest.mark.parametrize("name", [name for name in tiny.VARIANTS if name not in HOSTED])
def test_every_architecture_can_be_hosted(name: str) -> None:
    """As the reference of a core: the same parameters in the same order, the same logits."""
    config = tiny.config_of(name)
    model = tiny.build(config)
    tiny.scramble(model)
    hosted = Hosted({**config, "architectures": [registry.class_of(config)]}).double().eval()
    hosted.load_weights({n: p.detach() for n, p in model.named_parameters()})
    assert [n for n, _ in hosted.named_parameters()] == [n for n, _ in model.named_parameters()]
    batch = flat()
    batch.positions = batch.positions + hosted.table.sizes.first_position
    with Double(), torch.no_grad():
        found = hosted(batch, return_logits=True).logits
        given = padded(batch)
        del given["labels"]
        out = model(**given)
    logits = out["logits" if "logits" in out else "prediction_logits"][given["attention_mask"] == 1]
    assert gap(found, logits) <= ROUNDING


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_program_runs_its_layers_alone(name: str) -> None:
    """A mixture's bottom layers, the lowest of them frozen: transformers' model of those, and its gradients."""
    core, small = pair(name, _BALANCED)
    program = some(run=(0, 1), learn=(1,), embeddings_learn=False)
    small.model.layers = small.model.layers[:2]
    small.config.num_hidden_layers = 2
    with Double():
        found = core(asked(name), program)
    found.loss.backward()
    theirs = small(**padded(asked(name))).loss
    assert float(found.loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    learning = {n: p for n, p in small.named_parameters() if core.known[n].part in ("layer.1", "head")}
    slopes = torch.autograd.grad(theirs, list(learning.values()))
    grads = {n: p.grad for n, p in core.named_parameters() if p.grad is not None}
    assert grads.keys() == learning.keys()
    for (n, grad), slope in zip(grads.items(), slopes, strict=True):
        assert (grad - slope).abs().max() <= 1e-10 * slope.abs().max(), n
    assert len(core.layers) == 3  # the list is whole again


@pytest.mark.parametrize("name", ["t5", "mixtral"])
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    core, _ = pair(name, HOSTED[name])
    core.float().train()
    found = []
    for core.recompute in (False, True):
        core.zero_grad()
        core(asked(name)).loss.backward()
        found.append([p.grad.clone() for p in core.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_programs_that_cannot_run_are_refused() -> None:
    core, _ = pair("t5", {})
    with pytest.raises(InvalidConfig, match="only all of its layers can run"):
        core(asked("t5"), Step((0, 1), frozenset(core.parts[:2])))
    assert core(asked("t5"), full(core.parts)).predicted > 0
    hosted = Hosted(tiny.config_of("modernbert"))
    batch = flat()
    batch.nsp_labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InvalidConfig, match="without pairs of segments"):
        hosted(batch)


def test_filler_is_left_out() -> None:
    """Neither head nor router sees it, wherever it lies; a batch of filler alone has a loss of zero."""
    core, _ = pair("mixtral", _BALANCED)
    batch, filled = flat((7, 9, 1)), flat((7, 5, 9, 1))  # the last is a document of one token
    for what, filler in (("tokens", 3), ("labels", IGNORE)):
        values = getattr(batch, what)
        setattr(filled, what, torch.cat((values[:7], torch.full((5,), filler), values[7:])))
    filled.lengths = batch.lengths
    filled.cu_seqlens = torch.cat((filled.cu_seqlens, filled.cu_seqlens[-1:]))  # and an empty place
    with Double():
        one, other = core(batch, return_logits=True), core(filled, return_logits=True)
    assert one.predicted == other.predicted and gap(other.loss, one.loss) <= ROUNDING
    assert gap(torch.cat((other.logits[:7], other.logits[12:])), one.logits) <= ROUNDING
    filled.lengths = np.array([7, 5, 9, 1])  # the same as a sequence is routed, too
    with Double():
        assert gap(core(filled).loss, one.loss) > WRONG
    empty = flat((6, 4))
    empty.labels, empty.lengths = torch.full_like(empty.labels, IGNORE), np.array([], dtype=np.int64)
    with torch.no_grad():
        assert core(empty).loss == 0
        core, _ = pair("t5", {})
        empty.decoder, empty.labels = (
            Decoder(empty.tokens[:3], torch.tensor([0, 2, 3]).int(), 2, empty.lengths),
            empty.labels[:3],
        )
        assert core(empty).loss == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_the_experts(dtype: torch.dtype) -> None:
    """Where widths are whole 16 bytes; loss and gradients are those of experts computed one after the other."""
    config = tiny.config_of("mixtral", hidden_size=24, intermediate_size=16, **_BALANCED)
    core = registry.build(config).to(dtype)
    assert core._experts() == "grouped_mm" and core.double()._experts() == "eager"
    core = core.to(dtype)
    found = {}
    for way in ("grouped_mm", "eager"):
        core._experts = lambda way=way: way  # type: ignore[method-assign]
        core.zero_grad()
        core(flat()).loss.backward()
        found[way] = {n: p.grad.clone() for n, p in core.named_parameters() if p.grad is not None}
    limit = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for name, grad in found["grouped_mm"].items():
        other = found["eager"][name]
        assert (grad - other).abs().max() <= limit * other.abs().max() + 1e-12, name
