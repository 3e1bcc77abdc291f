"""Markdown from plain text."""

import re


def escaped(text: str) -> str:
    """Return Markdown that reads as this text. What is between backticks is code, and so are the names of options."""
    parts = re.split(r"(`[^`]+`)|(?<![\w-])(--[a-z][\w.-]*\w)", text)  # text, code, option, text, ...
    for number, part in enumerate(parts):
        kind = number % 3
        if part and kind != 1:
            parts[number] = f"`{part}`" if kind == 2 else re.sub(r"([\\*_\[\]<>$#|~{}])", r"\\\1", part)
    return "".join(part or "" for part in parts)


def fence(name: str, argument: str = "", body: str = "") -> str:
    """Return a directive of MyST or a block of code, if the name is that of a language."""
    return f"```{name} {argument}".rstrip() + f"\n{body}\n```\n"
