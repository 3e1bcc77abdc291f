"""Figures as inline SVG, for lessons and notebooks."""

from glassgpt.figures.charts import bars as bars
from glassgpt.figures.charts import lines as lines
from glassgpt.figures.matrices import heatmap as heatmap
from glassgpt.figures.matrices import heatmap_grid as heatmap_grid
from glassgpt.figures.matrices import tokens as tokens
from glassgpt.figures.svg import Figure as Figure
from glassgpt.figures.svg import side_by_side as side_by_side

__all__ = ["Figure", "bars", "heatmap", "heatmap_grid", "lines", "side_by_side", "tokens"]
