"""How long the playground takes with GPT-2 small, in a real Chromium: from a user's action to the painted result.

    python benchmarks/play.py --rounds 5

The model has random weights and GPT-2's vocabulary; server and browser share the machine. Each round uses a new
browser context with an empty cache, and new texts. Prints a Markdown table, and exits with 1 if a median misses its
target. Needs Playwright, Debian's Chromium, and GPT-2's vocabulary files as `--data.tokenizer gpt2` does.
"""

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import Browser, Page, sync_playwright

from glassgpt import GPT, ModelConfig
from glassgpt.interop.hf_models import export_hf
from glassgpt.tokenizers.builtin import Tokenizer, gpt2_tokenizer
from glassgpt.utils.device import cpu_name

# What is timed, with its target in seconds.
TARGETS: dict[str, float | None] = {
    "the server's start to its address": None,
    "the server's start to the model loaded": None,
    "page opened to its first view shown": 3.0,
    "a new text of 64 tokens to the thumbnails of all heads": 1.5,
    "a key pressed to another head's matrix, 64 tokens": 0.1,
    "a new text of 1,024 tokens to the thumbnails of all heads": None,
    "a key pressed to another head's matrix, 1,024 tokens": None,
}
HEADS_WALKED = 8
# Seconds from a key press in the grid of heads until the facts and the matrix of another head are painted.
WALK = """async () => {
  const facts = document.querySelector('[data-test=head-facts]'), before = facts.textContent, begin = performance.now();
  document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
  while (facts.textContent === before) await new Promise(requestAnimationFrame);
  await new Promise(requestAnimationFrame);
  return (performance.now() - begin) / 1000;
}"""


def text_of(tokenizer: Tokenizer, tokens: int, seed: int) -> str:
    """Random words with this many tokens in all."""
    draw = random.Random(seed)
    vocabulary = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    words = [piece for piece in vocabulary if piece.startswith(" ") and piece[1:].isalpha() and piece.isascii()]
    text = "".join(draw.choices(words, k=tokens))  # a word that starts with a space never merges with the one before
    assert len(tokenizer.encode(text)) == tokens
    return text


@contextmanager
def playing(model: Path) -> Iterator[tuple[str, float]]:
    """Run `glassgpt play`; yields the printed address and the start time."""
    command = [sys.executable, "-m", "glassgpt", "play", str(model), "--no-browser"]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = re.search(r"http://\S+", server.stdout.readline())
        assert address
        try:
            yield address[0], begin
        finally:
            server.terminate()


def wait_for_model(address: str) -> None:
    """Wait until the model is loaded."""
    url, _, token = address.partition("#token=")
    headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
    urllib.request.urlopen(urllib.request.Request(f"{url}api/model", b'{"model": 0}', headers)).read()


def one_round(browser: Browser, address: str, texts: dict[int, str], seconds: dict[str, list[float]]) -> None:
    """Open the page, look at the heads of a text of each length, and walk through some of them."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(120_000)
    begin = time.perf_counter()
    page.goto(address)
    shown(page, "text")
    seconds["page opened to its first view shown"].append(time.perf_counter() - begin)
    for tokens, text in texts.items():
        begin = time.perf_counter()
        page.evaluate(
            "hash => { delete document.body.dataset.ready; location.hash = hash; }",
            urlencode({"view": "heads", "text": text}),
        )
        shown(page, "heads")
        seconds[f"a new text of {tokens:,} tokens to the thumbnails of all heads"].append(time.perf_counter() - begin)
        page.focus("[data-test=head-grid]")
        seconds[f"a key pressed to another head's matrix, {tokens:,} tokens"] += [
            page.evaluate(WALK) for _ in range(HEADS_WALKED)
        ]
    context.close()


def shown(page: Page, view: str) -> None:
    """Wait until a view is shown and painted."""
    page.wait_for_selector(f'body[data-ready="{view}"]')
    page.evaluate("() => new Promise(requestAnimationFrame)")


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("chromium is not installed: apt-get install chromium")
    tokenizer = gpt2_tokenizer()
    seconds: dict[str, list[float]] = {name: [] for name in TARGETS}
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        shape = ModelConfig(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, n_embd=768)
        export_hf(GPT.create(shape, seed=0), tokenizer, Path(scratch) / "model")
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        for number in range(1 + options.rounds):
            with playing(Path(scratch) / "model") as (address, begin):
                seconds["the server's start to its address"].append(time.perf_counter() - begin)
                wait_for_model(address)
                seconds["the server's start to the model loaded"].append(time.perf_counter() - begin)
                one_round(
                    browser, address, {size: text_of(tokenizer, size, 10 * number) for size in (64, 1024)}, seconds
                )
            if number == 0:  # files and Chromium's own start
                seconds = {name: [] for name in TARGETS}
        browser.close()
    machine = f"{cpu_name()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}"
    print(f"{machine}, {options.rounds} rounds after a warm-up round\n")
    print("| from … to … | s, median (fastest – slowest) | target |\n| --- | --- | --- |")
    missed = 0
    for name, times in seconds.items():
        median, target = statistics.median(times), TARGETS[name]
        missed += target is not None and median > target
        result = "" if target is None else f"{target:g}: {'met' if median <= target else 'missed'}"
        print(f"| {name} | {median:.3f} ({min(times):.3f} – {max(times):.3f}) | {result} |")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
