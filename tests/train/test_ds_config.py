"""ds_configs: what is filled in, what is refused, and that DeepSpeed itself reads every file that is shipped."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from bert2bert.errors import InvalidConfig
from bert2bert.recipe import AdamW, Data, Phase, Recipe
from bert2bert.train.ds_config import ALLOWED, REFUSED, REMOVED, REMOVED_ZERO, expert_ranks, read, resolve

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))

MODEL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 64, "max_position_embeddings": 32}  # fmt: skip
RECIPE = Recipe("tiny", MODEL, Data("bins", 32), 512, (Phase("full", 10),), AdamW(1e-3), gradient_clipping=0.5)
CONFIG = {"train_micro_batch_size_per_gpu": 32, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}


def test_batch_sizes_and_clipping_come_from_the_recipe() -> None:
    before = copy.deepcopy(CONFIG)
    found = resolve(CONFIG, RECIPE, 4)
    assert found["train_batch_size"] == 512
    assert found["gradient_accumulation_steps"] == 4
    assert found["gradient_clipping"] == 0.5
    assert found["zero_allow_untested_optimizer"] is True
    assert found["zero_optimization"] == {"stage": 2} and found["bf16"] == {"enabled": True}
    assert before == CONFIG
    assert resolve(found, RECIPE, 4) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_micro_batch_size_per_gpu": None}, "train_micro_batch_size_per_gpu is None; expected the rows"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu is 'auto'"),
        (
            {"train_micro_batch_size_per_gpu": 48},
            "makes 192 rows, which do not divide the recipe's global_batch_size, 512",
        ),
        ({"train_micro_batch_size_per_gpu": 256}, "set train_micro_batch_size_per_gpu to a divisor of 128"),
        ({"train_batch_size": 256}, "train_batch_size is 256, but the recipe's global_batch_size, 512"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, but"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, the recipe's is 0.5"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer': it belongs to the recipe (recipe.optimizer); remove it"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler': it belongs to the recipe"),
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation': did you mean 'zero_optimization'"),
        ({"elasticity": {"enabled": True}}, "'elasticity'"),
        ({"pipeline": {"stages": 2}}, "'pipeline'"),
        ({"fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"bf16": True}, "bf16 is True; expected an object"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled is 'auto'"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "no fp32 master weights"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer is not true"),
        ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype"),
        ({"data_types": {"keep_in_fp32_modules": "tally"}}, "data_types.keep_in_fp32_modules is 'tally'; expected"),
        ({"data_types": {"keep_in_fp32_modules": None}}, "data_types.keep_in_fp32_modules is None; expected"),
        ({"zero_force_ds_cpu_optimizer": True}, "'zero_force_ds_cpu_optimizer': DeepSpeed's CPU Adam cannot"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage is '2'"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "weights are lost in silence"),
        ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, "elastic_checkpoint"),
        ({"zero_optimization": {"stage": 2, "ignore_unused_parameters": False}}, "ignore_unused_parameters"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm is not true"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size is 8"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device is 'nvme'"),
        (
            {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            "use stage 2, or remove data_types",
        ),
    ],
)
def test_what_cannot_be_obeyed_is_refused(change: dict, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        resolve({**CONFIG, **change}, RECIPE, 4)
    assert message in str(caught.value)


SHARED = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
_MIXED = {
    "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64,
    "moe_intermediate_size": 16, "max_position_embeddings": 32, "num_experts": 6,
}  # fmt: skip
MIXTURE = dataclasses.replace(RECIPE, model={"model_type": "qwen3_moe", **_MIXED}, objective=None)


def test_ranks_may_share_the_experts_of_a_mixture() -> None:
    assert expert_ranks(resolve({**CONFIG, **SHARED}, MIXTURE, 4)) == 2
    assert expert_ranks(resolve(CONFIG, MIXTURE, 4)) is None
    for off in (None, False, {"enabled": False}, {}):
        assert "expert_parallel" not in resolve({**CONFIG, "expert_parallel": off}, RECIPE, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "expert_parallel with zero_optimization.stage 3"),
        ({"zero_optimization": {}}, "stage 0; AutoEP's checkpoints are read and written for stages 1 and 2"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 4}}, "which does not divide the 6 experts"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 3}}, "which does not divide the 4 ranks"),
        ({"expert_parallel": {"enabled": True, "autoep_size": "2"}}, "autoep_size is '2'"),
        ({"expert_parallel": {"enabled": "yes"}}, "expert_parallel.enabled is 'yes'; expected true or false"),
        ({"expert_parallel": {"enabled": True, "load_balance_coeff": 0.1}}, "load_balance_coeff is untested here"),
        ({"expert_parallel": True}, "expert_parallel is True; expected an object"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer with expert"),
    ],
)
def test_experts_that_cannot_be_shared_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        resolve({**CONFIG, **SHARED, **change}, MIXTURE, 4)
    assert message in str(caught.value)


def test_a_model_without_experts_has_none_to_share() -> None:
    with pytest.raises(InvalidConfig, match="a bert has no experts that DeepSpeed's AutoEP splits"):
        resolve({**CONFIG, **SHARED}, RECIPE, 4)


def test_experts_that_autoep_computes_otherwise_are_refused() -> None:
    other = dataclasses.replace(MIXTURE, model={**(MIXTURE.model or {}), "hidden_act": "gelu"})
    with pytest.raises(InvalidConfig, match=r"model\.hidden_act is 'gelu'; AutoEP computes 'silu' alone"):
        resolve({**CONFIG, **SHARED}, other, 4)
    assert resolve(CONFIG, other, 4)


def test_a_number_of_ranks_that_does_not_divide_the_batch_is_refused() -> None:
    micro = CONFIG["train_micro_batch_size_per_gpu"]
    with pytest.raises(InvalidConfig, match=r"run on a number of ranks that divides 512: 1, 2, 4, .* ranks with") as e:
        resolve(CONFIG, RECIPE, 3)
    offered = str(e.value).rpartition("512: ")[2].partition(" ranks")[0].replace(" or ", ", ").split(", ")
    assert len(offered) > 2
    for ranks in map(int, offered):
        assert resolve(CONFIG, RECIPE, ranks)["gradient_accumulation_steps"] * ranks * micro == 512
    with pytest.raises(InvalidConfig, match=r"of 128: 1, 2, 4, 8, 16, 32, 64 or 128; or run on 1 or 2 ranks with"):
        resolve({**CONFIG, "train_micro_batch_size_per_gpu": 256}, RECIPE, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline": {"enabled": False}},
        {"optimizer": None},
        {"zero_optimization": {"stage": 2, "round_robin_gradients": False}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"data_types": {"keep_in_fp32_modules": "auto"}},
        {"data_types": {"keep_in_fp32_modules": ["tally", "e_score*bias"]}},
        {"data_types": {"keep_in_fp32_modules": []}},
    ],
)
def test_what_is_switched_off_or_harmless_passes(change: dict) -> None:
    assert resolve({**CONFIG, **change}, RECIPE, 1)["train_batch_size"] == 512


def test_no_key_is_both_allowed_and_refused() -> None:
    assert not set(ALLOWED) & set(REFUSED)
    assert not set(REMOVED) & {*ALLOWED, *REFUSED}


@pytest.mark.parametrize("value", [True, False, None, {"enabled": False}], ids=repr)
def test_keys_that_deepspeed_removed_are_refused_whatever_their_value(value: object) -> None:
    """The keys are those of DeepSpeed's own lists, and it refuses them switched off, too."""
    from deepspeed.runtime import config

    assert REMOVED.keys() == config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
    assert REMOVED_ZERO.keys() == config._REMOVED_ZERO_CONFIG_KEYS.keys()
    for section, keys in (("", REMOVED), ("zero_optimization", REMOVED_ZERO)):
        for key, remedy in keys.items():
            change = {section: {"stage": 3, key: value}} if section else {key: value}
            name = f"{section}.{key}" if section else repr(key)
            with pytest.raises(config.DeepSpeedConfigError):
                config._reject_removed_config_keys(change)
            with pytest.raises(InvalidConfig) as caught:
                resolve({**CONFIG, **change}, RECIPE, 4)
            assert str(caught.value) == f"ds_config: {name} was removed in DeepSpeed 0.19.8: {remedy}"


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON"), ("[1]", "holds a list; expected a JSON object"), (None, "no ds_config")]
)
def test_an_unreadable_file_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidConfig, match=message):
        read(path)


def test_one_file_is_shipped_for_each_stage_and_precision() -> None:
    assert {path.stem for path in SHIPPED} == {f"zero{s}_{p}" for s in (1, 2, 3) for p in ("bf16", "fp16", "cpu")}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_says_what_its_name_says_and_deepspeed_reads_it(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = resolve(read(path), RECIPE, 1)
    stage, precision = path.stem.removeprefix("zero").split("_")
    found = DeepSpeedConfig(json.loads(json.dumps(config)))
    assert found.zero_optimization_stage == int(stage)
    assert found.bfloat16_config.enabled == (precision == "bf16")
    assert found.float16_config.enabled == (precision == "fp16")
    assert found.gradient_accumulation_steps == 512 // config["train_micro_batch_size_per_gpu"]
    assert found.gradient_clipping == 0.5
    assert {"optimizer", "scheduler", "train_batch_size", "gradient_clipping"}.isdisjoint(read(path))
