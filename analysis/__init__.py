"""Measure what features hold: artifact metrics, the pictures that show them, label-based probes.

Everything here is light to import: plotting and learning libraries are loaded by the functions that use them.
"""

from dvt.analysis.analyze import AnalyzeConfig, analyze
from dvt.analysis.doctor import Diagnosis, DoctorConfig, diagnose
from dvt.analysis.metrics import (
    BlankResponse,
    NormOutliers,
    ShiftStability,
    blank_response,
    grid_peak,
    norm_outliers,
    pooled_position_mic,
    position_decodability,
    position_mic,
    shift_stability,
)
from dvt.analysis.metrics.information import mic
from dvt.analysis.metrics.nulls import Score, matched_noise, shuffled, torus_shifted, with_null
from dvt.analysis.metrics.positions import PositionMeans, PositionShare, torus_windows
from dvt.analysis.metrics.scores import METRICS, Row
from dvt.analysis.pictures import choose_points, decomposition_figure, pca_colours, save, similarity
from dvt.analysis.results import Report

__all__ = [
    "METRICS",
    "AnalyzeConfig",
    "BlankResponse",
    "Diagnosis",
    "DoctorConfig",
    "NormOutliers",
    "PositionMeans",
    "PositionShare",
    "Report",
    "Row",
    "Score",
    "ShiftStability",
    "analyze",
    "blank_response",
    "choose_points",
    "decomposition_figure",
    "diagnose",
    "grid_peak",
    "matched_noise",
    "mic",
    "norm_outliers",
    "pca_colours",
    "pooled_position_mic",
    "position_decodability",
    "position_mic",
    "save",
    "shift_stability",
    "shuffled",
    "similarity",
    "torus_shifted",
    "torus_windows",
    "with_null",
]
