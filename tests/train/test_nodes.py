"""Ranks that are not of one mind are stopped before the first step, with the odd host named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bert2bert.errors import InvalidConfig
from bert2bert.recipe import Phase
from tests.distributed import run_ranks
from tests.train import runs, tiny


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


def told(bins: Path, root: Path) -> dict[str, Any]:
    """What each odd rank 1 makes both ranks say."""
    import socket

    import torch.distributed as dist

    from bert2bert.train import nodes

    odd, found, host = dist.get_rank() == 1, {}, socket.gethostname
    original = nodes._program, nodes._sees, nodes.versions
    if odd:
        socket.gethostname = lambda: "node7"

    def run(name: str, seed: int = 3) -> None:
        with pytest.raises(InvalidConfig) as caught:
            runs.run(runs.recipe(bins, phases=(Phase("all", 1),), seed=seed), tiny.ds_config(0), root / name)
        found[name] = str(caught.value)
        assert not (root / name / "run.json").exists()

    run("recipe", seed=4 if odd else 3)
    if odd:
        nodes._program = lambda: "another"  # type: ignore[assignment]
    run("program")
    nodes._program = original[0]
    if odd:
        nodes.versions = lambda *names: {"torch": "1.0"}  # type: ignore[assignment]
    run("packages")
    nodes.versions = original[2]
    if odd:
        nodes._sees = lambda mark: False
    run("folder")
    nodes._sees, socket.gethostname = original[1], host
    return found


def test_an_odd_rank_is_named_on_all(bins: Path, tmp_path: Path) -> None:
    first, second = run_ranks(told, 2, bins, tmp_path)
    assert first == second
    for key in ("recipe", "program", "packages"):
        assert first[key].startswith(f"the ranks do not have the same {key}: ") and "node7 has" in first[key]
    assert "node7 has another" in first["program"] and "node7 has torch 1.0" in first["packages"]
    assert "is another folder on node7 than on" in first["folder"]
    assert not [*tmp_path.rglob(".seen-*")]
