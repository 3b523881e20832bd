"""Accumulate the normal equations of raw = A f + P g view by view, and solve them for many images at once.

A interpolates the field's R_y x R_x bilinear nodes f at the tokens' coordinates (4 weights per token); P selects the
patch position's artifact g. Nodes of a row are coupled only to those of the same and the neighbouring rows, so
A'A + lambda L is block tridiagonal with one block per row. Its exact Cholesky factor consists of dense blocks of
R_x x R_x, with the same code on the CPU and on a GPU. Rows are eliminated one after the other, so on a GPU the time is
mostly that of starting many small kernels; images of one grid shape are therefore eliminated together, in the time of
one. (Ours; docs/method.md derives the closed-form decomposition.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor

from dvt import grids
from dvt.errors import ImageError
from dvt.grids import Size

# Size of a block, in numbers, above which several threads are faster than one.
SMALL_BLOCK = 65_536
# A'A is symmetric: the products of a token's four weights (corners a b / c d) lie on five of its diagonals. For each,
# the first and second corners of its products: aa bb cc dd, then ab cd, bc, ac bd, ad.
PRODUCTS = (
    (slice(0, 4), slice(0, 4)),
    (slice(0, 4, 2), slice(1, 4, 2)),
    (slice(1, 2), slice(2, 3)),
    (slice(0, 2), slice(2, 4)),
    (slice(0, 1), slice(3, 4)),
)


class NormalEquations:
    """Hold A'WA, A'WP, P'WP, A'WY and P'WY of the tokens Y added so far, with weights W; one set per image.

    Args:
        images: B, the number of images.
        resolution: (rows, columns) of the fields' nodes.
        positions: n, the number of patch positions of a view.
        channels: C.
        like: a tensor whose device is used and whose dtype, at least float32, holds the tall matrices.
    """

    def __init__(self, images: int, resolution: Size, positions: int, channels: int, like: Tensor):
        self.resolution = resolution
        nodes = resolution[0] * resolution[1]
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self.stencil = torch.zeros(images, len(PRODUCTS), nodes, device=like.device, dtype=torch.float64)
        self.cross = like.new_zeros(images, nodes, positions)
        self.field_rhs = like.new_zeros(images, nodes, channels)
        self.count = torch.zeros(images, positions, device=like.device, dtype=torch.float64)
        self.artifact_rhs = like.new_zeros(images, positions, channels)

    def image(self, number: int) -> NormalEquations:
        """Select the equations of one image, to add its views; they share their memory with these equations."""
        part = copy(self)
        for name in ("stencil", "cross", "field_rhs", "count", "artifact_rhs"):
            setattr(part, name, getattr(self, name)[number : number + 1])
        return part

    def add(self, tokens: Tensor, coords: Tensor, weights: Tensor | None = None) -> None:
        """Add views of every image: tokens (B, V, n, C), coords (B, V, n, 2), weights (B, V, n) or None for 1."""
        images, views, positions, channels = tokens.shape
        nodes = self.cross.shape[1]
        tokens = tokens.to(self.field_rhs.dtype)
        weights = tokens.new_ones(images, views, positions) if weights is None else weights.to(tokens)
        index, corner = grids.interpolation(coords.to(tokens).flatten(0, 2), self.resolution)
        weighted = corner * weights.reshape(-1, 1)
        image = torch.arange(images, device=tokens.device).repeat_interleave(views * positions)
        self._add_stencil(index, corner, weighted, image)
        # From here on, node indices run through all images.
        index = index + nodes * image[:, None]
        position = torch.arange(positions, device=tokens.device).repeat(images * views)
        flat = (index * positions + position[:, None]).reshape(-1)
        self.cross.view(-1).scatter_add_(0, flat, weighted.reshape(-1))
        token = torch.arange(len(index), device=tokens.device).repeat_interleave(4)
        interpolate = torch.sparse_coo_tensor(
            torch.stack((index.reshape(-1), token)),
            weighted.reshape(-1),
            (images * nodes, len(index)),
            check_invariants=False,
        )
        self.field_rhs += (interpolate @ tokens.reshape(-1, channels)).view(images, nodes, channels)
        self.count += weights.sum(1, dtype=torch.float64)
        self.artifact_rhs += torch.einsum("bvn,bvnc->bnc", weights, tokens)

    def _add_stencil(self, index: Tensor, corner: Tensor, weighted: Tensor, image: Tensor) -> None:
        nodes = self.stencil.shape[-1]
        index, corner, weighted = (index + len(PRODUCTS) * nodes * image[:, None]).T, corner.T, weighted.T
        where = torch.cat([index[first] + nodes * diagonal for diagonal, (first, _) in enumerate(PRODUCTS)])
        products = torch.cat([weighted[first] * corner[second] for first, second in PRODUCTS])
        self.stencil.view(-1).scatter_add_(0, where.reshape(-1), products.double().reshape(-1))

    def system(self, smoothness: Tensor) -> BlockTridiagonal:
        """Compute A'WA + smoothness L, where f'Lf is the sum of squared differences of neighbouring nodes.

        Args:
            smoothness: (..., B) one value per image; leading dimensions give several systems per image.
        """
        stencil = self.stencil.unflatten(-1, self.resolution).expand(*smoothness.shape, -1, -1, -1).clone()
        smoothness = smoothness[..., None, None]
        # A small multiple of the identity keeps the system definite if neither tokens nor neighbours determine a node.
        own, right, _, below, _ = stencil.unbind(-3)
        own += 1e-10 * (own.mean((-2, -1), keepdim=True) + smoothness)
        horizontal, vertical = (torch.zeros_like(own) for _ in range(2))
        horizontal[..., :-1] = smoothness
        vertical[..., :-1, :] = smoothness
        own += horizontal + horizontal.roll(1, -1) + vertical + vertical.roll(1, -2)
        right -= horizontal
        below -= vertical
        return BlockTridiagonal(stencil)

    def solve(
        self, smoothness: Tensor | Sequence[float] | float, artifact: Tensor | None = None, ridge: float = 1e-6
    ) -> tuple[Tensor, Tensor]:
        """Minimise |A f + P g - Y|_W^2 + smoothness |grad f|^2 + ridge |g|^2, with mean(g) = 0, for every image.

        Args:
            smoothness: lambda, in units of tokens per node difference: one for all images, one per image (B,) or, with
                a known artifact, several per image (..., B).
            artifact: (B, n, C) or (n, C) a known g; then only f is solved for.
            ridge: gamma relative to the mean number of tokens per position.

        Returns:
            f (..., B, rows * columns, C) and g (B, n, C), float64.
        """
        smoothness = self._for_each(smoothness)
        if artifact is None:
            system, field, cross = self._halfway(smoothness)
            artifact = solve_artifact(*self._artifact_equations(field, cross), ridge)
            return system.finish(field.sub_(cross @ artifact)), artifact
        artifact = artifact.double().expand(len(self.stencil), -1, -1)
        rhs = self.field_rhs.double() - self.cross.double() @ artifact
        rhs = rhs.expand(*smoothness.shape, -1, -1).contiguous()
        return self.system(smoothness).solve(rhs), artifact

    def artifact_equations(self, smoothness: Tensor | Sequence[float] | float) -> tuple[Tensor, Tensor]:
        """Compute each image's part of the equations of a shared artifact, (B, n, n) and (B, n, C); parts add up."""
        return self._artifact_equations(*self._halfway(self._for_each(smoothness))[1:])

    def _for_each(self, smoothness: Tensor | Sequence[float] | float) -> Tensor:
        zeros = self.stencil.new_zeros(len(self.stencil))
        return zeros + torch.as_tensor(smoothness, dtype=zeros.dtype, device=zeros.device)

    def _halfway(self, smoothness: Tensor) -> tuple[BlockTridiagonal, Tensor, Tensor]:
        """Decompose the fields' system K = L L'; return it, L^-1 A'WY (B, nodes, C) and L^-1 A'WP (B, nodes, n)."""
        system = self.system(smoothness)
        field, cross = (tall.to(torch.float64, copy=True) for tall in (self.field_rhs, self.cross))
        return system, system.start(field), system.start(cross)

    def _artifact_equations(self, field: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        """Eliminate the field: compute the Schur complement (B, n, n) of g and its right-hand side (B, n, C)."""
        return torch.diag_embed(self.count) - cross.mT @ cross, self.artifact_rhs.double() - cross.mT @ field


def solve_artifact(schur: Tensor, rhs: Tensor, ridge: float) -> Tensor:
    """Solve schur g = rhs for g (..., n, C), mean zero over positions, with a ridge relative to schur's mean diagonal.

    Constants are schur's null space (F and G share them): a rank-one term fixes the mean at 0 without other effects.
    """
    artifact = torch.cholesky_solve(rhs, factor_artifact(schur, ridge))
    return artifact - artifact.mean(-2, keepdim=True)


def factor_artifact(schur: Tensor, ridge: float) -> Tensor:
    """Compute the Cholesky factor that :func:`solve_artifact` uses.

    Raises:
        ImageError: the equations are singular: the views are too few.
    """
    n = schur.shape[-1]
    scale = schur.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(torch.finfo(schur.dtype).tiny)
    fixed = schur + scale / n + ridge * scale * torch.eye(n, device=schur.device, dtype=schur.dtype)
    try:
        return torch.linalg.cholesky(fixed)
    except torch.linalg.LinAlgError as error:
        raise ImageError(
            f"the views of an image of {n} patches do not tell its artifact from its content: give more views, or a "
            "larger size"
        ) from error


class BlockTridiagonal:
    """Factorise symmetric positive definite nine-point stencils by Cholesky, and solve with the factors.

    Args:
        stencil: (..., 5, rows, columns) each node's coupling to itself and to its right, lower left, lower and lower
            right neighbours.

    Raises:
        torch.linalg.LinAlgError: a matrix is not positive definite.
    """

    def __init__(self, stencil: Tensor):
        self.rows, self.columns = stencil.shape[-2:]
        with _threads_for(self.columns**2):
            self._factorise(stencil.reshape(-1, *stencil.shape[-3:]))

    def _factorise(self, stencil: Tensor) -> None:
        own, right, lower_left, lower, lower_right = stencil.permute(1, 2, 0, 3)  # each (rows, systems, columns)
        # LAPACK needs contiguous columns. factors[i] starts as the lower triangle of the block of row i and becomes the
        # inverse of its Cholesky factor; links[i][c, a] starts as the coupling of node a of row i with node c of the
        # next row.
        blocks = stencil.new_zeros(2, self.rows, len(stencil), self.columns, self.columns).mT
        self.factors, self.links = blocks
        _diagonal(self.factors, 0).copy_(own)
        _diagonal(self.factors, -1).copy_(right[..., :-1])
        _diagonal(self.links, 0).copy_(lower)
        _diagonal(self.links, 1).copy_(lower_left[..., 1:])
        _diagonal(self.links, -1).copy_(lower_right[..., :-1])
        eye = torch.eye(self.columns, device=blocks.device, dtype=blocks.dtype)
        failed = []
        for row, block in enumerate(self.factors):
            if row:
                link = self.links[row - 1]
                link.copy_(link @ self.factors[row - 1].mT)
                block.baddbmm_(link, link.mT, alpha=-1)
            # The check of torch.linalg.cholesky would wait for the GPU at every row.
            factor, info = torch.linalg.cholesky_ex(block)
            # The inverses of such small factors serve many columns: products are several times as fast as substitution.
            block.copy_(torch.linalg.solve_triangular(factor, eye, upper=False))
            failed.append(info)
        if torch.stack(failed).any():
            raise torch.linalg.LinAlgError("the normal equations are not positive definite; are the weights finite?")

    def solve(self, rhs: Tensor) -> Tensor:
        """Solve K x = rhs for x (..., rows * columns, M); rhs must be contiguous and is overwritten."""
        return self.finish(self.start(rhs))

    def start(self, rhs: Tensor) -> Tensor:
        """Solve L y = rhs, where K = L L', the first half of :meth:`solve`; rhs is overwritten."""
        with self._blocks(rhs) as blocks:
            for row, block in enumerate(blocks):
                if row:
                    block.baddbmm_(self.links[row - 1], blocks[row - 1], alpha=-1)
                block.copy_(self.factors[row] @ block)
        return rhs

    def finish(self, rhs: Tensor) -> Tensor:
        """Solve L' x = rhs, the second half of :meth:`solve`; rhs is overwritten."""
        with self._blocks(rhs) as blocks:
            for row, block in reversed([*enumerate(blocks)]):
                if row + 1 < self.rows:
                    block.baddbmm_(self.links[row].mT, blocks[row + 1], alpha=-1)
                block.copy_(self.factors[row].mT @ block)
        return rhs

    @contextmanager
    def _blocks(self, rhs: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Split a right-hand side by rows of nodes."""
        with _threads_for(self.columns * rhs.shape[-1]):
            yield rhs.view(-1, self.rows, self.columns, rhs.shape[-1]).unbind(1)


def _diagonal(blocks: Tensor, offset: int) -> Tensor:
    return blocks.diagonal(offset, -2, -1)


@contextmanager
def _threads_for(block: int) -> Iterator[None]:
    """Use one CPU thread for small blocks, where several are slower, especially on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if block > SMALL_BLOCK else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
