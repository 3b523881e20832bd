"""Probe features with labels behind one interface: fit, predict, score; :func:`run_probe` makes a whole table."""

from dvt.analysis.probes.classification import KnnClassification, LinearClassification
from dvt.analysis.probes.correspondence import Correspondence, WarpConfig
from dvt.analysis.probes.datasets import LabelledData
from dvt.analysis.probes.depth import DepthProbe
from dvt.analysis.probes.discovery import Lost, TokenCut
from dvt.analysis.probes.probe import HeadConfig, Probe
from dvt.analysis.probes.protocol import ProbeConfig, prepare, run_probe
from dvt.analysis.probes.segmentation import KnnSegmentation, LinearSegmentation
from dvt.analysis.probes.table import ProbeReport

__all__ = [
    "Correspondence",
    "DepthProbe",
    "HeadConfig",
    "KnnClassification",
    "KnnSegmentation",
    "LabelledData",
    "LinearClassification",
    "LinearSegmentation",
    "Lost",
    "Probe",
    "ProbeConfig",
    "ProbeReport",
    "TokenCut",
    "WarpConfig",
    "prepare",
    "run_probe",
]
