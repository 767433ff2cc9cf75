"""Drives a headless Chromium over WebDriver's HTTP protocol, on the loopback interface only."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request

import pytest

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
]  # fmt: skip


class Browser:
    """One window with one page."""

    def __init__(self, root, chromium, profile):
        self._root = root
        options = {"binary": chromium, "args": [*ARGUMENTS, f"--user-data-dir={profile}", "--window-size=1200,1200"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}
        self._session = f"/session/{self._call('POST', '/session', {'capabilities': wanted})['sessionId']}"

        self._call("POST", f"{self._session}/url", {"url": "data:,"})
        for kind in logs:  # what the browser did to start
            self._log(kind)

    def open(self, path):
        self._call("POST", f"{self._session}/url", {"url": path.resolve().as_uri()})

    def resize(self, width):
        """Make the page think that the screen is `width` pixels wide."""
        parameters = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": True}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": parameters}
        self._call("POST", f"{self._session}/goog/cdp/execute", command)

    def run(self, script):
        """What `script` returns in the page."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def wait(self, script, seconds=120):
        """Wait until `script` returns something true."""
        for _ in range(10 * seconds):
            if found := self.run(script):
                return found
            time.sleep(0.1)
        raise AssertionError(f"still false after {seconds} s: {script}")

    def console(self):
        return [entry["message"] for entry in self._log("browser")]

    def requests(self):
        """Addresses of everything that was asked for, data URIs without their data."""
        events = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url.partition(",")[0] if url.startswith("data:") else url for url in sent]

    def close(self):
        self._call("DELETE", self._session)

    def _log(self, kind):
        return self._call("POST", f"{self._session}/se/log", {"type": kind})

    def _call(self, method, path, body=None):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(
            f"{self._root}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=240) as answer:
            return json.load(answer)["value"]


@contextlib.contextmanager
def browse(chromium, profile):
    """A browser, or a skip where there is no chromedriver."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("chromedriver is not installed")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        port = next(
            found[1] for line in process.stdout if (found := re.search(r"started successfully on port (\d+)", line))
        )
        browser = Browser(f"http://127.0.0.1:{port}", chromium, profile)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        process.terminate()
        process.communicate()
