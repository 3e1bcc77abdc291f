"""Generated HellaSwag items."""

import numpy as np

from glassgpt.evaluation.hellaswag_items import Item

WORDS = "a man is sitting on the roof and he starts pulling up [step] shingles, [title] looks at his dinner".split()


def some_items(count: int, longest: int = 8) -> list[Item]:
    """Return items of random words; their contexts and endings have 1 to `longest` words."""
    draw = np.random.default_rng(7)

    def text() -> str:
        return " ".join(draw.choice(WORDS, size=draw.integers(1, longest + 1)))

    return [
        Item(i, "Roof work", a, a, "", tuple(f"{text()} x" for _ in range(4)), int(draw.integers(4)))
        for i, a in enumerate(f"{text()} x" for _ in range(count))
    ]
