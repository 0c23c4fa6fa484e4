"""What a target holds otherwise than its source, or does not hold, in sentences for the user."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bert2bert.checkpoints.hub.beside import left_beside
from bert2bert.errors import some

if TYPE_CHECKING:
    from bert2bert.checkpoints.job import TargetSpec
    from bert2bert.checkpoints.source import Source


def rounding(spec: TargetSpec, format: str, dtypes: Mapping[str, Iterable[str]]) -> list[str]:
    """What is stored in a narrower dtype than it has in the source, in a sentence. dtypes: of what a tensor is made."""
    narrower: dict[str, list[str]] = {}
    for name, origins in dtypes.items():
        stored = str(spec.widest_dtype(name, format)).removeprefix("torch.")
        if any(origin not in (stored, "float16", "bfloat16") or (origin != stored != "float32") for origin in origins):
            narrower.setdefault(stored, []).append(name)
    return [
        f"rounded to {stored}: {len(names)} tensors that are wider in the source, first {names[0]}"
        for stored, names in narrower.items()
    ]


def still_frozen(spec: TargetSpec) -> list[str]:
    """Which parameters of a growth a script must freeze, in a sentence."""
    names = spec.frozen
    return [
        f"frozen, as what they are made of: {len(names)} parameters, first {names[0]} (`bert2bert inspect --json` "
        "lists them); a script that goes on must freeze these and no others"
    ] if names else []  # fmt: skip


def untrained(source: Source, spec: TargetSpec, stage: int | None) -> list[str]:
    """What is to be known, in a target of this stage, of parameters that the run kept out of its optimizer and perhaps
    did not freeze, in sentences: DeepSpeed's stage 3 neither saves nor restores values of such."""
    held = [name for name in source.untrained if name in spec.frozen] if stage in (2, 3) else []
    lost = [name for name in source.untrained if name in spec.unread]
    found = [
        f"in no optimizer group, and perhaps not frozen: {len(held)} parameters, first {held[0]}. DeepSpeed's stage 3 "
        "restores them where requires_grad is False before load_checkpoint, and leaves them as they are elsewhere"
    ] if held else []  # fmt: skip
    found += [
        f"left out: {len(lost)} tensors, first {lost[0]}. They look like parameters in no optimizer group, of which "
        "DeepSpeed's stage 3 restores none but frozen ones. To have them, freeze them (requires_grad=False) and save "
        "the source with all that is frozen"
    ] if lost else []  # fmt: skip
    odd = [name for name in source.unlisted if name in spec.buffers] if stage == 3 else []
    found += [
        f"written whole: {len(odd)} tensors, first {odd[0]}, which the source's files list neither as parameters nor "
        "as buffers. If they are parameters (in no optimizer group), DeepSpeed's stage 3 refuses them: freeze them "
        "(requires_grad=False) and save the source again"
    ] if odd else []  # fmt: skip
    return found


def valueless(names: Sequence[str], loads: bool) -> list[str]:
    """Which names of the model have no values in source and target, in a sentence. loads: a strict load of the target
    asks for no more than the names."""
    more = "" if loads else ". Where DeepSpeed looks for them, load with load_module_strict=False"
    return [f"not in the source, so not in the target: {some(names, 8)}{more}"] if names else []


def regrouped(source: Source, spec: TargetSpec, made_of: Mapping[str, Sequence[str]]) -> list[str]:
    """Where new groups give parameters other hyper-parameters than the source's, in sentences. made_of: see
    `spec.Content`."""
    of = {name: group for group in source.groups for name in group["names"]}
    found = []
    for key in ("lr", "betas", "eps", "weight_decay") if of else ():
        changed = [
            (name, was[key], group.hyper.get(key))
            for group in spec.groups
            for name in group.names
            for was in [of.get(next(iter(made_of[name]), ""), {})]
            if key in was and was[key] != group.hyper.get(key)
        ]
        if changed:
            name, was, now = changed[0]
            found.append(f"--groups: {key} changes for {len(changed)} parameters, first {name}: {was} -> {now}")
    return found


def empty_groups(source: Source, spec: TargetSpec) -> list[str]:
    """Which of the source's groups hold no trained parameter and are left out, in a sentence."""
    empty = [i for i, group in enumerate(source.groups or ()) if not group["names"]]
    if not empty or spec.group_layout != "source" or any(not group.names for group in spec.groups):
        return []
    return [
        f"optimizer groups without a trained parameter are left out: {', '.join(map(str, empty))} of the source (lr "
        f"{source.groups[empty[0]].get('lr')}); a script that goes on must not build them, for DeepSpeed's ZeRO "
        "stages 1 and 2 fail with such groups"
    ]


def second_names(source: Source, spec: TargetSpec) -> list[str]:
    """What is carried, or not, of tied frozen parameters that a run left out by their first names, in a sentence."""
    if not source.second_names:
        return []
    name, (first, _) = next(iter(source.second_names.items()))
    done = "carried" if spec.second_names else "left out"
    return [
        f"{done}: {len(source.second_names)} tensors, first {name} = {first}, "
        "second names of frozen parameters that are not in the source (exclude_frozen_parameters): load with "
        "load_module_strict=False"
    ]


def kept_groups(spec: TargetSpec, parts: Mapping[str, str], layers: Collection[str]) -> list[str]:
    """Into which of the source's own groups, of no known layout, the parameters of added layers go, in a sentence.

    parts: of the target's tensors that are in a layer, as of `groups.Member`; layers: the source's parts.
    """
    if spec.group_layout != "source" or set(parts.values()) <= set(layers):
        return []
    places: dict[str, dict[int, Any]] = {}  # layer -> its groups, with their rates
    for place, group in enumerate(spec.groups):
        for name in group.names:
            if name in parts:
                places.setdefault(parts[name], {})[place] = group.hyper.get("lr")
    alike: dict[tuple[tuple[int, Any], ...], list[str]] = {}
    for layer, found in places.items():
        alike.setdefault(tuple(found.items()), []).append(layer)
    placed = []
    for own, names in alike.items():
        rates = ", ".join(dict.fromkeys(f"{rate:.3g}" for _, rate in own if rate is not None))
        placed.append(f"{some(names, 4)} in {', '.join(str(place) for place, _ in own)} (lr {rates or 'not stored'})")
    return [
        f"optimizer groups: the source's {len(spec.groups)} are kept, and the parameters of a layer go into those of "
        f"the layer that they are made of: {'; '.join(placed)}. A script that goes on must build its groups so, or "
        "choose others with --groups"
    ]


def left(source: Source, spec: TargetSpec) -> list[str]:
    """What lies beside the weights of a Hugging Face folder and is not carried into the target, in a sentence."""
    found = left_beside(source.folder, spec.extra_files, source.files)
    return [f"left behind in {source.folder}: {', '.join(found)}"] if found else []


def unopened(source: Source, format: str) -> list[str]:
    """A sentence about what a target keeps and nobody here has looked into."""
    names = source.unopened() if format != "hub" else []
    what = "carried as it is, unopened: what the run saved of classes not known here"
    return [f"{what} ({some(names, 4)})"] if names else []
