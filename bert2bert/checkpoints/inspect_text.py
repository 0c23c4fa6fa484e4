"""The results of `inspect` and `check` as text for a terminal."""

from __future__ import annotations

from typing import Any

from bert2bert.checkpoints.inspect import HYPER, Architecture, Check, Inspection, TensorFacts
from bert2bert.errors import some


def render_check(found: Check) -> str:
    """The result of `check` as text: a line for every bad file."""
    lines = [f"bad          {name}: {problem}" for name, problem in found.bad.items()]
    lines += [f"unlisted     {name}: not of this checkpoint" for name in found.unlisted]
    how = "sizes and contents" if found.digests == found.files else "sizes"
    if 0 < found.digests < found.files:
        how = f"sizes, and contents of {found.digests}"
    verdict = f"{len(found.bad)} bad" if found.bad else "all as the manifest says"
    files = f"{found.files} files, {_bytes(found.bytes)}"
    return "\n".join([*lines, f"checked      {found.folder}: {files}, {how}: {verdict}"])


def _bytes(size: float) -> str:
    power = min((len(f"{size:.0f}") - 1) // 3, 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values)) if len(values) < 6 else f"{values[0]} to {values[-1]}"


def render(found: Inspection, tensors: bool = False) -> str:
    """The result of `inspect` as text; ``tensors`` adds a table of all tensors."""
    ranks = f"{found.world_size} rank{'s' * (found.world_size != 1)}"
    formats = {
        "zero": f"native DeepSpeed ZeRO stage {found.stage}, {ranks}{_split(found.expert_parallel)}",
        "universal": "DeepSpeed universal",
        "hub": "Hugging Face",
    }
    lines = [
        ("checkpoint", found.folder),
        ("format", formats[found.format]),
        ("precision", found.precision),
        ("architecture", _render_architecture(found.architecture)),
        ("tensors", f"{found.tensor_count}, {found.parameters:,} parameters"),
        ("files", f"{found.files}, {_bytes(found.bytes)}"),
        ("optimizer", _render_optimizer(found)),
    ]  # fmt: skip
    if counters := {k.removeprefix("global_"): v for k, v in found.counters.items()}:
        lines.append(("counters", ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in counters.items())))
    if found.lr_scheduler is not None:
        lines.append(("lr scheduler", ", ".join(f"{k} {v}" for k, v in list(found.lr_scheduler.items())[:6])))
    if found.loss_scale is not None:
        lines.append(("loss scale", f"{found.loss_scale:g}"))
    if found.tied:
        lines.append(("tied", some([f"{absent} = {kept}" for absent, kept in found.tied.items()], 4)))
    for key in ("frozen", "buffers", "extras", "client_state"):
        if names := getattr(found, key):
            lines.append((key.replace("_", " "), some(names, 4)))
    if found.unopened:
        lines.append(("not opened", f"{some(found.unopened, 4)}: classes that this program does not know"))
    if found.unread:
        lines.append(("not stored", f"{some(found.unread, 4)}: the model has them, the checkpoint does not"))
    lines += _render_history(found)
    text = "\n".join(f"{key:<13} {value}" for key, value in lines)
    if found.groups:
        text += "\n\n" + _table(["group", "tensors", "parameters", "step", *HYPER], _group_rows(found))
    if tensors:
        text += "\n\n" + _table(["tensor", "shape", "dtype", "group", "step"], _tensor_rows(found))
    return text


def _group_rows(found: Inspection) -> list[list[str]]:
    return [
        [str(i), str(group.tensors), f"{group.parameters:,}", _numbers(group.step)]
        + [_value(group.hyper.get(key, "")) for key in HYPER]
        for i, group in enumerate(found.groups)
    ]


def _tensor_rows(found: Inspection) -> list[list[str]]:
    return [[t.name, "x".join(map(str, t.shape)) or "scalar", t.dtype, _owner(t), str(t.step)] for t in found.tensors]


def _split(size: int | None) -> str:
    return "" if size is None else f", {size} rank{'s share' if size > 1 else ' holds'} the experts"


def _owner(tensor: TensorFacts) -> str:
    if tensor.group is not None:
        return str(tensor.group)
    return "-" if tensor.trainable else "frozen"


def _render_architecture(found: Architecture | None) -> str:
    if found is None:
        return "unknown: no config.json beside it"
    sizes = ", ".join(f"{size} {value}" for size, value in found.sizes.items() if value is not None)
    return f"{some(found.classes or [], 4) or found.type or 'unnamed'}: {sizes}"


def _render_optimizer(found: Inspection) -> str:
    others = f"; {', '.join(found.other_states)}, which this program does not carry over" * bool(found.other_states)
    if len(found.states) == 1:
        return "no Adam state" + others
    return f"{' and '.join(found.states[1:])}, step {_numbers(found.step)}" + others


def _render_history(found: Inspection) -> list[tuple[str, str]]:
    lines = []
    if growth := found.growth:
        source = growth.source
        options = ", ".join(f"{k} {growth.operators[k]}" for k in ("width", "depth", "seed") if k in growth.operators)
        lines.append(("grown from", f"{source.get('path')} ({source.get('format')}, tag {source.get('tag')})"))
        lines.append(("grown by", f"{options}; plan {growth.plan_digest[:16]}"))
        for what, reasons in growth.exactness.items():
            lines.append((f"  {what}", "not exact: " + "; ".join(reasons) if reasons else "exact"))
    if training := found.training:
        lines.append(("trained", ", ".join(f"{k} {_value(v)}" for k, v in training.spent.items()) or "nothing yet"))
    if found.versions:
        lines.append(("written by", ", ".join(f"{k} {v}" for k, v in found.versions.items())))
    return lines


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_value(v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    )
