"""One image: its features as a semantic field, an artifact and a residual."""

from dvt.fields.decomposition import Decomposition, Fit
from dvt.fields.linear import LinearConfig, LinearFit, LinearSolver
from dvt.fields.neural import NeuralConfig, NeuralFit, NeuralSolver
from dvt.fields.shifts import ShiftConfig, ShiftFit, ShiftSolver

__all__ = [
    "Decomposition",
    "Fit",
    "LinearConfig",
    "LinearFit",
    "LinearSolver",
    "NeuralConfig",
    "NeuralFit",
    "NeuralSolver",
    "ShiftConfig",
    "ShiftFit",
    "ShiftSolver",
]
