"""Models run with no parameter in memory but the one at work: transformers' logits, and what is read."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bert2bert.errors import InvalidCheckpoint
from bert2bert.measure import streamed
from bert2bert.measure.transformers_models import IGNORE, Sample
from bert2bert.model import streaming
from bert2bert.tables import table_for
from tests import tiny
from tests.rounding import ROUNDING, allowed, gap


def case(name: str) -> tuple[dict, transformers.PreTrainedModel, dict[str, torch.Tensor], Sample]:
    """A scrambled model of a variant, its parameters, and tokens that it is to predict."""
    config = tiny.config_of(name)
    model = tiny.build(config)
    tiny.scramble(model)
    given = torch.Generator().manual_seed(5)
    ids, labels = (torch.randint(2, 23, (3, 7), generator=given) for _ in range(2))
    if not config.get("is_encoder_decoder"):
        labels[torch.rand(labels.shape, generator=given) < 0.3] = IGNORE
    return config, model, tiny.parameters(model, config), Sample(ids, labels)


def oracle(config: dict, model: transformers.PreTrainedModel, sample: Sample) -> dict[str, torch.Tensor]:
    """What the whole model of transformers says."""
    given = {"input_ids": sample.ids}
    if config.get("is_encoder_decoder"):
        model.config.decoder_start_token_id = model.config.pad_token_id  # as T5's checkpoints say
        given["labels"] = sample.labels  # of which transformers makes the decoder's input
    with torch.no_grad():
        return model(**given)


def passed(config: dict, rows: streaming.Rows, sample: Sample) -> streamed.Passed:
    """The streamed run."""
    return streamed.passed(
        config, table_for(config).names.classes[config["architectures"][0]], rows, sample, torch.float64
    )


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_streamed_logits_are_the_whole_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 50)  # several blocks of most parameters
    monkeypatch.setattr(streamed, "_TOKENS", 14)  # two rows and one
    config, model, weights, sample = case(name)

    def rows(n: str, start: int, stop: int) -> torch.Tensor:
        assert torch.zeros(1, dtype=torch.float32).float().dtype == torch.float32  # reading is not part of the model
        return weights[n].detach()[start:stop]

    run = passed(config, rows, sample)
    logits = torch.cat([run.logits(start, min(start + 10, run.vocab)) for start in range(0, run.vocab, 10)], 1)
    out = oracle(config, model, sample)
    keep = sample.labels != IGNORE
    compared = ("prediction_logits" if "prediction_logits" in out else "logits", "seq_relationship_logits")
    expected = out[compared[0]][keep]
    assert torch.equal(run.labels, sample.labels[keep]) and run.vocab == 29
    limits = allowed(lambda: {n: x for n, x in oracle(config, model, sample).items() if n in compared})
    assert gap(logits, expected, limits[compared[0]]) <= ROUNDING
    assert (run.pairs is None) == ("seq_relationship_logits" not in out)
    if run.pairs is not None:
        assert gap(run.pairs, out.seq_relationship_logits, limits[compared[1]]) <= ROUNDING


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gpt2", {"reorder_and_upcast_attn": True}), ("mistral", {"sliding_window": 3}),
        ("bert", {"hidden_act": "silu"}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                       "original_max_position_embeddings": 4}}),
    ],
    ids=["gpt2", "mistral", "bert", "llama"],
)  # fmt: skip
def test_settings_that_hold_no_parameter(name: str, keys: dict[str, Any]) -> None:
    """Their buffers are real, though the parameters are not."""
    config = tiny.config_of(name, **keys)
    model = tiny.build(config | ({"reorder_and_upcast_attn": False} if name == "gpt2" else {}))
    tiny.scramble(model)
    weights, sample = tiny.parameters(model, config), case(name)[3]
    run = passed(config, lambda n, start, stop: weights[n].detach()[start:stop], sample)
    out = oracle(config, model, sample)
    expected = (out.prediction_logits if "prediction_logits" in out else out.logits)[sample.labels != IGNORE]
    torch.testing.assert_close(run.logits(0, 29), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "modernbert", "qwen2_moe"])
def test_no_more_is_in_memory_than_a_block_or_one_parameter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers, experts and tokens of the vocabulary there are."""
    block = 64
    monkeypatch.setattr(streaming, "BLOCK", block)
    config, _, weights, sample = case(name)
    alive: dict[int, int] = {}
    most = 0

    def kept(values: np.ndarray) -> torch.Tensor:
        nonlocal most
        alive[id(values)] = values.size
        weakref.finalize(values, alive.pop, id(values))  # when the tensor's storage goes
        most = max(most, sum(alive.values()))
        return torch.from_numpy(values)

    def empty(*shape: Any, **how: Any) -> torch.Tensor:
        return made(*shape, **how) if "device" in how else kept(np.empty(*shape))

    made = torch.empty
    monkeypatch.setattr(streaming, "torch", SimpleNamespace(empty=empty))
    run = passed(config, lambda n, start, stop: kept(weights[n].detach()[start:stop].numpy().copy()), sample)
    run.logits(0, 1)
    one = [p.numel() for n, p in weights.items() if p.ndim == 1 or (name == "gpt2" and ".h." in n)]
    experts = [p[0].numel() for p in weights.values() if p.ndim == 3]
    looked_up = sample.ids.numel() * max(p.shape[1] for p in weights.values() if p.ndim == 2)  # an embedding's rows
    assert most <= 2 * block + max([*one, *experts, looked_up]) < 0.4 * sum(p.numel() for p in weights.values())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_foreign_shape_is_refused(name: str) -> None:
    config, _, weights, sample = case(name)
    tensor = next(n for n, p in weights.items() if p.ndim == 2 and ".1." in n)
    for other in (weights[tensor][:-1], weights[tensor][:, 1:]):
        held = {**weights, tensor: other}
        with pytest.raises(InvalidCheckpoint, match=f"{tensor} have shape"):
            passed(config, lambda n, start, stop, of=held: of[n].detach()[start:stop], sample)


@pytest.mark.parametrize(("name", "hosted"), [("llama", False), ("bert", False), ("bert silu", True), ("t5", True)])
def test_the_own_core_is_run_where_it_computes_the_config(name: str, hosted: bool) -> None:
    config = tiny.config_of(name.split()[0], **({"hidden_act": "silu"} if hosted and name != "t5" else {}))
    model, names = streamed.outline(config, table_for(config).names.classes[config["architectures"][0]], torch.float32)
    assert model.hosted is hosted and all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())
    assert {"bert silu": "cls.predictions.decoder.weight"}.get(name, f"{model.head_path}.weight") in names
