"""Draw the README's picture of the report: the first screen of the page made from kept rows.

    gammabeta study judge results && python docs/picture.py     # or: make picture

Needs the packages of the extra "dev" and a Chromium.
"""

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from gammabeta.report import page

LIMIT = 200_000  # bytes
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def screen(html: Path, width: int, height: int) -> Image.Image:
    """The top of a page as a browser without network shows it."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        tab.goto(html.as_uri())
        tab.wait_for_selector("#theme:visible")
        found = Image.open(io.BytesIO(tab.screenshot()))
        browser.close()
    return found.convert("RGB")


def packed(picture: Image.Image) -> bytes:
    """A PNG under the limit, with as many colors as fit."""
    for colors in (256, 128, 64, 32, 16):
        file = io.BytesIO()
        picture.quantize(colors, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() <= LIMIT:
            return file.getvalue()
    raise SystemExit(f"The picture does not fit {LIMIT:,} bytes. Make it smaller: --height.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("results")])
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/report.png"))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        html = page.write(given.runs, Path(folder) / "report.html")
        given.out.write_bytes(packed(screen(html, given.width, given.height)))


if __name__ == "__main__":
    main()
