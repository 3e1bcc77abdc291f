"""Take the screenshots of the playground in the README and docs/ from a run.

    python benchmarks/screenshots.py runs/demo                 # a run with snapshots, such as one of the recipe `demo`

Writes play-VIEW.png, 1280 pixels wide, and play-phone.png into docs/images/. Needs Playwright and Debian's Chromium.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import Browser, sync_playwright

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "images"
TEXT = "The function returns the number of bytes. The function "
# For each view: its state, color scheme and height. A screenshot shows the top of the view.
DESKTOP: dict[str, tuple[dict[str, str], str, int]] = {
    "model": ({"layer": "1"}, "light", 1300),
    "text": ({"position": "8"}, "light", 720),
    "heads": ({"layer": "1", "head": "1"}, "light", 1000),
    "neurons": ({"layer": "1", "neuron": "229", "search": "on"}, "light", 1760),
    "lens": ({}, "dark", 1000),
    "interventions": ({"ablate": "h1.1,f2"}, "light", 1000),
    "generation": ({"temperature": "0.8", "top_p": "0.9"}, "light", 1000),
    "weights": ({}, "dark", 900),
    "training": ({}, "light", 1000),
    "compare": ({"other_step": "240"}, "light", 1000),
}


def take(
    browser: Browser, address: str, state: dict[str, str], path: Path, *, width: int, height: int, scheme: str
) -> None:
    """Take a screenshot of the page in a state."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = context.new_page()
    page.goto(f"{address}&{urlencode(state)}")  # the address ends with #token=...
    page.wait_for_selector(f'body[data-ready="{state["view"]}"]', timeout=60_000)
    page.wait_for_timeout(3000)  # charts, whose library loads last
    page.screenshot(path=path)
    context.close()
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def main() -> None:
    """Take all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, default=PICTURES)
    parser.add_argument("--text", default=TEXT)
    options = parser.parse_args()
    command = [sys.executable, "-m", "glassgpt", "play", options.run, "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        address = re.search(r"http://\S+", server.stdout.readline())
        assert address
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        try:
            for view, (state, scheme, height) in DESKTOP.items():
                shown, path = {"view": view, "text": options.text, **state}, options.out / f"play-{view}.png"
                take(browser, address[0], shown, path, width=1280, height=height, scheme=scheme)
            heads = {"view": "heads", "text": options.text, "layer": "1", "head": "1"}
            take(browser, address[0], heads, options.out / "play-phone.png", width=390, height=844, scheme="light")
        finally:
            browser.close()
            server.terminate()


if __name__ == "__main__":
    main()
