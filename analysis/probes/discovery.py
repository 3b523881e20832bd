"""Discover objects without labels by LOST and TokenCut: find one box per image from its tokens alone.

A fixed box in the middle of the picture is often right, so a score alone means little; :class:`DiscoveryProbe` also
scores fixed boxes. Boxes are (x0, y0, x1, y1) in [0, 1]^2 of the image; IoU is the same as in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.metrics.nulls import token_maps
from dvt.analysis.probes.probe import Maps, Probe, check_maps
from dvt.errors import ConfigError, ShapeError
from dvt.grids import Size
from dvt.tokens import Tokens

TRIVIAL_MARGINS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
"""Margins of the fixed centred boxes, as a share of each side; 0 is the whole image."""


def lost(tokens: Tensor, lowest: int = 100, centres: Tensor | None = None) -> Tensor:
    """Find the box of LOST in one token map.

    Two patches are connected if their inner product is not negative. The seed is the patch with the fewest connections
    (objects are smaller than backgrounds). Of the ``lowest`` patches with the fewest connections, those connected to
    the seed vote: the object consists of all patches whose inner products with the voters have a sum that is not
    negative. The box encloses the connected component (over edges, not corners) that holds the seed. In ties the first
    patch in reading order is taken, so if all tokens are equal, the box is the whole image.

    Args:
        tokens: (h, w, C). The paper takes the keys of the last attention layer; here any tokens are used unchanged. If
            all products are positive (tokens far from the origin), the box is the whole image: subtract their mean
            first, as :class:`Lost` does.
        lowest: k in the paper, at most the number of patches. The paper's grids have several hundred patches.
        centres: (h, w, 2) patch centres, if patches overlap; None means that the grid tiles the image.

    Returns:
        (4,) box in [0, 1], whole patches, on the CPU.

    Raises:
        ShapeError: the map is empty or not (h, w, C).
        NonFiniteError: a token is NaN or infinite.

    Source:
        Siméoni et al., Localizing Objects with Self-Supervised Transformers and no Labels, BMVC 2021, section 3.

    >>> tokens = -torch.ones(6, 8, 1)
    >>> tokens[1:4, 2:6] = 1
    >>> lost(tokens, lowest=5)
    tensor([0.2500, 0.1667, 0.7500, 0.6667])
    """
    if lowest < 1:
        raise ConfigError(f"lowest must be 1 patch or more, got {lowest}")
    features = _features(tokens)
    products = features @ features.T
    order = (products >= 0).sum(1).argsort(stable=True)
    seed, candidates = order[0], order[:lowest]
    voters = candidates[products[seed, candidates] >= 0]
    return _box_around(products[:, voters].sum(1) >= 0, int(seed), _places(tokens, centres))


def token_cut(tokens: Tensor, tau: float = 0.2, epsilon: float = 1e-5, centres: Tensor | None = None) -> Tensor:
    """Find the box of TokenCut in one token map, by a normalised cut.

    Two patches are connected with weight 1 if the cosine of their tokens is at least ``tau``, otherwise with
    ``epsilon``. The eigenvector of (D - W) y = lambda D y with the second smallest lambda is cut at its mean. The
    object is the side that holds the patch with the largest \\|y\\|, and the box encloses the connected component of
    that side (over edges, not corners) that holds this patch. If all weights are equal, the box is the whole image. A
    token of zeros has cosine 0 with all others.

    Args:
        tokens: (h, w, C). The paper takes the keys of the last attention layer; here any tokens are used unchanged;
            :class:`TokenCut` subtracts their mean first. Memory grows with the square and time with the
            cube of the number of patches.
        tau: threshold of the cosine, in [-1, 1]; the paper's is 0.2.
        epsilon: weight of patches below the threshold; it keeps the graph connected.
        centres: (h, w, 2) patch centres, if patches overlap; None means that the grid tiles the image.

    Returns and raises: as :func:`lost`.

    Source:
        Wang et al., Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut, CVPR 2022.

    >>> tokens = torch.eye(2)[0].repeat(6, 8, 1)
    >>> tokens[1:4, 2:6] = torch.eye(2)[1]
    >>> token_cut(tokens)
    tensor([0.2500, 0.1667, 0.7500, 0.6667])
    """
    if not -1 <= tau <= 1 or not 0 < epsilon < 1:
        raise ConfigError(f"tau must lie in [-1, 1] and epsilon in (0, 1), got {tau} and {epsilon}")
    features = torch.nn.functional.normalize(_features(tokens), dim=1)
    cosines = features @ features.T
    weights = torch.where(cosines >= tau, 1.0, epsilon).to(features)
    if bool((weights == weights[0, 1:2]).all()) or len(weights) == 1:
        return torch.tensor([0.0, 0.0, 1.0, 1.0])
    vector = second_eigenvector(weights)
    return _box_around(vector > vector.mean(), _largest(vector), _places(tokens, centres))


class DiscoveryProbe(Probe):
    """Find one box per image from its tokens alone; nothing is fitted.

    Targets are an image's true boxes (n, 4) in [0, 1]; :func:`dvt.grids.boxes_from_pixels` makes them from pixels.
    An image without a true box does not count.

    Args:
        centred: subtract each image's mean token first [ours]. Both methods compare the directions of tokens from the
            origin, but denoised tokens are known only up to a constant vector; if all tokens share a large one, every
            box is the whole image. False does not change the tokens, as the papers do not change keys.
    """

    metric = "CorLoc"

    def __init__(self, centred: bool = True) -> None:
        self.centred = centred

    def box(self, tokens: Tensor) -> Tensor:
        """Find the box of one map (h, w, C): (4,) in [0, 1]."""
        raise NotImplementedError

    def fit(self, tokens: Maps, targets: Sequence[Tensor]) -> DiscoveryProbe:
        """Do nothing, because the method uses each image alone."""
        return self

    def predict(self, tokens: Maps, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """Find a box (4,) for each image, in [0, 1], or in whole pixels of `sizes`."""
        maps = (tokens[i].double() for i in range(len(tokens)))
        boxes = [self.box(one - one.mean((0, 1)) if self.centred else one) for one in maps]
        if sizes is None:
            return boxes
        return [grids.boxes_to_pixels(box, size) for box, size in zip(boxes, sizes, strict=True)]

    def sufficient_statistics(self, tokens: Maps, targets: Sequence[Tensor]) -> Tensor:
        """Compare the predicted and each trivial box with the true ones.

        Returns:
            (N, 1 + len(TRIVIAL_MARGINS), 4): 1 if the image counts, 1 if IoU > 0.5, 1 if IoU > 0.7, and the IoU.

        Raises:
            ShapeError: counts differ, or a true box is empty or not in [0, 1].
        """
        check_maps(tokens, targets)
        predicted = torch.stack(self.predict(tokens)).double()
        return torch.stack([box_statistics(box, truth) for box, truth in zip(predicted, targets, strict=True)])

    @staticmethod
    def summarise(statistics: Tensor) -> dict[str, Tensor]:
        """Compute CorLoc (the share of images whose box has IoU > 0.5 with a true box), the same at 0.7, and mean IoU.

        The same three scores are computed for the whole image and for the best centred box of :data:`TRIVIAL_MARGINS`.
        The latter is chosen by its CorLoc on the same images, which favours it: a method that is better uses the image.
        """
        shares = statistics[..., 1:] / statistics[..., :1]
        # Mean IoU decides only if CorLocs are equal.
        best = (shares[..., 1:, 0] + 1e-6 * shares[..., 1:, 2]).argmax(-1, keepdim=True)
        centred = shares[..., 1:, :].gather(-2, best[..., None].expand(*best.shape, 3))[..., 0, :]
        rows = {"": shares[..., 0, :], "whole ": shares[..., 1, :], "centred ": centred}
        names = ("CorLoc", "CorLoc70", "IoU")
        scores = {f"{row}{name}": values[..., k] for row, values in rows.items() for k, name in enumerate(names)}
        return scores | {"centred margin": torch.tensor(TRIVIAL_MARGINS, dtype=torch.float64)[best[..., 0]]}


class Lost(DiscoveryProbe):
    """Run :func:`lost` as a probe.

    Args:
        lowest: k in the paper, in patches.
        centred: see :class:`DiscoveryProbe`.

    >>> tokens = -torch.ones(2, 6, 8, 1)
    >>> tokens[:, 1:4, 2:6] = 1
    >>> Lost(lowest=5).score(tokens, [torch.tensor([[0.25, 0.15, 0.75, 0.7]])] * 2)["CorLoc"]
    1.0
    """

    def __init__(self, lowest: int = 100, centred: bool = True) -> None:
        super().__init__(centred)
        self.lowest = lowest

    def box(self, tokens: Tensor) -> Tensor:
        return lost(tokens, self.lowest, self.centres((tokens.shape[0], tokens.shape[1])))


class TokenCut(DiscoveryProbe):
    """Run :func:`token_cut` as a probe.

    Args:
        tau: threshold of the cosine.
        centred: see :class:`DiscoveryProbe`.
    """

    def __init__(self, tau: float = 0.2, centred: bool = True) -> None:
        super().__init__(centred)
        self.tau = tau

    def box(self, tokens: Tensor) -> Tensor:
        return token_cut(tokens, self.tau, centres=self.centres((tokens.shape[0], tokens.shape[1])))


def box_statistics(box: Tensor, truth: Tensor) -> Tensor:
    """Compute :meth:`DiscoveryProbe.sufficient_statistics` of one image; zeros without a true box.

    Returns:
        (1 + len(TRIVIAL_MARGINS), 4).
    """
    from torchvision.ops import box_iou

    trivial = [[margin, margin, 1 - margin, 1 - margin] for margin in TRIVIAL_MARGINS]
    boxes = torch.cat((box[None].double().cpu(), torch.tensor(trivial, dtype=torch.float64)))
    if not len(truth):
        return boxes.new_zeros(len(boxes), 4)
    _check_boxes(boxes[:1], "the predicted box")
    _check_boxes(truth, "the true boxes of an image")
    best = box_iou(boxes, truth.double().cpu()).amax(1)
    return torch.stack((torch.ones_like(best), (best > 0.5).double(), (best > 0.7).double(), best), dim=1)


def _check_boxes(boxes: Tensor, name: str) -> None:
    right = boxes.ndim == 2 and boxes.shape[1] == 4
    # The comparisons are false for NaN too.
    if not right or not bool(((boxes >= -1e-6) & (boxes <= 1 + 1e-6)).all() and (boxes[:, 2:] > boxes[:, :2]).all()):
        raise ShapeError(
            f"{name} are {boxes.tolist()}; each must be (x0, y0, x1, y1) in [0, 1] with x0 < x1 and y0 < y1: "
            "clip boxes to the image and divide pixels by its size with dvt.grids.boxes_from_pixels"
        )


def second_eigenvector(weights: Tensor) -> Tensor:
    """Solve (D - W) y = lambda D y for the eigenvector (n,) of the second smallest lambda.

    Its sign is chosen so that its entry of largest magnitude is positive.

    Args:
        weights: (n, n) W, symmetric and positive, n at least 2; D holds its row sums.
    """
    from scipy.linalg import eigh

    count = len(weights)
    root = weights.sum(1).sqrt().double()
    # With z = D^1/2 y this is the second largest eigenvalue of the symmetric D^-1/2 W D^-1/2.
    _, vectors = eigh((weights.double() / root / root[:, None]).numpy(), subset_by_index=(count - 2, count - 2))
    vector = torch.from_numpy(vectors[:, 0]) / root
    return vector * vector[_largest(vector)].sign()


def _largest(vector: Tensor) -> int:
    """Find the first entry of largest magnitude; entries that differ only by rounding count as equal."""
    size = vector.abs()
    return int((size >= size.max() * (1 - 1e-6)).nonzero()[0])


def _features(tokens: Tensor) -> Tensor:
    """Flatten a map to (hw, C) float64 on the CPU."""
    if tokens.ndim != 3 or not tokens.numel():
        raise ShapeError(f"object discovery takes one token map (h, w, C) that is not empty, got {tuple(tokens.shape)}")
    return token_maps(Tokens.of(tokens))[0].flatten(0, 1).double().cpu()


def _places(tokens: Tensor, centres: Tensor | None) -> Tensor:
    """Return the patch centres (h, w, 2) of a map."""
    grid = (tokens.shape[0], tokens.shape[1])
    places = grids.grid_centres(grid) if centres is None else centres
    if tuple(places.shape) != (*grid, 2):
        raise ShapeError(f"centres {tuple(places.shape)} do not belong to a map of {grid} patches")
    return places.cpu()


def _box_around(mask: Tensor, seed: int, centres: Tensor) -> Tensor:
    """Bound the connected component of a mask (hw,) that holds the seed: (4,) in [0, 1]."""
    from scipy.ndimage import find_objects, label

    parts, _ = label(mask.view(centres.shape[:2]).numpy())
    rows, columns = find_objects(parts)[parts.flat[seed] - 1]
    return grids.box_of_cells((columns.start, rows.start, columns.stop, rows.stop), centres)
