"""A page in a real browser: headless Chromium, spoken to by its DevTools protocol."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run")
# Nothing but the page: a browser of its own accord looks for updates, and waits where there is no network.
_QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


def in_browser(page: Path, scripts: Sequence[str], profile: Path) -> tuple[list[Any], list[str]]:
    """Values of JavaScript expressions evaluated one after the other in `page`, and all that its console said."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on PATH")
    command = [browser, *_OPTIONS, *_QUIET, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = next(found[0] for line in process.stderr if (found := re.findall(r"ws://\S+", line)))
        return asyncio.run(asyncio.wait_for(_talk(address, page.as_uri(), scripts), 60))
    finally:
        process.kill()
        process.wait()


async def _talk(address: str, page: str, scripts: Sequence[str]) -> tuple[list[Any], list[str]]:
    import aiohttp

    said: list[str] = []
    number = 0
    async with aiohttp.ClientSession() as client:
        async with client.get(f"http://{address.split('/')[2]}/json/list") as answer:
            target = next(each for each in await answer.json() if each["type"] == "page")
        async with client.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:

            async def call(method: str, **parameters: Any) -> dict[str, Any]:
                nonlocal number
                number += 1
                await socket.send_json({"id": number, "method": method, "params": parameters})
                return await wait(lambda message: message.get("id") == number)

            async def wait(is_it: Any) -> dict[str, Any]:
                while True:
                    message = json.loads((await socket.receive()).data)
                    if message.get("method") in (
                        "Log.entryAdded",
                        "Runtime.consoleAPICalled",
                        "Runtime.exceptionThrown",
                    ):
                        said.append(json.dumps(message["params"])[:500])
                    if is_it(message):
                        return dict(message)

            for domain in ("Log", "Runtime", "Page"):
                await call(f"{domain}.enable")
            await call("Page.navigate", url=page)
            await wait(lambda message: message.get("method") == "Page.loadEventFired")
            values = []
            for script in scripts:
                answer = await call("Runtime.evaluate", expression=script, returnByValue=True)
                values.append(answer["result"]["result"].get("value"))
            return values, said
