"""The names of a checkpoint's tensors, and those that transformers gives them.

Stored names may carry a prefix (``model.``, ``base_model.model.``), the name of a wrapper anywhere in between
(``_orig_mod.`` of torch.compile, ``module.`` of data parallelism, …), a norm's gain and bias in the words of the first
BERT (``LayerNorm.gamma``, ``LayerNorm.beta``), and may lack the outer name of the full model (``bert.``), or have
another one, as some of transformers' classes with a head do (``transformer.``). transformers renames norms, and adds
outer names, on loading; a `Naming` says what was found, and gives new tensors names of the same kind.

Refuses (InvalidCheckpoint) a checkpoint of no such model or of several, and two stored names of one tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bert2bert.checkpoints.hub.experts import WRAPPERS
from bert2bert.checkpoints.wrappers import Path, enclosed, learn
from bert2bert.errors import InvalidCheckpoint

OBSOLETE = (
    "*.position_ids", "*.token_type_ids", "*.attn.bias", "*.attn.masked_bias", "*.crossattention.bias",
    "*.crossattention.masked_bias", "*.rotary_emb.*inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached",
)  # fmt: skip
"""Buffers that older versions of transformers stored beside the parameters: positions, causal masks, rotary tables. No
current model has them; from_pretrained leaves them, and a strict load refuses them."""
_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def is_obsolete(name: str) -> bool:
    """Whether a tensor is a buffer that older versions of transformers stored."""
    return any(fnmatchcase("." + name, pattern) for pattern in OBSOLETE)


@dataclass(frozen=True)
class Naming:
    """How stored names differ from canonical ones, which are transformers'.

    known: canonical -> stored name of what is stored; prefix: in front of all stored names; lacks: the outer name that
    they do not have ('' where they have it); instead: the one that tensors of the base model have; wrappers: path of
    modules (as stored, less the prefix; numbers also as '#') -> the names of wrappers that follow it; legacy: norms
    have gamma and beta.
    """

    known: Mapping[str, str]
    prefix: str
    lacks: str
    wrappers: Mapping[Path, Path]
    legacy: bool
    instead: str = ""

    def stored(self, name: str) -> str:
        """The name under which the checkpoint has a canonical tensor, or would have it."""
        return self.known[name] if name in self.known else self.spelled(name)

    def spelled(self, name: str) -> str:
        """A canonical tensor's own name in the checkpoint's spelling, also where that has it by a tied name."""
        text = enclosed(self.instead + name.removeprefix(self.lacks), self.wrappers)
        if self.legacy:
            for old, new in _LEGACY.items():
                if text.endswith(new):
                    text = text.removesuffix(new) + old
        return self.prefix + text

    def canonical(self, stored: str) -> str:
        """What transformers would call a stored tensor that is not a parameter, a buffer; `stored` undoes it."""
        return self.lacks + _clean(stored.removeprefix(self.prefix))

    @property
    def renamed(self) -> dict[str, str]:
        """Canonical -> stored name where they are not the same; a missing or another outer name does not count."""
        own = (self.instead, "") if self.instead else ("",)
        return {n: s for n, s in self.known.items() if s not in [front + n.removeprefix(self.lacks) for front in own]}


def read_names(
    stored: Iterable[str], anchor: str, outer: str, full: Collection[str], ties: Mapping[str, str], where: str
) -> tuple[Naming, list[str]]:
    """The naming of a checkpoint, and the stored names that do not have its prefix.

    anchor: a tensor that every variant of the model has, less ``outer``, the name of the base model inside the full one
    ('' if none); full: canonical names of the full model; ties: absent tied name -> kept name, for a file may hold the
    one in place of the other; where: the checkpoint, for messages.
    """
    stored = list(stored)
    clean = {name: _clean(name) for name in stored}
    copies = [absent for absent, kept in ties.items() if kept == outer + anchor]
    first, front, bare = _front(clean, anchor, outer, copies, where)
    instead = _other_outer(clean.values(), front, full) if bare or not outer else ""
    front = front.removesuffix(instead)
    prefix, _ = _split(first, front.count("."))
    known: dict[str, str] = {}
    wrappers: dict[Path, Path] = {}
    strange = []
    for name in stored:
        before, rest = _split(name, front.count("."))
        if before != prefix or not clean[name].startswith(front):
            strange.append(name)
            continue
        canonical = clean[name].removeprefix(front)
        if instead and canonical.startswith(instead):
            canonical = outer + canonical.removeprefix(instead)
        elif bare and canonical not in full:
            canonical = outer + canonical
        if canonical in known:
            raise InvalidCheckpoint(
                f"{where}: {known[canonical]} and {name} are both {canonical} of the model, one is expected. Remove "
                "the one that is not of this model."
            )
        known[canonical] = name
        learn(wrappers, rest, WRAPPERS)
    for absent, kept in ties.items():
        if kept not in known and absent in known:
            known[kept] = known.pop(absent)
    legacy = any(name.endswith(tuple(_LEGACY)) for name in stored)
    return Naming(known, prefix, outer if bare else "", wrappers, legacy, instead), strange


def _other_outer(names: Collection[str], front: str, full: Collection[str]) -> str:
    """The last module of ``front`` where tensors of the full model, its heads, lie beside that module: it is the base
    model under another outer name. Else ''."""
    parent, _, last = front.removesuffix(".").rpartition(".")
    parent += "." * bool(parent)
    beside = (name.removeprefix(parent) for name in names if name.startswith(parent) and not name.startswith(front))
    return f"{last}." if last and any(name in full for name in beside) else ""


def _front(
    clean: Mapping[str, str], anchor: str, outer: str, copies: Iterable[str], where: str
) -> tuple[str, str, bool]:
    """A tensor that tells the prefix, the prefix less wrappers, and whether the names lack the outer name."""
    found = [name for name, text in clean.items() if ("." + text).endswith("." + anchor)]
    if len(found) == 1:
        front = clean[found[0]].removesuffix(anchor)
        bare = not ("." + front).endswith("." + outer)
        return found[0], front if bare else front.removesuffix(outer), bare
    for copy in () if found else copies:
        for name, text in clean.items():
            if ("." + text).endswith("." + copy):
                front = text.removesuffix(copy)
                return name, front, not any(other.startswith(front + outer) for other in clean.values())
    if found:
        raise InvalidCheckpoint(
            f"{where}: {len(found)} tensors are named …{anchor}, one is expected: {' and '.join(found[:3])}. It holds "
            "more than one model (a teacher, an average of the weights); save the one that is to grow by itself."
        )
    raise InvalidCheckpoint(
        f"{where}: no tensor is named …{anchor}, one is expected; the checkpoint's first names are "
        f"{', '.join(list(clean)[:3])}. If frozen parameters were left out of it, "
        "save it with them (without exclude_frozen_parameters)."
    )


def _clean(name: str) -> str:
    text = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    for old, new in _LEGACY.items():
        if ("." + text).endswith("." + old):
            text = text.removesuffix(old) + new
    return text


def _split(name: str, depth: int) -> tuple[str, list[str]]:
    """A stored name's prefix, of ``depth`` modules and the wrappers among and right behind them, and the rest."""
    parts, count = name.split("."), 0
    for i, part in enumerate(parts):
        if part not in WRAPPERS:
            if count == depth:
                return "".join(p + "." for p in parts[:i]), parts[i:]
            count += 1
    return name, []
