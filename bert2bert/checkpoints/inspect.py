"""Say what is in a checkpoint, any checkpoint, without reading its tensors; or read every byte of it and say what is
bad.

`inspect` and `check` give plain data (it goes to JSON as it is), `render` and `render_check` the text for a terminal.
Refuses what `open_source` refuses; `check`, a folder without a manifest, for there is nothing to compare with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bert2bert.checkpoints.commit.pending import MANIFEST, file_sizes, listed, sealed
from bert2bert.checkpoints.open import locate, open_source
from bert2bert.checkpoints.source import Source
from bert2bert.errors import InvalidCheckpoint, some
from bert2bert.files.digest import FILE_DIGEST, file_digest
from bert2bert.files.texts import read_json

_HYPER = ("lr", "weight_decay", "betas", "eps")
_SIZES = (  # config keys of BERT and of GPT-2
    ("layers", ("num_hidden_layers", "n_layer")),
    ("hidden", ("hidden_size", "n_embd")),
    ("heads", ("num_attention_heads", "n_head")),
    ("intermediate", ("intermediate_size", "n_inner")),
    ("vocabulary", ("vocab_size",)),
    ("positions", ("max_position_embeddings", "n_positions")),
)


def inspect(path: str | Path, tag: str | None = None) -> dict[str, Any]:
    """What the checkpoint at ``path`` holds; ``tag`` as in `open_source`. ``bytes`` is the size of its files."""
    source = open_source(path, tag)
    tensors = source.tensors.values()
    manifest = source.manifest or {}
    return {
        "path": str(source.path),
        "folder": str(source.folder),
        "tag": source.tag,
        "format": source.form,
        "stage": source.stage,
        "world_size": source.world_size,
        "expert_parallel": source.expert_parallel.size if source.expert_parallel else None,
        "precision": source.precision,
        "architecture": _architecture(source.config),
        "tensor_count": len(tensors),
        "parameters": sum(m.numel for m in tensors),
        "bytes": sum(file.stat().st_size for file in source.files),
        "files": len(source.files),
        "states": list(source.states),
        "other_states": list(source.other_states),
        "step": sorted({source.step(m.name) for m in tensors if m.trainable}) if len(source.states) > 1 else [],
        "counters": source.counters,
        "groups": [_group(source, i) for i in range(len(source.groups))],
        "lr_scheduler": _plain(source.lr_scheduler),
        "loss_scale": (source.loss_scaler or {}).get("cur_scale") if source.precision == "fp16" else None,
        "client_state": sorted(map(str, source.client_state)),
        "tied": source.aliases,
        "frozen": [m.name for m in tensors if not m.trainable],
        "buffers": sorted(source.buffers),
        "extras": sorted(source.extras),
        "unopened": source.unopened(),
        "unread": list(source.unread),
        "kind": manifest.get("kind"),
        "growth": manifest.get("growth"),
        "training": manifest.get("training"),
        "versions": manifest.get("versions"),
        "tensors": [
            {
                "name": m.name,
                "shape": list(m.shape),
                "dtype": m.dtype,
                "group": m.group,
                "step": source.step(m.name),
                "trainable": m.trainable,
            }
            for m in tensors
        ],
    }


def check(path: str | Path, tag: str | None = None) -> dict[str, Any]:
    """Compare every file of a checkpoint of ours with its manifest: presence, size, and content where the manifest has
    digests (older training checkpoints have none: sizes alone). Streamed. ``bad``: name -> what is wrong, for each bad
    one; ``unlisted``: files that the manifest does not know. Raises InvalidCheckpoint if there is no manifest to go by.
    """
    folder, _ = locate(Path(path), tag)
    if not (folder / MANIFEST).is_file():
        raise InvalidCheckpoint(
            f"{folder}: has no {MANIFEST}, so there is nothing to compare its files with. Checkpoints that bert2bert "
            "writes have one; inspect without --check reads any."
        )
    manifest = read_json(folder / MANIFEST)
    digests = manifest.get("digests") or {"kind": FILE_DIGEST, "files": {}}
    if not isinstance(digests, dict) or not isinstance(digests.get("files"), dict):
        raise InvalidCheckpoint(f"{folder / MANIFEST}: its 'digests' are not a table of files. Restore the file.")
    if digests.get("kind") != FILE_DIGEST:
        raise InvalidCheckpoint(f"{folder / MANIFEST}: digests of kind {digests.get('kind')!r}; known: {FILE_DIGEST}")
    bad, sizes, count = {}, listed(folder, manifest), 0
    if not sealed(manifest):
        bad[MANIFEST] = "content differs"
    for name, size in sizes.items():
        if problem := _problem(folder / name, size, digests["files"].get(name)):
            bad[name] = problem
        count += size
    return {
        "folder": str(folder),
        "files": len(sizes),
        "bytes": count,
        "digests": len(digests["files"].keys() & sizes.keys()),
        "bad": bad,
        "unlisted": sorted(file_sizes(folder).keys() - sizes.keys()),
    }


def _problem(file: Path, size: int, digest: str | None) -> str | None:
    try:
        if not file.is_file():
            return "missing"
        if (found := file.stat().st_size) != size:
            return f"{found:,} bytes, should be {size:,}"
        return "content differs" if digest is not None and file_digest(file) != digest else None
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def render_check(found: dict[str, Any]) -> str:
    """The result of `check` as text: a line for every bad file."""
    lines = [f"bad          {name}: {problem}" for name, problem in found["bad"].items()]
    lines += [f"unlisted     {name}: not of this checkpoint" for name in found["unlisted"]]
    how = "sizes and contents" if found["digests"] == found["files"] else "sizes"
    if 0 < found["digests"] < found["files"]:
        how = f"sizes, and contents of {found['digests']}"
    verdict = f"{len(found['bad'])} bad" if found["bad"] else "all as the manifest says"
    files = f"{found['files']} files, {_bytes(found['bytes'])}"
    return "\n".join([*lines, f"checked      {found['folder']}: {files}, {how}: {verdict}"])


def _architecture(config: dict[str, Any] | None) -> dict[str, Any] | None:
    if config is None:
        return None
    classes = config.get("architectures")
    if classes is not None:  # a list of names, if the config is sound
        classes = [str(name) for name in classes] if isinstance(classes, list) else [str(classes)]
    found = {"type": config.get("model_type"), "classes": classes}
    for what, keys in _SIZES:
        found[what] = next((config[k] for k in keys if config.get(k) is not None), None)
    return found


def _group(source: Source, i: int) -> dict[str, Any]:
    group = source.groups[i]
    names = group["names"]
    return {
        **{key: _plain(group[key]) for key in _HYPER if key in group},
        "tensors": len(names),
        "parameters": sum(source.tensors[name].numel for name in names),
        "step": sorted({source.step(name) for name in names}),
    }


def _plain(value: Any) -> Any:
    """The value with tuples as lists and anything JSON cannot hold as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _bytes(size: float) -> str:
    power = min((len(f"{size:.0f}") - 1) // 3, 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values)) if len(values) < 6 else f"{values[0]} to {values[-1]}"


def render(found: dict[str, Any], tensors: bool = False) -> str:
    """The result of `inspect` as text; ``tensors`` adds a table of all tensors."""
    ranks = f"{found['world_size']} rank{'s' * (found['world_size'] != 1)}"
    formats = {
        "zero": f"native DeepSpeed ZeRO stage {found['stage']}, {ranks}{_split(found['expert_parallel'])}",
        "universal": "DeepSpeed universal",
        "hub": "Hugging Face",
    }
    lines = [
        ("checkpoint", found["folder"]),
        ("format", formats[found["format"]]),
        ("precision", found["precision"]),
        ("architecture", _render_architecture(found["architecture"])),
        ("tensors", f"{found['tensor_count']}, {found['parameters']:,} parameters"),
        ("files", f"{found['files']}, {_bytes(found['bytes'])}"),
        ("optimizer", _render_optimizer(found)),
    ]  # fmt: skip
    if counters := {k.removeprefix("global_"): v for k, v in found["counters"].items()}:
        lines.append(("counters", ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in counters.items())))
    if found["lr_scheduler"] is not None:
        lines.append(("lr scheduler", ", ".join(f"{k} {v}" for k, v in list(found["lr_scheduler"].items())[:6])))
    if found["loss_scale"] is not None:
        lines.append(("loss scale", f"{found['loss_scale']:g}"))
    if found["tied"]:
        lines.append(("tied", some([f"{absent} = {kept}" for absent, kept in found["tied"].items()], 4)))
    for key in ("frozen", "buffers", "extras", "client_state"):
        if found[key]:
            lines.append((key.replace("_", " "), some(found[key], 4)))
    if found["unopened"]:
        lines.append(("not opened", f"{some(found['unopened'], 4)}: classes that this program does not know"))
    if found["unread"]:
        lines.append(("not stored", f"{some(found['unread'], 4)}: the model has them, the checkpoint does not"))
    lines += _render_history(found)
    text = "\n".join(f"{key:<13} {value}" for key, value in lines)
    if found["groups"]:
        text += "\n\n" + _table(
            ["group", "tensors", "parameters", "step", *_HYPER],
            [
                [str(i), str(g["tensors"]), f"{g['parameters']:,}", _numbers(g["step"])]
                + [_value(g.get(key, "")) for key in _HYPER]
                for i, g in enumerate(found["groups"])
            ],
        )
    if tensors:
        text += "\n\n" + _table(
            ["tensor", "shape", "dtype", "group", "step"],
            [
                [t["name"], "x".join(map(str, t["shape"])) or "scalar", t["dtype"], _owner(t), str(t["step"])]
                for t in found["tensors"]
            ],
        )
    return text


def _split(size: int | None) -> str:
    return "" if size is None else f", {size} rank{'s share' if size > 1 else ' holds'} the experts"


def _owner(tensor: dict[str, Any]) -> str:
    if tensor["group"] is not None:
        return str(tensor["group"])
    return "-" if tensor["trainable"] else "frozen"


def _render_architecture(found: dict[str, Any] | None) -> str:
    if found is None:
        return "unknown: no config.json beside it"
    sizes = ", ".join(f"{what} {found[what]}" for what, _ in _SIZES if found[what] is not None)
    return f"{some(found['classes'] or [], 4) or found['type'] or 'unnamed'}: {sizes}"


def _render_optimizer(found: dict[str, Any]) -> str:
    others = f"; {', '.join(found['other_states'])}, which this program does not carry over" * bool(
        found["other_states"]
    )
    if len(found["states"]) == 1:
        return "no Adam state" + others
    return f"{' and '.join(found['states'][1:])}, step {_numbers(found['step'])}" + others


def _render_history(found: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    if growth := found["growth"]:
        source = growth.get("source") or {}
        how = growth.get("operators") or growth.get("operator") or {}
        named = (
            ", ".join(f"{k} {how[k]}" for k in ("width", "depth", "seed") if k in how) if isinstance(how, dict) else how
        )
        lines.append(("grown from", f"{source.get('path')} ({source.get('form')}, tag {source.get('tag')})"))
        lines.append(("grown by", f"{named}; plan {str(growth.get('plan_digest'))[:16]}"))
        for what, reasons in (growth.get("exactness") or {}).items():
            lines.append((f"  {what}", "exact" if not reasons else "not exact: " + "; ".join(map(str, reasons))))
    if training := found["training"]:
        spent = training.get("spent") or {}
        lines.append(("trained", ", ".join(f"{k} {_value(v)}" for k, v in spent.items()) or "nothing yet"))
    if found["versions"]:
        lines.append(("written by", ", ".join(f"{k} {v}" for k, v in found["versions"].items())))
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
