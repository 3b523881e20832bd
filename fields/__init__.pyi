# The names that `dvt.fields` offers; loaded when first used (lazy_loader), and read by type checkers.
from .decomposition import Decomposition as Decomposition
from .decomposition import Fit as Fit
from .linear import LinearConfig as LinearConfig
from .linear import LinearFit as LinearFit
from .linear import LinearSolver as LinearSolver
from .neural import NeuralConfig as NeuralConfig
from .neural import NeuralFit as NeuralFit
from .neural import NeuralSolver as NeuralSolver
from .shifts import ShiftConfig as ShiftConfig
from .shifts import ShiftFit as ShiftFit
from .shifts import ShiftSolver as ShiftSolver
