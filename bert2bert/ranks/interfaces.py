"""The network interface over which a rank reaches the others: the one that leads to rank 0's address.

Left to itself, gloo takes the interface that the host's own name resolves to. On Debian that is the loopback
(127.0.1.1), which no other host reaches. NCCL takes the first of its liking, which may be one that leads nowhere.
Refuses nothing: where no interface is found, and where the user names one, nothing is changed.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, MutableMapping

import psutil

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""The variables that name it, to gloo and to NCCL."""


def toward(address: str) -> str | None:
    """The address of this host from which it reaches another, by its routes; nothing is sent. None: it does not."""
    try:
        for family, _, _, _, where in socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(where)
                return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        pass
    return None


def loopback(address: str | None) -> bool:
    """Whether an address leads nowhere but to this host."""
    return address is None or ipaddress.ip_address(address).is_loopback


def interface(address: str) -> str | None:
    """The name of the interface that has an address."""
    wanted = ipaddress.ip_address(address)
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            numeric = one.family in (socket.AF_INET, socket.AF_INET6)
            if numeric and ipaddress.ip_address(one.address.partition("%")[0]) == wanted:
                return name
    return None


def choose(own: str | None, others: Iterable[str | None], environ: MutableMapping[str, str]) -> None:
    """Name the interface in ``environ``, except where it is named already.

    ``own``: this host's address `toward` rank 0. It is the loopback on rank 0's host where MASTER_ADDR is a name that
    resolves to it there: then the first of the ``others``' addresses counts that other hosts reach. On one host there
    is none, and nothing to choose.
    """
    if loopback(own):
        there = next((address for address in others if not loopback(address)), None)
        own = None if there is None else toward(there)
    name = None if own is None or loopback(own) else interface(own)
    if name is not None:
        for variable, value in zip(NAMES, (name, f"={name}"), strict=True):
            environ.setdefault(variable, value)
