"""A parser of the report's page that shares no code with the package."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs


class Page(HTMLParser):
    """The parsed page: its tags with attributes, and the texts by tag."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open = ""
        self.feed(path.read_bytes().decode().replace(get_plotlyjs(), "/* plotly */"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open][-1] += data

    @property
    def charts(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the charts' traces by chart title and trace name."""
        charts = json.loads(self.texts["script"][0])
        return {chart["title"]: {trace["name"]: trace for trace in chart["traces"]} for chart in charts}
