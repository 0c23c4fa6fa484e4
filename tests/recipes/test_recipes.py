"""The shipped recipes: they load, say what the house requires, agree with each other and with the paper's settings."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bert2bert.commands.plan_recipe import plan_recipe
from bert2bert.errors import InvalidConfig
from bert2bert.recipe import Full, Recipe, SubModels, from_dict, load_recipe
from bert2bert.recipe.schedules import lr_at
from bert2bert.train.ds_config import read, resolve
from tests.recipes.test_growing_recipes import LLAMA_7B

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def recipe(name: str):
    return load_recipe(ROOT / "recipes" / f"{name}.py")


def test_every_experiment_has_its_file() -> None:
    assert {path.stem for path in RECIPES} >= {
        "bert_small", "bert_base_scratch", "bert_base_bert2bert", "demo_small", "demo_scratch", "demo_bert2bert",
        "demo_gpt2", "demo_gpt2_scratch",
    }  # fmt: skip


def header(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def planned(path: Path, ds_config: str, ranks: int, *overrides: str) -> Recipe:
    """A recipe, once every phase of it has been planned; one without a model takes that of a Llama."""
    found = load_recipe(path, overrides)
    plan = plan_recipe(found if found.model else replace(found, model=LLAMA_7B), ROOT / ds_config, ranks)
    assert [phase.name for phase in plan.phases] == [phase.name for phase in found.phases]
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_header_says_command_machine_and_expectation(path: Path) -> None:
    text = header(path)
    for word in ("Command:", "Machine:", "Expected:", f"recipes/{path.name}", "launch/pretrain.py --ds_config"):
        assert word in text
    ds_config = next(word for word in text.split() if word.startswith("ds_configs/"))
    found = planned(path, ds_config, int(text.split("--num_gpus")[1].split()[0]))
    assert from_dict(found.to_dict()) == found


SET = re.compile(r"--set((?:[\s\\]+[\w.]+=\S+)+)")
SHOWN = [
    (path, tuple(word.rstrip(",:;)") for word in found.replace("\\", " ").split()))
    for path in RECIPES
    for found in SET.findall(header(path))
]


@pytest.mark.parametrize(("path", "overrides"), SHOWN, ids=lambda x: x.stem if isinstance(x, Path) else " ".join(x))
def test_what_a_header_sets_can_be_planned(path: Path, overrides: tuple[str, ...]) -> None:
    """And is another recipe than the plain one."""
    assert planned(path, "ds_configs/zero2_bf16.json", 8, *overrides) != load_recipe(path)


def test_headers_show_variants() -> None:
    assert len(SHOWN) > 15 and {path.stem for path, _ in SHOWN} >= {"llama_hyperclone", "gpt2_midas", "bert_stack"}


@pytest.mark.parametrize("path", [p for p in RECIPES if not p.stem.startswith("demo_")], ids=lambda path: path.stem)
def test_every_recipe_has_a_tiny_size(path: Path) -> None:
    """For a CPU; the demo's are small as they are."""
    found = planned(path, "ds_configs/zero2_cpu.json", 2, "size=tiny")
    assert found.steps is not None and found.steps <= 120


SIZED = ("gpt2_small_scratch", "llama_continue", "modernbert_scratch", "t5_scratch", "upcycled_mixtral")


@pytest.mark.parametrize("name", SIZED)
def test_a_tiny_size_is_the_same_experiment(name: str) -> None:
    """Fewer and smaller of everything, but the same architecture, objective and optimizer."""
    path = ROOT / "recipes" / f"{name}.py"
    whole, tiny = load_recipe(path), load_recipe(path, ["size=tiny", "phases.0.steps=7"])
    assert tiny.phases[0].steps == 7 and tiny.steps < 100 < whole.steps
    assert (tiny.optimizer, tiny.objective) == (whole.optimizer, whole.objective)
    assert (tiny.model or {}).keys() >= (whole.model or {}).keys() - {"num_decoder_layers"}
    for stage, ranks in ((1, 2), (2, 2), (3, 2), (2, 1)):
        resolve(read(ROOT / f"ds_configs/zero{stage}_cpu.json"), tiny, ranks)
    with pytest.raises(InvalidConfig, match=f"{name}.py defines no recipe of size 'tinny'; did you mean 'tiny'"):
        load_recipe(path, ["size=tinny"])


def test_a_size_of_a_recipe_that_has_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no recipe of size 'tiny'; leave size= out"):
        load_recipe(ROOT / "recipes" / "demo_small.py", ["size=tiny"])


@pytest.mark.parametrize(("grown", "config"), [("bert_base_bert2bert", "bert_base"), ("demo_bert2bert", "demo_base")])
def test_the_growth_target_is_the_model_that_is_trained(grown: str, config: str) -> None:
    assert json.loads((ROOT / "recipes" / "configs" / f"{config}.json").read_text()) == recipe(grown).model


@pytest.mark.parametrize(
    ("small", "scratch", "grown"),
    [("bert_small", "bert_base_scratch", "bert_base_bert2bert"), ("demo_small", "demo_scratch", "demo_bert2bert")],
)
def test_the_comparison_is_fair(small: str, scratch: str, grown: str) -> None:
    small, scratch, grown = recipe(small), recipe(scratch), recipe(grown)
    for key in ("model", "data", "global_batch_size", "optimizer", "gradient_clipping", "seed", "steps", "eval_every"):
        assert getattr(scratch, key) == getattr(grown, key), key
    assert small.data == grown.data
    head = {r.model["hidden_size"] // r.model["num_attention_heads"] for r in (small, grown)}
    assert len(head) == 1, "growth adds whole heads"
    for key in ("vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps"):
        assert small.model[key] == grown.model[key], key


def test_the_comparison_of_the_growth_in_the_job_is_fair() -> None:
    grown, scratch = recipe("demo_gpt2"), recipe("demo_gpt2_scratch")
    assert grown.models[-1] == scratch.model and grown.models[0] != scratch.model
    assert grown.phases[-1].steps == scratch.steps
    for key in ("data", "global_batch_size", "optimizer", "gradient_clipping", "seed", "eval_every", "predicts"):
        assert getattr(scratch, key) == getattr(grown, key), key


@pytest.mark.parametrize("name", ["bert_base_bert2bert", "demo_bert2bert"])
def test_two_stages_follow_one_unbroken_schedule(name: str) -> None:
    found = recipe(name)
    first, second = found.phases
    assert isinstance(first.program, SubModels) and isinstance(second.program, Full)
    assert first.steps / found.steps == pytest.approx(5 / 40)
    end = lr_at(first.schedule, found.optimizer.lr, first.steps, first.steps)
    start = lr_at(second.schedule, found.optimizer.lr, 0, second.steps)
    assert second.schedule.warmup_steps == 0 and start == pytest.approx(end, rel=1e-12)
    slopes = [
        (lr_at(p.schedule, found.optimizer.lr, s + 1, p.steps)
         - lr_at(p.schedule, found.optimizer.lr, s, p.steps))
        for p, s in ((first, first.steps - 1), (second, 0))
    ]  # fmt: skip
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-6)


def test_the_papers_settings() -> None:
    grown, source = recipe("bert_base_bert2bert"), recipe("bert_small")
    assert (source.layers, source.model["hidden_size"]) == (12, 512)
    assert (grown.layers, grown.model["hidden_size"], grown.model["num_attention_heads"]) == (12, 768, 12)
    assert grown.phases[0].program == SubModels(layers_per_stage=3)
    assert (grown.global_batch_size, grown.optimizer.lr, grown.phases[0].schedule.warmup_steps) == (512, 1e-4, 10_000)
    tokens = grown.steps * grown.global_batch_size * grown.data.seq_len
    assert tokens == pytest.approx(1e6 * 256 * 512), "40 epochs are BERT's million steps of 256 rows"
