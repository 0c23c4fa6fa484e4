"""Forward and backward of each model core on the CPU, next to transformers' own model, in one run.

    python benchmarks/cores.py [CORE…] [--rounds 7] [--tokens 4096] [--row N] [--toy] [--json]

Rows of each core's customary length: 512 tokens for BERT and ModernBERT, 1,024 for GPT-2, 2,048 for Llama. Two ways to
fill them, the same documents for both contestants:

  packed   documents of article-like lengths fill every row; transformers is given the rows without a mask, its fastest
           way, and attends across documents
  padded   one document a row; transformers is given rows padded to the longest of the batch, and their mask

Both compute the loss of the same predictions (15 % of the tokens of an encoder, whose head transformers evaluates at
every position, as it does; every next token of a decoder) and all gradients, in float32 on one thread, eager. Processor
time is measured, rounds alternate, and the median of the rounds' ratios is reported. Goals: encoders 1.5 and 2 times as
fast, decoders 1.2 and 1.5 times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import transformers

from bert2bert.model import registry
from bert2bert.model.batch import IGNORE, Batch
from bert2bert.terminal.arguments import Parser

_SIZES = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
CORES: dict[str, tuple[int, dict[str, Any]]] = {
    "bert": (512, {
        **_SIZES, "architectures": ["BertForMaskedLM"], "intermediate_size": 1024, "max_position_embeddings": 512,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }),
    "modernbert": (512, {
        **_SIZES, **_NO_TOKENS, "architectures": ["ModernBertForMaskedLM"], "intermediate_size": 384,
        "max_position_embeddings": 512, "pad_token_id": 0,
    }),
    "gpt2": (1024, {
        "architectures": ["GPT2LMHeadModel"], "vocab_size": 8192, "n_embd": 256, "n_layer": 4, "n_head": 4,
        "n_positions": 1024, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0,
        "eos_token_id": 0,
    }),
    "llama": (2048, {
        **_SIZES, "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, "intermediate_size": 688,
        "max_position_embeddings": 2048,
    }),
}  # fmt: skip
GOALS = {"masked": {"packed": 1.5, "padded": 2.0}, "causal": {"packed": 1.2, "padded": 1.5}}


def lengths_of(way: str, row: int, rows: int, rng: np.random.Generator) -> list[int]:
    """Documents with log-normal lengths (median 150 tokens) that fill the rows, or one a row."""
    drawn = np.clip(rng.lognormal(5.0, 1.0, 64 * rows).astype(int), 8, row).tolist()
    if way == "padded":
        return drawn[:rows]
    lengths = []
    for _ in range(rows):
        left = row
        while left:
            lengths.append(min(left, drawn.pop()))
            left -= lengths[-1]
    return lengths


def batch_of(lengths: list[int], row: int, masked: bool, vocab: int, rng: np.random.Generator) -> Batch:
    total = sum(lengths)
    tokens = torch.from_numpy(rng.integers(5, vocab, total))
    if masked:
        targets = torch.from_numpy(np.sort(rng.choice(total, max(1, round(0.15 * total)), replace=False)))
        labels = tokens[targets]
    else:
        targets = None
        labels = torch.cat([torch.cat((part[1:], torch.tensor([IGNORE]))) for part in tokens.split(lengths)])
    return Batch(
        tokens=tokens, positions=torch.cat([torch.arange(n) for n in lengths]), types=torch.zeros_like(tokens),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(), max_seqlen=row, targets=targets, labels=labels,
        lengths=np.array(lengths),
    )  # fmt: skip


def theirs(batch: Batch, row: int, way: str, masked: bool) -> dict[str, torch.Tensor]:
    """What transformers is given for the same documents."""
    labels = torch.full_like(batch.tokens, IGNORE) if masked else batch.tokens
    if batch.targets is not None:
        labels[batch.targets] = batch.labels
    if way == "packed":
        return {"input_ids": batch.tokens.view(-1, row), "labels": labels.view(-1, row)}
    mask = torch.arange(int(batch.lengths.max())) < torch.from_numpy(batch.lengths)[:, None]
    ids, answers = torch.zeros(mask.shape, dtype=torch.int64), torch.full(mask.shape, IGNORE)
    ids[mask], answers[mask] = batch.tokens, labels
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": answers}


def seconds(model: torch.nn.Module, *inputs: Any, **named: Any) -> float:
    """Processor time of a forward and a backward pass."""
    model.zero_grad()
    start = time.process_time()
    model(*inputs, **named).loss.backward()
    return time.process_time() - start


def compare(name: str, tokens: int, rounds: int, row: int) -> dict[str, Any]:
    """Both ways of one core: {"packed": ratio, "padded": ratio, "row": slots, "tokens_per_s": {way: ours}}."""
    config = CORES[name][1]
    config = {"model_type": name, **config}
    masked = registry.objective_of(config) == "masked"
    torch.manual_seed(0)
    ours = registry.build(config)
    other = getattr(transformers, config["architectures"][0])._from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="sdpa"
    )
    rng, found = np.random.default_rng(0), {}
    speed: dict[str, float] = {}
    for way in ("packed", "padded"):
        rows = max(2, tokens // (row if way == "packed" else 256))  # documents are of about 250 tokens
        batch = batch_of(lengths_of(way, row, rows, rng), row, masked, config["vocab_size"], rng)
        given = theirs(batch, row, way, masked)
        taken = [(seconds(ours, batch), seconds(other, **given)) for _ in range(rounds + 1)][1:]  # the first warms up
        found[way] = statistics.median(b / a for a, b in taken)
        speed[way] = batch.real_tokens / statistics.median(a for a, _ in taken)
    return {**found, "row": row, "tokens_per_s": speed, "goals": GOALS["masked" if masked else "causal"]}


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cores", nargs="*", choices=[*CORES, []], metavar="CORE", help=f"of {', '.join(CORES)}")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds of which the median counts")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="token slots of a batch")
    parser.add_argument("--row", type=int, metavar="N", help="slots of a row, fewer than is customary")
    parser.add_argument("--toy", action="store_true", help="one round of one small batch: it shows that all runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    tokens, rounds = (1, 1) if options.toy else (options.tokens, options.rounds)
    found = {
        name: compare(name, tokens, rounds, min(options.row or CORES[name][0], CORES[name][0]))
        for name in options.cores or CORES
    }
    if options.json:
        print(json.dumps(found))
        return
    print("| core | rows | our speed / transformers' | goal | our tokens/s of processor time |\n|---|---|---|---|---|")
    for name, result in found.items():
        for way, goal in result["goals"].items():
            missed = "" if result[way] >= goal else ", **missed**"
            speed = result["tokens_per_s"][way]
            print(f"| {name} | {way}, {result['row']} slots | {result[way]:.2f} ×{missed} | {goal} × | {speed:,.0f} |")


if __name__ == "__main__":
    main()
