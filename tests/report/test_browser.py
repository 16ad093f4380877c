"""report.html in a browser: Debian's chromium, headless. Skipped, saying so, where there is none."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest

from vitprune.report.page import render_page
from vitprune.report.runs import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open report.html with")

# A page around the report, so that the report itself stays as it is: its own policy forbids scripts.
HOST = """<!DOCTYPE html><title>host</title><body><iframe src="report.html" style="border:0;width:390px;height:800px">
</iframe><pre id="result"></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement, all = (s) => [...page.querySelectorAll(s)];
  document.getElementById("result").textContent = JSON.stringify({
    width: frame.contentWindow.innerWidth,
    scroll: Math.max(root.scrollWidth, page.body.scrollWidth),
    wide: all("body *:not(svg *):not(.scroll *)").filter((e) => e.getBoundingClientRect().right > 391)
      .map((e) => e.tagName),
    figures: all("data").map((e) => [e.dataset.key, e.value, e.textContent]),
    unnamed: all("svg, img").filter((e) => !(e.getAttribute("aria-label") || e.alt)).length,
    images: all("image").map((e) => e.getBoundingClientRect().width),
    copies: all('use[href^="#image"]').map((e) => e.getBoundingClientRect().width),
    mode: page.compatMode,
    verdict: page.getElementById("verdict").textContent,
  });
};
</script>"""


@pytest.fixture
def site(make_run, tmp_path):
    """A server with the report and the page around it; `site.asked` is what was requested."""
    folder = make_run()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "report.html").write_text(render_page(read_run(folder)))
    (tmp_path / "site" / "host.html").write_text(HOST)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            server.asked.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "site"))
    )
    server.asked, server.report = [], json.loads((folder / "report.json").read_text())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_in_a_browser(site, tmp_path):
    """One start of the browser for all: a start takes seconds."""
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=5000"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
            f"http://127.0.0.1:{site.server_port}/host.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    # The page's own policy forbids all loading and all scripts, and the browser tells the console what it stops.
    assert "CONSOLE" not in done.stderr, done.stderr
    assert set(site.asked) - {"/favicon.ico"} == {"/host.html", "/report.html"}, "the icon is the page's around it"
    assert result["mode"] == "CSS1Compat"
    assert result["width"] == 390
    assert result["scroll"] <= 390
    assert result["wide"] == []
    assert result["unnamed"] == 0
    assert all(width > 50 for width in result["images"] + result["copies"])
    assert len(result["images"]) == 2
    assert len(result["copies"]) == 4
    assert "1.46 x as fast" in result["verdict"]
    assert len(result["figures"]) > 30
    for key, value, text in result["figures"]:
        expected = site.report
        for part in key.split("."):
            expected = expected[int(part)] if isinstance(expected, list) else expected[part]
        assert json.loads(value) == expected
        assert float(text) == pytest.approx(expected, abs=0.5000001 * 10 ** -len(text.partition(".")[2]))
