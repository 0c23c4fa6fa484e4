"""The cost that `plan` expects, and what layers of a plan share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bert2bert.checkpoints.write import deal
from bert2bert.commands.cli import main
from bert2bert.errors import InvalidConfig
from bert2bert.growth.opened import open_growth
from bert2bert.growth.source_model import open_model
from bert2bert.measure.cost import bandwidth, cost
from bert2bert.tables import table_for
from tests.planning import plan_growth

SMALL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 40,
    "max_position_embeddings": 16, "tie_word_embeddings": False,
}  # fmt: skip
LARGE = SMALL | {"hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 48, "num_hidden_layers": 6}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    table = table_for(SMALL)
    tensors = table.parameters(SMALL, table.names.classes["LlamaForCausalLM"])
    save_file({name: torch.zeros(p.shape) for name, p in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "large.json").write_text(json.dumps(LARGE))
    return folder


def test_cost_is_that_of_the_rank_with_the_most_to_do(source: Path) -> None:
    growth = open_growth(source, source.parent / "large.json", width="tile")
    sizes = [4 * int(torch.Size(t.shape).numel()) for t in growth.plan.tensors.values()]
    read = 4 * sum(int(torch.Size(p.shape).numel()) for p in growth.model.parameters.values())
    one = cost(growth, 1, (2.0, 0.5))
    assert (one.bytes_read, one.bytes_written) == (read, sum(sizes))
    assert one.seconds == pytest.approx(read / 2e9 + sum(sizes) / 0.5e9)
    three = cost(growth, 3, (2.0, 0.5))
    assert three.bytes_written == max(sum(sizes[i] for i in hand) for hand in deal(sizes, 3)) < sum(sizes) / 2.5
    assert three.bytes_read < read / 2.5 and three.memory == one.memory
    assert three.line().startswith("cost     3 ranks at 2 GB/s read, 0.5 GB/s written (each): about ")
    with pytest.raises(InvalidConfig, match="--ranks is 0"):
        cost(growth, 0, (1.0, 1.0))
    assert one.numbers_drawn == 0 and "random numbers" not in one.line()


def test_cost_counts_random_numbers(source: Path) -> None:
    """Noise on what reads copies: of embed, all matrices but the embedding; of heads and neurons, what follows them."""
    how = {"width": "fpi", "depth": "stack", "breaker": "noise"}
    growth = open_growth(source, source.parent / "large.json", **how)
    plain, noisy = (cost(open_growth(source, source.parent / "large.json", **h), 1, (9.0, 9.0)) for h in (
        how | {"breaker": None}, how
    ))  # fmt: skip
    noise = [t for t in growth.plan.tensors.values() if t.noise is not None]
    assert len(noise) > 6 and all(t.noise and t.noise.dim == 1 for t in noise)
    assert noisy.numbers_drawn == sum(int(torch.Size(t.shape).numel()) for t in noise)
    assert noisy.seconds > plain.seconds and noisy.bytes_written == plain.bytes_written
    assert " to draw random numbers), at most" in noisy.line()


@pytest.mark.parametrize(
    "how",
    [
        "fpi", "aki", "hyperclone", "lemon", "tile", "msg", "sparkling", "direct", "random",
        "fpi --depth insert_identity", "aki --vocab mean", "fpi --break-symmetry noise", "fpi --moments reset",
    ],
)  # fmt: skip
def test_nothing_is_reported_of_an_optimizer_that_is_not_there(
    source: Path, how: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "target.json"
    config.write_text(json.dumps(LARGE | ({"vocab_size": 48} if "--vocab" in how else {})))
    out = tmp_path / "big"
    given = ["--config", str(config), "--width", *how.split()]
    assert main(["plan", str(source), *given]) == 0
    assert main(["grow", str(source), str(out), *given, "--lossy", "--no-measure", "--format", "hub"]) == 0
    printed = capsys.readouterr().out.replace(str(tmp_path), "").replace("note     --moments reset changes nothing", "")
    for word in ("moment", "adam", "optimizer state", "epsilon weighs"):
        assert word not in printed.lower(), printed
    assert not [w for w in open_model(out).source.manifest.growth.warnings if "moment" in w or "Adam" in w]


def test_what_is_not_about_moments_is_said_without_them(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copies stay identical whatever --moments says where there are none; a scaled epsilon is reported."""
    how = ["plan", str(source), "--config", str(source.parent / "large.json")]
    assert main([*how, "--width", "fpi", "--moments", "asymmetric"]) == 0
    printed = capsys.readouterr().out
    assert "warning  copies on embed" in printed and "--break-symmetry noise | uneven.\n" in printed
    assert "note     --moments asymmetric changes nothing: the source holds weights only" in printed
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(LARGE | {"hidden_size": 24, "num_attention_heads": 6, "intermediate_size": 36}))
    assert main(["plan", str(source), "--config", str(odd), "--width", "lemon"]) == 0
    assert "note     the target config's rms_norm_eps is multiplied by" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1", "1,2,3", "fast,slow", "0,1", "1,-1", "inf,1", "nan,1", ""])
def test_a_bandwidth_that_is_none(text: str) -> None:
    with pytest.raises(InvalidConfig, match="expected READ,WRITE in GB/s"):
        bandwidth(text)


def test_plan_prints_the_cost(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["plan", str(source), "--config", str(source.parent / "large.json"), "--width", "tile"]
    assert main(how) == 0
    assert "\ncost     1 rank at 1 GB/s read, 1 GB/s written (each): " in capsys.readouterr().out
    assert main([*how, "--ranks", "4", "--disk-bandwidth", "3,1.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cost"]
    assert (found["ranks"], found["disk_gb_per_s"]) == (4, [3.0, 1.5])
    assert main([*how, "--disk-bandwidth", "fast"]) == 2
    assert "--disk-bandwidth is 'fast'" in capsys.readouterr().err


@pytest.mark.parametrize("width", ["tile", "hyperclone", "lemon"])
def test_layers_share_their_index_lists(width: str) -> None:
    """A plan is as large as a layer of it, or planning would take seconds for models of many layers."""
    plan = plan_growth(SMALL, LARGE, width=width)
    shared = 0
    for name, tensor in plan.tensors.items():
        if (twin := plan.tensors.get(name.replace("layers.0.", "layers.3."))) and ".0." in name:
            dims = zip(tensor.terms[0].dims, twin.terms[0].dims, strict=True)
            shared += sum(a.index is b.index and a.grad is b.grad for a, b in dims)
    assert shared == 2 + 7 * 2  # two norms, seven matrices
