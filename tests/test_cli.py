"""The command line's manners: help where nothing is asked, options written out, one JSON object for a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bert2bert.commands import cli
from bert2bert.data.prepare import prepare
from bert2bert.tables import table_for
from bert2bert.terminal import progress
from tests.data.fixtures import write_bins
from tests.train.runs import make_bins

SMALL = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 64, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16,
}  # fmt: skip
COMMANDS = ("prepare", "inspect", "operators", "config", "plan", "grow", "reshard", "learn", "verify", "report")


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's Hugging Face folder, two larger configs, and bins."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small").mkdir()
    table = table_for(SMALL)
    draw = torch.Generator().manual_seed(0)
    tensors = table.parameters(SMALL, table.names.classes["BertForMaskedLM"])
    save_file({n: torch.randn(p.shape, generator=draw) for n, p in tensors.items()}, folder / "small/model.safetensors")
    (folder / "small/config.json").write_text(json.dumps(SMALL))
    double = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    (folder / "large.json").write_text(json.dumps(SMALL | double))
    (folder / "uneven.json").write_text(json.dumps(SMALL | double | {"hidden_size": 24, "num_attention_heads": 3}))
    make_bins(folder)
    return folder


def test_the_package_runs_and_says_what_there_is() -> None:
    named = python("-m", "bert2bert", "--version")
    assert (named.returncode, named.stdout) == (0, "0.1.0\n")
    bare, asked = python("-m", "bert2bert"), python("-m", "bert2bert", "--help")
    assert bare.returncode == asked.returncode == 0
    assert bare.stdout == asked.stdout and not bare.stderr and "bert2bert [-h]" in bare.stdout
    assert all(f"\n    {command}" in bare.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("grwo a b", "argument COMMAND: unknown 'grwo': did you mean 'grow'?"),
        ("grow a b --conf c", "bert2bert grow: error: unknown option --conf: did you mean '--config'?"),
        ("grow a b --confg=c", "unknown option --confg: did you mean '--config' or "),
        ("grow a b --config c --form hub", "unknown option --form: did you mean '--format'?"),
        ("grow a b --config c --format hbu", "argument --format: unknown 'hbu': did you mean 'hub'?"),
        ("reshard a b --world 2", "unknown option --world: did you mean '--world-size'?"),
        ("verify a b --js", "unknown option --js: did you mean '--json'?"),
        ("prepare --txt a --output b", "unknown option --txt: did you mean '--text' or "),
        ("plan a --config c d", "unexpected 'd'"),
        ("plan -c c a", "unknown option -c: "),
        ("--verson", "unknown option --verson: did you mean '--version'?"),
    ],
)
def test_a_wrong_word_is_refused_with_the_nearest(words: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("usage: bert2bert") and text in err.splitlines()[-1]


def test_dashes_and_underscores_are_alike(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(home / "small"), "--config", str(home / "large.json")]
    assert cli.main([*words, "--break_symmetry=noise:scale=0.01", "--disk_bandwidth", "2,1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["operators"]["break_symmetry"] == "noise:scale=0.01" and found["cost"]["disk_gb_per_s"] == [2.0, 1.0]


def test_every_command_prints_one_object(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a program reads is the whole of standard output; the account for people goes to standard error."""

    def ask(*words: object, status: int = 0) -> dict:
        assert cli.main([*map(str, words), "--json"]) == status
        found = json.loads(capfd.readouterr().out)
        assert isinstance(found, dict)
        return found

    small, grown, bins = home / "small", tmp_path / "grown", home / "bins0"
    how = ["--document", "line", "--heldout-fraction", "0.3", "--vocab-size", "64"]
    made = ask("prepare", "--text", home / "words0.txt", *how, "--output", tmp_path / "bins")
    assert made["output"] == str(tmp_path / "bins") and made["splits"]["heldout"]["documents"] > 0
    assert ask("inspect", small)["tensors"] and ask("operators", "fpi")["operators"][0]["name"] == "fpi"
    assert ask("plan", small, "--config", home / "large.json")["parameters"][1] > 0
    found = ask("grow", small, grown, "--config", home / "large.json", "--workers", "2")
    assert found["folder"] == str(grown / "global_step0") and found["growth"]["exactness"]["function"] == []
    assert found["format"] == "universal" and found["growth"]["drift"]["predictions"] > 0
    assert ask("verify", small, grown)["ok"] is True
    found = ask("reshard", grown, tmp_path / "z1", "--format", "zero", "--stage", "1", "--world-size", "2")
    assert (found["stage"], found["world_size"]) == (1, 2) and found["reshard"]["source"]["path"]
    assert ask("inspect", tmp_path / "z1", "--check")["bad"] == {}
    maps = tmp_path / "maps.safetensors"
    learned = ask("learn", small, "--config", home / "large.json", "--data", bins, "--output", maps, "--steps", "2")
    assert learned["output"] == str(maps) and len(learned["losses"]) == 2


def test_tokens_that_cannot_be_read_are_refused_before_anything_is_printed_or_done(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_bins(tmp_path / "wide", [30], SMALL["vocab_size"] + 1)
    (tmp_path / "cut").mkdir()
    ids = {"row.txt": "1 2 3\n4 5\n", "word.txt": "1 2 3\n4 five 6\n", "high.txt": "1 2 64\n"}
    for name, text in ids.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "utf16.txt").write_text("1 2 3\n", encoding="utf-16")
    small, config = str(home / "small"), str(home / "large.json")
    grow = ["grow", small, str(tmp_path / "grown"), "--config", config]
    for words, option, name, text in (
        (grow, "--bins", "none", "the folder does not exist"),
        (grow, "--bins", "cut", "the folder has no meta.json"),
        (grow, "--bins", "wide", "a vocabulary of 65 tokens, the model's has 64"),
        (["verify", small, small], "--bins", "wide", "a vocabulary of 65 tokens, the model's has 64"),
        (["verify", small, small], "--tokens", "row.txt", "rows of 2, 3 token ids"),
        (["verify", small, small], "--tokens", "word.txt", "line 2 holds 'five'"),
        (["verify", small, small], "--tokens", "high.txt", "token ids from 1 to 64; both models know 0 to 63"),
        (["verify", small, small], "--tokens", "utf16.txt", "text in UTF-16"),
    ):
        assert cli.main([*words, option, str(tmp_path / name)]) == 2
        out, err = capfd.readouterr()
        assert not out and text in err
    assert not (tmp_path / "grown").exists()


def test_quiet_prints_what_is_wrong_and_nothing_else(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = str(home / "small")
    words = ["grow", small, str(tmp_path / "t"), "--config", str(home / "large.json"), "--quiet"]
    assert cli.main(words) == 0
    out, err = capfd.readouterr()
    assert not out and err.startswith("warning  copies on embed, heads, ffn are even") and err.count("\n") == 1
    assert cli.main(["verify", small, str(tmp_path / "t"), "--quiet"]) == 0
    assert cli.main(["inspect", small, "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    uneven = ["grow", small, str(tmp_path / "u"), "--config", str(home / "uneven.json"), "--quiet", "--no-measure"]
    assert cli.main(uneven) == 2
    out, err = capfd.readouterr()
    assert not out and "--lossy" in err
    assert cli.main([*uneven, "--lossy", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["growth"]["exactness"]["function"]


@pytest.mark.parametrize("command", ["grow", "reshard", "prepare"])
def test_a_place_where_nothing_can_be_made(home: Path, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """/proc refuses new folders with an error that elsewhere means a missing file."""
    words = {
        "grow": ["grow", home / "small", "/proc/t", "--config", home / "large.json", "--no-measure", "--quiet"],
        "reshard": ["reshard", home / "small", "/proc/t", "--quiet"],
        "prepare": ["prepare", "--corpus", "emma", "--vocab-size", "64", "--output", "/proc/t"],
    }[command]
    assert cli.main([*map(str, words)]) == 2
    out, err = capfd.readouterr()
    assert not out and f"bert2bert {command}: " in err and "/proc/t cannot be written: " in err


def test_work_that_takes_long_says_so_in_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a job's log: no carriage return, no line for each update, and none at all for work that is done at once."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the whale and the sea {i % 97}\n" for i in range(20000)))

    def run(name: str) -> list[str]:
        prepare([text], None, None, None, None, None, 64, [], 0.2, "line", tmp_path / name, 0)
        out, err = capfd.readouterr()
        assert not out and "\r" not in err
        return err.splitlines()

    assert run("quick") == []
    monkeypatch.setattr(progress, "SECONDS", 0.02)
    lines = run("slow")
    assert 2 <= len(lines) < 100
    assert all(
        line.startswith(("alphabet: text.txt: ", "tokenizer: text.txt: ", "tokens: text.txt: ")) for line in lines
    ), lines
    assert any("% of 4" in line and line.endswith(" left") for line in lines), lines
