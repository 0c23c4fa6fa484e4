"""Which layers run and which learn in one optimizer step: a pure function of the recipe, the seed and the step.

Every rank computes the same program by itself, and a resumed run the same one again. Imports no torch.
"""

from __future__ import annotations

import hashlib

from bert2bert.model.program import LayerProgram, full
from bert2bert.recipe import Full, SubModels


def draw(program: Full | SubModels, step: int, seed: int, layers: int) -> LayerProgram:
    """The layer program of the run's 0-based optimizer ``step`` for a model of ``layers`` layers.

    Full: all run, all learn, embeddings too. SubModels(k): the bottom d layers run, d uniform over {k, 2k, ..., L}; the
    top k of them learn, the embeddings do not (bert2BERT, ACL 2022, algorithm 2; the head, which holds the tied word
    embedding, always learns). ValueError if k does not divide ``layers`` (a recipe is checked when it is loaded).
    """
    if isinstance(program, Full):
        return full(layers)
    k = program.layers_per_stage
    if layers % k:
        raise ValueError(f"stages of {k} layers do not divide a model of {layers}")
    # A hash and not a generator: the draw of a step does not depend on the steps before it.
    digest = hashlib.blake2b(f"sub-model {seed} {step}".encode(), digest_size=8).digest()
    depth = k * (1 + int.from_bytes(digest, "big") % (layers // k))
    return LayerProgram(run=tuple(range(depth)), learn=tuple(range(depth - k, depth)), embeddings_learn=False)
