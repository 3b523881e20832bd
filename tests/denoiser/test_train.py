"""Stage 2: data order, scores with known answers, a planted artifact learnt, exact continuation, refusals."""

import csv
import hashlib
import json
import math
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvt.denoiser.model import Denoiser
from dvt.denoiser.pairs import Pairs, pair_batches, split
from dvt.denoiser.scores import denoiser_loss, evaluate, reconstruction
from dvt.denoiser.train import (
    DenoiserTraining,
    train_denoiser,
)
from dvt.errors import ConfigError, NonFiniteError, StoreError
from dvt.store import FeatureStore, Job, Record, StoreWriter, plan

CHANNELS = 16
JOB = Job("vit", "ab" * 32, layer=-1, stride=16, size=224, config={"verb": "denoise"})


def sha(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


def artifact(grid):
    """(h, w, C) waves of position around an offset, the same function of the image's coordinates on every grid."""
    y, x = np.meshgrid(*((np.arange(n) + 0.5) / n for n in grid), indexing="ij")
    waves = [np.cos(math.pi * (i * x + j * y)) for i in range(4) for j in range(4)]
    return (1.5 * np.stack(waves, -1)[..., :CHANNELS] + 0.3).astype(np.float32)


def record(i, grid, terms=("raw", "semantic"), prefix=True):
    rng = np.random.default_rng(i)
    semantic = rng.standard_normal((*grid, CHANNELS)).astype(np.float32)
    maps = {"semantic": semantic, "raw": semantic + artifact(grid), "artifact": artifact(grid)}
    tokens = rng.standard_normal((2, CHANNELS)).astype(np.float32) if prefix else None
    return Record(f"{i:03}.jpg", sha(i), (96, 96), {term: maps[term] for term in terms}, tokens)


def make_store(folder, grids, job=JOB, first=0, **options):
    records = {r.path: r for r in (record(first + i, grid, **options) for i, grid in enumerate(grids))}
    images = [(r.path, r.sha256, r.terms["raw"].shape[:2]) for r in records.values()]
    with StoreWriter(folder, job) as writer:
        for shard in plan(images, 4, job):
            writer.write(shard.name, [records[path] for path, _, _ in shard.images], dtype="float32")
    return folder


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """24 images of three grids, one of them rare."""
    return make_store(tmp_path_factory.mktemp("ragged") / "store", [(6, 5)] * 14 + [(4, 6)] * 8 + [(3, 3)] * 2)


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("square") / "store", [(6, 6)] * 40)


def settings_of(job, **changes):
    """A job's settings with changes, of the job itself and of its training loop."""
    loop = job().loop
    own = {name: changes.pop(name) for name in list(changes) if not hasattr(loop, name)}
    return job(loop=replace(loop, **changes), **own)


def short(**changes):
    values = {"steps": 30, "batch_size": 4, "validate_every": 15, "checkpoint_every": 10, "log_every": 5}
    return settings_of(DenoiserTraining, **{**values, **changes})


# -- data -------------------------------------------------------------------------------------------------------------


def test_pairs_are_the_images_of_the_store(ragged):
    pairs = Pairs(FeatureStore(ragged), prefix=True)
    assert len(pairs) == 24 and pairs.grids[23] == (3, 3)
    item, planted = pairs[20], record(20, (4, 6))
    for name, values in {
        "raw": planted.terms["raw"],
        "target": planted.terms["semantic"],
        "prefix": planted.prefix,
    }.items():
        assert np.array_equal(item[name].numpy(), values)
    assert "prefix" not in Pairs(FeatureStore(ragged))[0]


def test_batches_from_memory_are_those_from_the_store(ragged):
    pairs = Pairs(FeatureStore(ragged), prefix=True)
    stored, kept = (pair_batches(source, range(24), 6, 50, seed=1) for source in (pairs, pairs.in_memory()))
    for step in (3, 0, 49):
        one, two = stored(step, 0, 1), kept(step, 0, 1)
        assert one.keys() == two.keys() == {"raw", "target", "prefix"}
        assert all(torch.equal(one[name], two[name]) for name in one)


def seen(pairs, batch):
    """Which images a batch holds: every planted map is its own."""
    known = {pairs[i]["raw"].numpy().tobytes(): i for i in range(len(pairs))}
    return [known[raw.numpy().tobytes()] for raw in batch["raw"]]


def test_a_batch_has_one_grid_and_processes_share_it(ragged):
    pairs = Pairs(FeatureStore(ragged)).in_memory()
    batches = pair_batches(pairs, range(24), 6, 400, seed=0)
    for step in range(20):
        whole = seen(pairs, batches(step, 0, 1))
        assert len({pairs.grids[i] for i in whole}) == 1 and len(whole) == 6
        assert [i for rank in range(3) for i in seen(pairs, batches(step, rank, 3))] == whole
    assert seen(pairs, batches(7, 0, 1)) != seen(pairs, pair_batches(pairs, range(24), 6, 400, seed=1)(7, 0, 1))


def test_every_image_is_seen_equally_often(ragged):
    """Grids are drawn in proportion to their images, and within a grid the epochs are permutations."""
    pairs = Pairs(FeatureStore(ragged)).in_memory()
    batches = pair_batches(pairs, range(24), 2, 3000, seed=0)
    counts = np.bincount([i for step in range(3000) for i in seen_fast(pairs, batches(step, 0, 1))], minlength=24)
    for grid in set(pairs.grids):
        same = counts[[i for i in range(24) if pairs.grids[i] == grid]]
        assert same.max() - same.min() <= 1
    assert abs(counts / counts.mean() - 1).max() < 0.15  # 3000 draws of a bucket of 2/24: sd 6 %


def seen_fast(pairs, batch):
    if not hasattr(seen_fast, "known"):
        seen_fast.known = {float(pairs[i]["raw"].double().sum()): i for i in range(len(pairs))}
    return [seen_fast.known[float(raw.double().sum())] for raw in batch["raw"]]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.floats(0.01, 0.99), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_the_split_holds_out_whole_files_whatever_their_order(names, share, seed):
    hashes = [sha(name) for name in names]
    if len(set(hashes)) < 2:
        with pytest.raises(StoreError, match="at least 2"):
            split(hashes, share, seed)
        return
    chosen, held = split(hashes, share, seed)
    assert sorted(chosen + held) == list(range(len(hashes)))
    sides = [{hashes[i] for i in side} for side in (chosen, held)]
    assert not sides[0] & sides[1] and all(sides)
    distinct = len(set(hashes))
    assert len(sides[1]) == min(max(1, round(share * distinct)), distinct - 1)
    turned = split(hashes[::-1], share, seed)
    assert {hashes[::-1][i] for i in turned[1]} == sides[1]


# -- scores -----------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_a_naive_loop():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2, 3, 4, 5)) for _ in range(2))
    square, cosine = [], []
    for index in np.ndindex(2, 3, 4):
        x, y = a[index], b[index]
        square.append(sum((x - y) ** 2) / 5)
        cosine.append(sum(x * y) / math.sqrt(sum(x * x) * sum(y * y)))
    found = reconstruction(torch.from_numpy(a), torch.from_numpy(b))
    assert float(found["mse"]) == pytest.approx(np.mean(square)) and float(found["cosine"]) == pytest.approx(
        np.mean(cosine)
    )
    assert float(found["loss"]) == pytest.approx(np.mean(square) + 1 - np.mean(cosine))


def test_the_gradient_of_the_loss_reaches_the_denoiser(ragged):
    pairs = Pairs(FeatureStore(ragged), prefix=True)
    denoiser = Denoiser(DenoiserTraining(use_prefix=True).denoiser(CHANNELS, (6, 5)))
    denoiser_loss(denoiser, pair_batches(pairs, range(24), 4, 5, seed=0)(0, 0, 1))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())


def test_evaluate_means_over_images_not_tokens(ragged):
    pairs = Pairs(FeatureStore(ragged))
    scores = evaluate({"zero": lambda batch: torch.zeros_like(batch["raw"])}, (pairs[i] for i in (0, 15, 23)))["zero"]
    wanted = np.mean([np.mean(pairs[i]["target"].numpy() ** 2) for i in (0, 15, 23)])
    assert scores["mse"] == pytest.approx(wanted, rel=1e-5) and scores["cosine"] == 0


def test_the_baselines_of_a_planted_artifact(square, tmp_path):
    """Doing nothing leaves the artifact, the mean shift its spread over positions, subtraction nothing."""
    _, report = train_denoiser(square, tmp_path / "d.safetensors", short(kind="subtract"))
    planted = artifact((6, 6)).astype(np.float64)
    found = {name: scores["mse"] for name, scores in report["baselines"].items()}
    assert found["no_op"] == pytest.approx(np.mean(planted**2), rel=1e-4)
    assert found["mean_shift"] == pytest.approx(np.mean((planted - planted.mean((0, 1))) ** 2), rel=1e-4)
    assert found["subtract"] < 1e-10 and report["validation"]["mse"] < 1e-10


# -- training ---------------------------------------------------------------------------------------------------------


def blurred(i, grid):
    """Beside the artifact, raw tokens hold the semantic ones in other channels: no subtraction undoes that."""
    planted = record(i, grid)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((CHANNELS, CHANNELS)))[0].astype(np.float32)
    planted.terms["raw"] = planted.terms["semantic"] @ turn + artifact(grid)
    return planted


@pytest.mark.parametrize(("kind", "rate"), [("block", 1e-2), ("conv1x1", 3e-2)])
def test_a_planted_artifact_is_learnt(tmp_path, kind, rate):
    """What a block must learn: the channels back, at each position without its artifact."""
    records = [blurred(i, (4, 4)) for i in range(60)]
    with StoreWriter(tmp_path / "store", JOB) as writer:
        writer.write("shard", records, dtype="float32")
    config = settings_of(
        DenoiserTraining, kind=kind, steps=250, batch_size=16, learning_rate=rate, ema=0.9, clip=0, validate_every=100
    )
    denoiser, report = train_denoiser(tmp_path / "store", tmp_path / "d.safetensors", config)
    reached, baselines = report["validation"]["loss"], {k: v["loss"] for k, v in report["baselines"].items()}
    assert baselines["subtract"] < baselines["mean_shift"] < baselines["no_op"]
    assert reached < baselines["subtract"] / (3 if kind == "block" else 1)
    images = Pairs(FeatureStore(tmp_path / "store"))
    held = split(images.sha256s, config.validation, config.loop.seed)[1]
    again = evaluate({"d": lambda batch: denoiser(batch["raw"])}, (images[i] for i in held))["d"]
    assert again["loss"] == pytest.approx(reached, rel=1e-5)
    with open(tmp_path / "d.run/log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["validation_loss"]) == pytest.approx(reached, rel=1e-5)
    assert {name: float(last[f"{name}_loss"]) for name in baselines} == baselines


def test_a_block_starts_as_the_subtraction(square, tmp_path):
    """After one step that changes next to nothing."""
    _, report = train_denoiser(square, tmp_path / "d.safetensors", short(steps=1, learning_rate=1e-6))
    assert report["validation"]["mse"] < 0.01 * report["baselines"]["mean_shift"]["mse"]
    _, bare = train_denoiser(square, tmp_path / "e.safetensors", short(steps=1, learning_rate=1e-6, position=False))
    assert bare["validation"]["mse"] > 0.9 * report["baselines"]["mean_shift"]["mse"]


@pytest.mark.parametrize("kind", ["block", "conv1x1", "conv3x3", "linear", "subtract"])
def test_every_kind_is_made_and_comes_back_from_its_file(ragged, tmp_path, kind):
    denoiser, report = train_denoiser(ragged, tmp_path / "d.safetensors", short(kind=kind))
    again = Denoiser.from_pretrained(tmp_path / "d.safetensors")
    raw = torch.randn(1, 5, 7, CHANNELS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(denoiser(raw), again(raw)) and not torch.equal(again(raw), raw)
    card = again.card
    made_for = (card["backbone"], card["layer"], card["weights_sha256"], card["feature_dim"])
    assert made_for == ("vit", -1, "ab" * 32, CHANNELS)
    assert card["data"] == {"images": 24, "held_out": 2, "store_job_sha256": JOB.digest}
    assert card["metrics"]["validation"]["loss"] == report["validation"]["loss"]
    assert kind == "linear" or again.config.grid == (6, 5)  # the most frequent
    assert not list(tmp_path.glob("*.part"))


def test_prefix_tokens_are_attended_to(ragged, tmp_path):
    denoiser, _ = train_denoiser(ragged, tmp_path / "d.safetensors", short(use_prefix=True))
    raw, prefix = torch.randn(1, 6, 5, CHANNELS), torch.randn(1, 2, CHANNELS)
    assert not torch.equal(denoiser(raw, prefix), denoiser(raw, prefix.flip(2)))


def test_an_interrupted_run_ends_with_the_same_bytes(ragged, tmp_path):
    def interrupt(what, done, total):
        if (what, done) == ("train", 17):
            raise KeyboardInterrupt

    train_denoiser(ragged, tmp_path / "whole.safetensors", short())
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(ragged, tmp_path / "cut.safetensors", short(), progress=interrupt)
    assert not (tmp_path / "cut.safetensors").exists()
    steps = []
    train_denoiser(
        ragged, tmp_path / "cut.safetensors", short(), progress=lambda what, done, total: steps.append((what, done))
    )
    assert min(done for what, done in steps if what == "train") == 11  # from the checkpoint at 10
    whole, cut = (Denoiser.from_pretrained(tmp_path / f"{name}.safetensors").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_run_of_an_earlier_version_is_continued(ragged, tmp_path):
    """Checkpoints hold the identity that they held when the settings of the loop were fields of the job."""
    held = {"steps": 30, "batch_size": 4, "learning_rate": 2e-4 * (4 / 256) ** 0.5, "min_learning_rate": 1e-06}
    held |= {"warmup": 0.15, "weight_decay": 0.01, "betas": [0.9, 0.999], "clip": 1.0, "ema": 0.99}
    held |= {"precision": "no", "seed": 0}

    def interrupt(what, done, total):
        if (what, done) == ("train", 17):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_denoiser(ragged, tmp_path / "d.safetensors", short(learning_rate=None), progress=interrupt)
    path = tmp_path / "d.run/step-00000010/state.json"
    about = json.loads(path.read_text())
    sides = split(Pairs(FeatureStore(ragged)).sha256s, 0.1, 0)
    images = "/".join(",".join(sorted(Pairs(FeatureStore(ragged)).sha256s[i] for i in side)) for side in sides)
    denoiser = {"kind": "block", "feature_dim": CHANNELS, "grid": [6, 5], "num_heads": None, "depth": 1}
    denoiser |= {"mlp_ratio": 4.0, "position": True, "use_prefix": False, "rank": 8, "strength": 1.0}
    assert about["config"] == held
    assert about["settings"] == {"denoiser": denoiser, "target": "semantic", "images": sha(images)}
    path.write_text(json.dumps({**about, "config": held}))
    steps = []
    train_denoiser(
        *(ragged, tmp_path / "d.safetensors", short(learning_rate=None)),
        progress=lambda what, done, total: steps.append((what, done)),
    )
    assert min(done for what, done in steps if what == "train") == 11


def test_a_card_lists_the_settings_of_the_loop_beside_the_others(ragged, tmp_path):
    """As it did when they were fields of the job."""
    denoiser, _ = train_denoiser(ragged, tmp_path / "d.safetensors", short(kind="subtract"))
    held = denoiser.card["training"]
    assert (held["kind"], held["validation"], held["steps"], held["batch_size"]) == ("subtract", 0.1, 30, 4)
    assert "loop" not in held and held["learning_rate"] == 1e-3 and held["seed"] == 0


def test_the_seed_decides_and_nothing_else(ragged, tmp_path):
    torch.manual_seed(1)
    one, _ = train_denoiser(ragged, tmp_path / "one.safetensors", short())
    torch.manual_seed(2)
    two, _ = train_denoiser(ragged, tmp_path / "two.safetensors", short())
    other, _ = train_denoiser(ragged, tmp_path / "other.safetensors", short(seed=1))
    assert torch.equal(one.body.pos_embed, two.body.pos_embed)
    assert not torch.equal(one.body.pos_embed, other.body.pos_embed)


def test_the_learning_rate_of_the_paper():
    for batch, rate in ((64, 1e-4), (256, 2e-4)):
        loop = settings_of(DenoiserTraining, learning_rate=None, batch_size=batch).loop
        assert loop.peak_rate == loop.learning_rate_at(149) == pytest.approx(rate)


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(store, tmp_path, error, match, **changes):
    with pytest.raises(error, match=match):
        train_denoiser(store, tmp_path / "d.safetensors", short(**changes))
    assert not (tmp_path / "d.safetensors").exists()


def test_no_store_and_an_empty_one(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        refused(tmp_path / folder, tmp_path, StoreError, "not a feature store")


def test_a_store_of_two_backbones(square, tmp_path):
    shutil.copytree(square, tmp_path / "mixed")
    other = make_store(tmp_path / "other", [(6, 6)] * 4, job=Job("vit_other", "cd" * 32), first=100)
    shutil.copy(next(other.glob("*.h5")), tmp_path / "mixed")
    refused(tmp_path / "mixed", tmp_path, StoreError, "different jobs.*backbone")


def test_a_store_without_semantic_tokens(tmp_path):
    store = make_store(tmp_path / "store", [(3, 3)] * 4, terms=("raw",))
    refused(store, tmp_path, StoreError, "terms raw but not semantic.*dvt denoise")


def test_a_target_that_is_no_target(square, tmp_path):
    refused(square, tmp_path, ConfigError, "nothing to learn", target="raw")
    refused(square, tmp_path, StoreError, "not denoised", target="denoised")


@pytest.mark.parametrize("term", ["raw", "semantic"])
def test_nan_tokens_are_refused_naming_the_image(tmp_path, term):
    store = make_store(tmp_path / "store", [(3, 3)] * 6)
    broken = sorted(store.glob("*.h5"))[0]
    with h5py.File(broken, "r+") as file:
        name = file["index/path"][1].decode()
        file[f"tokens/{term}"][10, 3] = np.nan  # nine rows an image: it is the second's; HDF5 renews its checksum
    refused(store, tmp_path, NonFiniteError, f"tokens of '{name}' hold NaN")


def test_a_truncated_shard(tmp_path):
    store = make_store(tmp_path / "store", [(3, 3)] * 6)
    broken = sorted(store.glob("*.h5"))[0]
    broken.write_bytes(broken.read_bytes()[:-1000])
    refused(store, tmp_path, StoreError, f"{broken.name}.*damaged")


def test_a_damaged_shard_is_found_by_its_checksum(tmp_path):
    store = make_store(tmp_path / "store", [(3, 3)] * 6)
    broken = sorted(store.glob("*.h5"))[0]
    content = bytearray(broken.read_bytes())
    semantic = FeatureStore(broken).read(0, "semantic")[0].tobytes()
    at = content.index(semantic)
    content[at] ^= 1
    broken.write_bytes(content)
    refused(store, tmp_path, StoreError, f"{broken.name}.*damaged")


def test_too_few_images(tmp_path):
    refused(make_store(tmp_path / "store", [(3, 3)]), tmp_path, StoreError, "holds 1 different image.*at least 2")


def test_prefix_tokens_that_are_not_there(tmp_path):
    store = make_store(tmp_path / "store", [(3, 3)] * 4, prefix=False)
    refused(store, tmp_path, StoreError, "no prefix tokens", use_prefix=True)


def test_heads_that_do_not_divide_the_feature_size(square, tmp_path):
    refused(square, tmp_path, ConfigError, "num_heads must divide feature_dim 16", heads=3)


def test_a_result_that_is_no_safetensors_file(square, tmp_path):
    with pytest.raises(ConfigError, match="safetensors file"):
        train_denoiser(square, tmp_path / "d.pth", short())


def test_a_run_of_other_images_is_not_continued(square, ragged, tmp_path):
    train_denoiser(square, tmp_path / "d.safetensors", short())
    with pytest.raises(ConfigError, match="images"):
        train_denoiser(make_store(tmp_path / "s", [(6, 6)] * 5), tmp_path / "d.safetensors", short())


@pytest.mark.parametrize(
    "changes", [{"kind": "mlp"}, {"validation": 0.0}, {"validation": 1.0}, {"steps": 0}, {"batch_size": 0}]
)
def test_settings_outside_their_range(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        short(**changes)


def test_a_store_of_the_faithful_product_is_trained_on_with_a_word(tmp_path, caplog):
    for product, said in [("removed", True), ("ensembled", False), (None, False)]:
        config = JOB.config if product is None else {**JOB.config, "product": product}
        store = make_store(tmp_path / str(product), [(6, 5)] * 12, replace(JOB, config=config))
        caplog.clear()
        train_denoiser(store, tmp_path / f"{product}.safetensors", short(kind="subtract"))
        assert ("--product ensembled" in caplog.text) is said
