"""Takes the pictures of a demo run's report that are in the README and in docs/demo.md.

Needs Chromium and its driver (`apt-get install chromium chromium-driver`).

Example:

  python examples/demo/screenshot.py runs/demo/report.html docs/demo
"""

import argparse
import base64
import os
import shutil
import sys
from pathlib import Path

from selenium import webdriver

WIDTH = 1240
PICTURES = {  # the sections at whose top and bottom each begins and ends
    "report.png": ("header", "#charts figure:nth-child(3)"),
    "utterances.png": ("#utterances", "#table tbody tr:nth-child(6)"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="report.html of a run")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    driver_path = shutil.which("chromedriver")
    if driver_path is None:  # selenium would download one
        sys.exit("error: there is no chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    flags = ["--headless=new", "--hide-scrollbars", f"--window-size={WIDTH},1000"]
    flags += ["--no-sandbox"] * (os.geteuid() == 0)  # root has none
    for flag in flags:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    try:
        driver.get(args.report.resolve().as_uri())
        for name, (first, last) in PICTURES.items():
            (args.out / name).write_bytes(_picture(driver, first, last))
    finally:
        driver.quit()


def _picture(driver: webdriver.Chrome, first: str, last: str) -> bytes:
    top, bottom = driver.execute_script(
        """
        const [first, last] = [...arguments].map((name) =>
          document.querySelector(name).getBoundingClientRect());
        return [first.top + scrollY, last.bottom + scrollY];
        """,
        first,
        last,
    )
    clip = {"x": 0, "y": top, "width": WIDTH, "height": bottom - top + 8, "scale": 1}
    options = {"format": "png", "clip": clip, "captureBeyondViewport": True}
    return base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"])


if __name__ == "__main__":
    main()
