"""Every file that dvt reads back, exchanged for what nobody should read: an error in words, and at once.

Pipes are not waited for, devices and sparse files of a terabyte take no memory, depth and digits end no process.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dvt.analysis import Report
from dvt.analysis.priors.config import PriorConfig
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.reading import opened_tokens
from dvt.analysis.priors.runs import open_run
from dvt.analysis.priors.texts import read_texts
from dvt.analysis.probes.datasets import open_data
from dvt.backbones.names import resolved_name
from dvt.backbones.weights import read_state
from dvt.denoiser import Denoiser
from dvt.denoiser.distill.job import read_card
from dvt.errors import DvtError
from dvt.training import TrainingConfig, train
from dvt.training.log import RunLog

pytestmark = pytest.mark.timeout(60)


def trained(folder):
    """Two steps of three, or what is left of them."""

    def loss(model, batch):
        return {"loss": (model(batch) - 1).square().mean()}

    config = TrainingConfig(steps=3, batch_size=2, learning_rate=0.1, ema=0.5, checkpoint_every=1, log_every=1, keep=1)
    stop = None if (folder / "step-00000002").exists() else lambda path: path.name == "step-00000002"
    train(torch.nn.Linear(3, 2), loss, lambda *_: torch.ones(2, 3), config, folder, on_checkpoint=stop)


def prior_run(folder):
    prior = Prior(PriorConfig((2, 2), 12, 5, (2, 3), width=8, depth=1, heads=2), torch.Generator().manual_seed(0))
    prior.card = {"condition": "patch", "target": {"kind": "pixels", "patch": 2, "mean": [0.5], "std": [0.2]}}
    prior.save(folder / "prior.safetensors")
    held = {"pictures": torch.rand(2, 3, 4, 4), "maps": torch.rand(2, 2, 2, 12), "conditions": torch.rand(2, 6, 5)}
    save_file(held, folder / "held_out.safetensors", {"images": '["a", "b"]'})


def boxes(folder):
    (folder / "images").mkdir()
    Image.new("RGB", (40, 30), "grey").save(folder / "images" / "a.png")
    entry = {"width": 40, "height": 30, "boxes": [[1, 2, 30, 20]], "source": "mine"}
    (folder / "boxes.json").write_text(json.dumps({"a.png": entry}))


BOX = "<xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax>"
VOC = f"<annotation><object><bndbox>{BOX}</bndbox></object></annotation>"


def voc(folder):
    for name in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (40, 30), "grey").save(folder / "JPEGImages" / "a.jpg")
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (folder / "Annotations" / "a.xml").write_text(VOC)


def tokens(folder):
    wanted = {"condition": None, "features": False, "side": 4}
    plain = {"names": ["a", "b"], "sha256s": ["0" * 64] * 2, "grid": [2, 3], "mirrored": 0, "skipped": []}
    (folder / "about.json").write_text(json.dumps({"from": {"wanted": wanted}, **plain}))
    np.save(folder / "pictures.npy", np.zeros((2, 3, 4, 4), np.float16))


def texts(folder):
    (folder / "texts.jsonl").write_text('{"image": "a.png", "text": "a bear", "rewrites": ["bear"]}\n')


def log(folder):
    (folder / "log.csv").write_text("step,lr,loss\n1,.1,.5\n")


def card(folder):
    save_file({"x": torch.ones(1)}, folder / "b.safetensors", {"dvt": '{"schema": "dvt-backbone/1"}'})


def settings(folder):
    (folder / "config.json").write_text('{"architecture": "test_vit"}')


# By name: how it is made, the file that is exchanged, and how it is read.
READERS = {
    "a checkpoint's state": (trained, "step-00000002/state.json", trained),
    "a checkpoint's weights": (trained, "step-00000002/ema.safetensors", trained),
    "a prior": (prior_run, "prior.safetensors", open_run),
    "a prior's held-out images": (prior_run, "held_out.safetensors", open_run),
    "a prior's kept tokens": (tokens, "about.json", opened_tokens),
    "a prior's kept pictures": (tokens, "pictures.npy", opened_tokens),
    "texts": (texts, "texts.jsonl", lambda folder: read_texts(folder / "texts.jsonl", ["a.png"])),
    "boxes": (boxes, "boxes.json", lambda folder: open_data(folder, "boxes")),
    "VOC's boxes": (voc, "Annotations/a.xml", lambda folder: open_data(folder, "boxes")),
    "VOC's list": (voc, "ImageSets/Main/train.txt", lambda folder: open_data(folder, "boxes")),
    "a distilled backbone's card": (card, "b.safetensors", lambda folder: read_card(folder / "b.safetensors")),
    "a model's folder": (settings, "config.json", lambda folder: resolved_name(str(folder))),
    "a log": (log, "log.csv", lambda folder: RunLog(folder / "log.csv", 1, False).rows),
}
QUIET = {"a log"}  # of which what cannot be read is left out, row by row


def exchanged(path, make):
    path.unlink()
    make(path)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


SWAPS = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a terabyte": sparse,
    "nothing": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00" * 50),
    "depth": lambda path: path.write_bytes(b"[" * 200_000),
    "deep objects": lambda path: path.write_bytes(b'{"a":' * 200_000),
    "digits": lambda path: path.write_bytes(b"9" * 100_000),
    "a list": lambda path: path.write_bytes(b"[1]"),
    "null": lambda path: path.write_bytes(b"null"),
}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_exchanged_for_what_nobody_should_read(reader, swap, tmp_path, attacks):
    attacks["readers"] += 1
    make, name, read = READERS[reader]
    make(tmp_path)
    read(tmp_path)  # whole, it is read
    if reader.startswith("a checkpoint"):  # which has gone on meanwhile
        shutil.rmtree(tmp_path)
        make(tmp_path)
    exchanged(tmp_path / name, SWAPS[swap])
    try:
        read(tmp_path)
    except DvtError as error:
        assert (tmp_path / name).name in str(error) or str(tmp_path) in str(error)
    else:
        assert reader in QUIET


def rewritten(path, value, *keys):
    """A JSON file with another value at a place."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


ODD = [None, True, "1", -1, 1e300, 10**30, float("nan"), float("inf"), [], [[]], {}, {"a": 1}]
PLACES = {
    "a checkpoint's state": [("step",), ("config",), ("settings",), ("scaler",)],
    "boxes": [
        ("a.png",), ("a.png", "width"), ("a.png", "height"), ("a.png", "boxes"), ("a.png", "boxes", 0),
        ("a.png", "boxes", 0, 1),
    ],
    "a prior's kept tokens": [
        ("from",), ("from", "wanted"), ("from", "wanted", "side"), ("from", "store"), ("names",), ("names", 0),
        ("sha256s",), ("grid",), ("grid", 0), ("mirrored",), ("skipped",),
    ],
    "texts": [("image",), ("text",), ("rewrites",), ("rewrites", 0)],
    "a model's folder": [("architecture",)],
}  # fmt: skip


@pytest.mark.parametrize("reader", PLACES)
def test_values_of_other_types_and_ranges(reader, tmp_path, attacks):
    """Refused in words, or of no consequence; never an error of Python's."""
    make, name, read = READERS[reader]
    refused = 0
    for number, (place, value) in enumerate((place, value) for place in PLACES[reader] for value in ODD):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder)
        rewritten(folder / name, value, *place)
        try:
            read(folder)
        except DvtError:
            refused += 1
    attacks["readers"] += len(ODD) * len(PLACES[reader])
    assert refused > len(ODD) * len(PLACES[reader]) // 2 or reader == "a model's folder", refused


def test_the_boxes_of_a_document_with_entities_are_refused(tmp_path):
    voc(tmp_path)
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    bomb = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "1">{entities}]>{VOC.replace("<xmin>1", "<xmin>&l9;")}'
    (tmp_path / "Annotations" / "a.xml").write_text(bomb)
    with pytest.raises(DvtError, match="document type"):
        open_data(tmp_path, "boxes")


def test_a_folder_of_timm_is_read_by_dvt_alone(tmp_path, make_tiny_backbone):
    """Some versions of timm unpickle what lies in such a folder; and they prefer other names than these."""
    import pickle

    import dvt

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    settings(tmp_path)
    for name in ("pytorch_model.bin", "model.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(), 2))
        with pytest.raises(DvtError):
            dvt.load_backbone(str(tmp_path))
        assert not (tmp_path / "canary").exists()
    state = make_tiny_backbone().model.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    loaded = dvt.load_backbone(str(tmp_path)).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items() if name != "pos_embed")
    assert not (tmp_path / "canary").exists()


def test_exported_models_are_no_weights(tmp_path, attacks):
    """ONNX and .pt2 of strangers, under any name: refused, whatever pickles lie in them."""
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
    torch.export.save(program, tmp_path / "plain.pt2")
    evil = b"cos\nmkdir\n(V" + str(tmp_path / "canary").encode() + b"\ntR."
    with zipfile.ZipFile(tmp_path / "plain.pt2") as plain, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as archive:
        root = plain.namelist()[0].split("/")[0]
        for name in plain.namelist():
            archive.writestr(name, evil if name.endswith(".pt") else plain.read(name))
        for name in ("data.pkl", "byteorder", "version", "data/0"):
            if f"{root}/{name}" not in plain.namelist():
                archive.writestr(f"{root}/{name}", evil if name == "data.pkl" else b"3")
    (tmp_path / "external.onnx").write_bytes(b"\x08\x0a:0\n.B\x01wj\x11\n\x08location\x12\x05/etcx" * 3)
    sources = [(tmp_path / name).read_bytes() for name in ("plain.pt2", "evil.pt2", "external.onnx")]
    for number, content in enumerate(sources):
        for suffix in (".onnx", ".pt2", ".pth", ".pt", ".bin", ".safetensors"):
            path = tmp_path / f"given{number}{suffix}"
            path.write_bytes(content)
            for read in (read_state, Denoiser.from_pretrained, read_card, Prior.load):
                attacks["readers"] += 1
                with pytest.raises(DvtError):
                    read(path)
    assert not (tmp_path / "canary").exists()


def test_a_model_of_transformers_runs_no_code_of_its_folder(tmp_path):
    import dvt

    pytest.importorskip("transformers")
    about = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\n")
    with pytest.raises(DvtError, match="transformers cannot load"):
        dvt.load_backbone(str(tmp_path))
    assert not (tmp_path / "canary").exists()


def test_a_report_s_files_may_be_anything(tmp_path, dvt_command, backbone_options, photos):
    dvt_command(["analyze", photos, *backbone_options, "--views", 0, "--out", tmp_path / "whole"])
    for name in ("report.json", "data.npz"):
        for number, swap in enumerate(SWAPS.values()):
            folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"{name}{number}"))
            exchanged(folder / name, swap)
            with pytest.raises(DvtError):
                Report.load(folder)


def test_a_denoiser_s_file_may_be_anything(tmp_path, denoiser_file):
    path = tmp_path / "d.safetensors"
    for swap in SWAPS.values():
        swap(path)
        with pytest.raises(DvtError):
            Denoiser.from_pretrained(path)
        path.rmdir() if path.is_dir() else path.unlink()
    state = load_file(denoiser_file)
    for described in ("[" * 100_000, "9" * 5000, "null", "[]", '{"schema": []}'):
        save_file(state, path, {"dvt": described})
        for read in (Denoiser.from_pretrained, read_card, Prior.load):
            with pytest.raises(DvtError):
                read(path)
