"""What features hold: artifact metrics and the pictures that show them.

Everything here is light to import: plotting and learning libraries are loaded by the functions that use them.
"""

from dvt.analysis.information import mic
from dvt.analysis.metrics import (
    BlankResponse,
    NormOutliers,
    ShiftStability,
    blank_response,
    grid_peak,
    norm_outliers,
    position_decodability,
    position_mic,
    shift_stability,
)
from dvt.analysis.nulls import Score, matched_noise, shuffled, with_null
from dvt.analysis.pictures import choose_points, decomposition_figure, pca_colours, save, similarity

__all__ = [
    "BlankResponse",
    "NormOutliers",
    "Score",
    "ShiftStability",
    "blank_response",
    "choose_points",
    "decomposition_figure",
    "grid_peak",
    "matched_noise",
    "mic",
    "norm_outliers",
    "pca_colours",
    "position_decodability",
    "position_mic",
    "save",
    "shift_stability",
    "shuffled",
    "similarity",
    "with_null",
]
