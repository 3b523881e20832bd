# The names that `dvt.fields` offers; loaded when first used (lazy_loader), and read by type checkers.
from .config import LinearConfig as LinearConfig
from .config import NeuralConfig as NeuralConfig
from .config import ShiftConfig as ShiftConfig
from .decomposition import Decomposition as Decomposition
from .decomposition import Fit as Fit
from .linear import LinearFit as LinearFit
from .linear import LinearSolver as LinearSolver
from .neural import NeuralFit as NeuralFit
from .neural import NeuralSolver as NeuralSolver
from .shifts import ShiftFit as ShiftFit
from .shifts import ShiftSolver as ShiftSolver
