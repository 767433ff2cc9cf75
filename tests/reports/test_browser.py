import pytest
from browser import browse
from example_run import HELD_OUT, TRAINED, write_example
from rich.console import Console

from perennial.reports import compare, page

pytestmark = pytest.mark.browser
COLUMNS = len(TRAINED) + len(HELD_OUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("runs") / "demo")


def clean(browser):
    """Nothing was logged, and nothing but the page itself and data inside it was asked for."""
    assert browser.console() == []
    requests = browser.requests()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == 1


def test_the_page_shows_matrices_and_plays_its_videos(folder, chromium, tmp_path):
    with browse(chromium, tmp_path) as browser:
        browser.open(page.write(folder))
        videos = 2 * COLUMNS
        loaded = "[...document.querySelectorAll('video')].filter(v => v.readyState >= 1 && v.videoWidth == 128)"
        browser.wait(f"return {loaded}.length == {videos}")
        assert browser.run("return document.querySelectorAll('video').length") == videos
        browser.run("document.querySelector('video').play()")
        browser.wait("return document.querySelector('video').currentTime > 0.2")
        cells = "return document.querySelectorAll('table.heat[data-decoder=sampled] td.cell data').length"
        assert browser.run(cells) == (len(TRAINED) + 1) * COLUMNS
        outlined = "return [...document.querySelectorAll('table.heat td.taught')].length"
        assert browser.run(outlined) == 2 * len(TRAINED)
        ground = "return getComputedStyle(document.querySelector('table.heat td.cell:not(.missing)')).backgroundColor"
        assert browser.run(ground) not in ("rgba(0, 0, 0, 0)", "transparent")
        boxes = "[...document.querySelectorAll('svg.plot')].map(s => s.getBoundingClientRect())"
        drawn = f"return {boxes}.every(box => box.width > 200 && box.height > 80)"
        assert browser.run(drawn)
        for width in (1200, 400):
            browser.resize(width)
            assert browser.run("return window.innerWidth") == width
            assert browser.run("return document.documentElement.scrollWidth") <= width
        clean(browser)


def test_the_comparison_loads_alone(folder, chromium, tmp_path):
    other = write_example(tmp_path / "other", seed=1, boost=0.2, videos=False)
    compare.command([folder, other], tmp_path / "compare.html", False, Console(quiet=True))
    with browse(chromium, tmp_path / "profile") as browser:
        browser.open(tmp_path / "compare.html")
        assert browser.run("return document.querySelectorAll('table.heat').length") == 2
        assert browser.run("return document.querySelectorAll('svg.plot').length") == len(TRAINED)
        clean(browser)
