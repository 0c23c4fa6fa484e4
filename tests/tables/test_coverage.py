"""Every table against the models that the installed transformers builds: names, order, shapes, ties and defaults."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bert2bert import tables
from bert2bert.algebra import axes
from bert2bert.tables import TABLES, table_for
from bert2bert.tables.table import Table
from tests import tiny

_OTHERS = ("__init__.py", "table.py", "description.py", "expressions.py", "flops.py")
FILES = [p for p in Path(tables.__file__).parent.glob("*.py") if p.name not in _OTHERS]
LAWS = Path(__file__).parents[1] / "laws"

# Settings that add or reshape tensors, beyond the variants' own; {} is the variant, None transformers' default config.
CHANGES: dict[str, tuple[dict[str, Any] | None, ...]] = {
    "bert": (None, {"hidden_size": 12, "num_hidden_layers": 5, "type_vocab_size": 3, "max_position_embeddings": 7},),
    "roberta": (None, {"hidden_size": 12, "num_hidden_layers": 5, "type_vocab_size": 1, "vocab_size": 31},),
    "gpt2": (None, {"n_inner": None}, {"n_embd": 12, "n_layer": 5, "n_positions": 7, "n_head": 3},),
    "llama": (None, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": None, "num_key_value_heads": 3},),
    "mistral": (None, {"head_dim": None, "sliding_window": 5}, {"num_hidden_layers": 5, "num_key_value_heads": 3}),
    "qwen2": (None, {"num_hidden_layers": 5, "num_key_value_heads": 6, "head_dim": 2},),
    "qwen3": (None, {"attention_bias": True, "head_dim": 8}, {"num_hidden_layers": 5, "num_key_value_heads": 1}),
    "t5": (None, {"num_decoder_layers": None}, {"num_layers": 5, "d_model": 12, "relative_attention_num_buckets": 5}),
    "modernbert": (None, {"num_hidden_layers": 5, "hidden_size": 12}, {"decoder_bias": False}, {"mlp_bias": True}),
    "mixtral": (None, {"num_local_experts": 3, "head_dim": None}, {"num_hidden_layers": 5, "num_key_value_heads": 3}),
    "qwen3_moe": (None, {"num_experts": 3, "attention_bias": True}, {"num_hidden_layers": 5, "head_dim": 8}),
    "qwen2_moe": (None, {"num_experts": 3, "qkv_bias": False}, {"num_hidden_layers": 5, "num_key_value_heads": 3}),
}  # fmt: skip

# Config keys that no model's function in eval mode depends on, or only by what tokens mean.
INERT = re.compile(
    r".*(dropout|pdrop).*|initializer.*|(bos|eos|sep|cls|decoder_start)_token_id|use_cache|summary_.*|classifier_.*"
    r"|pretraining_tp|reorder_and_upcast_attn|output_router_logits|router_(aux_loss_coef|jitter_noise)"
    r"|deterministic_flash_attn|sparse_pred.*"
)
# The same for single models: GPT-2 has no padding row; sizes of windows say nothing where there are none, nor those of
# dense layers where all have experts; T5 derives its activation from feed_forward_proj, and sets is_decoder itself.
_NO_WINDOWS = {"sliding_window", "max_window_layers"}
INERT_HERE = {
    "gpt2": {"pad_token_id"},
    "qwen2": _NO_WINDOWS,
    "qwen3": _NO_WINDOWS,
    "qwen2_moe": _NO_WINDOWS | {"intermediate_size"},
    "qwen3_moe": _NO_WINDOWS | {"intermediate_size"},
    "t5": {"dense_act_fn", "is_gated_act", "is_decoder"},
}

# The law that exercises each axis: a growth along it, checked against the model's function. Depth axes included.
LAW_AXES = {
    **dict.fromkeys(("embed", "normed", "sigma"), "test_families.test_divisible_widths_keep_the_logits"),
    **dict.fromkeys(("heads", "kv", "group", "ffn", "shared"), "test_families.test_units_grow_exactly_by_any_map"),
    **dict.fromkeys(("tau", "qk", "v"), "test_copying.test_head_sizes_grow_exactly"),
    **dict.fromkeys(("rho", "iota"), "test_padding.test_padding_needs_the_gain_and_the_epsilon"),
    # no operator grows these: the gradients of the tensors that have them are compared, which reach every entry
    **dict.fromkeys(("types", "classes", "buckets", "one"), "test_families.test_the_gradient_rule"),
    **dict.fromkeys(("layers", "decoder_layers"), "test_depth.test_identities_change_no_bit"),
    "labels": "test_heads.test_what_a_model_says_is_kept",
    "vocab": "test_vocab.test_old_logits_stay",
    "pos": "test_vocab.test_positions",
    "experts": "test_experts.test_duplicates_that_are_chosen_together",
}


def _cases() -> list[Any]:
    cases = []
    for name, variant in tiny.VARIANTS.items():
        table = TABLES[variant.base["model_type"]]
        own = next(v for v in tiny.VARIANTS.values() if v.base["model_type"] == table.model_type)
        for cls in table.names.classes:
            cases.append(pytest.param(name, cls, {}, id=f"{name}-{cls}"))
            for i, changes in enumerate(CHANGES.get(table.model_type, (None,)) if variant is own else ()):
                cases.append(pytest.param(name, cls, changes, id=f"{name}-{cls}-{i or 'default'}"))
    return cases


def _config(name: str, cls: str, changes: dict[str, Any] | None) -> dict[str, Any]:
    if changes is not None:
        labels = {"num_labels": 3} if cls.endswith(("SequenceClassification", "TokenClassification")) else {}
        return tiny.config_of(name, architectures=[cls], **labels, **changes)
    kind = tiny.VARIANTS[name].base["model_type"]
    return transformers.AutoConfig.for_model(kind, architectures=[cls]).to_dict()


def _model(config: dict[str, Any]) -> torch.nn.Module:
    with torch.device("meta"):
        built = transformers.AutoConfig.for_model(**config)
        model = getattr(transformers, config["architectures"][0])._from_config(built, attn_implementation="eager")
    tiny.untie(model, config)
    return model


def _differences(table: Table, config: dict[str, Any], model: torch.nn.Module) -> str:
    """What the table says otherwise than the model, '' if nothing."""
    (cls,) = config["architectures"]
    heads = table.names.classes[cls]
    have = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    rows = [(table.in_class(name, cls), p.shape) for name, p in table.parameters(config, heads).items()]
    wrong = [f"{a} in the model, {b} in the table" for a, b in zip(have, rows, strict=False) if a != b]
    if have[len(rows) :] or rows[len(have) :]:
        wrong.append(f"beyond: {have[len(rows) :]} in the model, {rows[len(have) :]} in the table")
    kept: dict[int, str] = {}
    ties = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if kept.setdefault(id(p), name) != name:
            ties[name] = kept[id(p)]
    decaying = transformers.Trainer.get_decay_parameter_names(None, model)
    for full, p in table.parameters(config, heads).items():
        if p.decay != ((name := table.in_class(full, cls)) in decaying):
            wrong.append(f"decay of {name}: {name in decaying} by transformers' Trainer, {p.decay} in the table")
    listed = {table.in_class(a, cls): table.in_class(k, cls) for a, k in table.aliases(config, heads).items()}
    if ties != listed:
        wrong.append(f"ties: {ties} in the model, {listed} in the table")
    return "\n".join(wrong)


@pytest.mark.parametrize(("name", "cls", "changes"), _cases())
def test_every_parameter_is_described(name: str, cls: str, changes: dict[str, Any] | None) -> None:
    config = _config(name, cls, changes)
    model = _model(config)
    assert not _differences(table_for(config), config, model)
    short = {**model.config.to_diff_dict(), "architectures": [cls]}  # what a config.json holds: no key at its default
    if config["tie_word_embeddings"] != model.config.tie_word_embeddings:  # an untied T5, see `tiny.untie`
        short["tie_word_embeddings"] = config["tie_word_embeddings"]
    assert not _differences(table_for(config), short, model)


def test_a_wrong_table_is_noticed() -> None:
    config = tiny.config_of("gpt2")
    model, right = _model(config), TABLES["gpt2"]
    first, second, *rest = right.rows
    for rows in ((second, first, *rest), (first, *rest), (*right.rows, replace(first, name="more.weight"))):
        assert "in the table" in _differences(replace(right, rows=rows), config, model)
    shape = replace(first, spec="pos -> embed")
    assert "(10, 8)" in _differences(replace(right, rows=(shape, second, *rest)), config, model)
    untied = replace(right, names=replace(right.names, ties=()))
    assert "ties" in _differences(untied, config, model)
    fixed = replace(first, decay=False)
    assert "decay of" in _differences(replace(right, rows=(fixed, second, *rest)), config, model)


def test_every_table_has_a_variant() -> None:
    assert {v.base["model_type"] for v in tiny.VARIANTS.values()} == set(TABLES)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_defaults_are_those_of_transformers(table: Table) -> None:
    config = transformers.AutoConfig.for_model(table.model_type).to_dict()
    defaults = {**table.settled({}), **table.compatible.requires, table.norms.eps[0]: table.norms.eps[1]}
    defaults["tie_word_embeddings"] = table.names.tie_default
    wrong = {k: (v, config[k]) for k, v in defaults.items() if v != config.get(k, v)}
    assert not wrong, "table's and transformers' defaults differ"


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_setting_is_an_axis_or_guarded_or_inert(table: Table) -> None:
    """A key that alters the function, and that neither sizes a tensor nor must agree, would let a growth lie."""
    own = transformers.AutoConfig.for_model(table.model_type).to_dict().keys()
    general = transformers.PreTrainedConfig().to_dict().keys() - {"tie_word_embeddings"}
    sized = {word for text in table.sizes.axes.values() for word in re.findall(r"[a-z_]+", text)}
    settings = table.compatible
    known = sized | settings.must_agree.keys() | settings.requires.keys()
    known |= {settings.kinds, settings.every[0], "model_type"}
    known |= INERT_HERE.get(table.model_type, set())
    assert not {key for key in own - general - known if not INERT.fullmatch(key)}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_specs(table: Table) -> None:
    sizes = table.sizes
    constants, sized = set(sizes.constants), {*sizes.axes, *sizes.follows, *sizes.constants}
    used = set(sizes.depth)
    for row in table.rows:
        used |= axes.axes_of(row.spec)
        for dim in axes.parse(row.spec):
            for product in dim:
                order = [atom.axis in constants for atom in product]
                assert order == sorted(order, reverse=True), f"{row.name}: axes of fixed size come first in {row.spec}"
    assert used == sized
    assert table.compatible.must_agree[table.norms.eps[0]] == table.norms.eps[1]
    assert {*sizes.units, *sizes.scales, *sizes.scales.values(), *sizes.aligned, *sizes.fixed} <= sized
    assert set(sizes.depth) >= {row.depth for row in table.rows} - {""}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_table_is_small(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= 90
    data = [node for node in ast.parse(text).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    assert data and sum((node.end_lineno or 0) - node.lineno + 1 for node in data) <= 75


def test_every_axis_has_a_law() -> None:
    laws = {
        f"{path.stem}.{node.name}"
        for path in LAWS.glob("test_*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    parts = [table.sizes for table in TABLES.values()]
    used = {axis for sizes in parts for axis in (*sizes.axes, *sizes.follows, *sizes.constants)}
    assert used == LAW_AXES.keys(), f"without a law {used - LAW_AXES.keys()}, unknown {LAW_AXES.keys() - used}"
    assert set(LAW_AXES.values()) <= laws, f"no such test: {set(LAW_AXES.values()) - laws}"
