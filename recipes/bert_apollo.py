r"""Apollo: BERT-base of 1, 3, 6 and 12 layers, run at sampled depths by sharing them (Pan et al., AAAI 2024).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/bert_apollo.py --bins bins/wiki_books --output runs/apollo
Machine:   8 x H100; `bert2bert plan --recipe recipes/bert_apollo.py` says the FLOPs of every phase.
Expected:  not yet run at this size. What the paper (arXiv 2401.09192) saves in percent was not found in what was read
           of it.

The settings:
  known from the released code       1, 3, 6 and 12 layers until the ends of epochs 2, 4, 10 and 40; a depth between
                                     those and 12 sampled every step, low ones more often, made by sharing layers (i *
                                     N // d); new layers copy layer i * N_old // N_new; rate 1e-4, warmed up over 2.5 %
                                     of the steps, cosine; decay 0.01
  differs                            every rank draws the same depth, where the released code lets each draw its own;
                                     new layers take their moments along, where there the new slots keep what they had
  assumed                            batch, row length, betas and dropout as bert_base_scratch.py; gradients of shared
                                     layers are summed, as automatic differentiation does
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Full, Grow, Phase, Recipe, Schedule, VirtualDepth, load_recipe

_scratch = Path(__file__).with_name("bert_base_scratch.py")


def _made(base: Recipe, name: str, layers: tuple[int, ...], epochs: tuple[int, ...], epoch: int, peak: float) -> Recipe:
    """layers: phase by phase; epochs: at whose ends the phases end; epoch: its steps."""
    model, total = base.model or {}, epochs[-1] * epoch
    wave = Schedule("cosine", max(total // 40, 1), peak, of="run")
    phases = []
    for i, (n, end) in enumerate(zip(layers, epochs, strict=True)):
        steps = (end - (epochs[i - 1] if i else 0)) * epoch
        program = VirtualDepth(layers[-1]) if n < layers[-1] else Full()
        grow = Grow({"num_hidden_layers": n}, depth="interpolate") if i else None
        phases.append(Phase(f"{n} layer{'s' * (n > 1)}", steps, program, wave, grow=grow))
    return replace(base, name=name, model={**model, "num_hidden_layers": layers[0]}, phases=tuple(phases))


recipe = _made(load_recipe(_scratch), "bert-apollo", (1, 3, 6, 12), (2, 4, 10, 40), 12_500, 1e-4)
tiny = _made(  # a minute on a CPU
    load_recipe(_scratch, ["size=tiny"]), "bert-apollo-tiny", (1, 2, 4), (4, 8, 20), 3, 2e-3
)
