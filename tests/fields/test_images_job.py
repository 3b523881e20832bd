"""Stage one over many images: groups and overlap change no bit, faults end the run, and the profile adds up."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dvt.backbones import load_backbone
from dvt.errors import ConfigError, ImageError, NonFiniteError
from dvt.fields import LinearConfig, LinearSolver, NeuralConfig
from dvt.fields.config import DenoiseConfig
from dvt.fields.image import denoise_image
from dvt.fields.images import DecomposeWork, denoise_images
from dvt.jobs.overlap import Ahead, InTurn
from dvt.jobs.profile import STAGES, WAITS, Profile, StageTimer
from dvt.jobs.run import shards_left
from dvt.store import FeatureStore
from dvt.views import ViewConfig

# Views beyond those of the pilot, which are read in another order when images are solved together.
CONFIG = DenoiseConfig(
    views=ViewConfig(count=9, batch=3), linear=LinearConfig(resolution=12, smoothness=0.05, pilot_views=5)
)
WAYS = [(1, False), (3, False), (1, True), (3, True)]


@pytest.fixture
def folder(tmp_path, photo):
    """Five photographs: four of 160 x 160, one of 160 x 240; the first has a copy."""
    pixels = (photo * 255).byte().permute(1, 2, 0).numpy()
    (tmp_path / "in").mkdir()
    for number in range(5):
        top, wide = 40 * number, 160 if number < 4 else 240
        Image.fromarray(pixels[top : top + 160, 100 : 100 + wide]).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "copy.png").write_bytes((tmp_path / "in" / "0.png").read_bytes())
    return tmp_path / "in"


def spoil(folder):
    """A file that is no image, and two copies of one whose header alone can be read."""
    (folder / "1a.png").write_bytes(b"this is no image")
    for name in ("1b.png", "1c.png"):
        (folder / name).write_bytes((folder / "2.png").read_bytes()[:3000])
    return [str(folder / name) for name in ("1a.png", "1b.png", "1c.png")]


def images_of(folder):
    return sorted(folder.iterdir())


def contents(out):
    """Every stored number, by path and term."""
    store = FeatureStore(out)
    arrays = {(path, term): store.read(i, term) for i, path in enumerate(store.images) for term in store.terms}
    return arrays | {(path, "prefix"): store.record(i).prefix for i, path in enumerate(store.images)}


def alive():
    return [thread.name for thread in threading.enumerate() if thread.name == "dvt-ahead"]


def ended_within(seconds, run):
    """What a run raised; it must end, and leave no thread."""
    found = []

    def caught():
        try:
            run()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=caught, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "the run hangs"
    deadline = time.monotonic() + 2
    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive()
    return found[0] if found else None


class Again:
    """An iterable that can be iterated again."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()


# -- groups and overlap -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "overlap"), WAYS)
@pytest.mark.parametrize("batch", [3, 16])
def test_every_stored_number_is_that_of_the_image_alone(tiny_backbone, folder, tmp_path, group, overlap, batch):
    bad = spoil(folder)
    config = replace(CONFIG, views=replace(CONFIG.views, batch=batch), solve_images=group, overlap=overlap)
    ticks = []
    summary = denoise_images(
        tiny_backbone,
        images_of(folder),
        tmp_path / "out",
        config,
        keep_terms=True,
        shard_images=4,
        progress=lambda *call: ticks.append(call),
    )
    assert sorted(path for path, _ in summary.failed) == bad and summary.done == 6
    assert ticks[-1] == ("denoise", 8, 8) and len(ticks) == 9 + 8
    found = contents(tmp_path / "out")
    for path in {path for path, _ in found}:
        result = denoise_image(tiny_backbone, path, config)
        for term, values in result.decomposition.terms().items():
            np.testing.assert_array_equal(found[path, term], values.numpy().astype(np.float16))
        np.testing.assert_array_equal(found[path, "prefix"], result.prefix.numpy().astype(np.float16))
    assert not alive()


@pytest.mark.parametrize(("group", "overlap"), WAYS[1:])
def test_a_shared_artifact_is_the_same_in_every_way(tiny_backbone, folder, tmp_path, group, overlap):
    shared = replace(CONFIG, shared_artifact=True, shared_images=2)
    denoise_images(tiny_backbone, images_of(folder), tmp_path / "one", shared, keep_terms=True)
    other = replace(shared, solve_images=group, overlap=overlap)
    denoise_images(tiny_backbone, images_of(folder), tmp_path / "other", other, keep_terms=True, shard_images=2)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one.keys() == two.keys() and len(one) == 6 * 5
    assert all(np.array_equal(one[key], two[key]) for key in one)


def test_the_neural_solver_takes_every_way(tiny_backbone, folder, tmp_path):
    neural = NeuralConfig(levels=2, finest=16, channels=2, steps=10, tokens_per_step=64)
    config = replace(CONFIG, solver="neural", neural=neural)
    for group, overlap in WAYS[::3]:
        each = replace(config, solve_images=group, overlap=overlap)
        denoise_images(tiny_backbone, images_of(folder)[:3], tmp_path / f"{overlap}", each)
    one, two = contents(tmp_path / "False"), contents(tmp_path / "True")
    assert len(one) == 3 * 3 and all(np.array_equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(("group", "overlap"), WAYS)
@pytest.mark.parametrize("late", [False, True])
def test_nan_in_one_image_is_reported_and_its_group_is_solved(
    make_tiny_backbone, folder, tmp_path, group, overlap, late
):
    """In all its tokens, or in a view alone that the pilot does not read."""
    backbone, paths = make_tiny_backbone(), images_of(folder)[:4]
    denoise_images(backbone, paths, tmp_path / "clean", CONFIG)

    def spoilt(module, inputs, output):
        grey = inputs[0].flatten(1).std(1) < 1e-3
        if late and len(grey) > 1:  # the last batch alone is one view
            return output
        return output.with_patches(torch.where(grey[:, None, None, None], torch.nan, output.patches))

    backbone.register_forward_hook(spoilt)
    grey = folder / "1-grey.png"
    Image.fromarray(np.full((160, 160, 3), 90, np.uint8)).save(grey)
    config = replace(CONFIG, solve_images=group, overlap=overlap)
    summary = denoise_images(backbone, [*paths, grey], tmp_path / "out", config)
    assert [path for path, _ in summary.failed] == [str(grey)] and "NaN" in summary.failed[0][1]
    clean, found = contents(tmp_path / "clean"), contents(tmp_path / "out")
    assert clean.keys() == found.keys() and all(np.array_equal(clean[key], found[key]) for key in clean)
    with pytest.raises(NonFiniteError):
        denoise_images(backbone, [*paths, grey], tmp_path / "strict", config, strict=True)
    assert not alive()


@pytest.mark.parametrize(("group", "overlap"), WAYS)
def test_strict_stops_at_an_unreadable_image_after_the_shards_before_it(
    tiny_backbone, folder, tmp_path, group, overlap
):
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:3000])
    for name, config in (("one", CONFIG), ("other", replace(CONFIG, solve_images=group, overlap=overlap))):
        with pytest.raises(ImageError, match=r"3\.png"):
            denoise_images(tiny_backbone, images_of(folder), tmp_path / name, config, shard_images=2, strict=True)
    before = FeatureStore(tmp_path / "one").images
    assert before and FeatureStore(tmp_path / "other").images == before and not alive()


def test_too_little_memory_for_a_group_is_no_end(tiny_backbone, folder, tmp_path, monkeypatch):
    fit_many = LinearSolver.fit_many

    def cramped(self, views, artifact=None):
        if len(views) > 1:
            next(iter(views[0]))
            raise torch.cuda.OutOfMemoryError("out of memory")
        return fit_many(self, views, artifact)

    denoise_images(tiny_backbone, images_of(folder), tmp_path / "one", CONFIG)
    monkeypatch.setattr(LinearSolver, "fit_many", cramped)
    for overlap in (False, True):
        denoise_images(
            tiny_backbone, images_of(folder), tmp_path / f"{overlap}", replace(CONFIG, solve_images=4, overlap=overlap)
        )
        one, two = contents(tmp_path / "one"), contents(tmp_path / f"{overlap}")
        assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def test_speed_settings_are_no_part_of_the_job():
    assert CONFIG.job_settings() == replace(CONFIG, solve_images=5, overlap=True).job_settings()
    with pytest.raises(ConfigError, match="solve_images"):
        DenoiseConfig(solve_images=0)


# -- the order, and the bound on memory -------------------------------------------------------------------------------


def test_the_backbone_sees_one_image_after_the_other_and_stays_within_the_budget():
    made, held, taken = [], [], []

    def source(name, count):
        def items():
            for number in range(count):
                made.append((name, number))
                held.append(len(made) - len(taken))
                yield name, number

        return Again(items)

    groups = ([source(f"{group}{stream}", 5) for stream in "ab"] for group in range(3))
    with Ahead(groups, lambda group: group, first=3, budget=6) as feed:
        for _, streams in feed:
            time.sleep(0.05)  # the thread has gone ahead as far as it may
            iterators = [iter(stream) for stream in streams]
            for iterator in iterators:  # as the solver reads
                taken.extend(next(iterator) for _ in range(3))
            time.sleep(0.05)
            for iterator in iterators:
                taken.extend(iterator)
    expected = [
        (f"{group}{stream}", number)
        for group in range(3)
        for part in (range(3), range(3, 5))
        for stream in "ab"
        for number in part
    ]
    assert made == taken == expected
    assert max(held) <= 6 + 1 and max(held) >= 6  # one more is made for a reader that waits


@pytest.mark.parametrize("order", ["forwards", "backwards", "in turn", "one alone"])
def test_any_order_of_reading_ends(order):
    def run():
        groups = ([Again(lambda s=s: iter(range(10 * s, 10 * s + 7))) for s in range(3)] for _ in range(2))
        with Ahead(groups, lambda group: group, first=2, budget=2) as feed:
            for _, streams in feed:
                if order == "in turn":
                    found = [list(column) for column in zip(*zip(*streams, strict=True), strict=True)]
                else:
                    chosen = {"forwards": [0, 1, 2], "backwards": [2, 1, 0], "one alone": [1]}[order]
                    read = {s: list(streams[s]) for s in chosen}
                    found = [read.get(s) for s in range(3)]
                for s, values in enumerate(found):
                    assert values in (None, list(range(10 * s, 10 * s + 7)))

    assert ended_within(10, run) is None


def test_a_stream_can_be_read_again_from_its_middle():
    def run():
        groups = ([Again(lambda: iter(range(9)))] for _ in range(1))
        with Ahead(groups, lambda group: group, first=9, budget=4) as feed:
            for _, (stream,) in feed:
                first = iter(stream)
                assert [next(first) for _ in range(3)] == [0, 1, 2]
                assert list(stream) == list(range(9)) and list(stream) == list(range(9))

    assert ended_within(10, run) is None


def test_what_is_being_made_when_a_stream_begins_again_is_dropped():
    passes = []

    def items():
        passes.append(len(passes))
        own = passes[-1]
        for number in range(4):
            time.sleep(0.1 if (own, number) == (0, 2) else 0)  # the reader begins again in the meantime
            yield own, number

    def run():
        with Ahead(([Again(items)] for _ in range(1)), lambda group: group, first=9, budget=9) as feed:
            for _, (stream,) in feed:
                first = iter(stream)
                assert [next(first), next(first)] == [(0, 0), (0, 1)]
                assert list(stream) == [(1, number) for number in range(4)]

    assert ended_within(10, run) is None


def test_ahead_and_in_turn_make_the_same():
    found = []
    for kind in (lambda *a: Ahead(*a, first=1, budget=1), InTurn):
        groups = ([Again(lambda g=g, s=s: iter([(g, s, 0), (g, s, 1)])) for s in range(g)] for g in range(4))
        with kind(groups, lambda group: group) as feed:
            found.append([[list(stream) for stream in streams] for _, streams in feed])
    assert found[0] == found[1] and found[0][3][2] == [(3, 2, 0), (3, 2, 1)]


def test_the_backbone_goes_on_while_images_are_solved(make_tiny_backbone, folder, tmp_path, monkeypatch):
    """Both made slow by sleeping, as if each had a device of its own: 4 passes of 0.05 s and a solve of 0.2 s."""
    backbone, fit = make_tiny_backbone(), LinearSolver.fit
    backbone.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    monkeypatch.setattr(LinearSolver, "fit", lambda *arguments: time.sleep(0.2) or fit(*arguments))
    profiles = [
        denoise_images(
            backbone, images_of(folder), tmp_path / f"{overlap}", replace(CONFIG, overlap=overlap, solve_images=1)
        ).profile
        for overlap in (False, True)
    ]
    assert profiles[1].wall < profiles[0].wall - 0.4  # of the 0.8 s that four of five solves could be hidden
    assert profiles[1].of("wait_solver") < 0.5 * profiles[0].of("wait_solver")


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "overlap"), WAYS[::3])
@pytest.mark.parametrize("error", [ValueError("a fault"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["solver", "backbone", "reader", "tick", "writer"])
def test_what_is_raised_anywhere_ends_the_run(
    make_tiny_backbone, folder, tmp_path, monkeypatch, group, overlap, error, place
):
    backbone, calls = make_tiny_backbone(), []

    def faulty(*_, **__):
        calls.append(place)
        if len(calls) == 2:
            raise error

    if place == "solver":
        fit = LinearSolver.fit_many
        monkeypatch.setattr(LinearSolver, "fit_many", lambda *a: faulty() or fit(*a))
    elif place == "backbone":
        backbone.register_forward_pre_hook(faulty)
    elif place == "reader":
        load = DecomposeWork._load
        monkeypatch.setattr(DecomposeWork, "_load", lambda *a: faulty() or load(*a))
    elif place == "writer":
        monkeypatch.setattr("dvt.jobs.run._written", lambda *a: faulty() or Profile())
    config = replace(CONFIG, solve_images=group, overlap=overlap)

    def run():
        tick = (lambda what, *_: faulty() if what == "denoise" else None) if place == "tick" else None
        denoise_images(backbone, images_of(folder), tmp_path / "out", config, shard_images=2, progress=tick)

    assert ended_within(20, run) is error and len(calls) >= 2


@pytest.mark.parametrize("shards", [0, 1])
def test_a_reader_that_goes_leaves_no_thread(tiny_backbone, folder, tmp_path, shards):
    work = DecomposeWork(tiny_backbone, replace(CONFIG, overlap=True), shard_images=1)
    images = [work.index_image(path) for path in images_of(folder)]
    plan = [(shard, None) for shard in shards_left(images, set(), set(), work.job, work.shard_images)]

    def run():
        made = work.make(iter(plan))
        for _ in range(shards):
            next(made)
        made.close()

    assert ended_within(10, run) is None


INTERRUPTED = """
import os, signal, sys, threading, time
import torch
torch.set_num_threads(1)
from dataclasses import replace
from pathlib import Path
from dvt.backbones import load_backbone
from dvt.fields.images import denoise_images
from dvt.fields import LinearConfig
from dvt.fields.config import DenoiseConfig
from dvt.views import ViewConfig
backbone = load_backbone("test_vit", pretrained=False, size=96)
config = DenoiseConfig(ViewConfig(count=9, batch=3), linear=LinearConfig(resolution=12, smoothness=0.05), overlap=True)
passes = []
backbone.register_forward_pre_hook(
    lambda *_: (passes.append(1), len(passes) == 6 and os.kill(os.getpid(), signal.SIGINT)) and None
)
try:
    denoise_images(backbone, sorted(Path(sys.argv[1]).iterdir()), sys.argv[2], config)
except KeyboardInterrupt:
    names = [thread.name for thread in threading.enumerate()]
    print("interrupted", "dvt-ahead" in names, flush=True)
"""


def test_control_c_ends_an_overlapped_run(folder, tmp_path):
    arguments = [sys.executable, "-c", INTERRUPTED, str(folder), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout.split() == ["interrupted", "False"], done.stderr


# -- the profile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_the_profile_of_a_run_adds_up(tiny_backbone, folder, tmp_path, overlap):
    start = time.perf_counter()
    summary = denoise_images(
        tiny_backbone,
        images_of(folder),
        tmp_path / "out",
        replace(CONFIG, overlap=overlap),
        profile=True,
        on_image=lambda *_: time.sleep(0.02),
    )
    wall, profile = time.perf_counter() - start, summary.profile
    assert 0.8 * wall < profile.wall <= wall
    assert profile.images == 5 and profile.views == 5 * 10
    assert profile.read_bytes == sum(path.stat().st_size for path in images_of(folder) if path.name != "copy.png")
    assert profile.written_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.h5"))
    assert profile.seconds["pictures"] > 5 * 0.02
    assert set(profile.seconds) == {"look", "read", "views", "backbone", "solve", "fetch", "pictures", "write"} | {
        *WAITS[: 3 if overlap else 2]
    }
    assert summary.extraction_seconds == pytest.approx(profile.of("views", "backbone"))
    assert summary.fitting_seconds == pytest.approx(profile.of("solve"))
    # The thread that runs the backbone does these, one after the other.
    ahead = profile.of("wait_images", "views", "backbone", "wait_solver")
    assert ahead < wall
    if not overlap:
        assert ahead + profile.of("look") > 0.8 * wall
    assert not FeatureStore(tmp_path / "out").verify()


def test_operations_are_those_of_the_matrix_products(tiny_backbone, folder, tmp_path):
    """test_vit: 64 channels, blocks of 12 C^2 weights; 36 or 54 patches of 16 x 16 and a class token."""
    model = tiny_backbone.model
    summary = denoise_images(tiny_backbone, images_of(folder), tmp_path / "out", CONFIG, profile=True)
    prefix, blocks = model.num_prefix_tokens, len(model.blocks)
    hidden = model.blocks[0].mlp.fc1.out_features
    expected = 0
    for patches, images in ((36, 4), (54, 1)):
        tokens = patches + prefix
        weights = tokens * (4 * 64 * 64 + 2 * 64 * hidden)
        attention = 2 * tokens * tokens * 64
        expected += 10 * images * 2 * (blocks * (weights + attention) + patches * 3 * 16 * 16 * 64)
    assert summary.profile.flops == pytest.approx(expected, rel=0.02)


def test_without_profile_nothing_is_counted(tiny_backbone, folder, tmp_path):
    assert denoise_images(tiny_backbone, images_of(folder)[:1], tmp_path / "out", CONFIG).profile.flops == 0


def test_profiles_add_and_name_what_bounds():
    one = Profile({"read": 8.0, "backbone": 3.0, "wait_images": 6.0}, wall=10.0, images=2, readers=4)
    two = Profile({"backbone": 2.0, "write": 1.0}, wall=2.0, images=1, read_bytes=5)
    one.add(two)
    assert (one.wall, one.images, one.read_bytes, one.readers) == (12.0, 3, 5, 4)
    assert one.rows() == [
        ("read", 8.0, pytest.approx(8 / 12), pytest.approx(8 / 48)),
        ("backbone", 5.0, pytest.approx(5 / 12), pytest.approx(5 / 12)),
        ("wait images", 6.0, pytest.approx(6 / 12), 0.0),
        ("write", 1.0, pytest.approx(1 / 12), pytest.approx(1 / 12)),
    ]
    assert one.bound().startswith("backbone bounds this run: busy 42% of 12.0 s; the backbone was idle for 7.0 s (58%)")
    one.spend("write", 10.0)
    assert one.bound().startswith("write bounds")
    assert Profile().rows() == [] and set(WAITS) < set(STAGES)


def test_laps_count_what_lies_between_marks():
    laps = StageTimer(torch.device("cpu"))
    for stage in (None, "a", "b", None, "a"):
        laps.mark(stage)
        time.sleep(0.02)
    seconds = laps.seconds()
    assert set(seconds) == {"a", "b"} and 0.04 <= seconds["a"] < 0.2 and 0.02 <= seconds["b"] < 0.1


# -- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_overlap_changes_no_token(make_tiny_backbone, folder, tmp_path):
    """The same kernels on the same numbers: an unfinished hand-over between the streams would show."""
    backbone = make_tiny_backbone().cuda()
    for group in (1, 4):
        runs = []
        for number, overlap in enumerate((False, True, True, True)):
            config = replace(CONFIG, solve_images=group, overlap=overlap)
            out = tmp_path / f"{group}{number}"
            denoise_images(backbone, images_of(folder), out, config, keep_terms=True)
            runs.append(contents(out))
        for other in runs[1:]:
            assert runs[0].keys() == other.keys()
            for key, values in runs[0].items():
                np.testing.assert_allclose(values.astype(float), other[key].astype(float), rtol=1e-2, atol=1e-2)
                if key[1] in ("raw", "prefix"):
                    np.testing.assert_array_equal(values, other[key])


@pytest.mark.parametrize("settings", [{}, {"overlap": True}, {"solve_images": 3}, {"shared_artifact": True}])
def test_settings_with_which_no_image_can_be_used_are_refused_once(folder, tmp_path, settings):
    backbone = load_backbone("test_vit", pretrained=False, size=96, stride=12)
    with pytest.raises(ConfigError, match=r"no image can be used .* stride of 12 do not coincide .*--stride 16 or 8"):
        denoise_images(backbone, images_of(folder), tmp_path / "out", DenoiseConfig(views=4, **settings))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="needs at least 2 x 2"):
        one = load_backbone("test_vit", pretrained=False, size=16)
        denoise_images(one, images_of(folder), tmp_path / "out", DenoiseConfig(views=4, **settings))
    crops = DenoiseConfig(views=4, product="ensembled", **settings)
    assert denoise_images(backbone, images_of(folder), tmp_path / "crops", crops).done == 6
    with pytest.raises(ImageError, match="--product ensembled"):
        denoise_image(backbone, torch.rand(3, 96, 112), DenoiseConfig())
    half = load_backbone("test_vit", pretrained=False, size=96, stride=8)
    assert denoise_images(half, images_of(folder), tmp_path / "half", DenoiseConfig(views=4, **settings)).done == 6


@pytest.mark.parametrize("product", ["removed", "ensembled", "blend"])
def test_small_grids_are_done_and_grids_of_one_row_are_reported(tiny_backbone, tmp_path, product):
    for name, size in [("small", (40, 32)), ("row", (160, 16)), ("wide", (64, 32))]:
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"{name}.png")
    backbone = load_backbone("test_vit", pretrained=False, size=32)
    summary = denoise_images(backbone, sorted(tmp_path.glob("*.png")), tmp_path / "out", DenoiseConfig(product=product))
    assert not summary.failed and summary.done == 3
    row = load_backbone("test_vit", pretrained=False, size=16)
    with pytest.raises(ConfigError, match=r"no image can be used .*at least 2 x 2: choose a larger"):
        denoise_images(row, sorted(tmp_path.glob("*.png")), tmp_path / "row", DenoiseConfig(product=product))
