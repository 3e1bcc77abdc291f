"""One run, or several compared, as one HTML file that opens from the disk, with no network: charts, summary, samples, config.

It only reads the runs' files, so it may be written at any moment: before the first step, during training, after a kill.
"""

from glassgpt.report.page import script_json, write_report
from glassgpt.report.series import MAX_POINTS, smoothed, thinned

__all__ = ["MAX_POINTS", "script_json", "smoothed", "thinned", "write_report"]
