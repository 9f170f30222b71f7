"""Take the pictures of docs/ from a real MLflow server with a real browser.

    python docs/screenshots.py [FOLDER]

Train two short runs into a temporary store, start `mlflow server` on it, and write run-page.png,
run-charts.png and compare.png to FOLDER (default: docs). About two minutes on two cores.

Needs Chromium and its driver (Debian: chromium, chromium-driver), and the packages selenium and
pillow beside those of the project. Nothing but 127.0.0.1 is opened.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

BIN = Path(sys.executable).parent
WIDTH, HEIGHT = 1400, 900
COLORS = 128  # of a picture
LARGEST = 300_000  # bytes of a picture
SECONDS = 60  # to wait for anything on a page
MOUSE = "blink-settings=primaryHoverType=2,availableHoverTypes=2"
"""Without a mouse, charts show their tool bars all the time."""
UI = "?workflowType=machine_learning"  # without it, MLflow opens its pages for GenAI
RATES = {"learning rate 5e-3": "5e-3", "learning rate 5e-4": "5e-4"}
SECTION = "[data-testid='experiment-view-compare-runs-section-header']"
ASSISTANT = "[data-component-id='mlflow.assistant.chat_panel.close']"
LINES = ".js-plotly-plot .scatterlayer .trace"


def main() -> None:
    """Train, start the server and the browser, take the pictures, and end both."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory(prefix="screenshots-") as scratch, serve(Path(scratch)) as uri:
        runs = [train(uri, Path(scratch), name, rate) for name, rate in RATES.items()]
        with browser(Path(scratch) / "profile") as driver:
            take(driver, uri, runs, folder)


@contextlib.contextmanager
def serve(scratch: Path) -> Iterator[str]:
    """Run `mlflow server` on a new store; yield its address."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    words = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--backend-store-uri", f"sqlite:///{scratch}/mlflow.db", "--workers", "1"]
    words += ["--artifacts-destination", str(scratch / "artifacts")]
    with (scratch / "server.log").open("wb") as log:
        server = subprocess.Popen(words, cwd=scratch, stdout=log, stderr=log)
    try:
        uri = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{uri}/health"), "the server's answer")
        yield uri
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    """Return whether a server answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def train(uri: str, scratch: Path, name: str, rate: str) -> str:
    """Train golden-v2 for 60 steps, as a user does; return the run's id."""
    words = [str(BIN / "tunix-mlflow"), "train", "golden-v2", "training.steps=60"]
    words += ["training.eval_every_steps=10", f"optimizer.learning_rate={rate}"]
    words += ["tracking.experiment=golden", f"tracking.run_name={name}"]
    env = os.environ | {"MLFLOW_TRACKING_URI": uri, "TUNIX_MLFLOW_HOME": str(scratch / "home")}
    done = subprocess.run(words, env=env, cwd=scratch, stdout=subprocess.PIPE, check=True)
    return str(json.loads(done.stdout.splitlines()[-1])["run_id"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Chrome]:
    """Run a headless Chromium with a new profile."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for switch in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *(
            MOUSE,
            "disable-dev-shm-usage",
            f"window-size={WIDTH},{HEIGHT}",
            f"user-data-dir={profile}",
        ),
    ):
        options.add_argument(f"--{switch}")
    driver = Chrome(options, Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def take(driver: Chrome, uri: str, runs: list[str], folder: Path) -> None:
    """Write the pictures of the first run, and of both.

    Raises:
        ValueError: if train/loss is not in the first section of a run's charts.
    """
    with urllib.request.urlopen(f"{uri}/api/2.0/mlflow/runs/get?run_id={runs[0]}") as reply:
        experiment = json.load(reply)["run"]["info"]["experiment_id"]
    page = f"{uri}/#/experiments/{experiment}/runs"

    open_page(driver, f"{page}/{runs[0]}{UI}", "Parameters", height=1350)
    driver.find_element(By.XPATH, "//button[contains(., 'Show more')]").click()
    wait_for_text(driver, "to evaluate it")
    save(driver, folder / "run-page.png")

    open_page(driver, f"{page}/{runs[0]}/model-metrics{UI}", "loss")
    wait_for_lines(driver)
    save(driver, folder / "run-charts.png")
    first = driver.find_element(By.CSS_SELECTOR, SECTION).text.splitlines()[0]

    open_page(driver, f"{page}{UI}&compareRunsMode=CHART", "2 matching runs", height=1120)
    search = driver.find_element(By.CSS_SELECTOR, "input[placeholder='Search metric charts']")
    search.send_keys("/loss$")
    wait_for_text(driver, "train/loss")
    wait_for_lines(driver)
    save(driver, folder / "compare.png")
    if first != "train":
        raise ValueError(f"the charts of a run begin with the section {first!r}, not with 'train'")


def open_page(driver: Chrome, url: str, text: str, height: int = HEIGHT) -> None:
    """Open a page of the UI, wait until it shows a text, and close MLflow's assistant."""
    size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get("about:blank")
    driver.get(url)
    wait_for_text(driver, text)
    for button in driver.find_elements(By.CSS_SELECTOR, ASSISTANT):
        button.click()


def wait_for_lines(driver: Chrome) -> None:
    """Wait until the charts in view have their lines, and their size."""
    wait_until(lambda: len(driver.find_elements(By.CSS_SELECTOR, LINES)) > 1, "lines of charts")
    time.sleep(2)  # the charts grow into the space of the assistant


def wait_for_text(driver: Chrome, text: str) -> None:
    """Wait until the page shows a text."""
    wait_until(lambda: text in driver.find_element(By.TAG_NAME, "body").text, repr(text))


def wait_until(done: Callable[[], bool], what: str) -> None:
    """Wait for something to become true.

    Raises:
        TimeoutError: if it takes too long.
    """
    deadline = time.monotonic() + SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {SECONDS} s")
        time.sleep(0.2)


def save(driver: Chrome, path: Path) -> None:
    """Write what the browser shows, in few colors.

    Raises:
        ValueError: if the file is too large.
    """
    image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    image.quantize(COLORS).save(path, optimize=True)
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes; at most {LARGEST:,} are allowed")
    print(f"{path}: {size:,} bytes")


if __name__ == "__main__":
    main()
