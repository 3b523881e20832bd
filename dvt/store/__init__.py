"""The feature store: a folder of immutable HDF5 shards, schema ``dvt-features/1``. The only file that knows h5py.

A shard holds, each dataset chunked and with HDF5's fletcher32 checksum,

    attributes (text): schema, backbone, weights_sha256, version, checksum, and as JSON: layer, stride, size, config
    /index/path (N,) utf-8   /index/sha256 (N,)   /index/size (N, 2)   /index/grid (N, 2)   /index/offset (N + 1,)
    /tokens/TERM (T, C) float16 or float32, TERM of :data:`TERMS`    [/tokens/prefix (N, P, C)]    [/artifact (h, w, C)]

The rows of image i are ``offset[i]:offset[i + 1]``, its (h, w) patches row by row. All text has a fixed length, because
no checksum reaches variable-length data, and HDF5 walks in circles where that is damaged. ``checksum`` is the SHA-256
of the other attributes.

A shard appears under its name only when it is whole: it is written as ``NAME.h5.part``, synced and renamed. Images are
known by the SHA-256 of their bytes: :class:`StoreWriter` tells which are done, :func:`plan` cuts the others into
shards. A shard is a run of a fixed number of files in the order of their paths (copies by their first), so leaving out
the shards already done does not move the cuts between the others: a job that was killed ends with the shards it would
have had. Images that are added later go to new shards, and the old ones stay as they are. A file whose bytes are done
is skipped under any path; the paths in a store are those of the run that computed it. Files of equal bytes in one run
lie next to each other, each path with its own copy of the rows, and are computed once a shard.
"""

from dvt.store.batches import StoredTokens, collate_tokens
from dvt.store.format import TERMS, Record, shard_file
from dvt.store.index import ShardIndex, read_index
from dvt.store.job import SCHEMA, ImageEntry, Job, Shard, plan
from dvt.store.reader import FeatureStore, damaged_shards
from dvt.store.writer import StoreWriter, commit_shard

__all__ = [
    "SCHEMA",
    "TERMS",
    "FeatureStore",
    "ImageEntry",
    "Job",
    "Record",
    "Shard",
    "ShardIndex",
    "StoreWriter",
    "StoredTokens",
    "collate_tokens",
    "commit_shard",
    "damaged_shards",
    "plan",
    "read_index",
    "shard_file",
]
