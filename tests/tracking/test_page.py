"""The frame of a report in a real browser: nothing is wider than the page, no word is broken into letters."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from behrt_jax.config.commands import ReportConfig
from behrt_jax.files import read_json, write_json
from behrt_jax.tracking.evaluation_report import write_evaluation_report
from behrt_jax.tracking.report import write_report
from behrt_jax.workflows.report import report
from tests.tracking.test_comparison import make
from tests.tracking.test_evaluation_report import record_of
from tests.tracking.test_report import fill

# Opens every fold, and tells what is too wide, and what is higher than its few letters ask for.
MEASURE = """
<iframe id=page src="PAGE" style="border:0;width:WIDTHpx;height:4000px"></iframe><pre id=found></pre><script>
document.getElementById('page').onload = event => {
  const page = event.target.contentDocument, wide = [], broken = [];
  page.querySelectorAll('details').forEach(one => one.open = true);
  page.querySelectorAll('body, body *').forEach(one => {
    const box = one.getBoundingClientRect(), words = one.textContent.trim();
    if (box.right > WIDTH + 0.5 || box.left < -0.5) wide.push(one.tagName + ' ' + words.slice(0, 40));
    const own = page.createRange();
    own.selectNodeContents(one);
    const lines = new Set([...own.getClientRects()].map(rect => Math.round(rect.top)));
    if (!one.children.length && words.length && words.length <= 8 && lines.size > 1) broken.push(words);
  });
  const whole = page.documentElement;
  if (whole.scrollWidth > whole.clientWidth) wide.push('page ' + whole.scrollWidth);
  const seen = page.querySelectorAll('body *').length;
  document.getElementById('found').textContent = JSON.stringify({wide, broken, seen});
};
</script>
"""


def measured(page: Path, width: int, scratch: Path) -> dict:
    """What a headless Chromium finds of a page in a window of some width."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    wrapper = scratch / "measure.html"
    wrapper.write_text(MEASURE.replace("PAGE", page.as_uri()).replace("WIDTH", str(width)))
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--allow-file-access-from-files", "--virtual-time-budget=5000",
        f"--user-data-dir={scratch / 'browser'}", "--dump-dom", wrapper.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<pre id=\"found\">(.*?)</pre>", done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    return json.loads(html.unescape(found[1]))


def with_long_words(folder: Path) -> Path:
    """A run whose settings, codes and findings hold words that are wider than a phone."""
    fill(folder)
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    config["settings"]["data"] = {"path": "/a" * 100, "codes": ["ICD10CM" * 20]}
    summary["confusions"][0] |= {"code": "DX//" + "X" * 90, "instead_description": "word " * 40}
    summary["findings"][0]["seen"] = "y" * 200
    summary["data"]["fingerprint"] = "0f" * 32
    write_json(folder / "config.json", config)
    write_json(folder / "summary.json", summary)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_no_element_is_wider_than_the_page_and_no_word_is_broken(width, tmp_path):
    run = write_report(with_long_words(tmp_path / "run"))
    few = report(
        ReportConfig(
            (make(tmp_path / "a", [5.0]), make(tmp_path / ("b" * 60), [4.0], rank=16)), tmp_path / "few.html"
        )
    )
    many = tuple(make(tmp_path / f"many-{k}", [4.0 + k], rank=k + 1) for k in range(9))
    evaluation = tmp_path / "evaluation.html"
    record = record_of(task={"model": "/runs" * 60, "split": "held_out"})
    write_evaluation_report(evaluation, "Evaluation of " + "x" * 80, record, [])
    for page in (run, few, report(ReportConfig(many, tmp_path / "many.html")), evaluation):
        found = measured(page, width, tmp_path)
        assert found["seen"] > 40
        assert found["wide"] == [], page
        assert found["broken"] == [], page
