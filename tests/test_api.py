"""The Python API: a model in memory grows as its checkpoint does, bit for bit, and keeps its function."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bert2bert
from bert2bert import grow, open_checkpoint, plan
from bert2bert.checkpoints.factors import Factors
from bert2bert.commands import cli
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, LossyGrowth, UnsupportedGrowth
from bert2bert.measure.transformers_models import Double
from tests import tiny
from tests.test_verify_families import GROWN

DEEP = {"bert": {"num_hidden_layers": 6}, "gpt2": {"n_layer": 6}, "t5": {"num_layers": 6, "num_decoder_layers": 4},
        "llama-tied": {"num_hidden_layers": 6}, "mixtral": {"num_hidden_layers": 6}}  # fmt: skip
EXACT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # family -> changes of its config, operators
    "bert": ({}, {"width": "fpi", "breaker": "uneven"}),
    "llama-tied": (DEEP["llama-tied"], {"width": "hyperclone", "depth": "insert_identity", "breaker": "noise"}),
    "gpt2": (DEEP["gpt2"] | {"vocab_size": 40}, {"width": "fpi", "depth": "insert_identity", "vocab": "normal"}),
    "t5": (DEEP["t5"], {"width": "fpi", "depth": "insert_identity"}),
    "mixtral": (DEEP["mixtral"], {"width": "fpi", "depth": "insert_identity", "seed": 3, "breaker": "noise"}),
}


def model_of(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    model = tiny.build(tiny.config_of(name))
    tiny.scramble(model, seed)
    model.config.architectures = None  # as of a model that was never saved
    return model.to(dtype)


def goal(name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    return tiny.config_of(name, **(GROWN[name] | (EXACT[name][0] if changes is None else changes)))


def options(how: dict[str, Any]) -> list[str]:
    """As the command line takes them."""
    named = {"breaker": "break-symmetry"}
    return [word for key, value in how.items() for word in (f"--{named.get(key, key)}", str(value))]


@pytest.mark.parametrize("name", EXACT)
def test_a_grown_model_has_its_sources_function(name: str) -> None:
    model, config = model_of(name), goal(name)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.get_rng_state()
    grown = grow(model, config, **EXACT[name][1])
    assert plan(model, config, **EXACT[name][1]).opened.plan.exactness.logits
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert type(grown) is type(model) and grown.dtype == torch.float64 and not grown.training
    assert sum(p.numel() for p in grown.parameters()) > 2 * sum(p.numel() for p in model.parameters())
    known = tiny.config_of(name)["vocab_size"]
    small, large = tiny.logits(model, tiny.config_of(name)), tiny.logits(grown, config)[:, :known]
    assert (large - small).abs().max() <= 1e-10 * small.abs().max()
    assert (grown.get_output_embeddings().weight is grown.get_input_embeddings().weight) == (name != "mixtral")


@pytest.mark.parametrize("name", EXACT)
def test_a_grown_model_is_the_one_that_the_command_writes(name: str, tmp_path: Path) -> None:
    """In float32, and with depths that change the function; buffers, config and generation config too."""
    model, config = model_of(name, torch.float32), goal(name, DEEP[name])
    how = {**EXACT[name][1], "depth": "stack"}
    how.pop("vocab", None)
    if hasattr(model, "generation_config"):
        model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "small")
    (tmp_path / "big.json").write_text(json.dumps(config))
    command = ["grow", str(tmp_path / "small"), str(tmp_path / "big"), "--config", str(tmp_path / "big.json")]
    assert cli.main([*command, "--format", "hub", "--no-measure", "--quiet", *options(how)]) == 0
    written = getattr(transformers, config["architectures"][0]).from_pretrained(tmp_path / "big")
    grown = grow(model.train(), type(model.config).from_dict(config), **how)
    mine, theirs = ({**dict(m.named_buffers()), **m.state_dict()} for m in (grown, written))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) and mine[n].dtype == theirs[n].dtype for n in mine)
    assert grown.training and grown.config.to_diff_dict().keys() == written.config.to_diff_dict().keys()
    if grown.can_generate():
        assert grown.generation_config.max_new_tokens == written.generation_config.max_new_tokens == 7
    on_disk = plan(tmp_path / "small", config, **how)
    assert on_disk.shapes == {n: tuple(p.shape) for n, p in grown.named_parameters()}
    assert all(torch.equal(value, dict(grown.named_parameters())[n]) for n, value in on_disk.tensors())
    folder = on_disk.write(tmp_path / "again", format="hub", measure=False)
    for file in (tmp_path / "big").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_dtypes_modes_and_frozen_parameters_stay() -> None:
    model = model_of("bert", torch.bfloat16)
    for name, p in model.named_parameters():
        if "LayerNorm" in name:
            p.data = p.data.float()
        p.requires_grad_("encoder.layer.0." not in name)
    model.config._attn_implementation = "sdpa"
    grown = grow(model, goal("bert", DEEP["bert"]))
    of = {n: p.dtype for n, p in grown.named_parameters()}
    assert {dtype for n, dtype in of.items() if "LayerNorm" in n} == {torch.float32}
    assert {dtype for n, dtype in of.items() if "LayerNorm" not in n} == {torch.bfloat16}
    frozen = {n.split(".layer.")[1][0] for n, p in grown.named_parameters() if not p.requires_grad}
    assert frozen == {"0", "3"} and grown.config._attn_implementation == "sdpa"
    merged = grow(grown, tiny.config_of("bert"), width="coalesce", depth="coalesce")  # of a frozen layer and another
    assert all(p.requires_grad for p in merged.parameters())


def test_base_models_heads_untied_heads_and_dense_models_that_become_mixtures() -> None:
    for cls, kind in (("BertModel", "bert"), ("LlamaForSequenceClassification", "llama")):
        model = model_of(cls)
        grown = grow(model, {**tiny.config_of(cls), **GROWN[kind]})
        assert type(grown) is type(model)
        one, other = tiny.outputs(model, tiny.config_of(cls)), tiny.outputs(grown, grown.config.to_dict())
        key = "logits" if "logits" in one else "last_hidden_state"
        size = one[key].shape[-1]
        assert (other[key][..., :size] - one[key]).abs().max() <= 1e-10 * one[key].abs().max()
    model, config = model_of("t5-untied"), tiny.config_of("t5-untied", **GROWN["t5"])
    grown = grow(model, config)
    one, other = tiny.logits(model, tiny.config_of("t5-untied")), tiny.logits(grown, config)
    assert (other - one).abs().max() <= 1e-10 * one.abs().max() and grown.lm_head.weight is not grown.shared.weight
    model, config = model_of("llama"), tiny.config_of("mixtral", num_local_experts=2, rms_norm_eps=1e-6)
    config["rope_parameters"] = tiny.config_of("llama")["rope_parameters"]
    grown = grow(model, config, experts="upcycle")
    assert type(grown) is transformers.MixtralForCausalLM
    with Double():
        one, other = model(torch.arange(2, 9)[None]).logits, grown(torch.arange(2, 9)[None]).logits
    assert (other - one).abs().max() <= 1e-10 * one.abs().max()


def test_moments_of_adam_grow() -> None:
    """A grown optimizer's states, against those of gradients that the grown model has itself: exact by the plan."""
    model = model_of("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    growth = plan(model, goal("llama", {}), optimizer=optimizer, width="fpi")
    with pytest.raises(InvalidConfig, match="no optimizer's moments"):
        growth.fill_optimizer(optimizer, model)
    tiny.loss(model, tiny.config_of("llama")).backward()
    optimizer.step()
    growth = plan(model, goal("llama", {}), optimizer=optimizer, width="fpi")
    assert growth.exactness == {"function": [], "moments": []}
    assert growth.factors["lm_head.weight"] == Factors(0.5, 2.0, 1.0)
    grown = growth.model()
    assert growth.factors.keys() == dict(grown.named_parameters()).keys()
    filled, own = (torch.optim.AdamW(grown.parameters(), lr=0.0) for _ in range(2))
    growth.fill_optimizer(filled, grown)
    tiny.loss(grown, goal("llama", {})).backward()
    own.step()
    for p in grown.parameters():
        for key, value in own.state[p].items():
            found = filled.state[p][key]
            assert found.dtype == value.dtype and (found - value).abs().max() <= 1e-10 * value.abs().max(), key
    with pytest.raises(InvalidConfig, match="that is not the grown model's"):
        growth.fill_optimizer(torch.optim.AdamW(model.parameters()), grown)
    with pytest.raises(UnsupportedGrowth, match=r"expected a torch.optim.Adam or AdamW without amsgrad, not SGD"):
        growth.fill_optimizer(torch.optim.SGD(grown.parameters()), grown)
    fused = torch.optim.Adam(grown.parameters(), fused=True)
    growth.fill_optimizer(fused, grown)
    fused.step()
    assert {float(state["step"]) for state in fused.state.values()} == {2.0}
    amsgrad = torch.optim.AdamW(model.parameters(), lr=0.0, amsgrad=True)
    amsgrad.step()
    with pytest.raises(UnsupportedGrowth, match="AdamW keeps exp_avg, exp_avg_sq, max_exp_avg_sq of"):
        plan(model, goal("llama", {}), optimizer=amsgrad)
    with pytest.raises(InvalidConfig, match="expected an optimizer of the parameters of Llama"):
        plan(model, goal("llama", {}), optimizer=own)


def test_the_v_cycle_in_memory() -> None:
    small, large = model_of("gpt2"), tiny.build(goal("gpt2", {}))
    tiny.scramble(large, 1)
    grown = grow(small, goal("gpt2", {}), width="decoalesce")
    mixed = grow(small, goal("gpt2", {}), width="decoalesce", other=large, alpha=0.25).state_dict()
    for name, value in mixed.items():
        mean = 0.75 * large.state_dict()[name] + 0.25 * grown.state_dict()[name]
        assert (value - mean).abs().max() <= 1e-12 * mean.abs().max()


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, config = model_of("bert"), goal("bert", {})
    refused: list[tuple[type[Exception], str, Any]] = [
        (InvalidConfig, r"expected a model of transformers \(PreTrainedModel\), which may be its .module",
         lambda: grow(torch.nn.DataParallel(model), config)),  # type: ignore[arg-type]
        (InvalidConfig, r"grow\(\) takes a model of transformers in memory, not a str",
         lambda: grow("runs/small", config)),  # type: ignore[arg-type]
        (InvalidConfig, "the config is a int; expected", lambda: grow(model, 3)),
        (InvalidConfig, "hidden_size is 'abc'; a positive integer is expected",
         lambda: grow(model, config | {"hidden_size": "abc"})),
        (InvalidConfig, "a growth has no option 'widht'; did you mean 'width'",
         lambda: grow(model, config, widht="fpi")),  # type: ignore[call-arg]
        (InvalidConfig, "the config: the config has no 'model_type'", lambda: grow(model, {"hidden_size": 8})),
        (InvalidConfig, "a model in memory has none", lambda: plan(model, config).write(tmp_path / "out")),
        (InvalidConfig, "no tensor 'bert.pooler'; did you mean", lambda: plan(model, config).tensor("bert.pooler")),
        (InvalidConfig, r"no state 'exp_avg'; known: fp32 \(it holds weights only\)",
         lambda: plan(model, config).tensor("cls.predictions.bias", "exp_avg")),
        (InvalidConfig, "--disk-bandwidth is", lambda: plan(model, config).cost(disk=(0.0, 1.0))),
        (InvalidCheckpoint, "is on the meta device", lambda: grow(copy.deepcopy(model).to("meta"), config)),
        (UnsupportedGrowth, "--width 'fip': unknown operator; did you mean 'fpi'",
         lambda: grow(model, config, width="fip")),
    ]  # fmt: skip
    for error, text, call in refused:
        with pytest.raises(error, match=text):
            call()

    class Wider(type(model)):  # type: ignore[misc]
        def __init__(self, config: Any, times: int) -> None:
            super().__init__(config)

    with pytest.raises(UnsupportedGrowth, match="Wider is not made of a config alone"):
        grow(Wider(model.config, 2), config)
    with pytest.raises(InvalidConfig, match=r"transformers .* refuses the config of the grown model"):
        grow(model, config | {"hidden_dropout_prob": "much"})
    model.register_buffer("scale", torch.ones(3))
    with pytest.raises(InvalidCheckpoint, match="BertForPreTraining in memory: 1 tensors are not part of a bert"):
        grow(model, config)
    assert not (tmp_path / "out").exists()


def test_the_words_are_those_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("bert", torch.float32)
    model.save_pretrained(tmp_path / "small")
    (tmp_path / "big.json").write_text(json.dumps(goal("bert", {"hidden_size": 12, "num_attention_heads": 3})))
    small, config = tmp_path / "small", tmp_path / "big.json"
    how = ["--config", str(config), "--width", "fpi"]
    assert cli.main(["grow", str(small), str(tmp_path / "out"), *how]) == 2
    words = capsys.readouterr().err
    for source in (model, small):
        growth = plan(source, config, width="fpi")
        for do in (growth.model, lambda growth=growth: next(growth.tensors())):
            with pytest.raises(LossyGrowth) as caught:
                do()
            assert str(caught.value) in words
    assert grow(model, config, width="fpi", lossy=True).config.hidden_size == 12
    printed: list[str] = []
    folder = plan(open_checkpoint(small), goal("bert", {})).write(
        tmp_path / "out", shard_size=None, report=printed.append
    )
    assert folder == tmp_path / "out" / "global_step0" and any(line.startswith("drift") for line in printed)
    with pytest.raises(InvalidConfig, match="a target has no option 'stages'; did you mean 'stage'"):
        plan(small, goal("bert", {})).write(tmp_path / "more", stages=2)


def test_a_tie_that_the_config_does_not_say_is_refused() -> None:
    model = model_of("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(InvalidCheckpoint, match=r"missing|one parameter"):
        grow(model, goal("llama", {}))
    model = model_of("llama")
    layers = model.model.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(InvalidCheckpoint, match=r"layers\.1\.mlp\.gate_proj.*"):
        grow(model, goal("llama", {}))


def test_the_page_on_python_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "how-to" / "python.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/how-to/python.md", "exec"), names)
    assert len(blocks) > 6 and (tmp_path / "grown" / "latest").is_file()


def test_the_package_says_what_it_exports() -> None:
    assert {"grow", "open_checkpoint", "plan"} <= set(dir(bert2bert))
    with pytest.raises(AttributeError, match="no attribute 'grown'"):
        bert2bert.grown  # noqa: B018
