"""Make AdamW's parameter groups, and load its moments from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dvt.errors import ConfigError
from dvt.training.checkpoint import check_same
from dvt.training.config import TrainingConfig


def parameter_groups(
    model: nn.Module, groups: Sequence[Mapping[str, Any]] | None, config: TrainingConfig
) -> list[dict[str, Any]]:
    """Split each group into parameters with weight decay and those without (fewer than two dimensions).

    Args:
        model: the model to train.
        groups: as :func:`dvt.training.train` takes them.
        config: gives the weight decay of groups that have none.

    Raises:
        ConfigError: no parameter requires a gradient, or one that does is in no group or in two.
    """
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    given = groups if groups is not None else [{"params": [p for p in model.parameters() if p.requires_grad]}]
    found: list[dict[str, Any]] = []
    for group in given:
        parameters = [p for p in group["params"] if p.requires_grad]
        decay, scale = group.get("weight_decay", config.weight_decay), group.get("lr_scale", 1.0)
        for chosen, value in (
            ([p for p in parameters if p.ndim > 1], decay),
            ([p for p in parameters if p.ndim < 2], 0.0),
        ):
            if chosen:
                found.append({"params": chosen, "weight_decay": value, "lr_scale": scale})
    held = [id(p) for group in found for p in group["params"]]
    if missing := [name for key, name in trainable.items() if key not in held]:
        raise ConfigError(f"{len(missing)} parameters require a gradient but are in no group: {', '.join(missing[:4])}")
    if not held or len(set(held)) < len(held):
        raise ConfigError("no parameter requires a gradient" if not held else "a parameter is in two groups")
    return found


def load_moments(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """Load the optimizer's moments from a checkpoint's tensors, which are named NUMBER.NAME.

    Raises:
        ValueError: the tensors come from another model.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    # In torch's numbering of parameters. Those that never had a gradient have no moments.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state.items():
        parameter, step = parameters[index], torch.zeros(())
        check_same(values, {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
