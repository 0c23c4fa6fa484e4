"""Models of transformers as a reference: the logits, losses and gradients of a checkpoint of any family.

The only place here that imports its models, and only when it is asked for. A model is made from its config without
initialisation and filled by name from a callable. In float64, the casts to float32 that transformers makes inside
norms, softmaxes and rotary angles are removed, so that two equal functions agree to about 1e-12.

Refuses (`NoReference`): to run without transformers, an architecture that the installed version lacks, and a model that
would not fit into the memory that is free.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bert2bert.errors import InvalidCheckpoint, UserError
from bert2bert.files.memory import free_memory
from bert2bert.growth.live import quiet
from bert2bert.tables import Table

IGNORE = -100
_SHARE = 0.8  # of the free memory that a reference may take

Fetch = Callable[[str], Tensor]


class NoReference(UserError):
    """There is no model of transformers to compare with: not installed, not known to it, or too large to run."""


@dataclass(frozen=True)
class Sample:
    """Token ids and labels, int64 [rows, length]; label -100: not predicted. An encoder-decoder reads the ids and
    writes the labels; in a decoder label i is what follows token i."""

    ids: Tensor
    labels: Tensor


class Double(TorchFunctionMode):
    """Every cast to float32 becomes one to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


def class_of(table: Table, config: Mapping[str, Any], heads: frozenset[str]) -> str:
    """The transformers class of a checkpoint with these heads: the config's own, or the one with most of them; one that
    predicts words, where the checkpoint does, whatever head it has beside that."""
    words = heads & {"lm"}
    fitting = {name: has for name, has in table.names.classes.items() if words <= has <= heads}
    most = max(map(len, fitting.values()), default=0)
    best = [name for name, has in fitting.items() if len(has) == most]
    named = [name for name in config.get("architectures") or () if name in best]
    if not best:
        raise NoReference(
            f"no class of transformers has a {table.model_type} with the heads {', '.join(sorted(heads)) or 'none'}; "
            f"known: {', '.join(table.names.classes)}"
        )
    return (named or best)[0]


def build(
    table: Table, config: Mapping[str, Any], heads: frozenset[str], fetch: Fetch, dtype: torch.dtype
) -> nn.Module:
    """The transformers model of a config in eval mode, filled with ``fetch(canonical name)``.

    Raises NoReference without transformers or the class in it, InvalidCheckpoint for tensors that do not fill it.
    """
    transformers = _transformers()
    name, cls, hf = reference(table, config, heads)
    state = {n: fetch(n).to(dtype) for n in table.parameters(config, table.names.classes[name])}
    with quiet(transformers):
        model, info = cls.from_pretrained(
            None, config=hf, state_dict=state, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    if wrong := {what: sorted(map(str, names)) for what, names in info.items() if names}:
        raise InvalidCheckpoint(f"the checkpoint does not fill a {name} of transformers: {wrong}")
    model.eval().requires_grad_(False)
    return model


def reference(table: Table, config: Mapping[str, Any], heads: frozenset[str]) -> tuple[str, Any, Any]:
    """The transformers class of a checkpoint: its name, it, and its config. Raises NoReference."""
    transformers = _transformers()
    name = class_of(table, config, heads)
    cls = getattr(transformers, name, None)
    if cls is None or config["model_type"] not in transformers.CONFIG_MAPPING:
        raise NoReference(
            f"transformers {transformers.__version__} has no {name}, so there is no reference to compare with.\n"
            f"Install a newer one (pip install -U transformers), or leave the comparison out with --no-logits."
        )
    try:
        hf = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # its validators raise what they like
        raise NoReference(
            f"transformers {transformers.__version__} refuses the config of a {name}: {error}\n"
            f"Correct the config, or leave the comparison out: --no-logits (verify), --no-measure (grow)."
        ) from None
    hf._experts_implementation = "eager"  # grouped matrix products know no float64
    hf.reorder_and_upcast_attn = False  # GPT-2: the same function, in a way that takes 16 or 32 bits for granted
    return name, cls, hf


def run(model: nn.Module, sample: Sample, what: str, vocab: int) -> tuple[Tensor, Tensor]:
    """Logits [predictions, vocab] of the first ``vocab`` tokens, and the mean cross entropy over all tokens in nats (a
    next-sentence head's added, for random labels). what: see `kind`."""
    double = next(model.parameters()).dtype == torch.float64
    with Double() if double else nullcontext():
        out = model(**_inputs(model, sample, what))
    keep = sample.labels != IGNORE
    scores = out.prediction_logits if "prediction_logits" in out else out.logits
    logits = scores[keep]
    loss = F.cross_entropy(logits, sample.labels[keep])
    if "seq_relationship_logits" in out:
        pairs = out.seq_relationship_logits
        loss = loss + F.cross_entropy(pairs, torch.arange(len(pairs)) % 2)
    return logits[:, :vocab], loss


def _inputs(model: nn.Module, sample: Sample, what: str) -> dict[str, Tensor]:
    inputs = {"input_ids": sample.ids}
    if what == "seq2seq":
        config: Any = model.config
        inputs["decoder_input_ids"] = decoder_reads(sample.labels, lambda key: getattr(config, key, None))
    return inputs


def decoder_reads(labels: Tensor, setting: Callable[[str], Any]) -> Tensor:
    """What a decoder reads to write rows of labels: them, moved by one behind its start token. setting: the value of a
    config key, or None."""
    starts = map(setting, ("decoder_start_token_id", "pad_token_id"))
    return F.pad(labels[:, :-1], (1, 0), value=next((token for token in starts if token is not None), 0))


def gradients(model: nn.Module, sample: Sample, what: str, vocab: int) -> dict[str, Tensor]:
    """The loss's gradient by every parameter, dropout off; zeros where a parameter takes no part."""
    model.requires_grad_(True)
    run(model, sample, what, vocab)[1].backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def precision(numel: int, doing: str) -> torch.dtype:
    """The widest dtype in which so many numbers fit into the free memory. Raises NoReference when none does."""
    gc.collect()
    free = free_memory()
    for dtype in (torch.float64, torch.float32):
        if free is None or numel * dtype.itemsize <= _SHARE * free:
            return dtype
    raise NoReference(
        f"{doing} takes about {numel * 4 / 1e9:.3g} GB of memory in float32, and {(free or 0) / 1e9:.3g} GB are free; "
        f"leave it out with --no-logits (verify) or --no-measure (grow), or run on a machine with more."
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise NoReference(
            f"comparing this architecture's function needs transformers, which does not load ({error}).\n"
            f"Install it (pip install transformers), or leave the comparison out: --no-logits (verify), --no-measure "
            f"(grow)."
        ) from None
    return transformers
