"""Headless Chromium, and the page in it as a test sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

DEADLINE_S = 60.0
PROGRAMS = ("chromium", "chromedriver")
KEPT_NOTHING = "sessionStorage.clear();"
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",  # other tests look at what is left there
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--window-size=1200,820",
)


def missing_programs() -> str:
    """Names of what is not installed; empty: all is there."""
    return " and ".join(name for name in PROGRAMS if shutil.which(name) is None)


@contextmanager
def headless_browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    try:
        driver.set_page_load_timeout(DEADLINE_S)
        driver.set_script_timeout(DEADLINE_S)
        yield driver
    finally:
        driver.quit()


class Page:
    """The page of a server, freshly opened; `before` is a script that runs before those of the page."""

    def __init__(self, driver: Chrome, url: str, before: str = "", expects_failures: bool = False):
        self.driver = driver
        self.url = url
        self.expects_failures = expects_failures  # of requests: the browser tells them as errors
        self._log("browser")  # what an earlier page left
        self._log("performance")
        driver.get("about:blank")  # else the address differs in its fragment only, and nothing is loaded
        added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": KEPT_NOTHING + before})
        try:
            driver.get(f"{url}/")
        finally:
            driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
        self.wait(lambda: self.all("html[data-started]"), "the page's start")

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
        return [str(text) for text in self.run(script, selector)]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        return WebDriverWait(self.driver, DEADLINE_S, 0.05).until(lambda _: condition(), f"no {what}")

    def press(self, *keys: str) -> None:
        """Where the focus is."""
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def press_with_shift(self, key: str) -> None:
        ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()

    def focused(self) -> str:
        """The id or name of what has the focus."""
        return str(self.run("const a = document.activeElement; return a.id || a.ariaLabel || a.textContent"))

    def attach(self, *files: Path) -> None:
        self.one("#files").send_keys("\n".join(map(str, files)))

    def wait_for_attachments(self, count: int) -> None:
        self.wait(lambda: len(self.all("#attachments .tile")) == count, f"{count} attachments")

    def ask(self, text: str) -> str:
        """Send, and wait for the end of the answer.  Returns its text."""
        before = len(self.all(".answer"))
        self.one("#message").send_keys(text + Keys.ENTER)
        return self.answer(before)

    def answer(self, index: int = 0) -> str:
        """The text of an answer, once it is whole."""
        self.wait(lambda: len(self.all(".answer[aria-busy=false]")) > index, f"answer {index}")
        return self.texts(".answer .prose")[index].strip()

    def press_in_turn(self, index: int, label: str) -> None:
        self.all(".turn")[index].find_element(By.CSS_SELECTOR, f"[aria-label='{label}']").click()

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def complaints(self) -> list[str]:
        """What the browser had to say: errors, warnings, violations of the policy."""
        return [
            entry["message"]
            for entry in self._log("browser")
            if entry["level"] in ("SEVERE", "WARNING") and not (self.expects_failures and entry["source"] == "network")
        ]

    def requested_hosts(self) -> set[str]:
        """Of all that this page has asked for over the network."""
        hosts = set()
        for entry in self._log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                address = urlsplit(message["params"]["request"]["url"])
                hosts |= {address.netloc} if address.scheme not in ("data", "blob", "about") else set()
        return hosts

    def _log(self, kind: str) -> list[dict[str, Any]]:
        """What has come since the last look."""
        entries: list[dict[str, Any]] = self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        return entries
