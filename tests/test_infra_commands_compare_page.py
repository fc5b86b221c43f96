"""The page of `metagmvae compare --html` in a headless browser: complete, without errors, without network requests."""

import html
import json
import os
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow_template
import pytest
from glyphs_dataset import new_dataset

from metagmvae.infra.cli import main

# Making the page and starting a browser can take minutes on a busy machine.
pytestmark = pytest.mark.timeout(900)
HOSTILE = "<script>alert(1)<script>$x^$"
PROBE = """<!doctype html><title>probe</title><iframe id="page" src="/page.html" width="{width}" height="900"></iframe>
<pre id="findings"></pre><script>
document.getElementById("page").addEventListener("load", event => {
  const page = event.target.contentDocument, view = event.target.contentWindow;
  const images = [...page.images].map(image => [image.alt, image.naturalWidth, image.currentSrc.slice(0, 11)]);
  document.getElementById("findings").textContent = JSON.stringify({
    images, title: page.title, scripts: page.scripts.length, width: page.documentElement.scrollWidth,
    fetched: view.performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 40)),
    rows: [...page.querySelectorAll("section")].map(part => [part.id, part.querySelectorAll("tbody tr").length]),
    names: [...page.querySelectorAll("#accuracy tbody th")].map(cell => cell.firstChild.textContent.trim()),
  });
});
</script>"""


@pytest.fixture
def chromium() -> str:
    """Path of Chromium. Without it the test is skipped, or fails if METAGMVAE_REQUIRE_BROWSER is 1."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path:
        return path
    message = "no chromium on this machine: apt-get install chromium"
    if os.environ.get("METAGMVAE_REQUIRE_BROWSER") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A comparison of three trainings, one with a malicious name, and a row of the paper."""
    root = tmp_path_factory.mktemp("page")
    new_dataset(root / "data", (6, 6, 6))
    runs = [mlflow_template.new_run(root / f"net-seed{seed}", seed=seed) for seed in range(2)]
    runs.append(mlflow_template.new_run(root / HOSTILE, seed=2))
    for run in runs:
        lines = [
            {"stage": "meta", "step": s, "global_step": s, "elapsed_s": 1.0 * s, "loss": 9.0 / s} for s in range(1, 6)
        ]
        lines[-1] |= {"validation/5w1s": 0.5, "validation/5w1s_ci95": 0.1}
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [*map(str, runs), "paper:omniglot/meta-gmvae", "--data", str(root / "data"), "--episodes", "6"]
    assert main(["compare", *arguments, "--html", str(root / "page.html"), "--json"]) == 0
    return root / "page.html"


@pytest.fixture
def site(page):
    """Serve the page and a probe that inspects it; yield the address and the requested paths."""
    requested: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            path, _, width = self.path.partition("?")
            contents = {"/page.html": page.read_text(), "/probe.html": PROBE.replace("{width}", width or "1200")}
            self.send_response(200 if path in contents else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(contents.get(path, "").encode())

        def log_message(self, *arguments: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requested
        server.shutdown()
        thread.join()


def browse(chromium: str, url: str, folder: Path) -> tuple[dict, str]:
    """Return the findings of the probe and the console messages of the browser."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions")
    # This browser resolves no other host, so it cannot send a request elsewhere.
    offline = ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr")
    run = ("--dump-dom", f"--user-data-dir={folder / 'profile'}", url)
    done = subprocess.run(
        [chromium, *options, *quiet, *offline, *run], capture_output=True, text=True, timeout=240, check=False
    )
    findings = re.search(r'<pre id="findings">(.+?)</pre>', done.stdout, re.DOTALL)
    assert findings, f"the probe wrote nothing: {done.stdout[:500]} {done.stderr[-2000:]}"
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(findings[1])), console


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 390])
def test_page_renders_completely_without_requests(chromium, site, tmp_path, width):
    address, requested = site
    findings, console = browse(chromium, f"{address}/probe.html?{width}", tmp_path)
    assert console == ""
    assert findings["title"] == "Comparison of few-shot models"
    rows = dict(findings["rows"])
    assert (rows["accuracy"], rows["paired"], rows["models"]) == (5, 1, 3)
    assert findings["names"] == ["net-seed0", "net-seed1", "net (2 trainings)", HOSTILE, "paper: Meta-GMVAE"]
    # Two accuracy curves and the loss; reliability diagram, episode and latent map of each model.
    assert len(findings["images"]) == 3 + 3 * 3
    assert all(width > 100 and source == "data:image/" for _, width, source in findings["images"]), findings["images"]
    assert findings["scripts"] == 0
    assert not [name for name in findings["fetched"] if not name.startswith("data:")]
    assert {path.partition("?")[0] for path in requested} <= {"/probe.html", "/page.html", "/favicon.ico"}
    # Wide tables scroll inside their box: the page is not wider than the screen.
    assert findings["width"] <= width


class Links(HTMLParser):
    """Collects the elements of a page and every attribute that can load a resource."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.elements: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]


def test_page_has_no_external_resource_and_no_script(page):
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.fetched
    assert all(value.startswith("data:") for value in links.fetched)
    assert not links.elements & {"script", "iframe", "object", "embed", "form", "base"}
    assert html.escape(HOSTILE) in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert "url(" not in text
    assert "@import" not in text
