"""Links in output folders, as an unpacked archive or a shared folder may hold them: what they lead to stays."""

import json
import os

import pytest

from dvt.cli.beside import names_beside

SECRET = b"somebody's own words, which no command may change"


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    return path


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("extract", name) for name in ("writer.lock", "config.json", "config.json.part")),
        *(("denoise", name) for name in ("pictures/000.png", "upsampled/000.npy", "writer.lock")),
        *(("train", name) for name in ("d.safetensors", "d.run/run.lock", "d.run/log.csv")),
        *(("analyze", name) for name in ("report.json", "data.npz", "pca.png", "table.csv")),
        *(("export", name) for name in ("index.json", "raw/00000000.npy", "unfinished-export")),
        ("report", "r.html"),
    ],
)
def test_what_a_link_leads_to_stays(
    command, name, link, secret, photos, tmp_path, dvt_command, extract_command, denoise_command, train_command,
    backbone_options, denoised_store,
):  # fmt: skip
    out = tmp_path / "out"
    if command == "denoise":
        name = name.replace("000.", names_beside([photos / "000.png"])[photos / "000.png"] + ".")
    (out / name).parent.mkdir(parents=True)
    link(secret, out / name)
    if command == "export" and name != "unfinished-export":
        (out / "unfinished-export").touch()
    if command == "report":
        dvt_command(["analyze", photos, *backbone_options, "--views", 0, "--out", tmp_path / "analysis"])
    arguments = {
        "extract": lambda: extract_command(photos, out),
        "denoise": lambda: denoise_command(photos / "000.png", out, "--pictures", "--upsample", 2),
        "train": lambda: train_command(out / "d.safetensors"),
        "analyze": lambda: ["analyze", photos, *backbone_options, "--views", 0, "--out", out],
        "export": lambda: ["store", "export", denoised_store, "--out", out],
        "report": lambda: ["report", tmp_path / "analysis", "--out", out / "r.html"],
    }[command]()
    ended = dvt_command(arguments, expect=None)
    assert ended.code in (0, 2), ended
    assert secret.read_bytes() == SECRET


def test_eight_exports_at_once_are_one_whole_export(denoised_store, tmp_path, dvt_command, digests):
    """One writes; the others are told so, or that the folder is taken. Nothing ends in a traceback."""
    arguments = ["store", "export", denoised_store, "--out", tmp_path / "out"]
    started = [dvt_command.start(arguments) for _ in range(8)]
    ended = [dvt_command.wait(each) for each in started]
    assert sorted(each.code for each in ended) == [0, *[2] * 7], ended
    dvt_command(["store", "export", denoised_store, "--out", tmp_path / "alone"])
    for name in ("out", "alone"):
        settings = tmp_path / name / "config.json"
        kept = json.loads(settings.read_text())
        assert kept.pop("out") == str(tmp_path / name)
        settings.write_text(json.dumps(kept))
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")


def test_checkpoints_have_the_umask_s_permissions(train_command, tmp_path, dvt_command):
    dvt_command(train_command(tmp_path / "d.safetensors"))
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "d.run").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}
