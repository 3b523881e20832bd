"""What extraction, stage one and stage two cost an image, counted from first principles, and how long a machine takes.

A part of a job is a :class:`Work`: FLOPs by precision, bytes, pixels and so on. A :class:`Machine` has a rate for each
of these. Parts that run on the device add up; the device, the decoding cores and the writer either overlap, and then
the slowest decides, or they do not. benchmarks/cost.py measures rates and holds the model against real runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

Size = tuple[int, int]

SKETCH, NEIGHBOURS, FINEST, SMOOTHNESSES, PILOT_VIEWS = 32, 9, 112, 6, 64  # of fields/pilot.py and LinearConfig
PARTNERS, TRIALS = 3, 4  # of fields/defects.py: jumps of a token, and shares of the longest that are tried
HALF = 2  # bytes of a stored number


@dataclass(frozen=True)
class Work:
    """What a part of a job asks for, an image.

    Args:
        forward: FLOPs of matrix products in the forward pass's precision.
        single, double: FLOPs of matrix products and factorisations in float32 and float64.
        traffic: bytes that kernels beside the matrix products read and write in the device's memory.
        cut: pixels of views, resized on the device.
        selected: order statistics among a token's neighbours, one a channel.
        launches: kernels that follow each other and are too short to hide their launch.
        link: bytes between host and device.
        decoded, resized: pixels that a CPU core decodes, and resizes to.
        points: points that go into the kd-tree and are looked up in it, on a CPU core.
        stored: bytes put into shards and written.
    """

    forward: float = 0.0
    single: float = 0.0
    double: float = 0.0
    traffic: float = 0.0
    cut: float = 0.0
    selected: float = 0.0
    launches: float = 0.0
    link: float = 0.0
    decoded: float = 0.0
    resized: float = 0.0
    points: float = 0.0
    stored: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(getattr(self, each.name) * factor for each in fields(self)))


NOMINAL = ("forward", "single", "double", "traffic", "cut")  # rates that efficiency applies to; the others are achieved
DEVICE = (*NOMINAL, "selected", "launches", "link")
HOST = ("decoded", "resized", "points")


@dataclass(frozen=True)
class Machine:
    """Rates, each of what :class:`Work` names, a second.

    Args:
        name: for tables.
        rates: by name. Those of :data:`HOST` are one core's.
        efficiency: share of the nominal rates that this class of device reaches: one number for all of them.
        cores: CPU cores for decoding and kd-trees.
        writers: shards that are put together at the same time.
        overlap: whether device, decoding and writing go on at once.
    """

    name: str
    rates: Mapping[str, float]
    efficiency: float
    cores: int = 1
    writers: int = 1
    overlap: bool = True

    def seconds(self, work: Work) -> dict[str, float]:
        """Seconds of the device, the cores and the writer, and of the whole."""
        spent = {name: getattr(work, name) / self._rate(name) for name in (*DEVICE, *HOST, "stored")}
        parts = {
            "device": sum(spent[name] for name in DEVICE),
            "host": sum(spent[name] for name in HOST),
            "writer": spent["stored"],
        }
        return parts | {"all": max(parts.values()) if self.overlap else sum(parts.values())}

    def _rate(self, name: str) -> float:
        share = {"stored": self.writers, **dict.fromkeys(HOST, self.cores), **dict.fromkeys(NOMINAL, self.efficiency)}
        return self.rates[name] * share.get(name, 1)


# -- the forward pass -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vit:
    """A plain vision transformer; a denoiser of the kind "block" is one of depth 1 without patches to embed."""

    depth: int
    channels: int
    patch: int = 0
    prefix: int = 1
    mlp_ratio: float = 4.0

    @property
    def matrices(self) -> float:
        """Parameters that every token is multiplied by: query, key, value, projection and the MLP's two."""
        return self.depth * (4 + 2 * self.mlp_ratio) * self.channels**2

    def flops(self, grid: Size) -> float:
        """Of one image: 2 for each parameter and token, 4 N^2 C for each block's attention, the patches' embedding."""
        patches = grid[0] * grid[1]
        tokens = patches + self.prefix
        embedding = 2 * 3 * self.patch**2 * self.channels * patches
        return embedding + 2 * self.matrices * tokens + 4 * tokens**2 * self.channels * self.depth

    def traffic(self, grid: Size, width: int = HALF) -> float:
        """Bytes of one image that pass through memory with eager kernels, `width` bytes a number.

        A block reads and writes about 40 C numbers a token (norms, casts, bias, attention's in and out, GELU on 4 C,
        residuals), half of them in float32 under autocast.
        """
        tokens = grid[0] * grid[1] + self.prefix
        return self.depth * tokens * self.channels * 40 * (4 + width) / 2


VITS = {
    "vit_small_patch14_dinov2.lvd142m": Vit(12, 384, 14),
    "vit_base_patch14_dinov2.lvd142m": Vit(12, 768, 14),
    "vit_large_patch14_dinov2.lvd142m": Vit(24, 1024, 14),
    "vit_tiny_patch16_224": Vit(12, 192, 16),
}


# -- the linear solver ------------------------------------------------------------------------------------------------


def resolutions(grid: Size, tokens: int) -> list[Size]:
    """Nodes (rows, columns) that the pilot tries, the one for choosing smoothness first."""

    def nodes(multiple: int) -> Size:
        rows, columns = (max(2, round((multiple * min(grid) - 1) * side / min(grid)) + 1) for side in grid)
        return rows, columns

    first = next((multiple for multiple in (4, 3) if multiple * min(grid) <= FINEST), 2)
    rows, columns = nodes(6)
    fine = [6] if min(rows, columns) <= FINEST and 2 * rows * columns <= tokens else []
    return [nodes(multiple) for multiple in dict.fromkeys((first, 2, *fine))]


@dataclass(frozen=True)
class Solve:
    """One solve of the normal equations: block Cholesky, substitution, and with `eliminate` the Schur complement for G.

    Args:
        nodes: (rows, columns) of the field.
        width: channels on the right side.
        positions: n, patch positions.
        eliminate: whether G is solved for; otherwise it is known and only F is.
        systems: smoothnesses that are solved for at once.
    """

    nodes: Size
    width: int
    positions: int
    eliminate: bool
    systems: int = 1

    @property
    def columns(self) -> int:
        """Right sides of both ways of the substitution; only the way there has one for each position of G."""
        return 2 * self.width + (self.positions if self.eliminate else 0)

    @property
    def products(self) -> float:
        """FLOPs in matrix products; the inverses of the factors' blocks take part in the substitution."""
        rows, side = self.nodes
        count, n = rows * side, self.positions
        known = 2.0 * count * n * self.width
        coupling = 2.0 * count * n * n + 2 * known if self.eliminate else known
        factor = (rows - 1) * 4 * side**3
        return self.systems * (factor + (2 * rows - 1) * 2 * side**2 * self.columns) + coupling

    @property
    def triangular(self) -> float:
        """FLOPs in Cholesky factors, their inverses and triangular solves."""
        rows, side = self.nodes
        n = self.positions
        artifact = n**3 / 3 + 2 * n**2 * self.width if self.eliminate else 0.0
        return self.systems * rows * 4 * side**3 / 3 + artifact

    @property
    def work(self) -> Work:
        rows, side = self.nodes
        count = rows * side
        traffic = self.systems * 8 * count * self.columns * 6 + 20 * count * self.positions
        # 6 kernels a row for the factor and 3 for each way of the substitution.
        launches = (15 if self.eliminate else 12) * rows
        return Work(double=self.products + self.triangular, traffic=traffic, launches=launches)


def pilot_solves(grid: Size, tokens: int) -> list[Solve]:
    """Weights, G and the choice of smoothness at the first resolution, the other resolutions, and the last fit."""
    first, *others = resolutions(grid, tokens)
    n = grid[0] * grid[1]
    known = [Solve(first, SKETCH, n, False, SMOOTHNESSES), *(Solve(nodes, SKETCH, n, False) for nodes in others)]
    return [Solve(first, SKETCH, n, True)] * 4 + known  # two for the weights, one for G, and the last fit


def screen_products(looked: int) -> float:
    """FLOPs of the search for a defect: for each trial, the jumps' second moment and ten products with a direction."""
    return 2.0 * TRIALS * PARTNERS * looked * SKETCH * (SKETCH + 10)


def linear(channels: int, grid: Size, views: int, batch: int = 1) -> dict[str, Work]:
    """The linear solver with its defaults on `views` views, the whole image among them.

    Args:
        batch: images that are solved together, and so share launches.
    """
    n, sketch = grid[0] * grid[1], min(SKETCH, channels)
    tokens, looked = views * n, min(views, PILOT_VIEWS) * n
    solves = pilot_solves(grid, looked)
    pilot = Work(
        single=2.0 * looked * channels * sketch + screen_products(looked),
        traffic=looked * (NEIGHBOURS * sketch * 12 + 14 * sketch * 40),
        selected=looked * (sketch + 2),
        points=looked,
        link=looked * (2 * 4 + NEIGHBOURS * 8),
    )
    # A second sketch (for weights), 4 corners a token and P'Y. Tokens of a defect, whose moments h needs, are few.
    single = 2.0 * tokens * channels * (sketch + 4 + 1)
    last = Solve(solves[0].nodes, channels, n, True).work
    parts = {
        "pilot": sum((solve.work for solve in solves), pilot),
        "sums": Work(single=single, traffic=tokens * channels * 40.0),
        # h: its ridge regression; outlier tokens are few.
        "solve": last + Work(double=8 / 3 * channels**3),
    }
    return {name: replace(work, launches=work.launches / batch) for name, work in parts.items()}


# -- the jobs ---------------------------------------------------------------------------------------------------------


def stored_bytes(channels: int, grid: Size, prefix: int, terms: int) -> float:
    """Of one image: `terms` maps and the prefix in half precision. Checksums, index and format add under a per cent."""
    return HALF * channels * (terms * grid[0] * grid[1] + prefix)


def pixels(vit: Vit, grid: Size) -> float:
    """Of an input with that grid."""
    return vit.patch**2 * grid[0] * grid[1]


def extract(vit: Vit, grid: Size, photo: Size, denoiser: bool, width: int = HALF) -> dict[str, Work]:
    """`dvt extract` of one image: raw, with a denoiser also denoised.

    Args:
        photo: (height, width) of the file in pixels.
        width: bytes of a number in the forward pass.
    """
    block = Vit(1, vit.channels, prefix=0)
    stored = stored_bytes(vit.channels, grid, vit.prefix, 1 + denoiser)
    sent = 12 * pixels(vit, grid) + stored
    parts = {
        "read": Work(decoded=photo[0] * photo[1], resized=pixels(vit, grid), link=sent),
        "backbone": Work(forward=vit.flops(grid), traffic=vit.traffic(grid, width)),
        "store": Work(stored=stored, traffic=4 * stored),
    }
    return parts | ({"denoiser": Work(block.flops(grid), traffic=block.traffic(grid, width))} if denoiser else {})


def stage_one(
    vit: Vit, grid: Size, photo: Size, views: int, *, batch: int = 1, keep_terms: bool = False, width: int = HALF
) -> dict[str, Work]:
    """`dvt denoise` of one image with `views` random views beside the whole image; `batch` as :func:`linear` has it."""
    seen = views + 1
    stored = stored_bytes(vit.channels, grid, vit.prefix, 4 if keep_terms else 2)
    return {
        "read": Work(decoded=photo[0] * photo[1], link=12 * photo[0] * photo[1] + 2 * stored),
        "views": Work(cut=seen * pixels(vit, grid), launches=8 * seen),
        "backbone": Work(forward=seen * vit.flops(grid), traffic=seen * vit.traffic(grid, width)),
        **linear(vit.channels, grid, seen, batch),
        "store": Work(stored=stored),
    }


def stage_two(channels: int, grid: Size, width: int = HALF) -> Work:
    """One image in one training step of the block denoiser: forward once, backward twice that."""
    block = Vit(1, channels, prefix=0)
    read = stored_bytes(channels, grid, 0, 2)
    return Work(forward=3 * block.flops(grid), traffic=3 * block.traffic(grid, width), link=read)


# -- ten million images -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """What many images need.

    Args:
        images: how many.
        rate: images a second and GPU.
        image_bytes: in the store, an image.
        shard_images: images a shard.
        gpus: a node.
    """

    images: float
    rate: float
    image_bytes: float
    shard_images: int
    gpus: int = 8

    @property
    def node_hours(self) -> float:
        return self.images / self.rate / self.gpus / 3600

    def nodes(self, hours: float) -> int:
        """Whole nodes that end within `hours`."""
        return math.ceil(self.node_hours / hours)

    @property
    def shards(self) -> int:
        return math.ceil(self.images / self.shard_images)

    @property
    def shard_bytes(self) -> float:
        return self.image_bytes * self.shard_images

    @property
    def node_write_rate(self) -> float:
        """Bytes a second that one node must write."""
        return self.rate * self.gpus * self.image_bytes
