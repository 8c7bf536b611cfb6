import pytest
from helpers import run_cli
from small_report import STACKER, make_run, write_evaluation

from ensemble.evaluation import report_scores

pytestmark = pytest.mark.browser

WIDTHS = (1280, 375)
LOOK = """() => ({
    missing: [...document.images].filter(image => !image.naturalWidth).length,
    pictures: document.images.length,
    beyond: document.documentElement.scrollWidth - window.innerWidth,
})"""


def looked_at(browser, file, width):
    """(what the browser said, what it sees) of a page at a width in pixels."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
    page.on("request", lambda request: None if request.url.startswith(("data:", "file:")) else said.append(request.url))
    page.goto(file.as_uri())
    seen = page.evaluate(LOOK)
    page.close()
    return said, seen


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_is_whole_in_a_browser(browser, tmp_path, width):
    make_run(tmp_path)
    rows = report_scores.read_run_images(tmp_path, STACKER)[0].frame
    write_evaluation(tmp_path, "first", rows, ("clean", "jpeg 30", "blur 2"))
    assert run_cli("report", "--run", tmp_path, "--no-heatmaps")[0] == 0
    said, seen = looked_at(browser, tmp_path / "report.html", width)
    assert said == []
    assert (seen["missing"], seen["beyond"]) == (0, 0)
    assert seen["pictures"] == 2 * (24 + 8)


def test_a_broken_page_is_caught(browser, tmp_path):
    (tmp_path / "page.html").write_text(
        "<meta name=viewport content='width=device-width'><img src=none.png><p style='width: 900px'>wide"
        "<script>console.log('hello'); throw new Error('broken')</script>"
    )
    said, seen = looked_at(browser, tmp_path / "page.html", 375)
    assert "hello" in said
    assert any("broken" in line for line in said)
    assert seen["missing"] == 1
    assert seen["beyond"] > 400
