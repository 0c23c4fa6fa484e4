"""docs/tutorial-llama.md is run as it is written, its training on two ranks of the real launcher, with fewer steps."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bert2bert.commands import cli
from tests.distributed import free_port
from tests.train.launched import ROOT

PAGE = (ROOT / "docs" / "tutorial-llama.md").read_text("utf-8")
STEPS = (2, 4)  # where the page's two runs of training end, in place of 60 and 90


def commands() -> list[list[str]]:
    """The page's commands as words, in its order: indented lines that start a program, and those that they go on in."""
    code = "\n".join(line.strip() for line in PAGE.splitlines() if line.startswith("    ")).replace("\\\n", " ")
    return [shlex.split(line) for line in code.split("\n") if re.match(r"(python|bert2bert|deepspeed) ", line)]


def shorter(command: list[str], steps: int) -> list[str]:
    kept = [word for word in command if not word.startswith("phases.")]
    place = kept.index("size=tiny") + 1
    fewer = ["data.eval_rows=32", f"phases.0.steps={steps}", "phases.0.schedule.warmup_steps=1"]
    launcher = [kept[0], "--master_port", str(free_port())]  # other launchers may be at work
    return [*launcher, *kept[1:place], *fewer, *kept[place:]]


def test_the_page_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("bert2bert", "ds_configs", "launch", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    (make,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)[:1]
    Path("make_llama.py").write_text(make)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
    steps, printed = iter(STEPS), {}
    for command in commands():
        words = [str(found) for word in command for found in (sorted(Path().glob(word)) if "*" in word else [word])]
        if words[0] == "python":
            runpy.run_path(words[1])
        elif words[0] == "bert2bert":
            assert cli.main(words[1:]) == 0, command
        else:
            subprocess.run(shorter(words, next(steps)), env=env, check=True)
        printed[words[1]] = "".join(capfd.readouterr())
    assert next(steps, None) is None, "the page trains twice"
    before, after = re.findall(r"drift +loss (\S+) -> (\S+) nats", printed["grow"])[0]
    assert before == after and "\nfunction exact" in printed["grow"] and "\nverified" in printed["verify"]
    records = [json.loads(line) for line in Path("runs/llama/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "eval"] == [0, *STEPS]
    assert json.loads(Path("llama-trained/config.json").read_text())["hidden_size"] == 128
    assert Path("llama-trained/tokenizer.json").is_file()
