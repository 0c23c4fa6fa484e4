"""The command verify on models of every kind: what passes, what fails, and what is not promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import xxhash
from safetensors.torch import load_file, save_file

from bert2bert.checkpoints.manifest import Manifest
from bert2bert.commands import cli
from bert2bert.commands.verify import verify
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, InvalidData
from bert2bert.growth.source_model import open_model
from bert2bert.measure import transformers_models
from bert2bert.measure.checks import Verified
from bert2bert.tables import TABLES
from tests import tiny
from tests.data.fixtures import write_bins
from tests.doors import grow
from tests.rounding import ROUNDING, SINGLE, WRONG, allowed, gap

BERT = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 25}
LLAMA = {"hidden_size": 24, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 20}
GROWN: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT,
    "gpt2": {"n_embd": 16, "n_head": 4, "n_inner": 24},
    "llama": LLAMA,
    "llama-tied": LLAMA,
    "t5": {"d_model": 16, "num_heads": 4, "d_ff": 24},
    "modernbert": {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 20},
    "mixtral": LLAMA,
}


def silent(_: str) -> None:
    """For growths whose words do not matter."""


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A scrambled model of a variant as transformers saves it."""
    config = tiny.config_of(name)
    cls = getattr(transformers, config["architectures"][0])
    model = cls._from_config(transformers.AutoConfig.for_model(**config), attn_implementation="eager")
    tiny.scramble(model)
    model.to(dtype).save_pretrained(folder)
    return model.eval()


def target(path: Path, name: str, **changes: Any) -> Path:
    """The config file of a grown variant."""
    path.write_text(json.dumps(tiny.config_of(name, **(GROWN[name] | changes))))
    return path


def result(report: Verified, name: str) -> tuple[bool, str]:
    """One check's outcome and detail."""
    return next((c.ok, c.detail) for c in report.checks if c.name == name)


@pytest.mark.parametrize("name", GROWN)
def test_an_exact_growth_passes_everything(name: str, tmp_path: Path) -> None:
    save(tmp_path / "small", name)
    lines: list[str] = []
    grow(tmp_path / "small", tmp_path / "big", target(tmp_path / "big.json", name), say=lines.append)
    (drift,) = (line for line in lines if line.startswith("drift"))
    assert drift.startswith("drift    logits differ by") and "loss" not in drift and "random tokens" in drift
    report = verify(tmp_path / "small", tmp_path / "big")
    assert report.ok, report.text()
    assert [c.name for c in report.checks] == [
        "source", "plan", "tensors", "weights", "exp_avg", "exp_avg_sq", "logits", "gradients",
    ]  # fmt: skip
    assert "of the largest entry" in result(report, "gradients")[1]
    assert gap(report.drift.logits_relative, 0.0, SINGLE) <= ROUNDING and report.drift.dtype == "float64"
    assert report.drift.loss_source is report.drift.loss_grown is None  # of random tokens


def change(file: Path, name: str, at: Any) -> None:
    """Add 1 to one element of a tensor, in place."""
    tensor, content = load_file(file)[name], bytearray(file.read_bytes())
    place = content.find(tensor.numpy().tobytes())
    tensor[at] += 1
    content[place : place + tensor.nbytes] = tensor.numpy().tobytes()
    file.write_bytes(content)


def test_a_changed_weight_and_a_changed_function_fail(tmp_path: Path) -> None:
    save(tmp_path / "small", "gpt2")
    grow(tmp_path / "small", tmp_path / "big", target(tmp_path / "big.json", "gpt2"), format="hub", say=silent)
    change(tmp_path / "big" / "model.safetensors", "transformer.h.1.mlp.c_fc.weight", (3, 4))
    report = verify(tmp_path / "small", tmp_path / "big")
    assert [c.name for c in report.checks if not c.ok] == ["weights", "logits"]
    assert "transformer.h.1.mlp.c_fc.weight" in result(report, "weights")[1]
    assert cli.main(["verify", str(tmp_path / "small"), str(tmp_path / "big")]) == 1


def test_a_wrong_rule_for_gradients_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is checked against real gradients: one that forgets the shares is found."""
    from bert2bert.algebra import realise

    save(tmp_path / "small", "gpt2")
    grow(tmp_path / "small", tmp_path / "big", target(tmp_path / "big.json", "gpt2"), format="hub", say=silent)
    plain = dict(realise.STATES)
    monkeypatch.setitem(realise.STATES, "exp_avg", type(plain["exp_avg"])("exp_avg", gradient=False, power=1))
    report = verify(tmp_path / "small", tmp_path / "big")
    assert [c.name for c in report.checks if not c.ok] == ["gradients"]


def test_what_is_not_promised_is_reported_and_not_judged(tmp_path: Path) -> None:
    save(tmp_path / "small", "llama")
    grow(tmp_path / "small", tmp_path / "big", target(tmp_path / "big.json", "llama"), width="aki", say=silent)
    report = verify(tmp_path / "small", tmp_path / "big")
    assert report.ok and report.drift.logits_relative > 1e-3
    assert "not promised" in result(report, "logits")[1] and "not promised" in result(report, "gradients")[1]


@pytest.mark.parametrize("name", ["bert", "llama-tied"])
def test_old_logits_are_judged_where_the_vocabulary_grows(name: str, tmp_path: Path) -> None:
    """They are promised though the loss is not; so a changed embedding of an old token fails."""
    save(tmp_path / "small", name)
    config = target(tmp_path / "big.json", name, vocab_size=34)
    grow(tmp_path / "small", tmp_path / "big", config, vocab="mean", format="hub", say=silent)
    ids = tmp_path / "ids.txt"
    ids.write_text("5 6 7 8 9 10")
    report = verify(tmp_path / "small", tmp_path / "big", tokens=ids)
    assert report.ok and "at most" in result(report, "logits")[1], report.text()
    assert "new tokens enter the softmax" in result(report, "loss")[1]
    assert abs(report.drift.loss_source - report.drift.loss_grown) > 1e-3
    file = tmp_path / "big" / "model.safetensors"
    kept = load_file(file)
    (words,) = (n for n in kept if n.endswith(("word_embeddings.weight", "embed_tokens.weight")))
    content = bytearray(file.read_bytes())
    at = content.find(kept[words].numpy().tobytes())
    kept[words][20] += 1
    content[at : at + kept[words].nbytes] = kept[words].numpy().tobytes()
    file.write_bytes(content)
    assert [c.name for c in verify(tmp_path / "small", tmp_path / "big").checks if not c.ok] == [
        "weights", "logits",
    ]  # fmt: skip


def test_sixteen_bit_files_are_compared_at_their_precision(tmp_path: Path) -> None:
    save(tmp_path / "small", "t5", torch.bfloat16)
    grow(tmp_path / "small", tmp_path / "big", target(tmp_path / "big.json", "t5"), format="hub", say=silent)
    assert {m.dtype for m in open_model(tmp_path / "big").source.tensors.values()} == {"bfloat16"}
    report = verify(tmp_path / "small", tmp_path / "big")
    assert report.ok and "at most 0.15" in result(report, "logits")[1], report.text()


def test_a_model_that_magnifies_rounding_is_judged_before_it(tmp_path: Path) -> None:
    """Noise many times as large as the weights: exact, but float32 shows it less well than in other growths."""
    save(tmp_path / "small", "t5")
    goal = target(tmp_path / "big.json", "t5")
    big = tmp_path / "big"
    grow(tmp_path / "small", big, goal, format="hub", breaker="noise:scale=20", measure=False, say=silent)
    report = verify(tmp_path / "small", big)
    detail = next(c.detail for c in report.checks if c.name == "logits")
    assert report.ok and "before rounding" in detail, report.text()
    # a file that is not the plan's is judged as it is
    change(big / "model.safetensors", "encoder.final_layer_norm.weight", 0)
    checks = {c.name: c for c in verify(tmp_path / "small", big).checks}
    assert not checks["logits"].ok and "before rounding" not in checks["logits"].detail


def test_a_long_comparison_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "small", "gpt2")
    config, lines = target(tmp_path / "big.json", "gpt2"), list[str]()
    for limit, words in ((1e9, ["logits differ"]), (1e3, ["being measured: ", "logits differ"])):
        monkeypatch.setattr("bert2bert.measure.drift._LONG", limit)
        grow(tmp_path / "small", tmp_path / f"big{limit}", config, format="hub", say=lines.append)
        drifts = [line for line in lines if line.startswith("drift")]
        assert len(drifts) == len(words) and all(word in line for word, line in zip(words, drifts, strict=True))
        lines.clear()


def test_drift_and_verify_look_at_what_was_written(tmp_path: Path) -> None:
    """A growth that stores bfloat16 changes the function; transformers, on the files, says by how much."""
    save(tmp_path / "small", "llama")
    big, ids = tmp_path / "big", tmp_path / "ids.txt"
    grow(
        tmp_path / "small", big, target(tmp_path / "big.json", "llama"), format="hub", precision="bf16", say=silent
    )  # fmt: skip
    manifest = open_model(big).source.manifest
    assert manifest and manifest.growth
    report = verify(tmp_path / "small", big)
    assert report.ok and report.drift.as_dict() == manifest.growth.drift
    many = sum(1 for _ in load_file(big / "model.safetensors"))
    assert f"{many} tensors, bit for bit, " in result(report, "weights")[1]
    assert "of them rounded to bfloat16" in result(report, "weights")[1]
    ids.write_text("5 6 7 8 9\n10 11 12 13 14")
    found = verify(tmp_path / "small", big, tokens=ids).drift
    given = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    x, y = (
        tiny.build(tiny.config_of("llama", **changes))
        for changes in ({}, GROWN["llama"])
    )  # fmt: skip
    for model, folder in ((x, tmp_path / "small"), (y, big)):
        model.load_state_dict(load_file(folder / "model.safetensors"))

    @torch.no_grad()
    def measured() -> dict[str, torch.Tensor]:
        a, b = (model(input_ids=given).logits[:, :-1].flatten(0, 1) for model in (x, y))
        losses = (torch.nn.functional.cross_entropy(z, given[:, 1:].flatten()) for z in (a, b))
        far = {"logits_relative": (a - b).norm() / a.norm(), "logits_max": (a - b).abs().max()}
        return (
            far
            | {"agreement": (a.argmax(1) == b.argmax(1)).double().mean()}
            | dict(zip(("loss_source", "loss_grown"), losses, strict=True))
        )

    limits = allowed(measured)
    assert found.logits_relative > WRONG * limits["logits_relative"]
    for what, value in measured().items():
        assert gap(torch.tensor(getattr(found, what), dtype=torch.float64), value, limits[what]) <= ROUNDING, what


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    """What takes no part is named, as the masks of an old model."""
    save(tmp_path / "small", "gpt2")
    held = load_file(tmp_path / "small" / "model.safetensors")
    mask = torch.ones(10, 10).tril()[None, None]
    save_file({**held, "transformer.h.1.attn.bias": mask}, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    grow(tmp_path / "small", tmp_path / "big", target(tmp_path / "big.json", "gpt2"), format="hub", say=silent)
    report = verify(tmp_path / "small", tmp_path / "big", logits=False)
    assert report.ok
    counted = f"{len(held)} of the source's {len(held) + 1} tensors make the target's {len(held)}"
    assert result(report, "tensors")[1] == f"{counted}; what transformers does not read: transformer.h.1.attn.bias"


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_given_tokens_and_held_out_text(name: str, tmp_path: Path) -> None:
    save(tmp_path / "small", name)
    grow(tmp_path / "small", tmp_path / "big", target(tmp_path / "big.json", name), format="hub", say=silent)
    ids = tmp_path / "ids.txt"
    ids.write_text("[5, 6, 7, 8, 9]\n10 11 12 13 14\n\n")
    given = verify(tmp_path / "small", tmp_path / "big", tokens=ids)
    assert given.ok and given.drift.tokens == 10 and str(ids) in given.drift.text
    write_bins(tmp_path / "bins", [30], 29, heldout=[90, 50], sentinels=5)
    held = verify(tmp_path / "small", tmp_path / "big", bins=tmp_path / "bins")
    assert held.ok and held.drift.text == "held-out text"
    assert held.drift.loss_source != given.drift.loss_source
    for text, words in (("1 2 3\n1 2\n", "rows of 2, 3 token ids"), ("1 29 3", "both models know 0 to 28"), ("", "no")):
        ids.write_text(text)
        with pytest.raises(InvalidData, match=words):
            verify(tmp_path / "small", tmp_path / "big", tokens=ids)
    with pytest.raises(InvalidData, match=r"not readable as text"):
        verify(tmp_path / "small", tmp_path / "big", tokens=tmp_path / "none.txt")
    write_bins(tmp_path / "other", [30], 31)
    with pytest.raises(InvalidConfig, match="a vocabulary of 31 tokens, the model's has 29"):
        verify(tmp_path / "small", tmp_path / "big", bins=tmp_path / "other")


def test_a_model_too_large_for_memory_is_refused_and_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "small", "gpt2")
    config, small, big = target(tmp_path / "big.json", "gpt2"), tmp_path / "small", tmp_path / "big"
    monkeypatch.setattr(transformers_models, "free_memory", lambda: 10_000)
    assert cli.main(["grow", str(small), str(big), "--config", str(config)]) == 0
    assert "drift    not measured: comparing logits takes" in capsys.readouterr().out
    assert cli.main(["verify", str(small), str(big)]) == 2
    assert "GB are free; leave it out with --no-logits" in capsys.readouterr().err
    file = tmp_path / "report.json"
    assert cli.main(["verify", str(small), str(big), "--no-logits", "--output", str(file)]) == 0
    assert "left out as asked" in capsys.readouterr().out
    assert json.loads(file.read_text())["drift"] is None
    # enough for logits, which need a layer, in float32 alone; not for both models' gradients
    monkeypatch.setattr(transformers_models, "free_memory", lambda: 50_000_000)
    for module in ("drift", "grown"):
        monkeypatch.setattr(f"bert2bert.measure.{module}.gradients_memory", lambda *of: 20_000_000)
    assert cli.main(["verify", str(small), str(big), "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["ok"] and report["drift"]["dtype"] == "float32" and "gradients will" not in shown.err
    detail = next(check["detail"] for check in report["checks"] if check["name"] == "gradients")
    assert "not compared: the gradients of both models takes" in detail
    monkeypatch.setattr(transformers_models, "free_memory", lambda: 200_000_000)
    assert cli.main(["verify", str(small), str(big), "--json"]) == 0
    assert "both models whole, which takes 0.16 GB of memory; --no-logits" in capsys.readouterr().err


def test_a_model_that_no_growth_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("llama", "gpt2"):
        save(tmp_path / name, name)
    assert cli.main(["verify", str(tmp_path / "llama"), str(tmp_path / "gpt2")]) == 2
    assert "a gpt2 of 10 positions cannot read what the source, a llama of 16, reads" in capsys.readouterr().err


def test_without_transformers_only_a_bert_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bert", "gpt2"):
        save(tmp_path / name, name)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    lines: list[str] = []
    for name in ("bert", "gpt2"):
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps({**json.loads((tmp_path / name / "config.json").read_text()), **GROWN[name]}))
        grow(tmp_path / name, tmp_path / f"{name}-big", config, say=lines.append)
    drifts = [line for line in lines if line.startswith("drift")]
    assert "logits differ by" in drifts[0] and "pip install transformers" in drifts[1]
    report = verify(tmp_path / "bert", tmp_path / "bert-big")
    assert report.ok and "not compared" in result(report, "gradients")[1]
    with pytest.raises(transformers_models.NoReference, match="--no-logits"):
        verify(tmp_path / "gpt2", tmp_path / "gpt2-big")


def test_a_growth_that_scales_the_norms_epsilon(tmp_path: Path) -> None:
    """The grown config has another epsilon than the one that was asked for; the plan is rebuilt all the same."""
    save(tmp_path / "small", "gpt2")
    config = target(tmp_path / "big.json", "gpt2", n_embd=12, n_head=3)
    grow(tmp_path / "small", tmp_path / "big", config, width="lemon", format="hub", say=silent)
    opened = open_model(tmp_path / "big")
    assert opened.config["layer_norm_epsilon"] == pytest.approx(1e-5 * 8 / 12)
    report = verify(tmp_path / "small", tmp_path / "big")
    assert report.ok and gap(report.drift.logits_relative, 0.0, SINGLE) <= ROUNDING, report.text()


def test_a_config_that_transformers_refuses_is_no_reference(tmp_path: Path) -> None:
    config = tiny.config_of("gpt2") | {"n_layer": "three"}
    with pytest.raises(
        transformers_models.NoReference, match=r"refuses the config of a GPT2LMHeadModel: (.|\n)*--no-logits"
    ):
        transformers_models.build(TABLES["gpt2"], config, frozenset({"lm"}), torch.empty, torch.float64)


def test_manifests_of_before_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is now `format` was `form`, in the manifest and in the identities of sources: one is verified, checked,
    shown, and grown again as before."""
    save(tmp_path / "small", "gpt2")
    save(tmp_path / "other", "gpt2")
    goal = target(tmp_path / "same.json", "gpt2", **{key: tiny.config_of("gpt2")[key] for key in GROWN["gpt2"]})
    how = ["--config", str(goal), "--with", str(tmp_path / "other"), "--alpha", "0.5", "--no-measure"]
    assert cli.main(["grow", str(tmp_path / "small"), str(tmp_path / "grown"), *how]) == 0
    (file,) = (tmp_path / "grown").glob("*/bert2bert.json")
    new = json.loads(file.read_text())
    seal = new.pop("digest")
    growth = new["growth"]
    old = {"form" if key == "format" else key: value for key, value in new.items()}
    old["growth"] = growth | {
        key: {"form" if k == "format" else k: v for k, v in growth[key].items()} for key in ("source", "with")
    }
    assert old["form"] == "universal" and old["growth"]["source"]["form"] == old["growth"]["with"]["form"] == "hub"
    old["digest"] = xxhash.xxh3_128(json.dumps(old, sort_keys=True).encode()).hexdigest()
    assert xxhash.xxh3_128(json.dumps(new, sort_keys=True).encode()).hexdigest() == seal != old["digest"]
    file.write_text(json.dumps(old))
    assert Manifest.from_json(old) == Manifest.from_json(new) and Manifest.from_json(old).intact
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "grown"), "--check"]) == 0
    assert cli.main(["inspect", str(tmp_path / "grown")]) == 0
    assert f"grown from    {tmp_path / 'small'} (hub, tag None)" in capsys.readouterr().out
    report = verify(tmp_path / "small", tmp_path / "grown", other=tmp_path / "other")
    assert report.ok, report.text()
    grow(tmp_path / "grown", tmp_path / "twice", target(tmp_path / "big.json", "gpt2"), say=silent)
    assert json.loads(next((tmp_path / "twice").glob("*/bert2bert.json")).read_text())["format"] == "universal"
    file.write_text(json.dumps(old | {"form": "zero"}))
    with pytest.raises(InvalidCheckpoint, match="the files have format 'universal', the manifest says 'zero'"):
        open_model(tmp_path / "grown")
