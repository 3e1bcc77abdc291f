"""The public names of the package with their summaries."""

from markup import escaped

import glassgpt


def names() -> str:
    """Return the Markdown of a table: each name of `glassgpt.__all__`, and the first line of its docstring."""
    lines = ["| name | what it is |", "| --- | --- |"]
    for name in glassgpt.__all__:
        summary = (getattr(glassgpt, name).__doc__ or "").splitlines()[0]
        lines.append(f"| {{py:obj}}`~glassgpt.{name}` | {escaped(summary)} |")
    return "\n".join(lines) + "\n"
