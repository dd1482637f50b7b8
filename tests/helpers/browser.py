"""A real headless Chromium and a real MLflow server on loopback, for tests and for the pictures in the documents."""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
_ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)


def missing() -> str:
    """Return why no browser can be started, or nothing."""
    if not (CHROMIUM and DRIVER):
        return "needs Chromium and its driver: apt-get install chromium chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "needs selenium: pip install selenium"
    return ""


@dataclass
class Browser:
    """A started browser: ``driver`` is Selenium's."""

    driver: Any

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open an address in a window of that size, light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")  # or an address that differs only in its fragment would not be loaded
        self.driver.get(url)

    def run(self, script: str, *arguments: object) -> Any:
        """Run the body of a JavaScript function in the page and return its result."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, seconds: float = 60.0) -> Any:
        """Wait until a script's result is true, and return it."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"not so after {seconds:.0f} s: {script}\n{self.text()[:2000]}"
            time.sleep(0.2)
        return found

    def text(self) -> str:
        """Return the text that is visible."""
        return str(self.run("return document.body.innerText"))

    def console(self) -> list[str]:
        """Return the console's lines since the last call."""
        return [f"{entry['level']} {entry['message']}" for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def picture(self, path: Path, top: int = 0, height: int | None = None) -> None:
        """Save a picture of the window, or of ``height`` pixels of the page from ``top``."""
        options: dict[str, Any] = {"format": "png"}
        if height is not None:
            width = self.run("return innerWidth")
            clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
            options |= {"captureBeyondViewport": True, "clip": clip}
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser with a profile of its own, and end it."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for argument in (*_ARGUMENTS.split(), f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            yield Browser(driver)
        finally:
            driver.quit()
