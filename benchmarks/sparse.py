"""A dry run of a growth over sparse files: sources and targets of any size that take no room on the disk.

The package's own writers lay a checkpoint out, with every header, structure and offset as it will be; only the tensors'
bytes are left out, as holes, which read as zeros. (The zip records' checksums are therefore not those of zeros; a
memory-mapping reader does not look at them.) Needs a file system with sparse files.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bert2bert.algebra.realise import values
from bert2bert.checkpoints.groups import param_groups
from bert2bert.checkpoints.hub import writer as hub_writer
from bert2bert.checkpoints.job import Job, Tally, TargetGroup, TargetSpec
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.planned import planned
from bert2bert.checkpoints.source import STATES
from bert2bert.checkpoints.target import Target
from bert2bert.commands.grow import target_spec
from bert2bert.commands.plan import describe
from bert2bert.files import torch_writer, zip_writer
from bert2bert.growth.named import Named
from bert2bert.growth.opened import open_growth
from bert2bert.measure.cost import cost
from bert2bert.tables import table_for

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "num_key_value_heads": 8, "initializer_range": 0.02,
}  # fmt: skip


def llama(hidden: int, layers: int, heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        **LLAMA, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": ffn, "head_dim": hidden // heads, **more,
    }  # fmt: skip


# name -> source, target, ranks of the source's files and of the target's
PAIRS = {
    "70B": (llama(4096, 32, 32, 14336), llama(8192, 80, 64, 28672), 16, 64),
    "toy": (llama(1024, 8, 16, 2816, vocab_size=32000), llama(2048, 20, 32, 5632, vocab_size=32000), 2, 8),
}


def fresh_spec(config: dict[str, Any], precision: str = "fp32") -> TargetSpec:
    """A checkpoint of this model at step 100, in the usual two groups."""
    table = table_for(config)
    heads = table.names.classes[config["architectures"][0]]
    parameters = table.parameters(config, heads)
    shapes = {name: p.shape for name, p in parameters.items()}
    hyper = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}
    groups = tuple(
        TargetGroup(g.part, g.decay, g.names, hyper | {"weight_decay": 0.01 * g.decay}, 100)
        for g in param_groups(parameters, "decay")
    )
    counters = {"global_steps": 100, "global_samples": 3200, "skipped_steps": 0}
    return TargetSpec(shapes, table.aliases(config, heads), config, groups, "decay", precision, STATES, counters)


_SAVE, _STREAM = torch_writer.save, torch_writer.stream


def _hole(file: Any, size: int) -> None:
    file.seek(size, io.SEEK_CUR)
    file.truncate()


def save(file: Any, tree: Any, wrote: Callable[[int], None] | None = None) -> int:
    """`frames.save`, with holes in place of the tensors that are streamed."""

    def stream(blank: torch_writer.Blank, counted: Callable[[int], None] | None) -> Iterator[memoryview]:
        if counted is None:
            yield from _STREAM(blank)
        elif blank.nbytes < zip_writer.SMALL:  # it is kept until the next large one
            yield memoryview(bytes(blank.nbytes))
        else:
            _hole(file, blank.nbytes)

    with mock.patch.object(torch_writer, "stream", stream):
        return _SAVE(file, tree, wrote or (lambda count: None))


@contextmanager
def holes() -> Iterator[None]:
    """The package's writers leave the tensors' bytes out."""

    def weights(job: Job, blanks: dict[str, Any], file: Any) -> int:
        empty = {n: torch_writer.Blank(b.shape, b.dtype, lambda: ()) for n, b in blanks.items()}
        with mock.patch.object(hub_writer, "stream", lambda *_: ()):
            end = written(job, empty, file)
        _hole(file, end)
        return end

    written = hub_writer._weights
    with mock.patch.object(torch_writer, "save", save), mock.patch.object(hub_writer, "_weights", weights):
        yield


def _nothing(name: str, state: str, start: int, stop: int) -> torch.Tensor:
    raise RuntimeError(f"a dry run asked for {name} {state} {start}:{stop}")


def lay_out(folder: Path, spec: TargetSpec, target: Target) -> int:
    """Every file of a checkpoint, tensors as holes; the bytes of tensors in it."""
    tag = folder if target.format == "hub" else folder / spec.tag
    with holes():
        plans = planned(Job(spec, _nothing, Tally.new()), target)
        for plan in plans:
            path = tag / plan.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                if plan.write(file) != plan.payload:  # type: ignore[arg-type]
                    raise RuntimeError(f"{plan.name} is not laid out as planned")
    if target.format != "hub":
        (folder / "latest").write_text(spec.tag)
    return sum(plan.payload for plan in plans)


def _on_disk(folder: Path) -> tuple[int, int]:
    """Bytes that the files say they have, and bytes that they take."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(s.st_size for s in stats), sum(512 * s.st_blocks for s in stats)


def dry_run(folder: Path, pair: str, width: str = "hyperclone", depth: str = "stack") -> dict[str, Any]:
    """Plan and lay out a growth over sparse files. Imports are done when this is called."""
    small, large, source_ranks, target_ranks = PAIRS[pair]
    target = Target("zero", 3, target_ranks)
    sources = {"zero": folder / "zero", "hub": folder / "hub"}
    lay_out(sources["zero"], fresh_spec(small), Target("zero", 3, source_ranks))
    lay_out(sources["hub"], fresh_spec(small), Target("hub"))
    config = folder / "large.json"
    config.write_text(json.dumps(large))

    found: dict[str, Any] = {"pair": pair, "plan_seconds": {}}
    for form in ("hub", "zero"):
        start = time.perf_counter()
        growth = open_growth(sources[form], config, width=width, depth=depth)
        described = describe(growth)
        expected = cost(growth, target_ranks, (2.0, 1.0))
        text = described.summary() + "\n" + expected.line()
        found["plan_seconds"][form] = time.perf_counter() - start
    found |= {"summary": text, "cost": expected.as_json(), "parameters": list(described.parameters)}

    start = time.perf_counter()
    spec = target_spec(Named.of(growth, "zero"), replace(target, precision="bf16"))
    payload = lay_out(folder / "target", spec, target)
    found["lay_out_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    grown = open_source(folder / "target")
    if {n: m.shape for n, m in grown.tensors.items()} != spec.shapes:
        raise RuntimeError("the checkpoint laid out does not hold the tensors planned")
    found["open_seconds"] = time.perf_counter() - start
    biggest = max(growth.plan.tensors, key=lambda n: growth.plan.tensors[n].shape[0])
    rows = values(growth.plan, growth.reads)(biggest, "exp_avg", 0, 2)
    if rows.shape != grown.read(biggest, "exp_avg", 0, 2).shape:
        raise RuntimeError(f"{biggest}: {tuple(rows.shape)} rows are not what the target has room for")
    found["target_tensor_bytes"] = payload
    for name, part in (("source", sources["zero"]), ("source_hub", sources["hub"]), ("target", folder / "target")):
        found[f"{name}_bytes"], found[f"{name}_on_disk"] = _on_disk(part)
    return found
