import base64
import csv
import os
from contextlib import contextmanager

import pytest
from pictures import photo_file
from small_members import write_networks
from small_server import ENSEMBLE, expected, grey, running

from ensemble.core.errors import UnavailableError
from ensemble.data.inputs import inputs_from_files
from ensemble.stacking.stack import read_stacker
from export.inference.explain import explain_image
from export.inference.infer import infer
from export.inference.loading import load_networks
from export.runtimes.settings import RuntimeOptions

api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser

HOSTILE = "=<img src=x onerror=alert(1)>,é 写真\"'.jpg"
DROP = """files => {
    const transfer = new DataTransfer();
    for (const [name, text] of files) {
        const data = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([data], name));
    }
    document.getElementById("drop").dispatchEvent(
        new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""
ROWS = """() => [...document.querySelectorAll("tbody tr")].map((row) => ({
    name: row.querySelector(".name").textContent,
    target: row.querySelector(".target")?.textContent ?? null,
    call: row.querySelector(".ai, .real")?.textContent ?? null,
    members: [...row.querySelectorAll(".member")].map((member) => member.innerText.split(/\\n+/).map((t) => t.trim())),
    bars: [...row.querySelectorAll(".bar")].map((bar) => bar.offsetWidth / bar.parentElement.offsetWidth),
    error: row.cells[2].querySelector(".error")?.textContent ?? null,
    pictures: [...row.querySelectorAll("img")].filter((image) => image.naturalWidth).length,
}))"""
WIDTHS = "all => Promise.all(all.map(async (image) => { await image.decode(); return image.naturalWidth; }))"
BEYOND = "() => document.documentElement.scrollWidth - window.innerWidth"


@contextmanager
def opened(browser, width=1280, ensemble=ENSEMBLE, **others):
    """The page of a server at a width in pixels, and what the browser says of it that nobody wants to hear."""
    with running(ensemble, **others) as url:
        page = browser.new_page(viewport={"width": width, "height": 900})
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda sent: None if sent.url.startswith((url, "blob:", "data:")) else said.append(sent.url))
        page.goto(url)
        page.locator("#about", has_text="manyeyes").wait_for()
        yield page, said
        page.close()


def drop(page, files):
    page.evaluate(DROP, [(name, base64.b64encode(data).decode()) for name, data in files])


def finished(page, text):
    api.expect(page.locator("#status")).to_have_text(text, timeout=20_000)
    return page.evaluate(ROWS)


def percent(p):
    return f"{100 * p:.1f} %"


@pytest.mark.parametrize("width", [1280, 375])
def test_a_photo_and_a_broken_file_are_dropped(browser, tmp_path, width):
    photo = photo_file("rocket.jpg")
    own = infer(inputs_from_files(["photo"], [photo]), ENSEMBLE, with_members=True)[0].iloc[0]
    with opened(browser, width) as (page, said):
        drop(page, [(HOSTILE, photo.read_bytes()), ("broken.jpg", photo.read_bytes()[:2000])])
        fine, broken = finished(page, "1 scored, 1 not.")
        if folder := os.environ.get("MANYEYES_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/page-{width}.png", full_page=True)
        assert page.evaluate(BEYOND) <= 0
    assert said == []
    assert (fine["name"], fine["target"], fine["pictures"]) == (HOSTILE, percent(own["target"]), 1)
    assert fine["call"] == ("AI-made" if own["target"] >= 0.6 else "real")
    assert fine["members"] == [[name, percent(own[name])] for name in ("one", "two")]
    assert fine["bars"] == pytest.approx([own["one"], own["two"]], abs=0.02)
    assert (broken["name"], broken["target"], broken["members"], broken["pictures"]) == ("broken.jpg", None, [], 0)
    assert broken["error"].startswith("broken.jpg: cannot be decoded")


def test_files_are_chosen_by_keyboard_and_saved_as_csv(browser, tmp_path):
    names = [HOSTILE, "@broken.jpg"]
    contents = [photo_file("rocket.jpg").read_bytes(), b"nothing"]
    with opened(browser) as (page, said):
        page.keyboard.press("Tab")
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        payloads = [
            {"name": name, "mimeType": "image/jpeg", "buffer": data} for name, data in zip(names, contents, strict=True)
        ]
        chooser.value.set_files(payloads)
        finished(page, "1 scored, 1 not.")
        with page.expect_download() as download:
            page.get_by_role("button", name="Save as CSV").click()
        download.value.save_as(tmp_path / "out.csv")
        page.get_by_role("button", name="Clear").click()
        assert finished(page, "") == []
    assert said == []
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        head, fine, broken = csv.reader(file)
    assert head == ["name", "target", "ai", "one", "two", "error"]
    assert fine[0] == f"'{HOSTILE}"
    assert 0 < float(fine[1]) < 1
    assert broken[0] == "'@broken.jpg"
    assert broken[1:5] == [""] * 4
    assert "not an image" in broken[5]


def test_pictures_above_and_below_the_threshold_are_called_and_saved(browser, tmp_path):
    names = {"<script>alert(1)</script>, ü.png": 250, "b.png": 30}  # the members' logits rise with brightness
    with opened(browser) as (page, said):
        drop(page, [(name, grey(brightness)) for name, brightness in names.items()])
        rows = finished(page, "2 scored.")
        with page.expect_download() as download:
            page.get_by_role("button", name="Save as CSV").click()
        download.value.save_as(tmp_path / "out.csv")
        assert page.get_by_role("button", name="Heat map").count() == 0
    assert said == []
    found = [expected(brightness) for brightness in names.values()]
    assert found[0] > 0.6 > found[1]
    calls = [(name, percent(p), call) for name, p, call in zip(names, found, ("AI-made", "real"), strict=True)]
    assert [(row["name"], row["target"], row["call"]) for row in rows] == calls
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        _, *saved = csv.reader(file)
    assert [row[0] for row in saved] == list(names)
    assert [float(row[1]) for row in saved] == pytest.approx(found, abs=1e-6)
    assert [(row[2], row[5]) for row in saved] == [("1", ""), ("0", "")]


@pytest.mark.parametrize("width", [1280, 375])
def test_heat_maps_open_and_close(browser, tmp_path, width):
    run = write_networks(tmp_path / "run")
    ensemble, networks = load_networks(run, read_stacker(run), RuntimeOptions("torch", device="cpu"))
    photo, calls = photo_file("rocket.jpg").read_bytes(), []

    def explain(name, data):
        calls.append(name)
        if calls == ["photo.jpg"]:
            raise UnavailableError("out of <b>memory</b>")
        return explain_image(ensemble, networks, name, data)

    with opened(browser, width, ensemble, explain=explain) as (page, said):
        drop(page, [("photo.jpg", photo), ("broken.jpg", photo[:2000])])
        (answer, _) = finished(page, "1 scored, 1 not.")
        button, maps = page.get_by_role("button", name="heat map"), page.locator(".maps")
        button.click()
        api.expect(maps).to_have_text("out of <b>memory</b>")
        button.click()
        api.expect(maps).to_have_count(0)
        button.click()
        api.expect(maps.locator("img")).to_have_count(2)
        widths = maps.locator("img").evaluate_all(WIDTHS)
        captions = maps.locator("figcaption").all_inner_texts()
        assert "not proof" in maps.inner_text()
        assert page.evaluate(BEYOND) <= 0
        button.click()
        api.expect(maps).to_be_hidden()
        button.click()
        api.expect(maps).to_be_visible()
    assert [line for line in said if "500" not in line] == []
    assert calls == ["photo.jpg"] * 2
    assert widths == [512, 512]
    assert [(name, call.partition(", ")[2]) for name, call in map(str.splitlines, captions)] == list(
        map(tuple, answer["members"])
    )


def test_many_files_go_in_several_requests_and_one_too_large_is_told(browser):
    small = photo_file("rocket.jpg").read_bytes()
    files = [(f"{number}.jpg", small) for number in range(9)]
    with opened(browser, images=4, megabytes=0.3) as (page, said):
        drop(page, [*files[:5], ("large.jpg", bytes(400_000)), *files[5:]])
        rows = finished(page, "9 scored, 1 not.")
    assert said == []
    assert {row["name"]: row["error"] for row in rows if row["error"]} == {"large.jpg": "larger than 0.3 MB"}
    assert sorted(row["name"] for row in rows if not row["error"]) == [name for name, _ in files]
    assert len({row["target"] for row in rows if not row["error"]}) == 1


def test_a_server_that_is_gone_is_told(browser):
    with opened(browser) as (page, said):
        page.route("**/api/score", lambda route: route.abort())
        drop(page, [("a.jpg", b"x")])
        (row,) = finished(page, "0 scored, 1 not.")
    assert row["error"]
    assert any("ERR_FAILED" in line for line in said)  # what is said is heard
