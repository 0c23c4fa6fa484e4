"""The command `config`: sizes that divide, what it reports against transformers' own models, what is refused."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bert2bert.commands import cli
from bert2bert.growth.candidates import candidates
from bert2bert.growth.choices import Choices
from bert2bert.growth.plan import plan_growth
from bert2bert.growth.resize import count
from bert2bert.growth.size_request import SizeRequest
from bert2bert.growth.sizes import resized
from bert2bert.tables import table_for
from bert2bert.tables.flops import Flops, Work
from tests import tiny


def saved(config: dict[str, Any], folder: Path) -> Path:
    """A config as transformers saves it."""
    transformers.AutoConfig.for_model(**config).save_pretrained(folder)
    return folder


def heads_of(config: dict[str, Any]) -> frozenset[str]:
    return table_for(config).names.classes[config["architectures"][0]]


def full(name: str, **changes: Any) -> dict[str, Any]:
    """transformers' default config of an architecture."""
    cls = next(v.cls for v in tiny.VARIANTS.values() if v.base["model_type"] == name)
    return transformers.AutoConfig.for_model(name, architectures=[cls], **changes).to_dict()


def sized(config: dict[str, Any], **sizes: str) -> tuple[dict[str, Any], tuple[str, ...], dict[str, int]]:
    """What `config` makes of a config, its notes, and its sizes."""
    found = resized(config, heads_of(config), SizeRequest.parse(**sizes))
    return *found, table_for(config).axis_sizes(found.config)


def ask(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> Any:
    assert cli.main(["config", *map(str, words), "--json"]) == status
    out, err = capsys.readouterr()
    return json.loads(out) if status == 0 else err


@pytest.mark.parametrize("how", [["--width", "2x", "--depth", "2x"], ["--width", "1.5x"], ["--params", "4x"]], ids=str)
@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_transformers_builds_the_model_with_the_parameters_that_are_printed(
    name: str, how: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = saved(tiny.config_of(name), tmp_path / "source"), tmp_path / "made"
    found = ask(capsys, source, *how, "--output", output)
    numbers = []
    for folder in (source, output):
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])._from_config(config)
        tiny.untie(model, found["config"])
        numbers.append(sum(p.numel() for p in model.parameters()))
    assert numbers == found["parameters"] and numbers[1] > numbers[0]
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, output))
    assert new == found["config"]
    assert {key: pair for key, pair in found["changes"].items() if key in old} == {
        key: [old[key], new[key]] for key in old if old[key] != new[key]
    }
    small, large = (table_for(c).axis_sizes(c) for c in (old, new))
    assert large["qk"] == small["qk"]  # whole heads of the same size
    if "group" in small:
        assert large["group"] == small["group"] or small["kv"] == 1
    if how[0] == "--width" and how[1] == "2x":
        ratio = {axis: large[axis] / small[axis] for axis in ("embed", "ffn", *table_for(old).sizes.depth)}
        assert set(ratio.values()) == {2.0} and not found["notes"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "qwen3", "t5", "modernbert", "mixtral"])
def test_a_number_of_parameters_is_reached_at_about_the_aspect(name: str) -> None:
    config = full(name)
    heads, table = heads_of(config), table_for(config)
    old, before = table.axis_sizes(config), count(config, heads)
    for times in (0.6, 1.7, 5.0):
        made, _, new = sized(config, params=f"{times}x")
        assert count(made, heads) == pytest.approx(times * before, rel=0.031)
        assert abs(log(new["embed"] / old["embed"] * old["layers"] / new["layers"])) < 0.3
        assert new["embed"] % 64 == new["ffn"] % 64 == 0 and new["qk"] == old["qk"]
    wide, _, _ = sized(config, params="3x", depth="1x")
    deep, _, new = sized(config, params="3x", width="1x")
    assert new["embed"] == old["embed"] and new["layers"] > old["layers"]
    assert table.axis_sizes(wide)["layers"] == old["layers"]
    for made in (wide, deep):
        assert count(made, heads) == pytest.approx(3 * before, rel=0.1)


GROUPED = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 2048}


@pytest.mark.parametrize(
    ("name", "changes", "sizes", "expected", "note"),
    [
        ("bert", {}, {"width": "1.3x"}, {"embed": 1024, "heads": 16, "ffn": 4096}, "1.3x is 998.4: chosen 1024"),
        ("bert", {}, {"width": "1000", "heads": "8"}, {"embed": 1024, "heads": 8}, "8 heads whose size is a multiple"),
        ("bert", {}, {"width": "1152"}, {"embed": 1152, "heads": 18, "ffn": 4608}, ""),
        ("bert", {}, {"heads": "6"}, {"embed": 768, "heads": 6, "qk": 128}, ""),
        ("llama", GROUPED, {"width": "2x"}, {"embed": 1536, "kv": 8, "group": 3, "ffn": 4096}, ""),
        ("llama", GROUPED, {"width": "900"}, {"embed": 960, "kv": 5, "group": 3}, "whole heads of 64, 3 at a"),
        ("llama", GROUPED | {"num_key_value_heads": 1}, {"width": "1.5x"}, {"kv": 1, "group": 18}, ""),
        ("llama", GROUPED, {"width": "2x", "kv_heads": "4"}, {"embed": 1536, "kv": 4, "group": 6}, ""),
        ("llama", GROUPED, {"ffn": "4x"}, {"embed": 768, "ffn": 8192}, ""),
        ("qwen3", {"head_dim": 128}, {"width": "2x"}, {"embed": 8192, "qk": 128}, ""),
        ("modernbert", {}, {"heads": "16"}, {"embed": 1024, "heads": 16}, "hidden_size follows"),
        ("t5", {"d_model": 384, "num_heads": 8}, {"width": "2x"}, {"embed": 768, "heads": 16, "qk": 64}, ""),
        ("t5", {"num_layers": 6, "num_decoder_layers": 3}, {"depth": "4"}, {"layers": 4, "decoder_layers": 2}, ""),
        ("t5", {}, {"depth": "1.2x"}, {"layers": 7, "decoder_layers": 7}, "1.2x is 7.2: chosen 7"),
        ("gpt2", {}, {"vocab": "50304"}, {"vocab": 50304, "embed": 768, "ffn": 3072}, ""),
        ("mixtral", {}, {"experts": "2x"}, {"experts": 16, "embed": 4096}, ""),
        ("qwen2_moe", {}, {"width": "1.5x"}, {"embed": 3072, "ffn": 2112, "shared": 8448}, ""),
    ],
)
def test_sizes_divide(name: str, changes: Any, sizes: Any, expected: dict[str, int], note: str) -> None:
    made, notes, found = sized(full(name, **changes), **sizes)
    assert {axis: found[axis] for axis in expected} == expected
    assert note in " ".join(notes)
    assert note or not notes
    if name == "gpt2":
        assert made["n_inner"] is None  # the width's fourfold still


def test_patterns_of_layers_go_on() -> None:
    config = full("modernbert")
    made, _, _ = sized(config, depth="28")
    assert made["layer_types"][:22] == config["layer_types"] and len(made["layer_types"]) == 28
    assert [kind == "full_attention" for kind in made["layer_types"]] == [i % 3 == 0 for i in range(28)]


def test_the_number_of_experts_keeps_its_key() -> None:
    config = full("qwen3_moe")
    old = {key: value for key, value in config.items() if key != "num_local_experts"} | {"num_experts": 8}
    made, _, sizes = sized(old, experts="16")
    assert made["num_experts"] == sizes["experts"] == 16 and "num_local_experts" not in made


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "modernbert", "mixtral"])
def test_operators_are_exact_as_the_plan_of_the_whole_says(name: str) -> None:
    """Each width alone, at all layers, against what `config` found out at a few; tiny models."""
    config = tiny.config_of(name) | {"num_hidden_layers": 6}
    config = config | {key: 6 for key in ("n_layer", "num_layers") if key in config}
    config.pop("layer_types", None)
    for sizes in ({"width": "2x"}, {"width": "1.5x", "ffn": "3x"}):
        made, _, _ = sized(config, **sizes)
        found = candidates(config, made, heads_of(config))
        assert set(found) == {"width"}
        kept = {c.name: c.exact for c in found["width"] if not c.refused}
        for operator, exact in kept.items():
            plan = plan_growth(config, made, Choices.parse(width=operator), heads=heads_of(config))
            assert exact == (not plan.exactness.function), operator
        assert len(kept) > 8 and not kept["aki"] and kept["hyperclone"] == (sizes == {"width": "2x"})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small Llama's folder with a tokenizer's file."""
    config = tiny.config_of("llama")
    model = tiny.build(config)
    tiny.scramble(model)
    model.float().save_pretrained(tmp_path / "small")
    kept = json.loads((tmp_path / "small/config.json").read_text())
    (tmp_path / "small/config.json").write_text(json.dumps(kept | {"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "small/tokenizer.json").write_text("{}")
    return tmp_path / "small"


def test_the_command_line_that_is_printed_grows_the_model(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly, as promised; the folder is the target's config, and what was grown is a source of the next one."""
    made, grown = tmp_path / "made", tmp_path / "grown"
    found = ask(capsys, llama, "--width", "2x", "--depth", "2x", "--output", made)
    assert found["reasons"] == [] and found["command"][2] == str(llama)
    assert sorted(p.name for p in made.iterdir()) == ["config.json", "generation_config.json", "tokenizer.json"]
    assert cli.main([str(grown) if word == "TARGET" else word for word in found["command"][1:]]) == 0
    assert cli.main(["verify", str(llama), str(grown)]) == 0
    capsys.readouterr()
    again = ask(capsys, grown, "--depth", "3x", "--output", tmp_path / "again")
    assert again["parameters"][0] == found["parameters"][1]
    work = Work((16,), 16)
    spent = [Flops(c, frozenset({"lm"})).forward(work) / 16 for c in (found["config"], again["config"])]
    assert again["forward_flops_per_token"] == spent


@pytest.mark.parametrize("sizes", [(), ("--width", "2x", "--depth", "2x"), ("--params", "3x")], ids=str)
def test_a_tied_model_is_untied_on_the_way(
    sizes: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly, by the command that is printed."""
    source, made, grown = tmp_path / "source", tmp_path / "made", tmp_path / "grown"
    config = tiny.config_of("gpt2", tie_word_embeddings=True)
    model = tiny.build(config)
    tiny.scramble(model)
    model.float().save_pretrained(source)
    found = ask(capsys, source, "--embeddings", "untie", *sizes, "--output", made)
    assert found["changes"]["tie_word_embeddings"] == [True, False] and found["reasons"] == []
    assert [(o["name"], o["exact"]) for o in found["operators"]["embeddings"]] == [("untie", True)]
    assert bool(set(found["operators"]) - {"embeddings"}) == bool(sizes)
    if "--params" in sizes:
        assert found["parameters"][1] == pytest.approx(3 * found["parameters"][0], rel=0.1)
    assert cli.main([str(grown) if word == "TARGET" else word for word in found["command"][1:]]) == 0
    assert cli.main(["verify", str(source), str(grown)]) == 0


def test_another_vocabulary_has_another_tokenizer(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ask(capsys, llama, "--vocab", "64", "--output", tmp_path / "made")
    assert not (tmp_path / "made/tokenizer.json").exists() and "no tokenizer is copied" in " ".join(found["notes"])
    assert "--vocab" in found["command"]


def test_a_terminal_is_given_the_same(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", str(llama / "config.json"), "--width", "2x", "--output", str(tmp_path / "made")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "change   hidden_size 12 -> 24" in lines and "function exact" in lines
    assert any(line.startswith("size ") and "parameters (" in line for line in lines)
    assert any(line.startswith("width    exact: fpi") for line in lines)
    assert lines[-1].startswith(f"grow     bert2bert grow CHECKPOINT TARGET --config {tmp_path / 'made'} --width")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("", "no size is given"),
        ("--width 0", "--width is '0'; expected 2x"),
        ("--width two", "--width is 'two'"),
        ("--depth 1.5", "--depth is '1.5'"),
        ("--width 2k", "--width is '2k'"),
        ("--params 1M --width 2x --depth 2x", "leaves nothing to choose"),
        ("--params 10", "--params 10 is out of reach"),
        ("--experts 8", "a llama has no experts"),
        ("--kv-heads 4", "6 heads cannot be shared evenly among 4 key-value heads"),
        ("--heads 1.3x", "--heads 1.3x of 6 is 7.8; a whole number is expected"),
        ("--width 1x", "nothing would change"),
        ("--width 13 --ffn 1x", "nothing would change"),
        ("--vocab 1", "would be no token"),
        ("--embeddings untie", "the source is untied already"),
        ("--embeddings tie", "--embeddings 'tie': unknown operator"),
        ("--width 99999999x", "hidden_size would be 1,199,999,988; expected at most 16,777,216"),
        ("--depth 100000", "num_hidden_layers would be 100,000; expected at most 4,096"),
        ("--params 9999999B", "expected at most 10,000,000,000,000"),
        ("--params 1M --heads 7", "7 heads cannot be shared evenly among 2 key-value heads"),
        ("--width 2x --source-config small/config.json", "is a config itself"),
    ],
)
def test_what_cannot_be_is_refused(
    words: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tiny.config_of("llama"), tmp_path / "small")
    err = ask(capsys, "small", *words.split(), "--output", "made", status=2)
    assert text in err and err.startswith("bert2bert config: ") and not (tmp_path / "made").exists()


def test_places_that_cannot_be_are_refused(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in llama.iterdir())
    assert "the folder holds files already" in ask(capsys, llama, "--width", "2x", "--output", llama, status=2)
    file = llama / "config.json"
    assert "a file; name a folder" in ask(capsys, llama, "--width", "2x", "--output", file, status=2)
    none, made = tmp_path / "none", tmp_path / "made"
    assert "no checkpoint there" in ask(capsys, none, "--width", "2x", "--output", made, status=2)
    assert not made.exists()
    assert sorted(p.name for p in llama.iterdir()) == before
