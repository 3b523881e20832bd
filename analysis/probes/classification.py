"""Classify whole images from their mean patch token: a linear classifier and nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvt.analysis.probes.probe import Maps, Probe, check_maps, fitted
from dvt.analysis.probes.segmentation import check_labels, class_counts, count_scores
from dvt.errors import ConfigError, DataError, ShapeError
from dvt.grids import Size


class ClassificationProbe(Probe):
    """Predict the class of an image from the mean of its patch tokens.

    The class token is not used, because denoisers of patches do not change it. Targets are class indices of shape ();
    an image of class IGNORE does not count.

    Args:
        num_classes: K.
    """

    metric = "accuracy"

    def __init__(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ConfigError(f"the number of classes is {num_classes}; it must be 2 or more")
        self.num_classes = num_classes
        self.model: Any = None

    def make(self, images: int) -> Any:
        """Make a scikit-learn classifier for a number of training images."""
        raise NotImplementedError

    def fit(self, tokens: Maps, targets: Sequence[Tensor]) -> ClassificationProbe:
        check_maps(tokens, targets, rank=0)
        check_labels(targets, self.num_classes)
        classes = np.array([int(target) for target in targets])
        known = classes >= 0
        if len(set(classes[known])) < 2:
            raise DataError(f"all training images are of class {classes[known][0]}; a classifier needs two classes")
        self.model = self.make(int(known.sum())).fit(_vectors(tokens)[known], classes[known])
        return self

    def predict(self, tokens: Maps, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """Predict the class of each image, () int64; `sizes` is ignored."""
        model, vectors = fitted(self.model, self), _vectors(tokens)
        if vectors.shape[1] != model.n_features_in_:
            raise ShapeError(
                f"tokens have {vectors.shape[1]} channels; this probe was fitted on {model.n_features_in_}"
            )
        return list(torch.from_numpy(model.predict(vectors)))

    def sufficient_statistics(self, tokens: Maps, targets: Sequence[Tensor]) -> Tensor:
        """Mark for each image and class, (N, K, 3): rightly predicted, the true class, the predicted class."""
        check_maps(tokens, targets, rank=0)
        pairs = zip(self.predict(tokens), targets, strict=True)
        return torch.stack([class_counts(found[None], target[None], self.num_classes) for found, target in pairs])

    @staticmethod
    def summarise(statistics: Tensor) -> dict[str, Tensor]:
        """Compute the accuracy, and the mean accuracy of the classes in the truth; both in [0, 1]."""
        scores = count_scores(statistics)
        return {"accuracy": scores["aAcc"], "class accuracy": scores["mAcc"]}


class LinearClassification(ClassificationProbe):
    """Classify by logistic regression on standardised mean tokens.

    Args:
        num_classes: K.
        strength: strength of the squared penalty on the weights; 1 / C in scikit-learn.
    """

    def __init__(self, num_classes: int, strength: float = 1.0) -> None:
        super().__init__(num_classes)
        if strength <= 0:
            raise ConfigError(f"strength is {strength}; it must be positive")
        self.strength = strength

    def make(self, images: int) -> Any:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return make_pipeline(StandardScaler(), LogisticRegression(C=1 / self.strength, max_iter=2000))


class KnnClassification(ClassificationProbe):
    """Classify by the vote of the nearest training images, by the cosine of mean tokens.

    Args:
        num_classes: K.
        neighbours: number of images that vote; all images vote if there are fewer.
    """

    def __init__(self, num_classes: int, neighbours: int = 20) -> None:
        super().__init__(num_classes)
        if neighbours < 1:
            raise ConfigError(f"neighbours is {neighbours}; it must be 1 or more")
        self.neighbours = neighbours

    def make(self, images: int) -> Any:
        from sklearn.neighbors import KNeighborsClassifier

        return KNeighborsClassifier(min(self.neighbours, images), metric="cosine")


def _vectors(tokens: Maps) -> np.ndarray:
    """Average the tokens of each image: (N, C)."""
    return torch.stack([tokens[i].float().mean((0, 1)) for i in range(len(tokens))]).cpu().numpy()
