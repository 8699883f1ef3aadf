"""Ports for what tests start."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below those that the kernel gives to outgoing connections."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    while len(found) < count:
        port = 10_000 + secrets.randbelow(max(1000, min(first, 32_768) - 10_000))
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
