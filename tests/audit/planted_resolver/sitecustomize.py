"""Runs at the start of every Python that has this folder in PYTHONPATH: a name server with planted faults.

`PLANTED_RESOLVER` names a JSON file: `ports` {80: port, 443: port} that every host of `.example` is led to, `hosts`
with another port for single ones (null: there is no such host), and `broken_urls`, for which name resolution as a
whole is out of order. No name reaches the network.
"""

from __future__ import annotations

import json
import os
import socket
import sys


def _url_of_request() -> str:
    """The url that urllib is opening in this thread."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "do_open":
        frame = frame.f_back
    return frame.f_locals["req"].full_url if frame is not None else ""


def _plant(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        plan = json.load(file)
    broken = set(plan["broken_urls"])
    resolve = socket.getaddrinfo

    def planted(host, port, *args, **kwargs):
        if _url_of_request() in broken:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        target = plan["hosts"].get(host, plan["ports"].get(str(port)))
        if target is None or not str(host).endswith(".example"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve("127.0.0.1", target, *args, **kwargs)

    socket.getaddrinfo = planted


if os.environ.get("PLANTED_RESOLVER"):
    _plant(os.environ["PLANTED_RESOLVER"])
