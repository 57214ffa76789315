"""A real browser to drive: headless Chromium by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-port=0 about:blank"
).split()
PATIENCE = 90.0  # seconds, on a machine that does other work too


class Tab:
    """The browser's one tab. console, asked: what it has complained of and what addresses it has asked for so far."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse[bool]) -> None:
        self._loop, self._socket, self._number = loop, socket, 0
        self.console: list[str] = []
        self.asked: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(self._command(method, parameters))

    async def _command(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads(await self._socket.receive_str(timeout=PATIENCE))
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
            self._notice(message.get("method"), message.get("params", {}))

    def _notice(self, event: str | None, found: dict[str, Any]) -> None:
        if event == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(part.get("value", part.get("description"))) for part in found["args"]))
        elif event == "Runtime.exceptionThrown":
            self.console.append(str(found["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.console.append(f"{found['entry']['text']} {found['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent":
            self.asked.append(found["request"]["url"])

    def open(self, address: str) -> None:
        self.command("Page.navigate", url=address)

    def value(self, script: str) -> Any:
        """What a JavaScript expression is, awaited where it is a promise."""
        done = self.command("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The first value of an expression that is true."""
        end = time.monotonic() + PATIENCE
        while not (found := self.value(script)):
            assert time.monotonic() < end, f"{script} never came; the page says {self.value('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def press(self, key: str, **more: Any) -> None:
        for kind in ("keyDown", "keyUp"):
            self.command("Input.dispatchKeyEvent", type=kind, key=key, **more)

    def choose_file(self, selector: str, file: Path) -> None:
        """As the system's dialogue for a file input would."""
        root = self.command("DOM.getDocument")["root"]["nodeId"]
        node = self.command("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.command("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def drop_file(self, file: Path, x: int, y: int) -> None:
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.command("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def looks(self, width: int, height: int, dark: bool = False) -> None:
        """The window's size, and what its reader likes."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file: Path) -> None:
        """The whole page, below the fold too."""
        done = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(done["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """Chromium with a profile of its own. Without CHROMIUM there is none to be had."""
    process = subprocess.Popen(
        [str(CHROMIUM), f"--user-data-dir={profile}", *FLAGS], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    loop = asyncio.new_event_loop()
    session = loop.run_until_complete(new_session())
    try:
        socket = loop.run_until_complete(connected(session, profile))
        yield Tab(loop, socket)
        loop.run_until_complete(socket.close())
    finally:
        loop.run_until_complete(session.close())
        loop.close()
        process.terminate()
        process.wait(timeout=PATIENCE)


async def new_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


async def connected(session: aiohttp.ClientSession, profile: Path) -> aiohttp.ClientWebSocketResponse[bool]:
    """The socket of the tab that the browser opens with; its port is in the profile."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            port = (profile / "DevToolsActivePort").read_text().split()[0]
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
            return await session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0)
        except (OSError, IndexError, aiohttp.ClientError):
            assert time.monotonic() < end, "Chromium does not start"
            await asyncio.sleep(0.05)
