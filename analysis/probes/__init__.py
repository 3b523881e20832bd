"""Probe features with labels behind one interface: fit, predict, score; :func:`run_probe` makes a whole table."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvt.analysis.probes.classification import KnnClassification as KnnClassification
    from dvt.analysis.probes.classification import LinearClassification as LinearClassification
    from dvt.analysis.probes.correspondence import Correspondence as Correspondence
    from dvt.analysis.probes.correspondence import WarpConfig as WarpConfig
    from dvt.analysis.probes.depth import DepthProbe as DepthProbe
    from dvt.analysis.probes.discovery import Lost as Lost
    from dvt.analysis.probes.discovery import TokenCut as TokenCut
    from dvt.analysis.probes.probe import HeadConfig as HeadConfig
    from dvt.analysis.probes.probe import Probe as Probe
    from dvt.analysis.probes.protocol import ProbeConfig as ProbeConfig
    from dvt.analysis.probes.protocol import prepare as prepare
    from dvt.analysis.probes.protocol import run_probe as run_probe
    from dvt.analysis.probes.segmentation import KnnSegmentation as KnnSegmentation
    from dvt.analysis.probes.segmentation import LinearSegmentation as LinearSegmentation
    from dvt.analysis.probes.table import ProbeReport as ProbeReport

# Loaded when first asked for, so that importing one probe does not load the others.
_HOME = {
    "Correspondence": "correspondence",
    "DepthProbe": "depth",
    "HeadConfig": "probe",
    "KnnClassification": "classification",
    "KnnSegmentation": "segmentation",
    "LinearClassification": "classification",
    "LinearSegmentation": "segmentation",
    "Lost": "discovery",
    "Probe": "probe",
    "ProbeConfig": "protocol",
    "ProbeReport": "table",
    "TokenCut": "discovery",
    "WarpConfig": "correspondence",
    "prepare": "protocol",
    "run_probe": "protocol",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dvt.analysis.probes' has no attribute {name!r}")
    value = getattr(import_module(f"dvt.analysis.probes.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
