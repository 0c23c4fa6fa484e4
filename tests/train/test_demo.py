"""The demo's runner: what it does when a step fails, hangs or finds its folder taken. (`make demo` runs the steps.)"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

from bert2bert.data.objective import Causal, check
from bert2bert.data.tokenizer_files import load_tokenizer
from bert2bert.recipe import load_recipe


def program(name: str) -> ModuleType:
    """A file of launch/ as a module."""
    file = Path(__file__).parents[2] / "launch" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return program("demo")


def python(demo: ModuleType, code: str) -> object:
    return demo.Step("a step", [sys.executable, "-c", code])


def test_steps_name_files_that_exist_and_follow_each_other(demo: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made: set[str] = set()
    for step in demo.steps(out, 29500):
        after_output = step.command[step.command.index("--output") + 1] if "--output" in step.command else ""
        if step.command[:2] == ["bert2bert", "grow"]:
            after_output = step.command[3]
        for word in step.command:
            if word.startswith(str(out)) and word != after_output:
                assert word in made, f"{step.title}: {word} is read before any step has written it"
            elif word.startswith(("launch/", "recipes/", "ds_configs/", "bert2bert/")):
                assert (demo.ROOT / word).is_file(), f"{step.title}: there is no {word}"
        made.add(after_output)


def test_the_tokenizer_of_the_demo_is_one_of_its_causal_model(demo: ModuleType, tmp_path: Path) -> None:
    assert program("demo_tokenizer").write(["It is a truth, " * 9, "café"], 300, tmp_path) < 300  # so little text
    found = load_tokenizer(tmp_path).vocabulary
    check(Causal(), found)
    model = load_recipe(demo.ROOT / "recipes" / "demo_gpt2_scratch.py").model
    assert found.special["eos"] == model["eos_token_id"] == model["bos_token_id"]
    text = "naïve — It is\n\n"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_failing_step_ends_the_demo_with_its_status(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = [python(demo, "print('one')"), python(demo, "raise SystemExit(3)"), python(demo, "print('three')")]
    monkeypatch.setattr(demo, "steps", lambda out, port: plan)
    assert demo.main(["--output", str(tmp_path / "out")]) == 3
    printed = capfd.readouterr()
    assert "one\n" in printed.out and "three\n" not in printed.out
    assert "step 2 (a step) failed with exit status 3" in printed.err


def test_a_hanging_step_is_ended_with_its_children(demo: ModuleType, tmp_path: Path) -> None:
    """The child is deaf to SIGTERM, as a rank inside a collective may be; its parent is not."""
    pid_file = tmp_path / "pid"
    child = "import os, signal, time; signal.signal(15, signal.SIG_IGN); "
    child += f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    status, seconds = demo.run(python(demo, code), limit=2)
    assert status == 124 and seconds < 60  # the child sleeps longer
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{int(pid_file.read_text())}/stat").read_text().split()[2] == "Z":
                break
            time.sleep(0.1)
        except FileNotFoundError:
            break
    else:
        pytest.fail("the step's child outlived it")


def test_a_killed_step_and_a_missing_command_have_a_status(demo: ModuleType) -> None:
    assert demo.run(python(demo, "import os; os.kill(os.getpid(), 9)"))[0] == 137
    assert demo.run(demo.Step("none", ["no-such-command-here"]))[0] == 127


def test_a_taken_folder_is_refused_and_kept(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "steps", lambda out, port: [python(demo, "pass")])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for flags in ([], ["--clean"]):
        assert demo.main(["--output", str(foreign), *flags]) == 2
    assert (foreign / "thesis.txt").read_text() == "mine"
    assert "not a demo's" in capfd.readouterr().err

    out = tmp_path / "out"
    assert demo.main(["--output", str(out)]) == 0
    (out / "small").mkdir()
    assert demo.main(["--output", str(out)]) == 2
    assert "ARGS=--clean" in capfd.readouterr().err and (out / "small").is_dir()
    assert demo.main(["--output", str(out), "--clean"]) == 0
    assert not (out / "small").exists()
    assert [step["status"] for step in json.loads((out / "demo.json").read_text())["steps"]] == [0]


def test_steps_run_with_the_environment_of_this_python(demo: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "env"
    code = f"import os; open({str(file)!r}, 'w').write(os.environ['DS_ACCELERATOR'] + os.environ['PATH'])"
    assert demo.run(python(demo, code))[0] == 0
    assert file.read_text().startswith("cpu" + str(Path(sys.executable).parent) + os.pathsep)
