"""A text whose tokens are coloured by a value."""

from collections.abc import Sequence
from typing import Any

from glassgpt.figures.cells import SMALL, fill, shares
from glassgpt.figures.svg import FONT, SIZE, Figure, attribute_of, number_text, text_of, vector
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import escape_token

_TOKEN = "padding:1px 3px;border-radius:3px;text-align:center;font-family:ui-monospace,monospace"


def tokens(texts: Sequence[str], values: Any, *, title: str = "", signed: bool = False, form: str = ".2f") -> Figure:
    """Draw a text's tokens (N) in lines that wrap, coloured by their values (N,), with the values below them.

    Spaces, newlines and other invisible characters become visible. A value that is not finite is shown as –, without
    colour. Raises `UserError` if the numbers of tokens and values differ.
    """
    numbers = vector(values, "the values of tokens")
    if len(numbers) != len(texts):
        raise UserError(f"there are {len(texts)} tokens and {len(numbers)} values; give one value per token")
    strengths, _, _ = shares(numbers, signed)
    triples = zip(texts, numbers.tolist(), strengths.tolist(), strict=True)
    items = "".join(_token(visible(str(text)), value, strength, form) for text, value, strength in triples)
    head = f'<div style="font-weight:bold;font-size:15px;margin-bottom:4px">{text_of(title)}</div>' if title else ""
    row = f'<div style="display:flex;flex-wrap:wrap;gap:3px 2px">{items}</div>'
    style = f"font-family:{FONT};font-size:{SIZE}px;line-height:1.3"
    name = attribute_of(title or "Tokens with values")
    return Figure(f'<div role="group" aria-label={name} style="{style}">{head}{row}</div>')


def visible(token: str) -> str:
    """A token's text in display form (see `escape_token`)."""
    return escape_token(token.encode("utf-8", "surrogatepass"))


def _token(text: str, value: float, strength: float, form: str) -> str:
    color = fill(strength)
    red, green, blue = (int(str(color["fill"])[i : i + 2], 16) for i in (1, 3, 5))
    background = f"background:rgb({red} {green} {blue} / {color['fill_opacity']})"
    below = f'<span style="display:block;font-size:{SMALL - 1}px">{text_of(number_text(value, form))}</span>'
    tip = attribute_of(f"{text}: {value:.6g}")
    return f'<span title={tip} style="{_TOKEN};{background}">{text_of(text)}{below}</span>'
