"""Commands write to a place that is theirs: refused, continued, begun anew, and without a trace after a refusal."""

import json
import shutil

import pytest
from skimage import data, io

from dvt.cli import main
from dvt.cli.commands import COMMANDS
from dvt.cli.settings.common import Remade

WITH = ("--weights", "demo", "--size", "64", "--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photographs, a store of them, and a prior without a condition."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos").mkdir()
    for number in range(44):
        image = data.astronaut()[8 * number : 8 * number + 80, 4 * number : 4 * number + 100]
        io.imsave(folder / "photos" / f"{number}.png", image)
    (folder / "bad.png").write_bytes(b"no image")
    two = [str(folder / "photos" / f"{number}.png") for number in (0, 9)]
    assert main(["extract", *two, *WITH, "--out", str(folder / "s"), "-q"]) == 0
    prior = ("--condition", "None", "--side", "8", "--steps", "2", "--batch-size", "4", "--held-out", "0.5")
    small = ("--width", "32", "--depth", "1", "--heads", "2")
    assert main(["prior", "train", str(folder / "photos"), "--out", str(folder / "run"), *prior, *small, "-q"]) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


#: Inputs that a command refuses as late as it can: its model is loaded, or its store is open.
REFUSED = {
    "demo": None,
    "doctor": None,
    "denoise": ("bad.png", *WITH, "--out", "deep/o"),
    "extract": ("bad.png", *WITH, "--out", "deep/o"),
    "inspect": None,
    "store merge": ("s", "photos", "--out", "deep/o"),
    "store export": ("s", "--out", "deep/o", "--terms", "semantic"),
    "train": ("s", "--out", "deep/o.safetensors"),
    "remedy": ("registers", "bad.png", *WITH, "--out", "deep/o.safetensors"),
    "distill": ("bad.png", *WITH, "--teacher", "raw", "--out", "deep/o.safetensors"),
    "export": (*WITH[:4], "--opset", "3", "--out", "deep/o.onnx"),
    "show": ("bad.png", *WITH, "--out", "deep/o"),
    "view": ("photos", "--out", "deep/o.html"),
    "match": ("photos/0.png", "bad.png", *WITH, "--views", "0", "--out", "deep/o"),
    "search": ("bad.png", "s", *WITH, "--views", "0", "--out", "deep/o"),
    "analyze": ("bad.png", *WITH, "--views", "0", "--out", "deep/o"),
    "report": ("s", "--out", "deep/o.html"),
    "probe": ("knn", "photos", *WITH, "--out", "deep/o.json"),
    "predict": ("bad.png", "photos", "--out", "deep/o"),
    "prior train": ("bad.png", *WITH, "--out", "deep/o"),
    "prior sample": ("s", "--out", "deep/o.png"),
    "prior evaluate": None,
    "prior compare": ("bad.png", *WITH, "--out", "deep/o"),
    "prior loop": ("s", "--out", "deep/o"),
    "prior represent": ("run", "--out", "deep/o"),
    "prior tower": ("photos", "--texts", "bad.png", "--out", "deep/o.safetensors"),
    "prior itit": ("photos", "--texts", "bad.png", "--out", "deep/o"),
    "config": None,
    "completion": None,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_refusal_leaves_nothing(name, here, capsys):
    if (arguments := REFUSED[name]) is None:  # it writes nothing, or takes nothing that could be refused
        return
    assert main([*name.split(), *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") or "skipped" in said.out + said.err, said
    assert not (here / "deep").exists(), list(here.glob("deep/**/*"))


@pytest.mark.parametrize("name", [name for name, (settings, _) in COMMANDS.items() if issubclass(settings, Remade)])
def test_a_run_of_another_command_cannot_go_on(name, here, run):
    """Whatever the command, and before anything is loaded; its files stay."""
    arguments = list(REFUSED[name])
    place = "o.safetensors" if arguments[arguments.index("--out") + 1].endswith(".safetensors") else "o"
    arguments[arguments.index("--out") + 1] = place
    folder = here / ("o.run" if "." in place else "o")
    folder.mkdir()
    other = "prior train" if name != "prior train" else "train"
    (folder / "config.json").write_text(json.dumps({"command": other}))
    arguments = [each if each not in ("bad.png", "photos") else "photos/0.png" for each in arguments]
    for more in ((), ("--overwrite",)):
        said = run(*name.split(), *arguments, *more, expect=2)
        assert f"was made by `dvt {other}`, and this is `dvt {name}`" in said and "--resume" not in said
    assert "not of `dvt" in run(*name.split(), *arguments, "--resume", expect=2)
    assert [each.name for each in folder.iterdir()] == ["config.json"]


def test_a_store_of_another_command_is_not_to_be_resumed(here, run):
    said = run("denoise", "photos/0.png", *WITH, "--out", "s", expect=2)
    assert "made by `dvt extract`" in said and "--overwrite" in said and "--resume" not in said
    (here / "s" / "config.json").unlink()  # the shards tell it, too
    said = run("denoise", "photos/0.png", *WITH, "--out", "s", "--no-pictures", expect=2)
    assert "made by `dvt extract`" in said and "--overwrite" in said and "--resume" not in said
    assert run("denoise", "photos/0.png", *WITH, "--out", "s", "--no-pictures", "--overwrite")["done"] == 1


def test_a_conflict_names_the_option_that_changed_and_not_what_follows(here, run):
    options = ("photos/0.png", *WITH, "--no-pictures", "--out", "d")
    run("denoise", *options)
    said = run("denoise", *options, "--product", "ensembled", expect=2)
    assert "was made with --product removed (you ask for ensembled). Go on" in said
    said = run("denoise", *options, "--views", 9, "--seed", 1, expect=2)
    assert "made with --views 16 (you ask for 9), --seed 0 (you ask for 1). Go on" in said


@pytest.mark.parametrize("form", ["npy", "safetensors", "zarr"])
def test_an_export_is_continued_or_made_anew(form, here, run, digests):
    if form == "zarr":
        pytest.importorskip("zarr")
    run("store", "export", "s", "--out", "e", "--format", form)
    before = digests(here / "e")
    (here / "e" / "mine.txt").write_text("mine")
    assert "--overwrite" in run("store", "export", "s", "--out", "e", "--format", form, expect=2)
    (here / "e" / "unfinished-export").write_text(json.dumps({"format": form}))  # as if it had been interrupted
    (here / "e" / "config.json").write_text(json.dumps({"command": "store export", "store": "s", "form": form}))
    other = "npy" if form != "npy" else "safetensors"
    said = run("store", "export", "s", "--out", "e", "--format", other, expect=2)
    assert f"format '{form}' (you ask for '{other}')" in said and "--resume" in said
    (here / "e" / "unfinished-export").write_text("")
    assert run("store", "export", "--out", "e", "--resume")["settings"]["form"] == form
    run("store", "export", "s", "--out", "e", "--format", other, "--overwrite")
    run("store", "export", "s", "--out", "e", "--format", form, "--overwrite")
    assert (here / "e" / "mine.txt").read_text() == "mine"
    assert digests(here / "e").keys() - before.keys() == {"mine.txt"}
    assert "is no export" in run("store", "export", "s", "--out", "photos", "--overwrite", expect=2)
    assert len(list((here / "photos").iterdir())) == 44


def test_a_loop_is_continued_or_begun_anew(here, run):
    loop = ("--rounds", 1, "--round-steps", 1, "--seeds", 2, "--steps", 2)
    first = run("prior", "loop", "run", "--out", "l", *loop)
    said = run("prior", "loop", "run", "--out", "l", *loop, "--mix", 2, expect=2)
    assert "mix 1.0 (you ask for 2.0)" in said and "--resume" in said  # the rounds are of other samples
    assert run("prior", "loop", "--out", "l", "--resume")["distances"] == first["distances"]
    (here / "l" / "notes.txt").write_text("mine")
    anew = run("prior", "loop", "run", "--out", "l", *loop, "--mix", 2, "--overwrite")
    assert anew["settings"]["loop"]["mix"] == 2 and (here / "l" / "notes.txt").exists()


def test_a_comparison_is_continued_or_begun_anew(here, run):
    some = [f"photos/{number}.png" for number in range(30)]
    small = ("--seeds", 2, "--kinds", "raw", "--side", 8, "--steps", 1, "--width", 32, "--depth", 1, "--heads", 2)
    run("prior", "compare", *some, *WITH, *small, "--out", "c")
    said = run("prior", "compare", *some, *WITH[:2], "--size", 48, *small, "--out", "c", expect=2)
    assert "(you ask for" in said and "--resume" in said and "choose another folder" in said
    assert run("prior", "compare", "--out", "c", "--resume")["settings"]["size"] == 64
    anew = run("prior", "compare", *some, *WITH[:2], "--size", 48, *small, "--out", "c", "--overwrite")
    assert anew["settings"]["size"] == 48


def test_files_of_a_folder_without_a_run_are_the_users_own(here, run):
    (here / "mine" / "tokens").mkdir(parents=True)
    (here / "mine" / "config.json").write_text("{}")
    run("prior", "train", "bad.png", *WITH, "--out", "mine", "--overwrite", expect=2)
    assert (here / "mine" / "tokens").exists() and (here / "mine" / "config.json").read_text() == "{}"


def test_images_of_a_few_patches_end_in_words(here, run):
    """Of which no score of position can be made, or which too few views decompose."""
    photos = [f"photos/{number}.png" for number in range(0, 40, 10)]
    small = ("--weights", "demo", "--size", 32, "--views", 3, "--device", "cpu", "--dtype", "float32", "--no-pictures")
    assert run("denoise", photos[0], *small, "--out", "one")["position"] == {}
    code = main(["denoise", *photos, *map(str, small), "--out", "some"])
    assert code in (0, 2)


def test_what_two_commands_said_badly(here, run):
    assert "must lie in 0..65535" in run("view", "s", "--port", 99999, "--no-browser", expect=2)
    said = run("analyze", "photos", *WITH[:2], "--stride", 12, "--out", "o", expect=2)
    assert "no image can be used" in said and "ahead" not in said
    for line, wanted in {
        ("match", "a.png"): "SECOND and --out PATH must be given",
        ("remedy",): "REMEDY (one of registers, ",
        ("match", "a", "b", "c", "--out", "o"): "c is one argument too many",
        ("denoise", "a", "--out", "o", "--views"): "--views must be given a value",
        ("prior", "train", "a", "--condition", "class"): "'class' is not among the choices; did you mean 'cls'?",
    }.items():
        assert wanted in run(*line, expect=2)
