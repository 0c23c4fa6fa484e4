r"""BERT-large whose layers share their weights at first, then not (SWE: Yang et al., 2021, arXiv 2110.03848).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/bert_share_unshare.py --bins bins/wiki_books --output runs/swe
           (SWE-F, unshared at a step; --set size=adaptive: SWE-A, once the layers' gradients disagree;
           --set size=multi: SWE-M, groups of layers split step by step, once two neighbours in one disagree)
Machine:   8 x H100; `bert2bert plan --recipe recipes/bert_share_unshare.py` says the FLOPs of every phase.
Expected:  not yet run at this size. The paper reports, at 500,000 steps, masked-LM accuracies of 73.72 (SWE-F), 73.86
           (SWE-A) and 73.73 (SWE-M), of 73.21 without sharing, and of 74.42 without sharing at 1,000,000 steps.

The settings:
  known from the paper's text        24 layers; 512 rows of 512 tokens; shared for the first 50,000 of 500,000 steps;
                                     gradients are the mean over the uses; one schedule over both phases, 10,000 steps
                                     of warm-up to 3e-4, linear to 0; AdamW (0.9, 0.999), decay 0.01; SWE-A:
                                     correlations of neighbours every 1,000 steps, unshared when more than half are
                                     below 0.5 three times in a row; SWE-M: a group is split between two layers that
                                     correlate less than that, again and again
  differs                            the paper's model has its norms inside the residual branches, a BERT after them:
                                     the paper trains such a one at 1e-4; SWE-M splits all groups in their middles, for
                                     the sizes of a recipe's phases are known before it runs, where the paper splits
                                     one group, between the two layers that disagree
  assumed                            moments are copied to every layer (the paper does not say); SWE-A shares for at
                                     most 250,000 steps; SWE-M splits after three checks in a row, as SWE-A, and after
                                     25,000 steps at the latest
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Agreement, Full, Grow, Phase, Recipe, RunSteps, Schedule, Shared, load_recipe

_scratch = Path(__file__).with_name("bert_base_scratch.py")


def _base(base: Recipe, name: str, layers: int, peak: float, **sizes: int) -> tuple[Recipe, int]:
    model = {**(base.model or {}), **sizes, "num_hidden_layers": 1}
    return replace(base, name=name, model=model, optimizer=replace(base.optimizer, lr=peak)), layers


def _fixed(base: Recipe, layers: int, shared: int, steps: int, warmup: int) -> Recipe:
    """SWE-F. shared: steps before unsharing, of all steps."""
    line = Schedule("linear", warmup, of="run", steps=steps)
    grow = Grow({"num_hidden_layers": layers}, depth="unshare")
    phases = (
        Phase("shared", shared, Shared(times=layers), line),
        Phase("unshared", steps - shared, Full(), line, grow=grow),
    )
    return replace(base, phases=phases)


def _adaptive(fixed: Recipe, agreement: Agreement, most: int, steps: int) -> Recipe:
    """SWE-A. most: steps of the shared phase at most."""
    shared, unshared = fixed.phases
    ends = replace(unshared, steps=None, until=RunSteps(steps))
    return replace(fixed, name=fixed.name + "-adaptive", phases=(replace(shared, steps=most, until=agreement), ends))


def _multi(fixed: Recipe, layers: int, groups: tuple[int, ...], agreement: Agreement, most: int, steps: int) -> Recipe:
    """SWE-M. groups: their numbers, phase by phase; most: steps of a phase before the last at most."""
    line = fixed.phases[0].schedule
    ends = replace(agreement, share=0.0)  # one pair is enough
    split = (
        Phase(
            f"{n} groups",
            most,
            Shared(uses=(layers // n,) * n),
            line,
            ends,
            Grow({"num_hidden_layers": n}, depth="interleave"),
        )
        for n in groups[1:-1]
    )
    last = Phase(
        "unshared", None, Full(), line, RunSteps(steps), Grow({"num_hidden_layers": groups[-1]}, depth="interleave")
    )
    first = replace(fixed.phases[0], steps=most, until=ends)
    return replace(fixed, name=fixed.name + "-multi", phases=(first, *split, last))


_large, _layers = _base(
    load_recipe(_scratch), "bert-swe", 24, 3e-4, hidden_size=1024, num_attention_heads=16, intermediate_size=4096
)
_small, _few = _base(load_recipe(_scratch, ["size=tiny"]), "bert-swe-tiny", 4, 2e-3)

recipe = _fixed(_large, _layers, 50_000, 500_000, 10_000)
adaptive = _adaptive(recipe, Agreement(), 250_000, 500_000)
multi = _multi(recipe, _layers, (1, 2, 4, 12, 24), Agreement(), 25_000, 500_000)

tiny = _fixed(_small, _few, 20, 60, 6)  # half a minute on a CPU
_often = Agreement(threshold=0.9, every=5, patience=2)
adaptive_tiny = _adaptive(tiny, _often, 40, 60)
multi_tiny = _multi(tiny, _few, (1, 2, 4), _often, 20, 60)
