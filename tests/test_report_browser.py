"""Reports in a browser: Debian's Chromium, without a screen or a network."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from flax_projector.report.writing import write_report
from tests.reports import PAIRS, make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="needs Chromium and its driver: `apt-get install chromium chromium-driver`",
    ),
    pytest.mark.xdist_group("chromium"),
]

EVIL = "<img src=x onerror=window.isHacked=true></script><script>window.isHacked=true</script>"
SIZES = {"desktop": (1280, 900), "phone": (390, 844), "small phone": (320, 568)}


class Browser:
    """One page after the other in Chromium.

    Attributes:
      driver: of selenium.
    """

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        flags = ["--headless=new", "--mute-audio", "--autoplay-policy=no-user-gesture-required"]
        flags += ["--no-sandbox"] * (os.geteuid() == 0)  # root has none
        for flag in [*flags, "--disable-gpu", "--disable-dev-shm-usage"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))

    def open(self, page: Path, size: str = "desktop") -> None:
        """Opens a page in a window of another size."""
        width, height = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        metrics["mobile"] = size != "desktop"
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.run("window.isOld = true")
        self.driver.get(page.as_uri())
        self.wait_for("return !window.isOld && document.readyState === 'complete'")

    def wait_for(self, script: str, *args: Any) -> None:
        """Waits until a script returns true; if a machine is busy, that takes its time."""
        WebDriverWait(self.driver, 30).until(lambda _: self.run(script, *args))

    def run(self, script: str, *args: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *args)

    def all(self, selector: str) -> list[WebElement]:
        """Elements by a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The only one."""
        (found,) = self.all(selector)
        return found

    def ids(self) -> list[str]:
        """The utterances that are shown, in order."""
        return [element.text for element in self.all("#table tbody tr .name")]

    def requests(self) -> list[str]:
        """The URLs that have been asked for."""
        events = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report of a run, some of whose texts try to become a part of it."""
    pairs = PAIRS | {f"evil {EVIL}": (EVIL, f"heard {EVIL}")}
    run = make_run(tmp_path_factory.mktemp("run") / EVIL.split("/")[0], pairs=pairs)
    return Path(str(write_report([str(run)], out=None, sources=())))


@pytest.fixture(scope="module")
def page_of_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = [str(make_run(folder / name, seed=seed)) for seed, name in enumerate(("one", "two"))]
    return Path(str(write_report(runs, out=str(folder / "both.html"), sources=())))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["page", "page_of_two"])
def test_the_page_fits_the_window_and_is_silent_and_needs_no_network(browser, request, name, size):
    browser.open(request.getfixturevalue(name), size)
    whole, seen = browser.run(
        "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]"
    )
    assert whole == seen >= SIZES[size][0] - 20  # without the bar that scrolls it
    assert len(browser.all("#charts .main-svg")) >= 10
    assert browser.driver.get_log("browser") == []
    requests = browser.requests()
    assert requests and {url.split(":")[0] for url in requests} <= {"file", "data"}


def test_texts_of_users_stay_texts(browser, page):
    browser.open(page)
    assert browser.run("return window.isHacked") is None
    assert not browser.all("img")
    assert any(EVIL in name for name in browser.ids())
    assert EVIL.split("/")[0] in browser.one("h1").text


def test_a_clip_plays(browser, page):
    browser.open(page)
    clips = browser.all("#table audio")
    assert len(clips) == len(PAIRS) + 1
    assert clips[0].get_attribute("aria-label") == "Clip of " + browser.ids()[0]
    browser.run("arguments[0].play()", clips[0])
    browser.wait_for("return arguments[0].currentTime > 0.2", clips[0])
    assert 1.4 < browser.run("return arguments[0].duration", clips[0]) < 1.7
    browser.run("arguments[0].play()", clips[1])  # one at a time
    browser.wait_for("return arguments[0].paused", clips[0])
    assert browser.driver.get_log("browser") == []


def test_the_worst_come_first_and_keys_sort_the_table(browser, page):
    browser.open(page)
    errors = [int(cell.text) for cell in browser.all("#table tbody tr td:first-child")]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0
    button = next(b for b in browser.all("#table thead button") if b.text.startswith("Utterance"))
    button.send_keys(Keys.ENTER)
    assert browser.ids()[:4] == ["dev/0", "dev/1", "dev/2", "dev/10"]  # as numbers
    header = button.find_element(By.XPATH, "..")
    assert header.get_attribute("aria-sort") == "ascending"
    button.send_keys(Keys.SPACE)
    assert browser.ids()[-4:] == ["dev/10", "dev/2", "dev/1", "dev/0"]
    assert header.get_attribute("aria-sort") == "descending"
    sorted_by = [h.get_attribute("aria-sort") for h in browser.all("#table thead [aria-sort]")]
    assert sorted_by.count("none") == len(sorted_by) - 1


def test_the_table_is_filtered(browser, page):
    browser.open(page)
    browser.one("#filters [name=text]").send_keys("WINDOW open")
    assert browser.ids() == ["dev/10"]
    assert browser.one("#shown").text == "1 of 5 utterances"
    browser.one("#filters [name=text]").clear()
    browser.one("#filters [name=wrong]").click()
    assert "dev/0" not in browser.ids() and len(browser.ids()) == 4


def test_differences_are_marked(browser, page):
    browser.open(page)
    browser.one("#filters [name=text]").send_keys("dev/1")
    marked = {tag: [e.text for e in browser.all(f"#table {tag}")] for tag in ("mark", "del", "ins")}
    assert marked == {"mark": ["left", "right", "window", "door"], "del": ["on"], "ins": ["now"]}


def test_curves_lie_over_steps_or_hours(browser, page):
    browser.open(page)
    get = """
    const plot = document.querySelector("#charts .plot");
    return [plot.data[1].x.at(-1), plot.layout.xaxis.title.text, plot.layout.yaxis.type];
    """
    assert browser.run(get) == [40, "step", "log"]
    browser.one("#axes [value=hours]").click()
    assert browser.run(get) == [5, "hours of audio", "log"]
    browser.one("#axes [value=linear]").click()
    assert browser.run(get) == [5, "hours of audio", "linear"]


def test_runs_and_curves_can_be_hidden(browser, page_of_two):
    browser.open(page_of_two)
    shown = 'return document.querySelector("#charts .plot").data.map((line) => line.name)'
    both = browser.run(shown)
    assert both == [
        f"{run}, {curve}"
        for run in ("one", "two")
        for curve in ("CTC warm start", "training", "dev")
    ]
    browser.all("#axes [name=run]")[0].click()
    assert browser.run(shown) == both[3:]
    button = browser.all("#charts .legend button")[1]
    button.send_keys(Keys.ENTER)
    assert browser.run(shown) == ["two, CTC warm start", "two, dev"]
    assert button.get_attribute("aria-pressed") == "false"


def test_options_that_differ_are_shown_alone(browser, page_of_two):
    browser.open(page_of_two)
    rows = [row for row in browser.all("#options-table tbody tr") if row.is_displayed()]
    assert [row.text.split()[0] for row in rows] == ["--out", "--data.eval", "--seed"]
    browser.one("#options-filter input").click()
    assert len([row for row in browser.all("#options-table tbody tr") if row.is_displayed()]) > 20
