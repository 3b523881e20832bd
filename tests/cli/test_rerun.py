"""Runs are continued with their own settings, begun anew, replayed, logged and kept quiet."""

import json

import pytest
from skimage import data, io

from dvt.cli import main
from dvt.cli.common import duration
from dvt.store import FeatureStore

WITH = ("--weights", "demo", "--size", "64", "--device", "cpu", "--dtype", "float32")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three photographs in the working folder."""
    for name, image in {"a": data.astronaut(), "b": data.coffee(), "c": data.chelsea()}.items():
        io.imsave(tmp_path / f"{name}.png", image[:200, :260])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def denoise(run, *more, expect=0):
    return run("denoise", "a.png", "b.png", *WITH, "--out", "s", *more, expect=expect)


def test_a_store_goes_on_with_its_own_settings_or_begins_anew(run, photos, digests):
    denoise(run, "--views", 5, "--strength", 0.5)
    (photos / "s" / "notes.txt").write_text("mine")
    before = digests(photos / "s", "*.h5")
    said = denoise(run, "--views", 6, expect=2)
    assert "--views 5 (you ask for 6)" in said and "--strength 0.5 (you ask for 1.0)" in said
    assert "--resume" in said and "--overwrite" in said and "seed" not in said
    again = run("denoise", "c.png", "--out", "s", "--resume")  # the views, the strength, the size and the weights
    assert (again["done"], len(FeatureStore("s"))) == (1, 3)
    assert before.items() <= digests(photos / "s", "*.h5").items()
    anew = denoise(run, "--views", 6, "--overwrite")
    assert (anew["done"], len(FeatureStore("s")), FeatureStore("s").job.config["views"]["count"]) == (2, 2, 6)
    pictures = {file.name for file in (photos / "s" / "pictures").glob("*.png")}
    assert set(json.loads((photos / "s" / "pictures" / "index.json").read_text())) == pictures and len(pictures) == 2
    assert (photos / "s" / "notes.txt").read_text() == "mine"


def test_a_strength_scales_what_is_removed(run, photos):
    denoise(run, "--views", 4, "--keep-terms", "--no-pictures")
    run("denoise", "a.png", *WITH, "--views", 4, "--keep-terms", "--no-pictures", "--strength", 0.25, "--out", "t")
    whole, quarter = (
        {term: FeatureStore(name).read(0, term) for term in ("raw", "semantic", "artifact")} for name in "st"
    )
    assert (whole["raw"] == quarter["raw"]).all()
    wanted = whole["raw"] + 0.25 * (whole["semantic"].astype("f4") - whole["raw"])
    assert abs(quarter["semantic"] - wanted).max() < 0.01
    assert abs(quarter["artifact"] - 0.25 * whole["artifact"].astype("f4")).max() < 0.01


def test_a_training_goes_on_with_its_own_settings_or_begins_anew(run, photos):
    denoise(run, "--views", 4, "--no-pictures")
    run("train", "s", "--out", "d.safetensors", "--steps", 4, "--batch-size", 2, "--strength", 0.5)
    said = run("train", "s", "--out", "d.safetensors", "--steps", 6, "--batch-size", 2, expect=2)
    assert "steps 4 (you ask for 6)" in said and "batch_size" not in said
    assert run("train", "--out", "d.safetensors", "--resume")["steps"] == 4
    anew = run("train", "s", "--out", "d.safetensors", "--steps", 6, "--batch-size", 2, "--overwrite")
    assert anew["steps"] == 6
    replayed = run("train", "--config", "d.run/config.json", "--out", "e.safetensors", "--strength", 0.5)
    assert replayed["steps"] == 6
    from dvt.denoiser import Denoiser

    assert (Denoiser.from_pretrained("d.safetensors").strength, Denoiser.from_pretrained("e.safetensors").strength) == (
        1,
        0.5,
    )


def test_the_strength_of_a_denoiser_belongs_to_the_job(run, photos):
    run("remedy", "noise", *WITH, "--out", "n.safetensors", "--noise-images", 2)
    with_half = ("a.png", *WITH, "--denoiser", "n.safetensors", "--strength", 0.5)
    run("extract", *with_half, "--out", "x")
    stored = FeatureStore("x", "denoised").job.config["denoiser"]["strength"]
    assert stored == 0.5
    said = run("extract", "a.png", *WITH, "--denoiser", "n.safetensors", "--out", "x", expect=2)
    assert "--strength 0.5 (you ask for 1.0)" in said
    assert "also give --denoiser" in run("extract", "a.png", *WITH, "--strength", 0.5, "--out", "y", expect=2)


def test_resume_without_a_run_says_what_is_missing(run, photos):
    assert "--out" in run("denoise", "a.png", "--resume", expect=2)
    said = run("denoise", "a.png", "--resume", "--out", "none", expect=2)
    assert "none/config.json" in said and not (photos / "none").exists()


def test_quiet_prints_nothing_and_a_log_holds_everything(photos, capsys):
    line = ["extract", "a.png", "b.png", *WITH, "--out", "s"]
    assert main([*line, "-q", "--log-file", "logs/l.txt"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*line, "--layer", "3", "--log-file", "logs/l.txt"]) == 2
    log = (photos / "logs" / "l.txt").read_text()
    assert log.count("dvt extract a.png b.png") == 2 and "done; exit code 0" in log
    assert "2 images" in log and "layer -1 (you ask for 3)" in log and log.rstrip().endswith("exit code 2")
    assert "choose another place" in (main([*line, "--log-file", "a.png/l"]), capsys.readouterr().err)[1]


def test_images_left_out_for_one_reason_are_printed_once(photos, capsys):
    for name in "defg":
        (photos / f"{name}.jpg").write_bytes(b"no image")
    assert main(["extract", ".", *WITH, "--out", "s"]) == 2
    out, err = capsys.readouterr()
    assert out.count("d.jpg") == 1 and "skipped 4 images" in out and "and 1 more" in out and "d.jpg" not in err


@pytest.mark.parametrize(
    ("seconds", "said"), [(4, "5 seconds"), (89, "90 seconds"), (91, "2 minutes"), (9000, "2.5 hours")]
)
def test_a_duration_in_words(seconds, said):
    assert duration(seconds) == f"about {said}"


def test_the_time_ahead_is_said_once_from_the_first_images_or_from_a_pass(monkeypatch):
    import io
    import time

    from rich.console import Console

    from dvt.backbones import load_backbone
    from dvt.cli import common

    monkeypatch.setattr(common, "_MEASURED", 0.05)
    console = Console(file=(out := io.StringIO()), width=80)
    with common.progress_bar(console) as progress:
        for done in range(4):
            time.sleep(0.1)
            progress("images", done, 2000)
    assert out.getvalue().count("ahead") == 1 and "minutes ahead, 199" in out.getvalue()
    monkeypatch.setattr(common, "_WORTH_TELLING", 0.0)
    common.say_ahead(console, load_backbone("test_vit", pretrained=False), 100, "3 images")
    assert "3 images: about" in out.getvalue() and "100 passes of the backbone" in out.getvalue()


def test_a_distributed_run_removes_nothing(run, photos, monkeypatch):
    denoise(run, "--views", 4, "--no-pictures")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in run("train", "s", "--out", "d.safetensors", "--overwrite", expect=2)
