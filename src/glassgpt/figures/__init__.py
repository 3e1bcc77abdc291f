"""Figures as inline SVG, for lessons, notebooks and documentation. They load nothing and need no script."""

from glassgpt.figures.charts import bars as bars
from glassgpt.figures.charts import lines as lines
from glassgpt.figures.heatmaps import heatmap as heatmap
from glassgpt.figures.heatmaps import heatmap_grid as heatmap_grid
from glassgpt.figures.svg import Figure as Figure
from glassgpt.figures.svg import side_by_side as side_by_side
from glassgpt.figures.token_row import tokens as tokens

__all__ = ["Figure", "bars", "heatmap", "heatmap_grid", "lines", "side_by_side", "tokens"]
