"""A real browser for the tests of the board."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.ui import WebDriverWait

_AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text()
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage"
)
PATIENCE = 60


class Browser:
    """Debian's Chromium, or Chrome, driven by Selenium.

    Args:
        profile: A fresh directory.
    """

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = _program("chromium", "chromium-browser", "google-chrome")
        for flag in [*_FLAGS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(_program("chromedriver", "chromium.chromedriver")))
        self.messages: list[str] = []

    def tell(self, command: str, **arguments: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, arguments)

    def dress(self, width: int, *, dark: bool, scale: int = 1) -> None:
        """Set how wide the window is, and whether it is dark."""
        height = 900 if width > 500 else 844
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell(
            "Emulation.setEmulatedMedia", features=[scheme, {"name": "prefers-reduced-motion", "value": "reduce"}]
        )

    def open(self, url: str) -> None:
        """Open a page."""
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page, as DevTools do: past its policy."""
        return self.driver.execute_script(script, *arguments)

    def follow(self, selector: str) -> None:
        """Click what leads to another page, and wait until that page is there.

        Chromedriver returns from a click before the old page is gone: what is looked for then may be found there.
        """
        left = self.driver.find_element(By.CSS_SELECTOR, selector)
        left.click()
        self._wait(staleness_of(left))
        self.until("document.readyState === 'complete'")

    def until(self, script: str) -> Any:
        """Wait until a script returns something, whatever page it is asked of meanwhile."""
        return self._wait(lambda _: self.run(f"return {script}"))

    def _wait(self, condition: Callable[[Any], Any]) -> Any:
        # A page that is left while it is asked answers with an error, of one of several classes.
        return WebDriverWait(self.driver, PATIENCE, 0.05, [WebDriverException]).until(condition)

    def console(self) -> list[str]:
        """Return what the page has said on its console since."""
        return [entry["message"] for entry in self.driver.get_log("browser") if "favicon" not in entry["message"]]

    def accessibility(self) -> list[str]:
        """Return what axe-core finds that is serious or critical."""
        self.run(_AXE)
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document, {resultTypes: ['violations']}).then(found => done(found.violations))"
        )
        return [
            f"{one['id']}: {node['html'][:160]} {node.get('failureSummary', '')[:200]}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"][:3]
        ]

    def picture(self, path: Path) -> None:
        """Keep what is seen."""
        found = self.tell("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


def _program(*names: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise RuntimeError(f"install {names[0]}: the tests of the board need a browser")
