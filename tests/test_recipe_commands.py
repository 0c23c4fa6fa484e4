"""`bert2bert plan` and `grow` with a recipe whose model grows between its phases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from bert2bert.commands.cli import main
from bert2bert.commands.plan_recipe import plan_recipe
from bert2bert.recipe import load_recipe

ROOT = Path(__file__).parents[1]

FILE = """
from bert2bert.recipe import AdamW, Data, Grow, Phase, Recipe, SubModels, Tokens

recipe = Recipe(
    name="two", model={model}, data=Data("bins", 16), global_batch_size=8, optimizer=AdamW(1e-3),
    phases=(
        Phase("small", 10),
        Phase("sub-models", 4, SubModels(2), grow=Grow({{"hidden_size": "2x", "num_attention_heads": 4,
              "intermediate_size": 64, "num_hidden_layers": 4}}, depth="stack")),
        Phase("full", 6, until=Tokens(500)),
    ),
)
"""
MODEL = {
    "model_type": "bert", "vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "two.py"
    path.write_text(FILE.format(model=MODEL))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = transformers.BertConfig(**{key: value for key, value in MODEL.items() if key != "model_type"})
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_plan_says_what_every_phase_is_and_costs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters as transformers counts them; memory as ZeRO's paper does."""
    ds_config = ROOT / "ds_configs" / "zero2_bf16.json"
    assert main(["plan", "--recipe", str(recipe), "--ds_config", str(ds_config), "--ranks", "8", "--json",
                 "--set", "global_batch_size=512"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    small, stage, full = found["phases"]
    sizes = [
        sum(p.numel() for p in transformers.BertForMaskedLM(transformers.BertConfig(**config)).parameters())
        for config in (MODEL, {**MODEL, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
                               "num_hidden_layers": 4})
    ]  # fmt: skip
    assert [p["parameters"] for p in (small, stage, full)] == [sizes[0], sizes[1], sizes[1]]
    assert stage["memory"] == 2 * sizes[1] + 2 * sizes[1] // 8 + 12 * sizes[1] // 8
    assert stage["grows"]["axes"]["embed"] == [16, 32] and stage["grows"]["bytes_written"] == 12 * sizes[1]
    assert (small["grows"], small["steps"], full["until"]) == (None, 10, "until tokens")
    assert 2 < stage["layers_run"] < 4 and stage["flops_a_token"] < full["flops_a_token"]
    assert found["tokens"] == 20 * 512 * 16 and found["flops"] == pytest.approx(
        sum(p["flops"] for p in found["phases"])
    )
    assert main(["plan", "--recipe", str(recipe)]) == 0
    text = capsys.readouterr().out
    assert "phase 1  sub-models: 4 steps" in text and "growth   embed 16 -> 32" in text


def test_a_growth_of_a_recipe_is_that_of_the_options(recipe: Path, source: Path, tmp_path: Path) -> None:
    larger = {**json.loads((source / "config.json").read_text()), "hidden_size": 32, "num_attention_heads": 4,
              "intermediate_size": 64, "num_hidden_layers": 4}  # fmt: skip
    (tmp_path / "larger.json").write_text(json.dumps(larger))
    common = ["--format", "hub", "--no-measure", "--quiet"]
    assert main(["grow", str(source), str(tmp_path / "a"), "--recipe", str(recipe), *common]) == 0
    assert main(["grow", str(source), str(tmp_path / "b"), "--config", str(tmp_path / "larger.json"), *common]) == 0
    manifests = [json.loads((tmp_path / x / "bert2bert.json").read_text()) for x in "ab"]
    assert manifests[0]["growth"]["plan_digest"] == manifests[1]["growth"]["plan_digest"]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]
    assert manifests[0]["growth"]["inserted"] == ["layer.2", "layer.3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan"], "give SOURCE and --config FILE, the larger model, or --recipe FILE"),
        (["plan", "--recipe", "R", "--width", "aki"], "--width is in the recipe, in the Grow of its phase"),
        (["plan", "x", "--config", "c", "--set", "seed=1"], "--set, --phase and --ds_config belong to --recipe"),
        (["grow", "S", "T", "--recipe", "R", "--phase", "ful"], "--phase is 'ful'; expected a phase that"),
        (["plan", "--recipe", "R", "--set", "phases.1.grow.model.hidden_size=24"], "phases.1 ('sub-models')"),
        (["plan", "--recipe", "R", "--set", "phases.1.grow.width=akki"], "phases.1 ('sub-models'): its growth"),
        (["plan", "--recipe", "R", "--set", "phases.1.grow.model.hidden_sise=32"], "did you mean 'phases.1.grow.mod"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    recipe: Path, source: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"R": str(recipe), "S": str(source), "T": str(source / "t")}.get(word, word) for word in words]
    assert main(given) == 2
    assert message in capsys.readouterr().err


def test_the_recipe_of_the_page_on_training_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    path = tmp_path / "page.py"
    path.write_text(text.split("```python\n")[1].split("```")[0])
    found = plan_recipe(load_recipe(path, ["phases.1.grow.width=fpi"]), None, 1)
    assert [phase.name for phase in found.phases] == ["small", "sub-models", "full"]
    assert found.phases[1].grows is not None and found.phases[1].grows["axes"]["layers"] == [6, 12]
