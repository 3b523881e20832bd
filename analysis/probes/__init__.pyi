# The names that `dvt.analysis.probes` offers; loaded when first used (lazy_loader), and read by type checkers.
from .classification import KnnClassification as KnnClassification
from .classification import LinearClassification as LinearClassification
from .correspondence import Correspondence as Correspondence
from .correspondence import WarpConfig as WarpConfig
from .datasets import LabelledData as LabelledData
from .depth import DepthProbe as DepthProbe
from .discovery import Lost as Lost
from .discovery import TokenCut as TokenCut
from .heads import SavedHead as SavedHead
from .probe import HeadConfig as HeadConfig
from .probe import Probe as Probe
from .protocol import ProbeConfig as ProbeConfig
from .protocol import prepare as prepare
from .protocol import run_probe as run_probe
from .segmentation import KnnSegmentation as KnnSegmentation
from .segmentation import LinearSegmentation as LinearSegmentation
from .table import ProbeReport as ProbeReport
