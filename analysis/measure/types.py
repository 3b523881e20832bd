"""Define the types of an analysis's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from dvt.tokens import Tokens

if TYPE_CHECKING:
    from dvt.backbones import Backbone
    from dvt.store import FeatureStore

#: A function of the raw tokens, or another backbone of the same images.
DenoiserLike: TypeAlias = "Callable[[Tokens], Tokens] | Backbone"
Decompose = Callable[[Tensor], Mapping[str, Tensor]]
TermSource: TypeAlias = "FeatureStore | Decompose | None"
