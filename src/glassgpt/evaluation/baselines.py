"""Published results of GPT-2 and GPT-3, shown next to one's own for the same data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A model's scores on the 10,042 validation items of HellaSwag; None: not published."""

    model: str
    style: str
    acc: float | None
    acc_norm: float
    source: str


_SCRIPT = "build-nanogpt, hellaswag.py"
_NOTEBOOK = "build-nanogpt, play.ipynb"
PUBLISHED = (
    Published("GPT-2 124M", "build-nanogpt", 0.2859, 0.2955, _SCRIPT),
    Published("GPT-2 350M", "build-nanogpt", None, 0.375224, _NOTEBOOK),
    Published("GPT-2 774M", "build-nanogpt", None, 0.431986, _NOTEBOOK),
    Published("GPT-2 1558M", "build-nanogpt", 0.3842, 0.4893, _SCRIPT),
    Published("GPT-2 124M", "lm-eval", 0.2892, 0.3114, _SCRIPT),
    Published("GPT-2 1558M", "lm-eval", 0.4004, 0.5089, _SCRIPT),
    # Scored in OpenAI's own style; the notebook plots them next to build-nanogpt's.
    Published("GPT-3 124M", "GPT-3 paper", None, 0.337, _NOTEBOOK),
    Published("GPT-3 350M", "GPT-3 paper", None, 0.436, _NOTEBOOK),
    Published("GPT-3 774M", "GPT-3 paper", None, 0.510, _NOTEBOOK),
    Published("GPT-3 1558M", "GPT-3 paper", None, 0.547, _NOTEBOOK),
)

GPT2_FINEWEB_LOSS = 3.2924
"""FineWeb-Edu validation loss of GPT-2 124M in nats per token, as plotted in build-nanogpt's play.ipynb."""
