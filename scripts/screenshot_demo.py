#!/usr/bin/env python
"""Take the screenshots of the web demo for the documentation, on a wide screen and on a phone. Needs playwright and Chromium

python scripts/screenshot_demo.py --prompt "a noto emoji of a red apple" --seed 3
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from diffusers_imagen.commands.parser import Parser, check_numbers
from diffusers_imagen.utils.errors import run_to_exit_code
from diffusers_imagen.utils.files import check_writable, whole_file
from diffusers_imagen.utils.packages import require_packages


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# width and height of the window
WINDOWS = {"web-demo.png": (1280, 800), "web-demo-phone.png": (390, 844)}
PATIENCE = 300_000  # in ms: maximum time of a drawing


def find_browser() -> str:
    """Return the path of Chromium; raise ValueError if it is not installed."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise ValueError(f"No browser was found, of {', '.join(BROWSERS)}: on Debian, apt install chromium.")
    return path


def take_screenshot(browser, url: str, size: tuple[int, int], prompt: str, seed: int, path: Path) -> None:
    """Generate an image on the page, in a window of a size, and write a screenshot."""
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=width < height)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.get_by_label("Prompt", exact=True).first.fill(prompt)
    page.get_by_label("Random seed").first.uncheck()
    page.get_by_label("Seed", exact=True).first.fill(str(seed))
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Done in ").locator("visible=true").first.wait_for()
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.mouse.move(0, 0)
    page.wait_for_load_state("networkidle")
    with whole_file(path) as partial:
        page.screenshot(path=partial, type="png")
    context.close()


def main() -> None:
    """Serve the page, and write both screenshots."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", default="a noto emoji of a red apple", help="default: %(default)s")
    parser.add_number("--seed", int, 0, 2**31 - 1, default=3, help="default: %(default)s")
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="default: %(default)s")
    args = parser.parse_args()
    check_numbers(args)
    require_packages("this script", "demo", "gradio")
    require_packages("this script", "browser", "playwright")
    path = find_browser()
    for name in WINDOWS:
        check_writable(args.output_dir / name, "output_dir")

    from playwright.sync_api import sync_playwright

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported

        from diffusers_imagen import ImagenCascadePipeline
        from diffusers_imagen.commands import webdemo

        pipe = ImagenCascadePipeline.from_pretrained("imagen-emoji")
        page = webdemo.build(pipe, {"model": "imagen-emoji"})
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **webdemo.LOOK)
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, size in WINDOWS.items():
            take_screenshot(browser, url, size, args.prompt, args.seed, args.output_dir / name)
            print(args.output_dir / name)
        browser.close()
        page.close()


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "screenshot_demo.py"))
