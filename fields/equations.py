"""The normal equations of raw = A f + P g: accumulated view by view, solved by block elimination.

A interpolates the field's R_y x R_x bilinear nodes f at the tokens' coordinates (4 weights a token); P selects the
patch position's artifact g. Nodes of one row only meet those of the same and the neighbouring rows, so A'A + lambda L
is block tridiagonal with one block a row: its Cholesky factor is exact, made of dense blocks of R_x x R_x, the same
code on the CPU and on a GPU. (Ours; science: the closed-form decomposition in docs/method.md.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dvt import grids
from dvt.grids import Size

# Numbers in a block from which several threads pay.
SMALL_BLOCK = 65_536


class NormalEquations:
    """A'WA, A'WP, P'WP, A'WY, P'WY and Y'WY of the tokens added so far, for a weight W on each token.

    Args:
        resolution: (rows, columns) of the field's nodes.
        positions: n, the number of patch positions of a view.
        channels: C.
        like: a tensor whose device is used and whose dtype, at least float32, holds the tall matrices.
    """

    def __init__(self, resolution: Size, positions: int, channels: int, like: Tensor):
        self.resolution = resolution
        nodes = resolution[0] * resolution[1]
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self.stencil = torch.zeros(5, nodes, device=like.device, dtype=torch.float64)
        self.cross = like.new_zeros(nodes, positions)
        self.field_rhs = like.new_zeros(nodes, channels)
        self.count = torch.zeros(positions, device=like.device, dtype=torch.float64)
        self.artifact_rhs = like.new_zeros(positions, channels)

    def add(self, tokens: Tensor, coords: Tensor, weights: Tensor | None = None) -> None:
        """Add views: tokens (V, n, C), coords (V, n, 2), weights (V, n) or None for 1."""
        views, positions, channels = tokens.shape
        tokens = tokens.to(self.field_rhs.dtype)
        weights = tokens.new_ones(views, positions) if weights is None else weights.to(tokens)
        index, corner = grids.interpolation(coords.to(tokens).reshape(-1, 2), self.resolution)
        weighted = corner * weights.reshape(-1, 1)
        self._add_stencil(index, corner, weighted)
        position = torch.arange(positions, device=tokens.device).repeat(views)
        flat = (index * positions + position[:, None]).reshape(-1)
        self.cross.view(-1).scatter_add_(0, flat, weighted.reshape(-1))
        token = torch.arange(views * positions, device=tokens.device).repeat_interleave(4)
        interpolate = torch.sparse_coo_tensor(
            torch.stack((index.reshape(-1), token)),
            weighted.reshape(-1),
            (self.stencil.shape[1], views * positions),
            check_invariants=False,
        )
        self.field_rhs += interpolate @ tokens.reshape(-1, channels)
        self.count += weights.sum(0, dtype=torch.float64)
        self.artifact_rhs += torch.einsum("vn,vnc->nc", weights, tokens)

    def _add_stencil(self, index: Tensor, corner: Tensor, weighted: Tensor) -> None:
        # Corners a b / c d: every product of two lies on one of five diagonals of the symmetric A'A.
        pairs = [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 3, 0), (0, 1, 1), (2, 3, 1), (1, 2, 2), (0, 2, 3), (1, 3, 3)]
        for first, second, diagonal in [*pairs, (0, 3, 4)]:
            product = (weighted[:, first] * corner[:, second]).double()
            self.stencil[diagonal].scatter_add_(0, index[:, first], product)

    def system(self, smoothness: float) -> BlockTridiagonal:
        """A'WA + smoothness L, where f'Lf is the sum of squared differences of neighbouring nodes."""
        rows, columns = self.resolution
        stencil = self.stencil.view(5, rows, columns).clone()
        # A trace of identity keeps the system definite where no token and no neighbour fixes a node.
        stencil[0] += 1e-10 * (stencil[0].mean() + smoothness)
        horizontal, vertical = stencil.new_zeros(2, rows, columns)
        horizontal[:, :-1] = vertical[:-1] = smoothness
        stencil[0] += horizontal + horizontal.roll(1, 1) + vertical + vertical.roll(1, 0)
        stencil[1] -= horizontal
        stencil[3] -= vertical
        return BlockTridiagonal(stencil)

    def solve(self, smoothness: float, artifact: Tensor | None = None, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
        """Minimise |A f + P g - Y|_W^2 + smoothness |grad f|^2 + ridge |g|^2, with mean(g) = 0.

        Args:
            smoothness: lambda, in units of tokens a node difference.
            artifact: (n, C) a known g; only f is solved for then.
            ridge: gamma relative to the mean number of tokens a position.

        Returns:
            f (rows * columns, C) and g (n, C), float64.
        """
        if artifact is not None:
            rhs = self.field_rhs.double() - self.cross.double() @ artifact.double()
            return self.system(smoothness).solve(rhs), artifact.double()
        field, coupling, schur, rhs = self._eliminate(smoothness)
        artifact = solve_artifact(schur, rhs, ridge)
        return field - coupling @ artifact, artifact

    def node_weight(self) -> Tensor:
        """(nodes,) A'W1: how many tokens each node takes part in."""
        return self.cross.sum(1, dtype=torch.float64)

    def artifact_equations(self, smoothness: float) -> tuple[Tensor, Tensor]:
        """This image's share of the equations of an artifact that many images have in common; they add up."""
        return self._eliminate(smoothness)[2:]

    def _eliminate(self, smoothness: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """f = field - coupling g, (nodes, C) and (nodes, n), and what is left for g: its n x n Schur complement and
        right side (n, C)."""
        cross = self.cross.double()
        solved = self.system(smoothness).solve(torch.cat((self.field_rhs.double(), cross), dim=1))
        field, coupling = solved.split((self.field_rhs.shape[1], cross.shape[1]), dim=1)
        schur = torch.diag(self.count) - cross.T @ coupling
        return field, coupling, (schur + schur.T) / 2, self.artifact_rhs.double() - cross.T @ field


def solve_artifact(schur: Tensor, rhs: Tensor, ridge: float) -> Tensor:
    """g (n, C), mean zero over positions, of schur g = rhs, with a ridge relative to schur's mean diagonal.

    Constants are schur's null space (F and G share them): a rank-one term fixes the mean at 0 and changes nothing else.
    """
    scale = schur.diagonal().mean().clamp_min(torch.finfo(schur.dtype).tiny)
    n = len(schur)
    fixed = schur + scale / n + ridge * scale * torch.eye(n, device=schur.device, dtype=schur.dtype)
    artifact = torch.cholesky_solve(rhs, torch.linalg.cholesky(fixed))
    return artifact - artifact.mean(0)


class BlockTridiagonal:
    """Cholesky factor of a symmetric positive definite nine-point stencil.

    Args:
        stencil: (5, rows, columns) the diagonals to the node itself, its right, lower left, lower and lower right
            neighbour.
    """

    def __init__(self, stencil: Tensor):
        self.rows, self.columns = stencil.shape[1:]
        with _threads_for(self.columns**2):
            self._factorise(stencil)

    def _factorise(self, stencil: Tensor) -> None:
        own = torch.diag_embed(stencil[0])
        right = torch.diag_embed(stencil[1, :, :-1], offset=1)
        diagonal = own + right + right.mT
        # lower[i][c, a] couples node a of row i with node c of row i + 1.
        lower = torch.diag_embed(stencil[3]) + torch.diag_embed(stencil[2, :, 1:], offset=1)
        lower = lower + torch.diag_embed(stencil[4, :, :-1], offset=-1)
        self.factors, self.links = [torch.linalg.cholesky(diagonal[0])], []
        for row in range(1, self.rows):
            link = torch.linalg.solve_triangular(self.factors[-1], lower[row - 1].mT, upper=False).mT
            self.links.append(link)
            self.factors.append(torch.linalg.cholesky(diagonal[row] - link @ link.mT))

    def solve(self, rhs: Tensor) -> Tensor:
        """x (rows * columns, M) of K x = rhs; rhs is overwritten."""
        with _threads_for(self.columns * rhs.shape[1]):
            self._substitute(rhs.view(self.rows, self.columns, -1))
        return rhs

    def _substitute(self, blocks: Tensor) -> None:
        for row in range(self.rows):
            if row:
                blocks[row] -= self.links[row - 1] @ blocks[row - 1]
            blocks[row] = torch.linalg.solve_triangular(self.factors[row], blocks[row], upper=False)
        for row in reversed(range(self.rows)):
            if row + 1 < self.rows:
                blocks[row] -= self.links[row].mT @ blocks[row + 1]
            blocks[row] = torch.linalg.solve_triangular(self.factors[row].mT, blocks[row], upper=True)


@contextmanager
def _threads_for(block: int) -> Iterator[None]:
    """One CPU thread for small blocks: handing them to several costs more than it saves, and far more on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if block > SMALL_BLOCK else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
