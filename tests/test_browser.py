"""In a real browser: sliders in JupyterLab show the package's numbers, and the report opens from disk.

They want ``pip install -e ".[browser]"`` and a Chromium of the system; with ``EARLYEXIT_SCREENSHOTS``, a
folder, they keep pictures.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest
from matplotlib.pyplot import subplots
from tiny_project import write_project

from earlyexit import explore
from earlyexit.runs.paths import PACKAGE, project
from earlyexit.runs.report import report

playwright = pytest.importorskip("playwright.sync_api", reason='needs pip install -e ".[browser]"')
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium"),
]
PATIENCE = 180_000  # milliseconds: the kernel imports torch, and reads or makes two traces
SETTINGS = '{"fetchNews": "false", "checkForUpdates": false}'  # no question at the start


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        chromium = started.chromium.launch(**options)
        yield chromium
        chromium.close()


def take(page, name: str) -> None:
    """Keep a screenshot where the reader of a test wants one."""
    if folder := os.environ.get("EARLYEXIT_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab with one notebook, which explores the published model."""
    folder = tmp_path_factory.mktemp("lab")
    cell = 'import earlyexit\nearlyexit.explore("cpu", device="cpu")'
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "explore.ipynb")
    plugin = folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(SETTINGS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"),
        *("--IdentityProvider.token=test", f"--ServerApp.root_dir={folder}"),
    ]
    own = {"JUPYTERLAB_SETTINGS_DIR": folder / "settings", "JUPYTER_CONFIG_DIR": folder / "config"}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces", "IPYTHONDIR": folder / "ipython"}
    own |= {"JUPYTER_RUNTIME_DIR": folder / "runtime", "PYTHONPATH": PACKAGE.parent}
    with open(folder / "lab.log", "w") as log:
        environment = os.environ | {name: str(path) for name, path in own.items()}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token=test", server)
            yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token=test"
        finally:
            server.terminate()
            server.wait(30)


def wait_for(address: str, server: subprocess.Popen) -> None:
    """Wait until a server answers, at most as long as ``PATIENCE``."""
    end = time.monotonic() + PATIENCE / 1000
    while server.poll() is None and time.monotonic() < end:
        try:
            urlopen(address)
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not start, exit code {server.poll()}")


def test_sliders_show_the_numbers_of_the_package(lab, browser, request):
    page = browser.new_page(viewport={"width": 1400, "height": 1300})
    page.set_default_timeout(PATIENCE)
    request.addfinalizer(lambda: take(page, "explore-last"))  # also of a failure
    page.goto(lab)
    page.get_by_text("| Idle").wait_for()  # its kernel is there
    page.locator(".jp-Notebook .cm-content").first.click()
    page.keyboard.press("Shift+Enter")
    table = page.locator(".widget-html table").first
    table.wait_for()
    take(page, "explore-first")
    explorer = explore("cpu", device="cpu")

    def shown_is(policy) -> None:
        """Compare the numbers on screen, once they have moved, with what the package says."""
        read, shares = explorer.read_out(policy), explorer.shares(policy)
        loss = f"{read['quality_loss']:+.1%}"
        page.locator("tr", has_text="quality loss").get_by_text(loss, exact=True).wait_for()
        cells = page.locator(".widget-html td:nth-child(2)").all_text_contents()
        speedups = [f"{read[f'speedup_{kind}']:.2f}×" for kind in ("layers", "flops", "time")]
        ends = [*shares[:-2], shares[-2:].sum()]
        assert cells == [loss, *speedups, *(f"{share:.1%}" for share in ends)]

    shown_is(explorer.within("gate", 0.05))
    handles = page.locator(".noUi-handle")
    handles.nth(0).press("ArrowRight")
    shown_is(explorer.within("gate", 0.07))
    page.get_by_role("button", name="threshold").click()
    handle, thresholds = handles.nth(1), explorer.thresholds("gate")
    shown_is(explorer.at("gate", thresholds[0]))
    for _ in range(20):
        handle.press("ArrowRight")
    policy = explorer.at("gate", thresholds[20])
    shown_is(policy)
    take(page, "explore-moved")
    page.locator("textarea:visible").last.fill("The state of the zyxwv is strong.")
    handle.focus()  # the text area is left
    page.get_by_text("zyxwv", exact=True).locator("visible=true").wait_for()
    passage = explorer.passage("The state of the zyxwv is strong.")
    layers = page.locator(".layers span[title]").evaluate_all("all => all.map(one => one.title)")
    table = explorer.read(policy, passage)
    assert [int(told.split()[0]) for told in layers] == table["layers"].tolist()
    take(page, "explore-pasted")


def test_the_report_opens_from_disk_and_asks_no_network(browser, tmp_path):
    place, picture = project(write_project(tmp_path)), io.BytesIO()
    subplots()[0].savefig(picture, format="png")
    png = base64.b64encode(picture.getvalue()).decode()
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}
    outputs = [
        nbformat.v4.new_output("display_data", {"image/png": png}),
        nbformat.v4.new_output("execute_result", view | {"text/html": "<b>sliders, still</b>"}),
    ]
    cells = [nbformat.v4.new_markdown_cell("# The question")]
    cells += [nbformat.v4.new_code_cell("1 + 1", outputs=outputs)]
    copy = place.executed("smoke", "01_build")
    copy.parent.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {}}), copy)
    path, asked, errors = report("smoke", place.root), [], []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
    page.goto(path.as_uri())
    assert page.locator("h1", has_text="The question").is_visible()
    assert page.get_by_text("sliders, still").is_visible()
    assert page.locator("img").evaluate("image => image.naturalWidth") > 100
    assert not page.locator(".jp-InputArea", has_text="1 + 1").is_visible()
    page.locator("summary").click()
    assert page.locator(".jp-InputArea", has_text="1 + 1").is_visible()
    assert not errors and {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert path.as_uri() in asked
    page.close()
