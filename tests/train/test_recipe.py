"""Recipes: round trip, typed overrides, and one clear message for everything a user can get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bert2bert.errors import InvalidConfig
from bert2bert.recipe import (
    AdamW,
    Causal,
    Data,
    Full,
    Masked,
    Phase,
    Recipe,
    Schedule,
    SubModels,
    current,
    from_dict,
    load_recipe,
    renamed,
)

TINY = '''"""A recipe for tests."""
from bert2bert.recipe import AdamW, Data, Full, Phase, Recipe, Schedule, SubModels

recipe = Recipe(
    name="tiny",
    model={
        "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64,
    },
    data=Data(bins="bins/tiny", seq_len=32),
    global_batch_size=8,
    phases=(
        Phase("sub-models", 10, SubModels(2), Schedule("linear", warmup_steps=2, peak=2e-3, final=0.5)),
        Phase("full", 20),
    ),
    optimizer=AdamW(lr=1e-3),
)
'''


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def test_to_dict_and_from_dict_are_inverse_and_json_ready(tiny: Path) -> None:
    recipe = load_recipe(tiny)
    plain = recipe.to_dict()
    assert plain["phases"][0]["program"] == {"layers_per_stage": 2, "kind": "sub-models"}
    assert plain["optimizer"]["betas"] == [0.9, 0.999]
    assert from_dict(plain) == recipe


def test_overrides_set_values_of_the_declared_type(tiny: Path) -> None:
    recipe = load_recipe(
        tiny,
        ["phases.0.steps=6", "phases.0.program.layers_per_stage=1", "phases.1.schedule.kind=cosine", "data.bins=x y",
         "optimizer.betas.1=0.98", "phases.0.schedule.peak=none", "model.hidden_dropout_prob=0", "gradient_clipping=0"],
    )  # fmt: skip
    assert recipe.phases[0].steps == 6 and type(recipe.phases[0].steps) is int
    assert recipe.phases[0].program == SubModels(1)
    assert recipe.phases[0].schedule.peak is None
    assert recipe.phases[1].program == Full()
    assert recipe.phases[1].schedule.kind == "cosine"
    assert recipe.data.bins == "x y"
    assert recipe.optimizer.betas == (0.9, 0.98)
    assert recipe.model["hidden_dropout_prob"] == 0.0
    assert recipe.gradient_clipping == 0.0


def test_overrides_are_judged_together(tiny: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"warmup_steps is 2, more than the phase's 1 steps"):
        load_recipe(tiny, ["phases.0.steps=1"])
    assert load_recipe(tiny, ["phases.0.steps=1", "phases.0.schedule.warmup_steps=0"]).steps == 21


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.0.step=1", "unknown key 'phases.0.step': did you mean 'phases.0.steps'"),
        ("optimiser.lr=1", "unknown key 'optimiser.lr': did you mean 'optimizer.lr'?"),
        ("model.hiden_size=64", "unknown key 'model.hiden_size': did you mean 'model.hidden_size'?"),
        ("phases.2.steps=1", "unknown key 'phases.2.steps': did you mean 'phases.0.steps' or 'phases.1.steps'?"),
        ("steps=3", "unknown key 'steps': did you mean 'phases.0.steps' or 'phases.1.steps'?"),
        ("train.steps=3", "did you mean 'phases.0.steps' or 'phases.1.steps'?"),
        ("clip=2", "unknown key 'clip': it is called gradient_clipping now"),
        ("data.mask_share=0.2", "unknown key 'data.mask_share': it is called objective.mlm_probability now"),
        ("hidden_size=64", "unknown key 'hidden_size': did you mean 'model.hidden_size'?"),
        ("lr=1", "did you mean 'optimizer.lr'?"),
        ("sed=1", "did you mean 'seed'?"),
        ("warmup=1", "did you mean 'phases.0.schedule.warmup_steps' or 'phases.1.schedule.warmup_steps'?"),
        ("betas=1", "did you mean 'optimizer.betas.0' or 'optimizer.betas.1'?"),
        ("layers_per_stage=1", "did you mean 'phases.0.program.layers_per_stage'?"),
        ("xyzzy=1", "unknown key 'xyzzy': known: checkpoint_async, "),
        ("phases.0=1", "'phases.0' is no single value; its parts: name, steps, program, schedule"),
        ("seed.x=1", "unknown key 'seed.x': it has no parts"),
        ("phases.1.program.kind=sub-models", "unknown key 'phases.1.program.kind': it has no parts"),
        ("seed=1.5", "seed is '1.5'; expected a value of type int"),
        ("gradient_clipping=high", "gradient_clipping is 'high'; expected a value of type float"),
        ("seed", "override 'seed': expected KEY=VALUE"),
        ("phases.0.steps=-1", "phase 'sub-models': steps is -1; expected a number of at least 0"),
        ("phases.1.schedule.kind=cosin", "schedule.kind is 'cosin': did you mean 'cosine'"),
        ("phases.0.program.layers_per_stage=3", "does not divide the 4 layers of the model; expected one of [1, 2, 4]"),
        ("phases.0.program.layers_per_stage=0", "layers_per_stage is 0; expected a number of at least 1"),
        ("optimizer.name=lamb", "a flat ZeRO partition holds pieces of layers"),
        ("optimizer.name=sgd", "optimizer.name is 'sgd'; expected 'adamw'"),
        ("optimizer.lr=0", "optimizer.lr is 0.0; expected a number above 0"),
        ("optimizer.lr=inf", "optimizer.lr is inf"),
        ("optimizer.betas.0=1", "optimizer.betas.0 is 1.0; expected a number in [0, 1)"),
        ("data.seq_len=128", "data.seq_len is 128, but model.max_position_embeddings is 64"),
        ("objective.mlm_probability=15", "objective.mlm_probability is 15.0; expected a share between 0 and 1"),
        ("model.num_attention_heads=3", "num_attention_heads"),
        ("model.architectures=BertForMaskedLM", "expected a value that only the recipe's file can set"),
        ("global_batch_size=0", "global_batch_size is 0; expected a number of at least 1"),
        ("eval_every=0", "eval_every is 0"),
        ("gradient_clipping=-1", "gradient_clipping is -1.0"),
        ("phases.1.schedule.final=2", "schedule.final is 2.0; expected a number of at least 0 and at most 1"),
        ("phases.1.name=sub-models", "expected different names"),
        ("objective.noise_density=0.2", "unknown key 'objective.noise_density'"),
        ("objective=causal", "'objective' is no single value; its parts: mlm_probability"),
        ("data.bins=", "data.bins is ''; expected the folder"),
    ],
)
def test_a_wrong_override_is_refused_with_its_name(tiny: Path, override: str, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_recipe(tiny, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.update(epochs=3), "unknown key 'epochs'"),
        (lambda plain: plain["phases"][0]["program"].update(kind="sub-model"), "did you mean 'sub-models'"),
        (lambda plain: plain["phases"][0]["program"].pop("kind"), "phases.0.program.kind is None"),
        (lambda plain: plain.update(objective={"kind": "mask"}), "objective.kind is 'mask': did you mean 'masked'"),
        (
            lambda plain: plain.update(objective={"kind": "causal"}),
            "objective is 'causal', but a bert is trained by 'masked'; leave objective out of the recipe",
        ),
        (lambda plain: plain["data"].update(seq_len="32"), "data.seq_len is '32'; expected a value of type int"),
        (lambda plain: plain["data"].update(seq_len=True), "data.seq_len is True; expected a value of type int"),
        (lambda plain: plain["optimizer"].update(betas=[0.9]), "optimizer.betas is [0.9]; expected 2 values"),
        (lambda plain: plain.update(phases=3), "phases is 3; expected a list"),
        (lambda plain: plain.update(data=3), "data is 3; expected a dict of bins"),
        (lambda plain: plain.update(model=3), "model is 3; expected a dict"),
        (lambda plain: plain.pop("optimizer"), "optimizer"),
        (lambda plain: plain["model"].pop("hidden_size"), "hidden_size"),
        (lambda plain: plain["model"].update(hidden_size="32"), "model.hidden_size is '32'"),
    ],
)
def test_a_wrong_dict_is_refused_with_its_name(tiny: Path, change: object, message: str) -> None:
    plain = load_recipe(tiny).to_dict()
    change(plain)  # type: ignore[operator]
    with pytest.raises(InvalidConfig) as caught:
        from_dict(plain)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe = (", "cannot be run: SyntaxError"),
        ("import nothing_of_that_name", "cannot be run: ModuleNotFoundError"),
        ("x = 1", "defines no `recipe = Recipe(...)` (found NoneType)"),
        (TINY.replace("global_batch_size=8", "global_batch_size=0"), "global_batch_size is 0"),
        (TINY.replace("global_batch_size=8", "global_batch=8"), "global_batch"),
        (TINY.replace("global_batch_size=8", "batch_rows=8"), "batch_rows is called global_batch_size now"),
        (
            TINY.replace("Data(", "Data(mask_share=0.1, "),
            "data.mask_share is called objective.mlm_probability now; write objective=Masked(mlm_probability=…) in",
        ),
        (TINY.replace('"vocab_size"', '"vocab_sise"'), "unknown key 'model.vocab_sise': did you mean 'vocab_size'"),
    ],
)
def test_a_broken_file_is_refused_with_its_path(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(InvalidConfig) as caught:
        load_recipe(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def other_recipe(folder: Path, config: dict[str, Any]) -> Path:
    """A recipe file with another model."""
    before, model, after = TINY.partition("model={")[0], "model=", TINY.partition("\n    },\n")[2]
    path = folder / "other.py"
    path.write_text(f"{before}{model}{config!r},\n{after}")
    return path


@pytest.mark.parametrize("name", ["LlamaConfig", "GPT2Config", "T5Config", "ModernBertConfig", "Qwen3MoeConfig"])
@pytest.mark.parametrize("dropped", [("model_type",), ("model_type", "architectures")])
def test_a_model_without_a_type_is_taken_for_no_bert(tmp_path: Path, name: str, dropped: tuple[str, ...]) -> None:
    """Whether its class says so or, written by hand, nothing but its keys."""
    import transformers

    config = json.loads(getattr(transformers, name)().to_json_string())
    config["architectures"] = [name.replace("Config", "ForCausalLM")]
    with pytest.raises(InvalidConfig) as caught:
        load_recipe(other_recipe(tmp_path, {key: value for key, value in config.items() if key not in dropped}))
    assert "there is no model_type" in str(caught.value) and "did you mean" not in str(caught.value)


LLAMA = {
    "model_type": "llama", "vocab_size": 67, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 32,
}  # fmt: skip


def test_the_objective_is_that_of_the_architecture(tmp_path: Path, tiny: Path) -> None:
    """It is part of what is recorded, and its settings of what can be set; without a model it waits for one."""
    assert load_recipe(tiny).objective == Masked(0.15)
    assert load_recipe(tiny, ["objective.mlm_probability=0.3"]).predicts == Masked(0.3)
    llama = load_recipe(other_recipe(tmp_path, LLAMA))
    assert llama.predicts == Causal() and llama.to_dict()["objective"] == {"kind": "causal"}
    assert from_dict(llama.to_dict()) == llama
    open_recipe = replace(llama, model=None, objective=None)
    assert open_recipe.objective is None and from_dict(open_recipe.to_dict()) == open_recipe
    assert replace(open_recipe, model=load_recipe(tiny).model).objective == Masked()
    path = other_recipe(tmp_path, LLAMA)
    path.write_text(path.read_text().replace(repr(LLAMA), "None"))
    with pytest.raises(InvalidConfig, match="'objective' is none, and only the recipe's file can say which it is"):
        load_recipe(path, ["objective.mlm_probability=0.3"])


def test_old_names(tiny: Path) -> None:
    assert current("data.mask_share=0.3") == current("data.mlm_probability=0.3") == "objective.mlm_probability=0.3"
    assert current("batch_rows=8") == "global_batch_size=8" and current("data.bins=clip") == "data.bins=clip"
    new = load_recipe(tiny, ["objective.mlm_probability=0.3"]).to_dict()
    for name in ("mask_share", "mlm_probability"):
        old = {key: value for key, value in new.items() if key not in ("objective", "global_batch_size")}
        old |= {"data": {**new["data"], name: 0.3}, "batch_rows": new["global_batch_size"]}
        assert renamed(old) == new == renamed(new)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA, "model_type": "bloom"}, "model_type is 'bloom'; this trainer trains models of model_type bert"),
        ({**LLAMA, "hidden_sise": 16}, "unknown key 'model.hidden_sise': did you mean 'hidden_size'"),
        ({**LLAMA, "hidden_size": "16"}, "model.hidden_size is '16'; expected a value of type int"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({**LLAMA, "architectures": ["LlamaModel"]}, "expected one of LlamaForCausalLM"),
        ({**LLAMA, "max_position_embeddings": 8}, "data.seq_len is 32, but model.max_position_embeddings is 8"),
        ({**LLAMA, "rope_parameters": {"rope_type": "odd", "rope_theta": 1.0}}, "rope_type is 'odd'"),
    ],
)
def test_what_is_wrong_with_another_model_is_reported(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_recipe(other_recipe(tmp_path, config))
    assert message in str(caught.value)


def test_values_of_another_model_are_set_by_their_types(tmp_path: Path) -> None:
    path = other_recipe(tmp_path, LLAMA)
    set_to = ["model.hidden_size=32", "model.attention_dropout=0.5", "model.head_dim=none", "model.hidden_act=gelu"]
    recipe = load_recipe(path, set_to)
    assert recipe.layers == 2 and recipe.model is not None
    assert [recipe.model[k] for k in ("hidden_size", "attention_dropout", "head_dim", "hidden_act")] == [
        32, 0.5, None, "gelu",
    ]  # fmt: skip
    with pytest.raises(InvalidConfig, match=r"unknown key 'model\.hiden_size'"):
        load_recipe(path, ["model.hiden_size=32"])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no recipe "):
        load_recipe(tmp_path / "nowhere.py")


def test_a_recipe_without_a_step_is_refused() -> None:
    model = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
             "intermediate_size": 8, "max_position_embeddings": 8}  # fmt: skip
    with pytest.raises(InvalidConfig, match="number of steps of all phases is 0"):
        Recipe("none", model, Data("bins", 8), 1, (Phase("full", 0),), AdamW(1e-3))


def test_a_constant_schedule_has_no_end_value() -> None:
    with pytest.raises(InvalidConfig, match=r"schedule.final is 0.5; expected 0"):
        Schedule("constant", final=0.5)


def test_recipes_import_no_torch(tiny: Path) -> None:
    code = (
        "import sys; from bert2bert.recipe import load_recipe, programs; from bert2bert.ranks import launcher;"
        "from bert2bert.train import ds_config;"
        f"load_recipe({str(tiny)!r}, ['seed=3']); print(sorted(m for m in ('torch', 'deepspeed') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
