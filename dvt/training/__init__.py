"""Train any model: AdamW, warm-up and cosine, averaged weights, checkpoints that a killed run continues exactly.

It runs through accelerate: started by ``accelerate launch`` or ``torchrun`` it takes as many processes as there are,
and the global batch, the schedule and the order of the data stay what they are with one. A run's folder holds

    step-00001000/   model.safetensors, ema.safetensors, optimizer.safetensors, state.json: whole, or not there
    log.csv          a row each `log_every` steps: step, lr, losses, and what `validate` measured

Nothing in a step depends on the steps before it, except through the weights and the optimizer's moments: batches are a
function of the step, and so is the seed of whatever draws random numbers inside the model. So a run that is killed
at any moment ends with the weights, bit by bit, that it would have had (on one device, with the same processes).
"""

from dvt.training.config import TrainingConfig, flat_settings
from dvt.training.data import epoch_indices, hold_out, sides_digest
from dvt.training.log import LogRow
from dvt.training.loop import Batches, LossFunction, Trained, train
from dvt.training.processes import is_first_process

__all__ = [
    "Batches",
    "LogRow",
    "LossFunction",
    "Trained",
    "TrainingConfig",
    "epoch_indices",
    "flat_settings",
    "hold_out",
    "is_first_process",
    "sides_digest",
    "train",
]
