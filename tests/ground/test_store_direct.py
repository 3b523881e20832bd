"""Chunks written past HDF5's filters are what HDF5 itself would have written."""

import errno
import io

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvt.errors import StoreError
from dvt.store import Job, Record, StoreWriter, write_shard
from dvt.store.direct import Target, fletcher32, write_rows


def filled(parts, chunk, direct):
    """The bytes of each chunk of a dataset, and its values, written past the filters or by HDF5."""
    rows, channels = sum(map(len, parts)), parts[0].shape[1]
    with h5py.File(io.BytesIO(), "w") as file:
        data = file.create_dataset("x", (rows, channels), parts[0].dtype, chunks=(chunk, channels), fletcher32=True)
        if direct:
            write_rows(data, parts)
        else:
            data[:] = np.concatenate(parts)
        file.flush()
        found = {
            start: data.id.read_direct_chunk((start, 0))[1][: chunk * channels * data.dtype.itemsize + 4]
            for start in range(0, rows, chunk)
        }
        return found, data[:]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 12),
    st.sampled_from([(1, "f2"), (3, "f2"), (600, "f2"), (5, "f4")]),
    st.integers(0, 2**32 - 1),
)
def test_chunks_are_those_of_hdf5(lengths, chunk, kind, seed):
    """Parts that end inside of chunks, chunks that end inside of parts, and a last chunk that is not full."""
    rng, (channels, dtype) = np.random.default_rng(seed), kind
    parts = [rng.standard_normal((length, channels)).astype(dtype) for length in lengths]
    chunk = min(chunk, sum(lengths))
    (ours, values), (theirs, expected) = (filled(parts, chunk, direct) for direct in (True, False))
    assert ours == theirs and np.array_equal(values, expected)


@pytest.mark.parametrize("words", [[0] * 7, [0xFFFF] * 4, [0xFFFF], [1, 0, 0xFFFF, 0, 0xFFFE]])
def test_the_checksum_where_sums_are_multiples_of_65535(words):
    """Ones' complement has two zeros, and HDF5 takes the second for all sums but that of zeros alone."""
    one = two = 0
    for word in words:
        one += (word & 255) << 8 | word >> 8
        two += one
    fold = lambda value: (value - 1) % 65535 + 1 if value else 0  # noqa: E731
    assert fletcher32(np.array(words, np.uint16)) == fold(two) << 16 | fold(one)


class Full(io.BytesIO):
    """A file on a disk with room for some bytes."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


def record(seed=0):
    rng = np.random.default_rng(seed)
    return Record("a.jpg", "0" * 64, (32, 32), {"raw": rng.standard_normal((8, 8, 64)).astype(np.float16)})


@pytest.mark.parametrize("room", [0, 100, 3000, 6000, 9000])
def test_a_full_disk_is_an_error_and_the_next_shard_is_whole(room, tmp_path):
    with pytest.raises(OSError, match="No space left"):
        write_shard(Full(room), "shard", Job("random", "0" * 64), [record()])
    with StoreWriter(tmp_path, Job("random", "0" * 64)) as writer:
        writer.write("shard", [record()])
    assert len((tmp_path / "shard.h5").read_bytes()) > 8192


def test_a_write_in_pieces_is_finished():
    class Slow(io.BytesIO):
        def write(self, content):
            return super().write(bytes(content)[:100])

    file = Slow()
    target = Target(file)
    assert target.write(memoryview(bytes(range(250)))) == 250
    target.check()
    assert file.getvalue() == bytes(range(250))


def test_a_bad_name_leaves_nothing(tmp_path):
    with StoreWriter(tmp_path, Job("random", "0" * 64)) as writer, pytest.raises(StoreError, match="valid shard name"):
        writer.write("a/b", [record()])
    assert [path.name for path in tmp_path.iterdir()] == ["writer.lock"]
