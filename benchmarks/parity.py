"""Parity of the training path with float64, with transformers and with bare torch; run by gpu.py.

A result must lie within 1e-4 of its float64 value in fp32 (TF32 would be about 3e-4 off), and in bf16 at most twice as
far from float64 as the plain bf16 computation of the same thing is: padded attention, transformers' model, layers that
are not compiled. Distance is ‖found − expected‖ / ‖expected‖ over all tensors together, where one tensor may be ten
times as far off as the whole (gradients of key biases are zero except for rounding and left out).

Every check yields (name, distance, distance allowed).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert2bert.checkpoints.groups import by_name
from bert2bert.data.bins import TokenBins
from bert2bert.data.loader import Loader
from bert2bert.data.objective import Masked
from bert2bert.model.attention import attend, plan_padding, uses_kernel
from bert2bert.model.batch import Batch
from bert2bert.model.bert import Bert
from bert2bert.model.core import Shared
from bert2bert.model.masked import label_loss
from bert2bert.model.program import Step, full
from bert2bert.model.registry import build
from bert2bert.recipe import AdamW, Data, Phase, Recipe

Checks = Iterator[tuple[str, float, float]]

ROOT = Path(__file__).resolve().parent.parent
FP32, WORSE = 1e-4, 2.0
SIZES = {  # hidden, layers, heads, layers of a sub-model's stage, rows of 512, steps of a round
    "BERT-base": (768, 12, 12, 3, 64, 20),
    "BERT-large": (1024, 24, 16, 3, 32, 10),
    "toy BERT": (64, 4, 4, 2, 2, 1),
}


def model_dict(size: str, seq_len: int, dropout: float) -> dict[str, Any]:
    hidden, layers, heads, *_ = SIZES[size]
    return {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 30522, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * hidden,
        "max_position_embeddings": seq_len, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def sub_model(depth: int, learning: int) -> Step:
    return Step(tuple(range(depth)), frozenset({"head", *(f"layer.{i}" for i in range(depth - learning, depth))}))


class Bare:
    """What a careful user would write: bf16 weights, fp32 master weights, clipping, fused AdamW."""

    def __init__(self, model: torch.nn.Module, adam: AdamW, clip: float) -> None:
        self.masters = {n: p.detach().float().clone() for n, p in model.named_parameters()}
        self.grads = [torch.empty_like(master) for master in self.masters.values()]
        for master, grad in zip(self.masters.values(), self.grads, strict=True):
            master.grad = grad
        self.weights, self.clip = list[Tensor](model.bfloat16().parameters()), clip
        of = by_name({n: m.shape for n, m in self.masters.items()})
        groups = [
            {
                "params": [m for n, m in self.masters.items() if of[n].decay == on],
                "weight_decay": adam.weight_decay * on,
            }
            for on in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=adam.lr, betas=adam.betas, eps=adam.eps, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        masters = list(self.masters.values())
        torch._foreach_copy_(self.grads, [w.grad for w in self.weights if w.grad is not None])
        for weight in self.weights:
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, self.clip)
        self.optimizer.step()
        torch._foreach_copy_(self.weights, masters)


def make_engine(config: dict[str, Any], model: Bert, bins: TokenBins, seq_len: int, rows: int, adam: AdamW) -> Any:
    from bert2bert.train import engine as engines
    from bert2bert.train.ds_config import read

    recipe = Recipe("benchmark", config, Data(str(bins.folder), seq_len), rows, (Phase("all", 10**6),), adam)
    ds = read(ROOT / "ds_configs/zero2_bf16.json") | {"train_micro_batch_size_per_gpu": rows}
    if not next(model.parameters()).is_cuda:
        ds["zero_optimization"] = read(ROOT / "ds_configs/zero2_cpu.json")["zero_optimization"]
    return engines.build(recipe, ds, model)


def backend(device: torch.device) -> str:
    return "inductor" if device.type == "cuda" else "aot_eager"


def distance(found: Any, expected: Any) -> float:
    found, expected = (x if isinstance(x, dict) else {"": x} for x in (found, expected))
    if set(found) != set(expected):
        return math.inf
    pairs = [(found[n].double(), expected[n].double()) for n in expected if not n.endswith("key.bias")]
    squares = [(float((a - b).square().sum()), float(b.square().sum())) for a, b in pairs]
    worst = max(off if off == 0 else off / size if size else math.inf for off, size in squares)
    whole = sum(off for off, _ in squares) / sum(size for _, size in squares)
    return max(math.sqrt(whole), math.sqrt(worst) / 10)


def gradients(model: Bert, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that the loss reaches."""
    named = dict(model.named_parameters())
    got = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, got, strict=True) if g is not None}


def by_hand(model: Bert, batch: Batch, step: Step) -> Tensor:
    """The loss of a sub-model written down without `Step`; padded attention; never compiled."""
    padding = plan_padding(batch.cu_seqlens, batch.max_seqlen, len(batch.tokens))
    shared = Shared(batch.cu_seqlens, batch.max_seqlen, padding)
    x = model.bert.embeddings(batch.tokens, batch.types, batch.positions)
    lowest = step.lowest(model.parts)
    for place, number in enumerate(step.run):
        x = x.detach() if place == lowest and "embeddings" not in step.learn else x
        x = model.bert.encoder.layer[number](x, shared)
    return label_loss(model.cls.predictions(x[batch.targets]), batch.labels)[0]


def kernel_parity(device: torch.device, heads: int, head_size: int) -> Checks:
    lengths = torch.tensor([512, 1, 7, 300, 64, 512, 129, 33, 0, 0])
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    q, k, v, out = torch.randn(4, int(lengths.sum()), heads, head_size, device=device).bfloat16()
    yield "variable-length kernel in use (0: yes)", float(not uses_kernel(device, q.dtype, head_size, 0.0, True)), 0.0
    padding = plan_padding(ends, 512, len(q))
    results: list[tuple[Any, Any]] = []
    for dtype, pad in ((torch.float64, padding), (torch.bfloat16, padding), (torch.bfloat16, None)):
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        found = attend(given[0], given[1], given[2], ends, 512, plan=pad)
        back = torch.autograd.grad(found, given, out.to(dtype))
        results.append((found.detach(), dict(zip("qkv", back, strict=True))))
    for what, exact, plain, kernel in zip(("forward", "gradients"), *results, strict=True):
        name = f"variable-length kernel, bf16, {what}, against padded attention"
        yield name, distance(kernel, exact), WORSE * distance(plain, exact)


def model_parity(size: str, seq_len: int, bins: TokenBins, device: torch.device) -> Checks:
    from transformers import BertConfig as TheirConfig
    from transformers import BertForMaskedLM

    config = model_dict(size, seq_len, dropout=0.0)
    rows, learning = 4, SIZES[size][3]
    batch = next(Loader(bins, "train", Masked(), seq_len, rows, 0, 1, seed=0)).to(device)
    exact = build(config).to(device).eval()
    with torch.no_grad():  # fresh biases of 0 and gains of 1 would hide mistakes; the same weights in every precision
        for name, p in exact.named_parameters():
            p.copy_((p + (0.1 if "LayerNorm" in name else 0.02) * torch.randn_like(p)).bfloat16())
    weights = exact.double().state_dict()

    def ours(dtype: torch.dtype) -> Bert:
        model = build(config).to(device, dtype).eval()
        model.load_state_dict(weights)
        return model

    def logits(model: Bert) -> Tensor:
        with torch.no_grad():
            return model(batch, return_logits=True).logits

    def theirs(dtype: torch.dtype) -> Tensor:
        """transformers' logits, each document a padded row."""
        model = BertForMaskedLM._from_config(TheirConfig(**config), attn_implementation="sdpa").to(device, dtype).eval()
        model.load_state_dict(weights)
        lengths = batch.cu_seqlens.long().diff()
        mask = torch.arange(int(lengths.max()), device=device) < lengths[lengths > 0, None]
        ids = torch.zeros_like(mask, dtype=torch.int64)
        ids[mask] = batch.tokens
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask.long()).logits[mask][batch.targets]

    single, half, compiled = ours(torch.float32), ours(torch.bfloat16), ours(torch.bfloat16)
    compiled.compile_layers(backend(device))
    expected = logits(exact)
    yield "logits, fp32, against transformers", distance(logits(single), theirs(torch.float32)), FP32
    allowed = WORSE * distance(theirs(torch.bfloat16), expected)
    yield "logits, bf16, against transformers", distance(logits(half), expected), allowed
    layers = exact.config.num_hidden_layers
    for program in (full(exact.parts), sub_model(layers, learning), sub_model(learning, learning)):
        what = "all layers" if "embeddings" in program.learn else f"sub-model of {len(program.run)} layers"
        wanted = gradients(exact, by_hand(exact, batch, program))
        yield f"gradients, fp32, {what}", distance(gradients(single, single(batch, program).loss), wanted), FP32
        plain = distance(gradients(half, by_hand(half, batch, program)), wanted)
        found = distance(gradients(compiled, compiled(batch, program).loss), wanted)
        yield f"gradients, bf16, {what}, compiled against eager", found, WORSE * plain


def engine_parity(size: str, seq_len: int, bins: TokenBins, device: torch.device) -> Checks:
    """One step with an eps that makes Adam's update smooth in the gradient; bf16 gradients' own rounding is allowed."""
    from bert2bert.train import partitions

    config, adam, rows = model_dict(size, seq_len, dropout=0.0), AdamW(lr=1e-3, eps=1e-3, weight_decay=0.01), 4
    batch = next(Loader(bins, "train", Masked(), seq_len, rows, 0, 1, seed=0)).to(device)
    model = build(config).bfloat16().float().to(device)  # master weights begin as bf16 weights
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    other = build(config).to(device)
    other.load_state_dict(model.state_dict())
    bare = Bare(other, adam, clip=1.0)
    engine = make_engine(config, model, bins, seq_len, rows, adam)
    engine.set_lr(adam.lr)
    engine.backward(engine.forward(batch)[0])
    other(batch).loss.backward()
    bare.step()
    found = {f.name: f.of(f.master).view(engine.shape(f.name)) - start[f.name] for f in partitions.fragments(engine)}
    expected = {name: (bare.masters[name].detach() - start[name]) for name in start}
    off = distance(found, expected)
    engine.destroy()
    yield "one step of the engine (ZeRO-2, bf16) against bare torch: update of the master weights", off, 2.0**-8
