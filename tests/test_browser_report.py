"""Tests of the report in a real browser: nothing spills over, every figure is visible, light, dark and on a phone.

Run with `pytest -m browser`; needs a Chromium (Debian: `apt-get install chromium`), and is skipped without one.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from helpers.synthetic import plan_of, synthetic_records
from scaling_lab.analysis.analysis import analyze, observations_of_sweep
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.analysis.settings import AnalysisSettings
from scaling_lab.reporting.page import ReportOptions, write_report

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    # No host name resolves: a page that needed the network would lack something.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
# Measures the laid-out page; added to a copy, the report itself has no script. A frame gives any width, where a headless
# window may refuse to be as narrow as a phone.
PROBE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll")
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  document.body.dataset.seen = JSON.stringify({
    spill: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    wide: wide.map(e => e.tagName + "." + e.className),
    figures: [...document.querySelectorAll("figure svg")].map(s => { const b = s.getBoundingClientRect();
      return [b.width, b.height, getComputedStyle(s).filter]; }),
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    requests: performance.getEntriesByType("resource").length });
  });</script>"""


def browse(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = synthetic_records(curve_points=60)
    settings = AnalysisSettings(bootstrap=BootstrapSettings(resamples=40))
    analysis = analyze(observations_of_sweep(records), settings)
    return write_report(
        analysis, records, tmp_path_factory.mktemp("page"), ReportOptions(plan=plan_of(records))
    )


def seen(page: Path, tmp_path: Path, width: int, *, dark: bool = False) -> dict[str, object]:
    """What the probe measured at this window width."""
    probed = tmp_path / "probed.html"
    probed.write_text(
        page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="probed.html" width="{width}" height="900" style="border:0"></iframe>'
        "<script>f.onload = () => setTimeout(() => { document.body.dataset.seen ="
        " f.contentDocument.body.dataset.seen; }, 50);</script>"
    )
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = browse(
        tmp_path, "--allow-file-access-from-files", "--virtual-time-budget=4000", f"--window-size={width + 40},1000",
        *scheme, "--dump-dom", frame.as_uri(),
    )  # fmt: skip
    found = re.search(r'data-seen="([^"]+)"', done.stdout)
    assert found is not None, done.stderr[-500:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_overflows_at_any_width(page: Path, tmp_path: Path, width: int) -> None:
    got = seen(page, tmp_path, width)
    assert got["spill"] == 0, got["wide"]
    figures = got["figures"]
    assert isinstance(figures, list)
    assert len(figures) == 8
    assert all(w >= 300 and h >= 80 for w, h, _ in figures), figures
    assert got["requests"] == 0


def test_dark_mode_changes_page_and_figures(page: Path, tmp_path: Path) -> None:
    light, dark = seen(page, tmp_path, 1000), seen(page, tmp_path, 1000, dark=True)
    assert light["paper"] == "rgb(255, 255, 255)"
    assert dark["paper"] == "rgb(20, 23, 27)"
    assert all(f[2] == "none" for f in light["figures"])  # type: ignore[attr-defined]
    assert all("invert" in f[2] for f in dark["figures"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("dark", [False, True])
def test_the_first_screen_is_painted(page: Path, tmp_path: Path, dark: bool) -> None:
    shot = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(tmp_path, "--window-size=1000,1600", *scheme, f"--screenshot={shot}", page.as_uri())
    pixels = matplotlib.image.imread(shot)[..., :3]
    paper = pixels[2, 2]
    assert (float(paper.mean()) < 0.2) == dark
    painted = np.abs(pixels - paper).max(axis=2) > 0.2
    assert painted.mean() > 0.02
    # The lower part holds the first figure: lines in color, not only gray text.
    colorful = (pixels.max(axis=2) - pixels.min(axis=2))[800:] > 0.25
    assert colorful.mean() > 0.001


def test_it_prints(page: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.pdf"
    browse(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={out}", page.as_uri())
    content = out.read_bytes()
    assert content.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", content))
    assert 4 <= pages <= 20
