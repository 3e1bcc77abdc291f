"""Quality of the demo's samples: the share of words that occur in the corpus, and the longest copied run of characters.

    python benchmarks/demo.py runs/demo

Draws samples from a finished run of the `demo` recipe with the recipe's own settings, and checks the two promises: at
least 85 % of the words of three letters and more occur in the corpus, and no run of 40 characters is copied from it.
Exits with 1 if one of them is broken.
"""

import argparse
import re
import sys

import glassgpt as g
from glassgpt.data.dataset import open_dataset
from glassgpt.data.prepare import prepare
from glassgpt.interop.references import find_checkpoint

WORD = re.compile(r"[A-Za-z]{3,}")


def longest_copied(text: str, corpus: str) -> str:
    """The longest run of characters of `text` that occurs in `corpus`."""
    best = ""
    for start in range(len(text)):
        while start + len(best) < len(text) and text[start : start + len(best) + 1] in corpus:
            best = text[start : start + len(best) + 1]
    return best


def main() -> int:
    """Measure and print; the exit status says whether both promises hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run of the demo recipe")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--temperature", type=float, help="instead of the recipe's")
    arguments = parser.parse_args()
    config = find_checkpoint(arguments.run).config
    dataset = open_dataset(prepare(config.data))
    train, validation = dataset.train, dataset.validation
    corpus = dataset.tokenizer.decode(train.read(0, len(train))) + dataset.tokenizer.decode(
        validation.read(0, len(validation))
    )
    known = {word.lower() for word in WORD.findall(corpus)}
    model, tokenizer = g.load(arguments.run)
    temperature = arguments.temperature if arguments.temperature is not None else config.sample.temperature
    texts = [""] * arguments.samples
    for piece in g.generate(
        model, tokenizer, config.sample.prompt, max_new_tokens=1000, temperature=temperature, n=arguments.samples
    ):
        texts[piece.sample] += piece.text
    # The last word of a sample may be cut off in its middle.
    words = [word.lower() for text in texts for word in WORD.findall(text)[:-1]]
    share = sum(word in known for word in words) / len(words)
    copied = max((longest_copied(text, corpus) for text in texts), key=len)
    print(texts[0][:800])
    print(
        f"\ntemperature {temperature}: {share:.1%} of {len(words)} words of three letters and more occur in the corpus"
        " (at least 85 %)"
    )
    print(f"longest run copied from the corpus: {len(copied)} characters (below 40): {copied!r}")
    return 0 if share >= 0.85 and len(copied) < 40 else 1


if __name__ == "__main__":
    sys.exit(main())
