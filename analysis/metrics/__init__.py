"""Measure artifacts without labels; each metric has a null."""

from dvt.analysis.metrics.artifacts import (
    NormOutliers,
    ShiftStability,
    grid_peak,
    grid_powers,
    log_norm_outliers,
    norm_outliers,
    peak_of,
    pooled_position_mic,
    position_decodability,
    position_errors,
    position_mic,
    position_mics,
    shift_stability,
    shifted_windows,
    stability_of,
)
from dvt.analysis.metrics.blank import BlankResponse, blank_correlation, blank_energy, blank_response

__all__ = [
    "BlankResponse",
    "NormOutliers",
    "ShiftStability",
    "blank_correlation",
    "blank_energy",
    "blank_response",
    "grid_peak",
    "grid_powers",
    "log_norm_outliers",
    "norm_outliers",
    "peak_of",
    "pooled_position_mic",
    "position_decodability",
    "position_errors",
    "position_mic",
    "position_mics",
    "shift_stability",
    "shifted_windows",
    "stability_of",
]
