"""Damage: shards, checkpoints and images that are cut, flipped, emptied, exchanged or changed while they are read.

What is damaged is named and, once it is removed or repaired as the message says, made again to the same tokens.
"""

import errno
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import h5py
import pytest
from PIL import Image


def flip(path, offset, bit=2):
    content = bytearray(path.read_bytes())
    content[offset] ^= bit
    path.write_bytes(content)


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def place(path, what):
    """The offset in a shard of something that is checked by different means."""
    if what in ("tokens/raw", "tokens/prefix"):
        with h5py.File(path) as file:
            chunk = file[what].id.get_chunk_info(0)
        return chunk.byte_offset + chunk.size // 2
    content = path.read_bytes()
    if what == "index":
        with h5py.File(path) as file:
            return content.index(bytes(file["index/sha256"][0])) + 7
    return {"signature": 1, "superblock": 20, "attributes": content.index(b"dvt-features/1") + 3}[what]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, save_photos, dvt_command, extract_command):
    """A folder of photographs and the store of their tokens; tests change copies of it."""
    folder = tmp_path_factory.mktemp("extracted")
    dvt_command(extract_command(save_photos(folder / "photos", 12), folder / "store"))
    return folder


@pytest.fixture
def store(extracted, tmp_path):
    """A copy of the store."""
    return Path(shutil.copytree(extracted / "store", tmp_path / "store"))


@pytest.fixture
def again(extracted, store, dvt_command, extract_command):
    """A function that runs the command that made the store once more."""
    return lambda **expect: dvt_command(extract_command(extracted / "photos", store, "--json"), **expect)


def verified(dvt_command, store):
    """Exit code and names of the damaged shards, by `dvt inspect --verify`."""
    ended = dvt_command(["inspect", store, "--verify", "--json"], expect=None)
    return ended.code, sorted(Path(path).name for path in ended.result.get("damaged", {}))


DAMAGES = {
    "emptied": lambda path: cut(path, 0),
    "cut in the signature": lambda path: path.write_bytes(path.read_bytes()[:5]),
    "cut in the index": lambda path: cut(path, 0.2),
    "cut in the middle": lambda path: cut(path, 0.5),
    "cut at the end": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped in the signature": lambda path: flip(path, place(path, "signature")),
    "flipped in the superblock": lambda path: flip(path, place(path, "superblock")),
    "flipped in the attributes": lambda path: flip(path, place(path, "attributes")),
    "flipped in the index": lambda path: flip(path, place(path, "index")),
    "another file": lambda path: path.write_bytes(b"words " * 4000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
}
SLOW = pytest.mark.slow
QUICK = ("emptied", "cut in the middle", "flipped in the superblock", "flipped in the attributes", "a link to nothing")
QUICK_AND_SLOW = [*QUICK, *(pytest.param(name, marks=SLOW) for name in DAMAGES if name not in QUICK)]


@pytest.mark.parametrize("damage", QUICK_AND_SLOW)
def test_a_damaged_shard_is_named_and_made_again(damage, extracted, store, again, dvt_command, contents, shards):
    whole = shards(store)
    victim = store / sorted(whole)[1]
    DAMAGES[damage](victim)
    refused = again(expect=2)
    assert victim.name in refused.text, refused
    code, named = verified(dvt_command, store)
    assert code == 2 and (named == [victim.name] or not victim.is_file())
    assert {**shards(store), victim.name: ""} == {**whole, victim.name: ""}
    assert "delete it" in refused.text or not victim.is_file()
    victim.rmdir() if victim.is_dir() and not victim.is_symlink() else victim.unlink()
    assert [again(expect=0).result["done"] for _ in range(2)] == [2, 0]
    assert shards(store) == whole and contents(store) == contents(extracted / "store")


@pytest.mark.parametrize("where", ["tokens/raw", "tokens/prefix"])
def test_a_flip_in_the_tokens_is_found_by_verify(where, extracted, store, again, dvt_command, contents, shards):
    whole = shards(store)
    victim = store / sorted(whole)[2]
    flip(victim, place(victim, where))
    assert verified(dvt_command, store) == (2, [victim.name])
    victim.unlink()
    again(expect=0)
    assert shards(store) == whole and verified(dvt_command, store) == (0, [])


def test_training_on_flipped_tokens_names_the_shard(denoised_store, tmp_path, dvt_command, shards):
    store = Path(shutil.copytree(denoised_store, tmp_path / "store"))
    victim = store / sorted(shards(store))[0]
    flip(victim, place(victim, "tokens/raw"))
    out = tmp_path / "denoiser.safetensors"
    ended = dvt_command(["train", store, "--out", out, "--steps", 4, "--batch-size", 4], expect=2)
    assert victim.name in ended.text and "delete it" in ended.text and not out.exists()


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=SLOW)])
def test_any_flipped_bit_is_found_or_harmless(count, extracted, store, again, dvt_command, contents, shards):
    """Once the shards that the commands name are deleted, as they say, the same tokens are there again."""
    expected, whole = contents(extracted / "store"), shards(store)
    seed = random.SystemRandom().randrange(10**6)
    chance, found = random.Random(seed), 0
    print(f"seed {seed}")
    for _ in range(count):
        victim = store / chance.choice(sorted(whole))
        content = victim.read_bytes()
        flip(victim, chance.randrange(victim.stat().st_size), 1 << chance.randrange(8))
        _, named = verified(dvt_command, store)
        assert named in ([], [victim.name])
        for name in named:
            (store / name).unlink()
        again(expect=0)
        assert contents(store) == expected
        victim.write_bytes(content)  # the harmless ones too
        found += len(named)
    print(f"{found} of {count} flips were found")
    assert found > count // 2


def test_shards_that_changed_their_names_hold_what_they_held(extracted, store, again, contents, shards):
    first, second, *_ = (store / name for name in sorted(shards(store)))
    first.rename(store / "aside")
    second.rename(first)
    (store / "aside").rename(second)
    assert again(expect=0).result["done"] == 0
    assert contents(store) == contents(extracted / "store")


def test_a_shard_of_another_job_is_refused(extracted, store, tmp_path, dvt_command, extract_command, shards):
    other = tmp_path / "other"
    dvt_command(extract_command(extracted / "photos", other, "--layer", 1))
    name = sorted(shards(other))[0]
    shutil.copy(other / name, store / name)
    refused = dvt_command(extract_command(extracted / "photos", store), expect=2)
    assert "another job's tokens" in refused.text and "layer" in refused.text
    (store / name).unlink()
    dvt_command(extract_command(extracted / "photos", store))


def test_what_else_lies_in_the_folder_does_no_harm(extracted, store, again, contents):
    """A torn lock file, settings that are none, and what another program has left there."""
    (store / "writer.lock").write_bytes(b"\xff\xfe\x00 no process")
    (store / "config.json").write_text("{")
    (store / "notes.txt").write_text("mine")
    dead = store / "dead.h5.1.0123456789abcdef.part"
    dead.write_bytes(b"half a shard")
    (store / "talk.h5.part").write_bytes(b"mine too")
    again(expect=0)
    assert contents(store) == contents(extracted / "store") and not dead.exists()
    assert (store / "talk.h5.part").read_bytes() == b"mine too"
    assert (store / "notes.txt").read_text() == "mine" and json.loads((store / "config.json").read_text())


CHECKPOINT_DAMAGES = {
    "emptied weights": lambda folder: cut(folder / "model.safetensors", 0),
    "cut weights": lambda folder: cut(folder / "optimizer.safetensors", 0.5),
    "missing weights": lambda folder: (folder / "ema.safetensors").unlink(),
    "cut state": lambda folder: cut(folder / "state.json", 0.5),
}


@pytest.mark.parametrize(
    "damage", ["cut weights", *(pytest.param(name, marks=SLOW) for name in CHECKPOINT_DAMAGES if name != "cut weights")]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(damage, tmp_path, dvt_command, train_command):
    for name in ("whole", "torn"):
        (tmp_path / name).mkdir()
    dvt_command(train_command(tmp_path / "whole" / "d.safetensors"))
    out = tmp_path / "torn" / "d.safetensors"
    dvt_command(train_command(out), {"kill": 60, "under": str(tmp_path / "torn")}, expect=-9)
    checkpoints = sorted((tmp_path / "torn" / "d.run").glob("step-????????"))
    assert len(checkpoints) > 1 and not out.exists()
    CHECKPOINT_DAMAGES[damage](checkpoints[-1])
    refused = dvt_command(train_command(out), expect=2)
    assert checkpoints[-1].name in refused.text and "delete it" in refused.text
    shutil.rmtree(checkpoints[-1])
    dvt_command(train_command(out))
    assert out.read_bytes() == (tmp_path / "whole" / "d.safetensors").read_bytes()


# -- images -----------------------------------------------------------------------------------------------------------

BAD = {
    "000.png": lambda path: path.write_bytes(b"not an image at all"),
    "001.png": lambda path: cut(path, 0.5),
    "004.png": lambda path: path.write_bytes(b""),
    "005.png": lambda path: (path.unlink(), path.symlink_to("nothing.png")),
    "008.png": lambda path: (path.unlink(), os.mkfifo(path)),
    "010.png": lambda path: flip(path, path.stat().st_size // 2, 0xFF),
    "011.png": lambda path: (path.unlink(), path.symlink_to(path)),
}


@pytest.fixture
def commands(extract_command, denoise_command):
    return {"extract": extract_command, "denoise": denoise_command}


@pytest.mark.parametrize("name", ["extract", "denoise"])
def test_unreadable_images_are_named_and_the_others_are_done(
    name, commands, save_photos, tmp_path, dvt_command, contents, shards
):
    photos, good = (save_photos(tmp_path / folder, 15) for folder in ("photos", "good"))
    (photos / "folder.jpg").mkdir()
    save_photos(photos / "folder.jpg", 1, first=20)
    dvt_command(commands[name](photos, tmp_path / "whole"))
    for file, spoil in BAD.items():
        spoil(photos / file)
    ended = dvt_command(commands[name](photos, tmp_path / "out", "--json"), expect=2)
    result = ended.result
    assert sorted(Path(path).name for path, _ in result["failed"]) == sorted(BAD)
    assert all(path in reason for path, reason in result["failed"])
    assert result["done"] == 16 - len(BAD)
    before, expected = shards(tmp_path / "out"), contents(tmp_path / "whole")
    assert contents(tmp_path / "out") == {key: value for key, value in expected.items() if key[0] not in BAD}
    for file in BAD:
        (photos / file).unlink()
        shutil.copy(good / file, photos / file)
    dvt_command(commands[name](photos, tmp_path / "out"))
    assert contents(tmp_path / "out") == expected
    assert {shard: shards(tmp_path / "out")[shard] for shard in before} == before


@pytest.fixture
def failing(dvt_command):
    """A function that makes the fault of reads that end with an error of the system; skips where that cannot be had."""
    if not dvt_command.preloaded:
        pytest.skip("there is no C compiler to make reads fail with")
    return lambda pattern, number, first=1: {"reads": [str(pattern), number, first]}


@pytest.mark.parametrize("name", ["extract", "denoise"])
@pytest.mark.parametrize(("number", "first"), [(errno.EIO, 1), (errno.ESTALE, 2), (errno.EACCES, 3)])
def test_an_image_on_a_dying_disk_is_named_and_the_others_are_done(
    name, number, first, commands, photos, tmp_path, dvt_command, contents, failing
):
    """The first read looks whether the file is empty, later ones are the hash's and the decoder's."""
    out = tmp_path / "out"
    ended = dvt_command(commands[name](photos, out, "--json"), failing("*/003.png", number, first), expect=2)
    assert [Path(path).name for path, _ in ended.result["failed"]] == ["003.png"]
    assert os.strerror(number) in ended.text and ended.result["done"] == 11
    assert dvt_command(commands[name](photos, out, "--json")).result["done"] == 1
    dvt_command(commands[name](photos, tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("command", ["list", "analyze", "doctor", "train", "inspect"])
def test_other_commands_name_what_a_dying_disk_does_not_give(
    command, photos, denoised_store, backbone_options, tmp_path, dvt_command, failing, extract_command, shards
):
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(map(str, sorted(photos.iterdir()))))
    shard = sorted(shards(denoised_store))[0]
    arguments, victim = {
        "list": (extract_command(listing, tmp_path / "out"), "list.txt"),
        "analyze": (["analyze", photos, *backbone_options, "--views", 0, "--out", tmp_path / "out"], "003.png"),
        "doctor": (["doctor", photos, *backbone_options], "003.png"),
        "train": (["train", denoised_store, "--steps", 2, "--out", tmp_path / "d.safetensors"], shard),
        "inspect": (["inspect", denoised_store, "--verify"], shard),
    }[command]
    ended = dvt_command(arguments, failing(f"*/{victim}", errno.EIO), expect=None)
    assert victim in ended.text and "Input/output error" in ended.text, ended
    assert "delete it" not in ended.text
    assert ended.code == (0 if command in ("analyze", "doctor") else 2), ended


@pytest.mark.parametrize("command", ["extract", "denoise", "analyze", "doctor", "remedy", "probe", "distill"])
def test_an_endless_image_is_named_before_it_takes_memory(
    command, commands, photos, backbone_options, tmp_path, dvt_command
):
    """3000 x 1 pixels, resized to a shorter side of 96, would be 288,000 x 96: 330 MB, and 18,000 patches of it."""
    Image.new("RGB", (1, 3000), "grey").save(photos / "endless.png")
    out = tmp_path / "out"
    options = ("--steps", 1, "--batch-size", 2, "--teacher", "views", "--views", 2, "--validate-every", 1)
    arguments, code = {
        "extract": (commands.get("extract"), 2),
        "denoise": (commands.get("denoise"), 2),
        "analyze": (["analyze", photos, *backbone_options, "--views", 2, "--out", out], 0),
        "doctor": (["doctor", photos, *backbone_options], 0),
        "remedy": (["remedy", "rasa", photos, *backbone_options, "--out", tmp_path / "d.safetensors"], 0),
        "probe": (["probe", "correspondence", photos, *backbone_options], 2),
        "distill": (["distill", photos, *backbone_options, *options, "--out", tmp_path / "b.safetensors"], 0),
    }[command]
    arguments = arguments(photos, out) if callable(arguments) else arguments
    ended = dvt_command(arguments, {"space": 3 << 30}, expect=code)
    assert command == "distill" or ("endless.png" in ended.text and "less extreme aspect ratio" in ended.text), ended


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_named(photos, tmp_path, dvt_command, extract_command, contents):
    (photos / "003.png").chmod(0)
    ended = dvt_command(extract_command(photos, tmp_path / "out"), expect=2)
    assert "003.png" in ended.text and "Permission denied" in ended.text
    (photos / "003.png").chmod(0o600)
    dvt_command(extract_command(photos, tmp_path / "out"))
    assert len({key[0] for key in contents(tmp_path / "out")}) == 12


def changes(victim, spare):
    """What happens to the last image when the first shard is written: after it was listed, before it is decoded."""
    with Image.open(victim) as image:
        other_content = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        other_size = image.resize((image.height + 60, image.width))
    other_content.save(spare / "content.png")
    other_size.save(spare / "size.png")
    (spare / "cut.png").write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return {
        "removed": ["remove", str(victim)],
        "other content": ["move", str(spare / "content.png"), str(victim)],
        "other size": ["move", str(spare / "size.png"), str(victim)],
        "cut": ["move", str(spare / "cut.png"), str(victim)],
        "growing": ["append", str(victim)],
    }


CHANGES = [(name, change) for name in ("extract", "denoise") for change in ("removed", "cut", "growing", "other size")]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("extract", "other content"),
        ("denoise", "other content"),
        *(pytest.param(*pair, marks=SLOW) for pair in CHANGES),
    ],
)
def test_an_image_that_changes_between_listing_and_decoding(
    name, change, commands, save_photos, tmp_path, dvt_command, contents
):
    """Its tokens may not be stored under the hash that it had before."""
    photos = save_photos(tmp_path / "photos", 24)
    victim = photos / "023.png"
    (tmp_path / "spare").mkdir()
    listed = hashlib.sha256(victim.read_bytes()).hexdigest()
    fault = {"at": "*.h5.*.part", "do": changes(victim, tmp_path / "spare")[change]}
    ended = dvt_command(commands[name](photos, tmp_path / "out"), fault, expect=None)
    stored = contents(tmp_path / "out")
    assert victim.name in ended.text and ended.code == 2, ended
    assert not any(key[:2] == (victim.name, listed) for key in stored)
    assert len({key[0] for key in stored}) == 23
    if change == "cut":  # which cannot be read either
        shutil.copy(save_photos(tmp_path / "more", 24) / victim.name, victim)
    dvt_command(commands[name](photos, tmp_path / "out"))
    dvt_command(commands[name](photos, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
