"""The FLOPs of every architecture against torch's own counter on transformers' models, and the literature's figures."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bert2bert.model import registry
from bert2bert.model.program import Step
from bert2bert.tables import table_for
from bert2bert.tables.flops import Flops, Work
from bert2bert.train.compute import step_flops
from tests import tiny
from tests.model.sample import batch
from tests.model.test_cores import flat
from tests.steps import some, whole

CLASSES = {"BertForPreTraining": "BertForMaskedLM"}  # the next-sentence head reads one token a sequence: not counted
WORK = Work((7, 7, 7), 21)


def flops_of(config: dict[str, Any]) -> Flops:
    return Flops(config, table_for(config).names.classes[config["architectures"][0]])


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """Windows as long as the text, of which torch counts the masked part, too."""
    local = {"local_attention": 64} if "modernbert" in name else {}
    config = tiny.config_of(name, **local, **changes)
    return config | {"architectures": [CLASSES.get(name, name) for name in config["architectures"]]}


def counted(model: torch.nn.Module, config: dict[str, Any], backward: bool) -> int:
    """What torch counts in transformers' model, rotary angles (a product, there) left out."""
    ids = tiny.inputs(config)["input_ids"]
    given = {"decoder_input_ids": ids[:, :6]} if config.get("is_encoder_decoder") else {}
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, **given).logits
        if backward:
            logits.sum().backward()
    angles = [sum(c.values()) for name, c in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return int(counter.get_total_flops() - sum(angles))


def work_of(config: dict[str, Any]) -> Work:
    return Work((7, 7, 7), 18, (6, 6, 6)) if config.get("is_encoder_decoder") else WORK


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_every_family_as_torch_counts_it(name: str) -> None:
    """Forward, and with the backward pass of a whole model. Of experts torch counts what the routing executed."""
    config = config_of(name)
    model, flops = tiny.build(config), flops_of(config)
    assert flops.forward(work_of(config)) == counted(model, config, backward=False)
    assert flops.step(work_of(config)) == counted(model, config, backward=True)


@pytest.mark.parametrize("lowest", [0, 1, 3, None])
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama", "qwen3", "t5", "modernbert", "qwen2_moe"])
def test_what_nobody_asks_for_is_not_counted(name: str, lowest: int | None) -> None:
    """All below a layer is frozen (None: all but the head), and autograd leaves out what it need not compute."""
    config = config_of(name, tie_word_embeddings=False)
    model, flops = tiny.build(config), flops_of(config)
    layers = range(len(flops.blocks))
    lowest = len(layers) if lowest is None else lowest
    known = table_for(config).parameters(config, table_for(config).names.classes[config["architectures"][0]])
    parts = [p for p in dict.fromkeys(p.part for p in known.values()) if "layer." in p]
    frozen = {"embeddings", *parts[:lowest]}
    for full_name, parameter in tiny.parameters(model, config).items():
        parameter.requires_grad_(known[full_name].part not in frozen)
    found, wanted = (
        flops.step(work_of(config), layers, {"head", *parts[lowest:]}),
        counted(model, config, backward=True),
    )
    if name == "t5" and lowest == len(layers):  # the encoder's last norm learns, too
        assert wanted < found < 1.1 * wanted
    else:
        assert found == wanted


PROGRAMS = {
    "full": whole(3),
    "bottom 2, top 1 learns": some((0, 1), (1,), False),
    "all run, top 2 learn": some((0, 1, 2), (1, 2), False),
    "one layer and embeddings": some((0,), (0,), True),
    "one layer twice": some((0, 2, 2), (2, 2), False),
    "head only": some((0, 1), (), False),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "gpt2", "llama", "mixtral"])
def test_layer_programs_as_torch_counts_them(kind: str, name: str) -> None:
    """In this project's own cores, on rows of one length, for padding is work that the mathematics does not need; by
    the math backend, because torch has no formula for its fused CPU kernel."""
    config = config_of(kind, tie_word_embeddings=False)
    core = registry.build(config, torch.float64).eval()
    masked = kind in ("bert", "roberta", "modernbert")
    given = batch((9, 9, 9), vocab=29) if masked else flat((9, 9, 9))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        core(given, PROGRAMS[name]).loss.backward()
    given.labels[:] = 1  # the spare places are computed as well
    found = step_flops(Flops(core.hf_config, core.heads), given, PROGRAMS[name])
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


def formula(config: dict[str, Any], lengths: tuple[int, ...], predicted: int, program: Step) -> int:
    """A BERT's step: F = Σ 8H² + 4HI a token + 4H a pair, head 2H² + 2VH a prediction; F + 2 × what learns, less 6H² a
    token where the gradient stops above the embeddings, or 2H² a prediction where only the head learns."""
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    tokens, attended = sum(lengths), sum(n * n for n in lengths)
    layer = tokens * (8 * hidden**2 + 4 * hidden * inner) + 4 * hidden * attended
    head = predicted * 2 * hidden * (hidden + vocab)
    learning = sum(f"layer.{i}" in program.learn for i in program.run)
    stopped = 0 if "embeddings" in program.learn else 6 * hidden**2 * tokens
    unasked = stopped if learning else 2 * hidden**2 * predicted
    return len(program.run) * layer + head + 2 * (learning * layer + head) - unasked


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("cls", ["BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize("tied", [True, False])
def test_bert_exactly(name: str, cls: str, tied: bool) -> None:
    program, lengths = PROGRAMS[name], (5, 1, 10, 3)
    config = tiny.bert_config(cls=cls, tie_word_embeddings=tied)
    found = flops_of(config).step(Work(lengths, 4), program.run, program.learn)
    assert found == formula(config, lengths, 4, program)


def base(model_type: str, **changes: Any) -> Flops:
    return flops_of(tiny.config_of(model_type, **changes))


BASE = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 512}  # fmt: skip
GPT2 = {"n_embd": 768, "n_head": 12, "n_inner": None, "n_layer": 12, "vocab_size": 50257, "n_positions": 1024}


@pytest.mark.parametrize("length, giga", [(128, 0.545), (512, 0.588)])
def test_bert_base_per_token(length: int, giga: float) -> None:
    work = Work([length] * 100, int(0.15 * 100 * length))
    count = base("bert", **BASE).step(work)
    assert count / (100 * length) / 1e9 == pytest.approx(giga, rel=2e-3)
    assert count == 3 * base("bert", **BASE).forward(work)


def test_gpt2_per_token() -> None:
    """6 N + 12 L H T at the whole context, N the numbers that are multiplied; 0.860 GF a token with all 124M in N."""
    flops, matrices = base("gpt2", **GPT2), 12 * 12 * 768**2 + 50257 * 768
    assert flops.step(Work((1024,), 1024)) / 1024 == 6 * matrices + 12 * 12 * 768 * 1024
    assert flops.step(Work((1024,), 1024)) / 1024 / 1e9 == pytest.approx(0.860, rel=0.01)


def test_bert2bert_first_stage_costs_about_three_eighths() -> None:
    """Depths 3, 6, 9, 12, top three learn: 13.5 of 36 layer units when head and stopped gradients are left out."""
    work, flops = Work([128] * 8, 0), base("bert", **BASE)
    learning = {d: {"head", *(f"layer.{i}" for i in range(d - 3, d))} for d in (3, 6, 9, 12)}
    mean = sum(flops.step(work, range(d), learning[d]) for d in learning) / 4
    assert mean / flops.step(work) == pytest.approx(0.375, abs=0.01)


def test_windows_count_what_is_inside() -> None:
    """By the pairs themselves; layers of ModernBERT without a window, and those of causal models, in full."""
    lengths = (1, 3, 11, 16)

    def pairs(config: dict[str, Any]) -> list[int]:
        found, alone = flops_of(config), Work(lengths, 0)
        linear = flops_of(config).forward(Work([1] * sum(lengths), 0), [0]) - found.pair * sum(lengths)
        return [(found.forward(alone, [i]) - linear) // found.pair for i in (0, 1)]

    whole = sum(n * n for n in lengths)
    local = sum(abs(i - j) <= 3 for n in lengths for i in range(n) for j in range(n))
    assert pairs(tiny.config_of("modernbert", local_attention=6)) == [whole, local]
    window = sum(n * min(n, 5) for n in lengths)
    assert pairs(tiny.config_of("mistral", sliding_window=5)) == [window, window]
    assert pairs(tiny.config_of("mistral", sliding_window=None)) == [whole, whole]
    assert pairs(tiny.config_of("qwen2", sliding_window=5)) == [whole, whole]  # which are switched off


def test_unused_sizes_do_not_count() -> None:
    longer = tiny.bert_config(max_position_embeddings=512, type_vocab_size=9)
    assert flops_of(longer).step(WORK) == flops_of(tiny.bert_config()).step(WORK)


def test_light_modules_import_no_torch() -> None:
    code = "import bert2bert.tables.flops, bert2bert.train.compute, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
