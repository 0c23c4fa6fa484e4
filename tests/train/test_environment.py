"""What of the environment reached which rank, in the head of the log, and over which interface ranks talk."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

from bert2bert.ranks import interfaces
from bert2bert.train import environment
from tests.distributed import run_ranks


def odd(folder: Path) -> str:
    rank = os.environ["RANK"]
    for name in [name for name in os.environ if name.startswith(("NCCL_", "HF_", "DS_", "TORCH_", "GLOO_"))]:
        del os.environ[name]
    os.environ.update(HOME=str(folder), NCCL_DEBUG="INFO", HF_TOKEN="hunter2", WANDB_API_KEY="swordfish", SECRET="x")
    if rank == "1":
        os.environ.update(OMP_NUM_THREADS="7", MY_OWN="5")
    return environment.line(["node1", "node2"])


def test_what_differs_is_named_and_no_secret_shown(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("MY_OWN=5\nWANDB_API_KEY=swordfish\n")
    first, second = run_ranks(odd, 2, tmp_path)
    assert first == second
    alike, _, differs = first.partition("; NOT ALIKE: ")
    assert "NCCL_DEBUG=INFO" in alike and "TOKENIZERS_PARALLELISM=false" in alike
    assert "HF_TOKEN=is set" in alike and "WANDB_API_KEY=is set" in alike
    assert differs == "MY_OWN: not set on node1, 5 on node2; OMP_NUM_THREADS: 1 on node1, 7 on node2"
    assert not any(word in first for word in ("hunter2", "swordfish", "SECRET"))


@pytest.fixture
def own() -> tuple[str, str]:
    """An interface of this host that others may reach, and its address."""
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET and not interfaces.loopback(one.address):
                return name, one.address
    pytest.skip("this host has no network")


def test_the_interface_is_the_one_that_leads_to_rank_0(own: tuple[str, str]) -> None:
    name, address = own
    assert interfaces.toward(address) == address and interfaces.interface(address) == name
    for given, others in ((address, []), ("127.0.1.1", [None, "127.0.0.1", address])):
        environ: dict[str, str] = {}
        interfaces.choose(given, others, environ)
        assert environ == {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    environ = {"GLOO_SOCKET_IFNAME": "ib0"}
    interfaces.choose(address, [], environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_one_host_has_nothing_to_choose() -> None:
    environ: dict[str, str] = {}
    interfaces.choose(interfaces.toward("127.0.0.1"), [None, "127.0.0.1", "::1"], environ)
    interfaces.choose(interfaces.toward("no.such.host.invalid"), [], environ)
    assert environ == {}
