"""Which files of a Hugging Face folder are its model, in transformers' own order, and what is not a plain model.

The order: the file that the config names (``transformers_weights``), ``model.safetensors``, the shards of
``model.safetensors.index.json``, the only safetensors file there is (if no ``pytorch_model.bin`` comes before it).

Refuses, as InvalidCheckpoint: two sets of weights that differ, an adapter (PEFT), weights in other formats, an index
that does not describe its files, links to nothing, and quantised weights, naming the scheme.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bert2bert.errors import InvalidCheckpoint, some
from bert2bert.files.disk import inside
from bert2bert.files.sniff import instead
from bert2bert.files.texts import read_json
from bert2bert.files.torch_writer import bits

INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_UNMERGED = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT",
    "POLY", "XLORA",
)  # fmt: skip
"""Kinds of adapters that PEFT cannot merge into a model: trained prompts and prefixes, and mixtures of adapters."""
_OTHERS = {  # files with weights in another format -> what to do with them
    "pytorch_model*.bin": "its weights are pickled ({}). Convert them to safetensors: "
    "AutoModel.from_pretrained(...).save_pretrained(...), with the class that fits.",
    "*.gguf": "its weights are in llama.cpp's format ({}), mostly quantised. Use the folder that they were made from, "
    "or convert them: from_pretrained(..., gguf_file=...).save_pretrained(...).",
    "tf_model*.h5": "its weights are of TensorFlow ({}), which transformers 4 reads: from_pretrained(..., from_tf=True)"
    ".save_pretrained(...).",
    "flax_model*.msgpack": "its weights are of Flax ({}), which transformers 4 reads: from_pretrained(..., "
    "from_flax=True).save_pretrained(...).",
    **dict.fromkeys(
        ("*.distcp", "*/*.distcp"),
        "its weights are a checkpoint of torch.distributed ({}), as FSDP saves it. Gather them: accelerate "
        "merge-weights, or torch.distributed.checkpoint.format_utils.dcp_to_torch_save, load_state_dict and "
        "save_pretrained(...).",
    ),
    "model.ckpt*": "its weights are a TensorFlow 1 checkpoint ({}). Use a folder that transformers has saved.",
}
_PACKED = re.compile(
    r"(.+\.)?(qweight|qzeros|g_idx|W_q|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|SCB|weight_format|"
    r"(nested_)?(absmax|quant_map)|quant_state\..+|_packed_params.*|weight_quantizer\..+|dqweight|weight\._data|"
    r"_?weight_+(\w+_)?qdata|codebooks|centroids\.weight|Qidxs|\w+_blocks|q_weight|q_scale(_max)?|q_invperm|trellis|"
    r"bitmask)"
)
"""Tensors that GPTQ, AWQ, HQQ, compressed-tensors, fp8, bitsandbytes, ModelOpt, torch.ao, FP-Quant, Quanto, torchao,
AQLM, VPTQ, QuIP#, MXFP4, EXL2 and EXL3 store."""
_WEIGHT = re.compile(r"(.+[._])?weight|.+\.experts\.(gate_up|down)_proj")
"""Parameters of linear maps and embeddings, of whole numbers only where they are quantised."""
_QUANTISED = ("quantization_config", "quantization", "compression_config")
_ALSO_PLAIN = re.compile(r"(.+\.)?(W_q|codebooks|centroids\.weight|bitmask|trellis)")
"""Those of _PACKED that models of other kinds have, too, with floating-point numbers alone in the layer."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_EIGHT_BITS = re.compile(r"F8_|F6_|F4|I4$|U4$")


def is_hub(folder: Path) -> bool:
    """Whether a folder holds a model of the hub in any form, readable or not."""
    patterns = ("*.safetensors", INDEX, *_OTHERS, *_ADAPTER)
    return any(any(folder.glob(pattern)) for pattern in patterns)


def in_cache(path: Path) -> Path:
    """The snapshot that a folder of the hub's cache (``models--org--name``) holds; any other path as it is.

    The one that ``refs/main`` names, else the only one; InvalidCheckpoint where that does not tell.
    """
    snapshots = path / "snapshots"
    if not (snapshots.is_dir() and (path / "blobs").is_dir()):
        return path
    found = sorted(p.name for p in snapshots.iterdir() if p.is_dir())
    main = path / "refs" / "main"
    wanted = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    name = wanted if wanted in found else found[0] if len(found) == 1 else ""
    if not name:
        raise InvalidCheckpoint(
            f"{path}: a folder of the hub's cache with {len(found)} snapshots"
            + (f", of which refs/main names none ({wanted})" if wanted else "")
            + f". Give one of them: {', '.join(str(snapshots / each) for each in found) or 'download it again'}."
        )
    return snapshots / name


def weight_files(folder: Path, config: Mapping[str, Any] | None) -> tuple[list[str], dict[str, str], list[str]]:
    """The files that are the model, the index's map of names to files ({} without one), and what a user should know."""
    if found := [name for name in _ADAPTER if (folder / name).is_file()]:
        raise InvalidCheckpoint(f"{folder}: holds an adapter ({', '.join(found)}), {_instead_of_adapter(folder)}")
    named = (config or {}).get("transformers_weights")
    if isinstance(named, str) and named:
        return _listed(folder, named) if named.endswith(".index.json") else ([_there(folder, named)], {}, [])
    single, index = is_there(folder / _WEIGHTS), is_there(folder / INDEX)
    if single and index:
        return [_WEIGHTS], {}, _beside(folder)
    if single:
        return [_WEIGHTS], {}, []
    if index:
        return _listed(folder, INDEX)
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    pickled = [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).is_file()]
    if found and pickled:
        raise InvalidCheckpoint(
            f"{folder}: transformers loads {pickled[0]}, and not {found[0]}. If that is the model, name it {_WEIGHTS}; "
            f"if not, {_OTHERS['pytorch_model*.bin'].format(pickled[0])}"
        )
    if len(found) == 1 and is_there(folder / found[0]):
        return found, {}, []
    if found:
        raise InvalidCheckpoint(f"{folder}: {_none_of(folder, found)}")
    for pattern, text in _OTHERS.items():
        if others := sorted(p.name for p in folder.glob(pattern)):
            raise InvalidCheckpoint(f"{folder}: {text.format(others[0])}")
    raise InvalidCheckpoint(f"{folder}: no safetensors file in it")


def _instead_of_adapter(folder: Path) -> str:
    """What an adapter's folder holds in place of a model, by its kind, and the remedy."""
    file = folder / _ADAPTER[0]
    config = read_json(file) if file.is_file() else {}
    kind, base = str(config.get("peft_type") or "").upper(), config.get("base_model_name_or_path")
    if kind in _UNMERGED:
        return (
            f"of the kind {kind}, which adds to what a model reads or runs and cannot be merged into its weights. Grow "
            f"its base model{f' ({base})' if base else ''}, and train the adapter again on the grown one."
        )
    return (
        f"which is not a model but a change to one{f' ({kind})' if kind else ''}. Merge it: "
        "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(...), and grow what that wrote."
    )


def is_there(file: Path) -> bool:
    """Whether a file is there. Raises InvalidCheckpoint for a link to one that is not."""
    if file.is_symlink() and not file.exists():
        raise InvalidCheckpoint(
            f"{file}: a link to {file.readlink()}, which is not there: a download that did not finish, or a copy "
            "without what its links lead to. Download it again, or copy it again (cp -rL)."
        )
    return file.is_file()


def _none_of(folder: Path, found: list[str]) -> str:
    """What to say of several safetensors files of which transformers would load none."""
    if variants := sorted(p.name for p in folder.glob(INDEX.replace(".json", ".*.json"))):
        variant = variants[0].split(".")[-2]
        return (
            f"its weights are a variant alone ({variants[0]}). Make it the model: from_pretrained(..., "
            f'variant="{variant}").save_pretrained(...), with the class that fits.'
        )
    if any(re.search(r"-\d+-of-\d+\.", name) for name in found):
        return f"{len(found)} safetensors files without {INDEX}. Copy it too."
    return f"{len(found)} safetensors files, none of them {_WEIGHTS} ({some(found)}). Give that name to the model's."


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config less what says that nothing is quantised, of which transformers warns, or which it chokes on."""
    return {key: value for key, value in config.items() if key not in _QUANTISED or _quantises(value)}


def _quantises(value: Any) -> bool:
    """Whether a quantisation config means one: an empty one does not, nor bitsandbytes' with both of its kinds off, as
    BitsAndBytesConfig() has them."""
    off = isinstance(value, Mapping) and value.get("quant_method") == "bitsandbytes"
    return bool(value) and not (off and not (value.get("load_in_4bit") or value.get("load_in_8bit")))


def _there(folder: Path, name: str) -> str:
    if not is_there(inside(folder, name, links=True)):
        raise InvalidCheckpoint(f"{folder / name}: no such file, though config.json names it. Copy it too.")
    return name


def _listed(folder: Path, name: str) -> tuple[list[str], dict[str, str], list[str]]:
    index = read_json(folder / name).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise InvalidCheckpoint(f"{folder / name}: has no 'weight_map' of names to files")
    where = {str(tensor): str(file) for tensor, file in index.items()}
    return [file for file in sorted(set(where.values())) if inside(folder, file, links=True)], where, []


def _beside(folder: Path) -> list[str]:
    """What to say of an index beside ``model.safetensors``, which transformers loads. Raises InvalidCheckpoint where
    the index's files hold other weights."""
    files, where, _ = _listed(folder, INDEX)
    lost = [file for file in files if not (folder / file).is_file()]
    if lost:
        return [f"{INDEX} names {lost[0]}, which is not there; {_WEIGHTS} is read, as transformers does"]
    if files == [_WEIGHTS]:
        return []
    one, differs = open_file(folder / _WEIGHTS), ""
    names = set(one.keys())
    for file in files:
        other = open_file(folder / file)
        for name in other.keys():  # noqa: SIM118 (not a mapping)
            if not differs and (name not in names or not bits(one.get_tensor(name), other.get_tensor(name))):
                differs = name
    if differs or names - where.keys():
        raise InvalidCheckpoint(
            f"{folder}: {_WEIGHTS} and the files of {INDEX} hold different weights (first "
            f"{differs or min(names - where.keys())}): one of them is left from another save. transformers loads "
            f"{_WEIGHTS}. Remove the files that are not wanted."
        )
    return [f"{_WEIGHTS} and the files of {INDEX} hold the same weights; the former is read, as transformers does"]


def open_file(path: Path) -> Any:
    """A safetensors file, opened. Raises InvalidCheckpoint."""
    try:
        return safe_open(path, framework="pt", device="cpu").__enter__()
    except FileNotFoundError:
        is_there(path)
        raise InvalidCheckpoint(f"{path}: no such file, though {INDEX} names it. Copy all shards.") from None
    except (SafetensorError, OSError) as error:
        why = instead(path, "safetensors", "binary") or f" ({error}): truncated or another format. Copy it again."
        raise InvalidCheckpoint(f"{path}: not readable as safetensors{why}") from None


def refuse_quantised(folder: Path, config: Mapping[str, Any] | None, dtypes: Mapping[str, str]) -> None:
    """Refuse weights that are not plain numbers (InvalidCheckpoint). dtypes: stored name -> safetensors' dtype."""
    signs = []
    for key in _QUANTISED:
        if isinstance(found := (config or {}).get(key), Mapping) and _quantises(found):
            method = found.get("quant_method") or found.get("quant_algo") or found.get("bits") or ", ".join(found)
            signs.append(f"config.json has {key} ({method})")
    packed = [name for name in dtypes if _PACKED.fullmatch(name) and not _plain(name, dtypes)]
    narrow = [name for name, dtype in dtypes.items() if _EIGHT_BITS.match(dtype)]
    kinds = ("I", "U", "BOOL")
    whole = [n for n, t in dtypes.items() if _WEIGHT.fullmatch(n) and t.startswith(kinds) and n not in packed]
    signs += [f"{packed[0]} is of a packed weight"] if packed else []
    signs += [f"{names[0]} is {dtypes[names[0]]}" for names in (narrow, whole) if names]
    if signs:
        raise InvalidCheckpoint(
            f"{folder}: its weights are quantised: {'; '.join(signs)}. Quantised numbers can neither be grown nor "
            "written again. Use the checkpoint they were made from, or load it with transformers, dequantize() and "
            "save_pretrained() (and no quantization in its config)."
        )


def _plain(name: str, dtypes: Mapping[str, str]) -> bool:
    """Whether a tensor with the name of a packed one is a plain parameter: its layer has no integer tensors."""
    match = _ALSO_PLAIN.fullmatch(name)
    layer = (match[1] or "") if match else ""
    return bool(match) and not any(n.startswith(layer) and t not in _FLOATS for n, t in dtypes.items())


def refuse_empty(folder: Path, empty: list[str], count: int) -> None:
    """Refuse tensors without elements (InvalidCheckpoint). count: of all floating-point tensors."""
    if empty:
        raise InvalidCheckpoint(
            f"{folder}: {len(empty)} of {count} tensors are empty (first {empty[0]}): saved under ZeRO-3 without "
            "gathering the weights, which are in the run's ZeRO shards. Give the run's own checkpoint folder (with "
            "'latest'), or save again with stage3_gather_16bit_weights_on_model_save."
        )
