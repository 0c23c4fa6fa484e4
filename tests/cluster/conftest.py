"""What tests of clusters share: a tiny run's inputs, and two nodes that are network namespaces with a cable between."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.ranks import root
from tests.train.launched import write_configs, write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with launched.py (a recipe of six steps), its bins, and zero1.json to zero3.json."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    write_configs(folder)
    return folder


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces, 10.77.0.1 and 10.77.0.2, whose interfaces are called as they are."""
    names = (f"bb{os.getpid()}-0", f"bb{os.getpid()}-1")  # another job may run these tests on this host, too
    gone = [["ip", "netns", "delete", name] for name in names]
    for command in gone:
        subprocess.run(command, capture_output=True, timeout=30)
    try:
        for name in names:
            root("ip", "netns", "add", name)
        root("ip", "link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1])
        for number, name in enumerate(names):
            inside = ("ip", "-n", name)
            root(*inside, "address", "add", f"10.77.0.{number + 1}/24", "dev", name)
            for link in ("lo", name):
                root(*inside, "link", "set", link, "up")
        yield names
    finally:
        for command in gone:
            subprocess.run(command, capture_output=True, timeout=30)


def cable(name: str, state: str) -> None:
    """Take the cable of a node ``down`` or ``up``."""
    root("ip", "-n", name, "link", "set", name, state)
