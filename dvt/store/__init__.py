"""Write and read feature stores: folders of immutable HDF5 shards, schema ``dvt-features/1``.

Only this package uses h5py. A shard holds, each dataset chunked and with HDF5's fletcher32 checksum,

    attributes (text): schema, backbone, weights_sha256, version, checksum, and as JSON: layer, stride, size, config
    /index/path (N,) utf-8   /index/sha256 (N,)   /index/size (N, 2)   /index/grid (N, 2)   /index/offset (N + 1,)
    /tokens/TERM (T, C) float16 or float32, TERM of :data:`TERMS`    [/tokens/prefix (N, P, C)]    [/artifact (h, w, C)]

The rows of image i are ``offset[i]:offset[i + 1]``, its (h, w) patches row by row. All text has a fixed length, because
checksums do not cover variable-length data, and HDF5 loops forever on such data if it is damaged. ``checksum`` is the
SHA-256 of the other attributes.

A shard has its name only when it is whole: it is written as ``NAME.h5.part``, synced and renamed. Images are identified
by the SHA-256 of their bytes: :class:`StoreWriter` knows which are done, and :func:`plan` divides the others into
shards. Each shard takes a fixed number of files in the order of their paths (copies follow their first path). So
leaving out finished shards does not move the boundaries of the others, and a killed and resumed job ends with the same
shards as an uninterrupted one. Images that are added later go to new shards; existing shards never change. A file whose
bytes are done is skipped under any path; the paths in a store are those of the run that computed it. Files of equal
bytes in one run are next to each other, each path with its own copy of the rows, and are computed once per shard.
"""

from dvt.store.batches import StoredTokens, collate_tokens
from dvt.store.format import TERMS, Record, shard_file, write_shard
from dvt.store.index import ShardIndex, damaged_shards, read_index
from dvt.store.job import SCHEMA, ImageEntry, Job, Shard, plan
from dvt.store.reader import FeatureStore
from dvt.store.writer import StoreWriter, clear_store, commit_shard

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
    "clear_store",
    "collate_tokens",
    "commit_shard",
    "damaged_shards",
    "plan",
    "read_index",
    "shard_file",
    "write_shard",
]
