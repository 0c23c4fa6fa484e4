"""Runs of the Trainer, of Accelerate and of Lightning: what they keep beside the engine's folder, and their tags."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bert2bert.checkpoints.inspect import inspect
from bert2bert.checkpoints.open import locate
from bert2bert.commands.cli import main
from bert2bert.errors import InvalidCheckpoint, InvalidConfig
from tests.checkpoints.engines import Case, hf_config, hf_model, save_cases
from tests.doors import grow, reshard

CONFIG = {"model_type": "bert", "architectures": ["BertForPreTraining"], **hf_config()}
LARGER = {**CONFIG, "num_hidden_layers": 4}
# what lies beside the engine's folder, the engine's folder, and how the client goes on
CLIENTS: dict[str, tuple[list[str], str, str]] = {
    "trainer": (
        ["trainer_state.json", "scheduler.pt", "training_args.bin", "rng_state_0.pth", "rng_state_1.pth", "vocab.txt"],
        "global_step1", "resume_from_checkpoint=",
    ),
    "accelerate": (["scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"], "pytorch_model", "load_state("),
    "lightning": (["zero_to_fp32.py"], "checkpoint", "ckpt_path="),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clients")
    save_cases(root, 2, [Case("run", 2, steps=1)])
    for name, (files, tag, _) in CLIENTS.items():
        shutil.copytree(root / "run", root / name)
        (root / name / "global_step1").rename(root / name / tag)
        (root / name / "latest").write_text(tag)
        (root / name / "config.json").write_text(json.dumps(CONFIG))
        (root / name / "model.safetensors").write_bytes(b"the weights before")
        for file in files:
            (root / name / file).write_bytes(f"{file} of {name}\0\xff".encode("latin-1"))
    (root / "larger.json").write_text(json.dumps(LARGER))
    return root


@pytest.mark.parametrize("form", [{"format": "zero", "stage": 3, "world_size": 3}, {}])
@pytest.mark.parametrize("client", CLIENTS)
def test_what_a_client_needs_goes_along(runs: Path, tmp_path: Path, client: str, form: dict[str, Any]) -> None:
    files, tag, call = CLIENTS[client]
    messages: list[str] = []
    grow(runs / client, tmp_path / "g", runs / "larger.json", measure=False, say=messages.append, **form)
    reshard(runs / client, tmp_path / "r", say=messages.append, **form)
    for text, target, config in ((messages[0], tmp_path / "g", LARGER), (messages[-2], tmp_path / "r", CONFIG)):
        assert (target / "latest").read_text() == tag and inspect(target).tag == tag
        for file in files:
            assert (target / file).read_bytes() == (runs / client / file).read_bytes() and file in text
        assert not (target / "model.safetensors").exists() and "model.safetensors" in text
        assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == config["num_hidden_layers"]
        assert call in text and str(target) in text
        assert ("random states are those of 2 ranks, 3" in text) == (bool(form) and client != "lightning")
        assert ('{"load_universal": true}' in text) == (not form)


def test_a_run_of_no_known_client_has_its_tag_kept_and_nothing_else(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "run", tmp_path / "run")
    (tmp_path / "run" / "global_step1").rename(tmp_path / "run" / "épo che")
    (tmp_path / "run" / "latest").write_text("épo che")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    reshard(tmp_path / "run", tmp_path / "r", say=lambda _: None)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["latest", "latest_universal", "épo che"]


def test_another_tag(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["reshard", str(runs / "run"), str(tmp_path / "r")]
    assert main([*common, "--target-tag", "pytorch_model"]) == 0
    assert (tmp_path / "r" / "latest").read_text() == "pytorch_model" and (tmp_path / "r" / "pytorch_model").is_dir()
    for odd in ("", "..", "a/b", "latest", "x.partial"):
        with pytest.raises(InvalidConfig, match=r"--target-tag is .*; expected the name of a folder"):
            reshard(runs / "run", tmp_path / "n", target_tag=odd)
    with pytest.raises(InvalidConfig, match="--target-tag: a Hugging Face folder has no tags"):
        reshard(runs / "run", tmp_path / "n", target_tag="a", format="hub")
    assert not (tmp_path / "n").exists()


def test_files_of_another_run_in_the_target_are_not_replaced(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "trainer_state.json").write_text("of another run")
    with pytest.raises(InvalidConfig, match=r"trainer_state\.json is there already"):
        reshard(runs / "trainer", tmp_path / "r")
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["trainer_state.json"]


def test_a_pointer_in_place_of_a_clients_file(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "trainer", tmp_path / "run")
    (tmp_path / "run" / "scheduler.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InvalidCheckpoint, match=r"scheduler\.pt: a git-lfs pointer"):
        reshard(tmp_path / "run", tmp_path / "r")


def test_a_folder_of_checkpoints_names_the_last(runs: Path, tmp_path: Path) -> None:
    for step in (500, 1500, 1000, 90):
        shutil.copytree(runs / "trainer", tmp_path / f"checkpoint-{step}")
    (tmp_path / "runs").mkdir()
    with pytest.raises(InvalidCheckpoint, match=r"4 of the folders in it are\. Give one; .*/checkpoint-1500\."):
        locate(tmp_path, None)


@pytest.mark.parametrize("client", CLIENTS)
def test_an_interrupted_growth_of_a_clients_run_is_finished(runs: Path, tmp_path: Path, client: str) -> None:
    """Killed after the folder had its name and before the pointers: the same command puts everything there."""
    target, how = tmp_path / "r", {"format": "zero", "stage": 2, "world_size": 2, "say": lambda _: None}
    from bert2bert.checkpoints.commit import pending

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pending, "set_latest", dies)
        patch.setattr(pending.Pending, "abort", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            reshard(runs / client, target, **how)  # type: ignore[arg-type]
    assert not (target / "latest").exists()
    for file in target.iterdir():
        if file.is_file():
            file.unlink()
    reshard(runs / client, target, **how)  # type: ignore[arg-type]
    assert (target / "latest").read_text() == CLIENTS[client][1]
    assert all((target / file).is_file() for file in CLIENTS[client][0])


def test_a_hugging_face_folder_is_no_clients_run(tmp_path: Path) -> None:
    """Whatever it is called: Lightning's tag is only a name."""
    hf_model({**CONFIG, "tie_word_embeddings": True}).save_pretrained(tmp_path / "checkpoint")
    messages: list[str] = []
    reshard(tmp_path / "checkpoint", tmp_path / "r", say=messages.append)
    assert "Lightning" not in "\n".join(messages) and "left behind" not in "\n".join(messages)
