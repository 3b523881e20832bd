"""Denoisers as files, folders and repositories, and the checkpoints that the paper's authors publish."""

import ast
import base64
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block

import dvt
from dvt.backbones import load_backbone
from dvt.denoiser import PUBLISHED, Denoiser, DenoiserConfig, published_backbone_state, published_file
from dvt.denoiser.config import DENOISER_KINDS
from dvt.errors import BackboneError, ConfigError, WeightsError

CARD = {"backbone": "test_vit", "layer": -1, "stride": [16, 16], "data": "10 photographs", "metrics": {"cosine": 0.9}}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made(kind="block", channels=32, **settings):
    denoiser = Denoiser(DenoiserConfig(kind, channels, (4, 5), **settings), generator())
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator(tensor.numel()))
    denoiser.card = json.loads(json.dumps(CARD))
    return denoiser.eval()


def tokens(channels=32):
    return torch.randn(2, 4, 5, channels, generator=generator(1))


def put_in_cache(cache, repository, name, source):
    """A file in a local cache, laid out as huggingface_hub lays it."""
    home, commit = cache / f"models--{repository.replace('/', '--')}", "c" * 40
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    target = home / "snapshots" / commit / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(Path(source).read_bytes())


def edited(path, **changes):
    """The same file with other metadata: a dict of what to change in its description."""
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["dvt"])
    save_file(load_file(path), path, metadata={"dvt": json.dumps(description | changes)})
    return path


# ------------------------------------------------------------------------------------------------ files and folders


@pytest.mark.parametrize("kind", DENOISER_KINDS)
@pytest.mark.parametrize("form", ["denoiser.safetensors", "folder"])
def test_what_is_saved_comes_back(kind, form, tmp_path):
    denoiser = made(kind)
    denoiser.strength = 0.75
    denoiser.save_pretrained(tmp_path / form)
    other = Denoiser.from_pretrained(tmp_path / form)
    assert torch.equal(other(tokens()), denoiser(tokens()))
    assert other.card == denoiser.card and other.strength == 0.75 and not other.training
    again = tmp_path / "again.safetensors"
    other.save_pretrained(again)
    saved = tmp_path / form if form.endswith("safetensors") else tmp_path / form / "model.safetensors"
    assert again.read_bytes() == saved.read_bytes()


def test_every_setting_of_a_block_comes_back(tmp_path):
    denoiser = made(depth=2, num_heads=4, mlp_ratio=1.5, position=False, use_prefix=True)
    denoiser.save_pretrained(tmp_path / "d.safetensors")
    assert Denoiser.from_pretrained(str(tmp_path / "d.safetensors")).config == denoiser.config


def test_one_file_holds_everything_and_nothing_else_is_written(tmp_path):
    made().save_pretrained(tmp_path / "new" / "d.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["d.safetensors"]


def test_a_folder_has_a_config_and_a_card_that_people_can_read(tmp_path):
    denoiser = made()
    denoiser.card["backbone"] = "vit_small_patch14_dinov2.lvd142m"
    denoiser.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["config"]["grid"] == [4, 5]
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "timm/vit_small_patch14_dinov2.lvd142m"
    assert "10 photographs" in card.text and "| metrics.cosine | 0.9 |" in card.text and "{" not in card.text
    (tmp_path / "README.md").write_text("my own words")
    denoiser.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "d.safetensors"
    made().save_pretrained(path)
    before = path.read_bytes()
    broken = made("conv1x1")
    broken.card["metrics"] = {"cosine": float("nan")}
    with pytest.raises(ConfigError, match="card holds only"):
        broken.save_pretrained(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_denoiser_in_half_precision_is_saved_small_and_read_in_full(tmp_path):
    made().save_pretrained(tmp_path / "full.safetensors")
    made().half().save_pretrained(tmp_path / "half.safetensors")
    full, half = (Denoiser.from_pretrained(tmp_path / f"{name}.safetensors") for name in ("full", "half"))
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "full.safetensors").stat().st_size
    torch.testing.assert_close(half(tokens()), full(tokens()), rtol=0.01, atol=0.01)


# ------------------------------------------------------------------------------------------------------ bad input


def test_files_that_hold_no_denoiser_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"no denoiser at .*missing\.safetensors"):
        Denoiser.from_pretrained(tmp_path / "missing.safetensors")
    with pytest.raises(WeightsError, match=r"no denoiser at .*model\.safetensors"):
        Denoiser.from_pretrained(tmp_path)
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "backbone.safetensors")
    with pytest.raises(WeightsError, match="not a denoiser of dvt: its metadata has schema None"):
        Denoiser.from_pretrained(tmp_path / "backbone.safetensors")
    save_file({"x": torch.ones(3)}, tmp_path / "list.safetensors", metadata={"dvt": "[1]"})
    with pytest.raises(WeightsError, match="not a denoiser of dvt"):
        Denoiser.from_pretrained(tmp_path / "list.safetensors")
    save_file({"x": torch.ones(3)}, tmp_path / "text.safetensors", metadata={"dvt": "{no json"})
    with pytest.raises(WeightsError, match="cannot read a denoiser"):
        Denoiser.from_pretrained(tmp_path / "text.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 200, -40])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "d.safetensors"
    made().save_pretrained(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="cannot read a denoiser"):
        Denoiser.from_pretrained(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "unet"}, "no denoiser of kind 'unet'; it must be one of block"),
        ({"flavour": "sweet"}, "flavour"),
        ({"feature_dim": "32"}, "cannot make"),
        ({"grid": 4}, "cannot make"),
        ({"strength": 3}, "strength must lie"),
        ({"feature_dim": 32.0}, "cannot make"),
        ({"mlp_ratio": float("inf")}, "cannot make"),
        # Larger than the file: refused before the memory is taken, or the search for a divisor takes a year.
        ({"feature_dim": 1_000_000_000_000_000_003}, "too small for it"),
        ({"depth": 10**12}, "too small for it"),
        ({"grid": [1 << 20, 1 << 20]}, "of another shape"),
    ],
)
def test_a_description_that_cannot_be_made_is_refused(tmp_path, config, message):
    path = tmp_path / "d.safetensors"
    made().save_pretrained(path)
    good = json.loads(json.dumps({"kind": "block", "feature_dim": 32, "grid": [4, 5]}))
    with pytest.raises(WeightsError, match=message):
        Denoiser.from_pretrained(edited(path, config=good | config))
    with pytest.raises(WeightsError, match="cannot make"):
        Denoiser.from_pretrained(edited(path, config={}))


def test_a_description_a_hundred_thousand_deep_is_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"dvt": "[" * 100_000})
    with pytest.raises(WeightsError, match="damaged"):
        Denoiser.from_pretrained(path)


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    denoiser = made()
    denoiser.body.pos_embed.data[0, 3, 1] = float("nan")
    denoiser.save_pretrained(path)
    with pytest.raises(WeightsError, match=r"NaN or infinity in 1 tensors: body\.pos_embed"):
        Denoiser.from_pretrained(path)
    made().save_pretrained(path)
    with pytest.raises(WeightsError, match="of another shape"):
        Denoiser.from_pretrained(edited(path, config={"kind": "block", "feature_dim": 32, "grid": [2, 2]}))
    with pytest.raises(WeightsError, match="lacks"):
        Denoiser.from_pretrained(edited(path, config={"kind": "block", "feature_dim": 32, "grid": [4, 5], "depth": 2}))


# ------------------------------------------------------------------------------------------------------ check_fits


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("test_vit", pretrained=False)


def made_for(owner, **changes):
    denoiser = made("conv1x1", 64)
    denoiser.card = {"backbone": owner.name, "layer": owner.layer, "weights_sha256": owner.weights_sha256} | changes
    return denoiser


def test_the_backbone_it_was_made_for_fits(backbone):
    made_for(backbone).check_fits(backbone)
    made_for(backbone, stride=[4, 4]).check_fits(backbone)
    made_for(backbone, backbone="test_vit.r160_in1k").check_fits(backbone)  # the same weights by another name
    bare = made("conv1x1", 64)
    bare.card = {}
    bare.check_fits(backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 5}, "layer 5, got -1"),
        ({"weights_sha256": "ab" * 32}, "weights (ab)+, got [0-9a-f]+"),
        ({"backbone": "vit_tiny", "weights_sha256": None}, "backbone vit_tiny, got test_vit"),
        ({"backbone": "vit_tiny", "weights_sha256": "ab" * 32}, "backbone vit_tiny, got test_vit; weights ab"),
    ],
)
def test_another_backbone_is_refused_unless_forced(backbone, change, message):
    denoiser = made_for(backbone, **change)
    with pytest.raises(BackboneError, match=message):
        denoiser.check_fits(backbone)
    denoiser.check_fits(backbone, force=True)


def test_another_feature_size_is_refused_even_when_forced(backbone):
    with pytest.raises(BackboneError, match=r"32 channels, test_vit gives 64"):
        made().check_fits(backbone, force=True)


# ------------------------------------------------------------------------------------------------ published checkpoints


def reference_block(channels):
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    block = Block(channels, channels // 64, mlp_ratio=4, qkv_bias=True, norm_layer=norm).eval()
    for number, parameter in enumerate(block.parameters()):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator(number))
    return block


def reference_file(path, channels=128, side=5, blocks=1):
    """A checkpoint in the form in which they are published, and the modules in it."""
    position = torch.randn(1, side * side, channels, generator=generator(77))
    modules = torch.nn.Sequential(*(reference_block(channels) for _ in range(blocks)))
    inner = modules.state_dict() if blocks > 1 else modules[0].state_dict()
    held = {"pos_embed": position, **{f"denoiser.{name}": value for name, value in inner.items()}}
    torch.save({"denoiser": held}, path)
    return position, modules


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("channels", "side"), [(128, 5), (64, 7)])
def test_a_published_denoiser_computes_what_its_blocks_compute(tmp_path, blocks, channels, side):
    position, modules = reference_file(tmp_path / "d.pth", channels, side, blocks)
    denoiser = Denoiser.from_pretrained(tmp_path / "d.pth")
    patches = torch.randn(2, side, side, channels, generator=generator(1))
    expected = modules(patches.flatten(1, 2) + position).unflatten(1, (side, side))
    torch.testing.assert_close(denoiser(patches), expected)
    assert denoiser.config.grid == (side, side) and denoiser.config.depth == blocks
    assert denoiser(torch.randn(1, 3, 9, channels)).shape == (1, 3, 9, channels)


def test_a_published_denoiser_without_positions(tmp_path):
    _, modules = reference_file(tmp_path / "d.pth")
    content = torch.load(tmp_path / "d.pth")
    del content["denoiser"]["pos_embed"]
    torch.save(content, tmp_path / "d.pth")
    patches = tokens(128)
    expected = modules(patches.flatten(1, 2)).unflatten(1, (4, 5))
    torch.testing.assert_close(Denoiser.from_pretrained(tmp_path / "d.pth")(patches), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": torch.zeros(1, 24, 128)}, r"pos_embed of shape \(1, 24, 128\); a square grid"),
        ({"pos_embed": torch.zeros(25, 128)}, r"pos_embed of shape \(25, 128\)"),
        ({"pos_embed": torch.zeros(1, 25, 64)}, r"has \(1, n n, 128\)"),
        ({"denoiser.1.weight": torch.zeros(128)}, r"holds \['denoiser.1.weight'\]"),
        ({"denoiser.attn.qkv.weight": [1.0]}, r"holds \['denoiser.attn.qkv.weight'\]"),
        ({"pos_embed": 3}, r"holds \['pos_embed'\]"),
        ({"denoiser.attn.qkv.weight": torch.full((384, 128), torch.nan)}, "NaN or infinity in 1"),
        ({"denoiser.attn.qkv.weight": torch.zeros(100, 128)}, "of another shape"),
        ({"denoiser.attn.qkv.bias": None}, "lacks 1 of the"),
        ({"denoiser.mlp.fc1.weight": None}, "lacks the weight of mlp.fc1"),
    ],
)
def test_a_published_denoiser_of_another_form_is_refused(tmp_path, change, message):
    reference_file(tmp_path / "d.pth")
    held = torch.load(tmp_path / "d.pth")["denoiser"] | change
    torch.save({"denoiser": {name: value for name, value in held.items() if value is not None}}, tmp_path / "d.pth")
    with pytest.raises(WeightsError, match=message):
        Denoiser.from_pretrained(tmp_path / "d.pth")


def test_a_file_of_something_else_is_refused_with_a_hint(tmp_path):
    with pytest.raises(WeightsError, match="no weights file at"):
        Denoiser.from_pretrained(tmp_path / "missing.pth")
    for content in ({"model": {"model.norm.weight": torch.ones(3)}}, {"denoiser": 3}, torch.ones(3), [1]):
        torch.save(content, tmp_path / "d.pth")
        with pytest.raises(WeightsError, match=r"entry 'denoiser' is needed.*load_backbone"):
            Denoiser.from_pretrained(tmp_path / "d.pth")
    torch.save({"denoiser": {}}, tmp_path / "d.pth")
    with pytest.raises(WeightsError, match="no block"):
        Denoiser.from_pretrained(tmp_path / "d.pth")


class Payload:
    """Pickles to code that leaves a mark when it is run."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("read", [Denoiser.from_pretrained, published_backbone_state])
def test_pickled_code_is_refused_and_not_run(tmp_path, read):
    mark = tmp_path / "mark"
    torch.save({"denoiser": {"pos_embed": Payload(mark)}, "model": {"model.x": Payload(mark)}}, tmp_path / "d.pth")
    with pytest.raises(WeightsError, match="does not unpickle"):
        read(tmp_path / "d.pth")
    assert not mark.exists()
    torch.load(tmp_path / "d.pth", weights_only=False)
    assert mark.exists(), "the payload of this test does nothing"


def test_a_distilled_backbone_is_read_by_timms_names(tmp_path, backbone):
    state = backbone.model.state_dict()
    torch.save({"model": {f"model.{name}": value for name, value in state.items()}}, tmp_path / "b.pth")
    read = published_backbone_state(tmp_path / "b.pth")
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    images = torch.rand(1, 3, 64, 64, generator=generator())
    loaded = load_backbone("test_vit", weights=tmp_path / "b.pth")
    assert torch.equal(loaded(images).patches, backbone(images).patches)
    reference_file(tmp_path / "d.pth")
    with pytest.raises(WeightsError, match="holds no distilled backbone"):
        published_backbone_state(tmp_path / "d.pth")


def test_the_table_of_published_files_names_models_of_timm():
    assert len(PUBLISHED["voc_denoised"]) == 12 and set(PUBLISHED) == {
        f"{data}_{kind}" for data in ("voc", "imgnet") for kind in ("denoised", "distilled")
    }
    for name in PUBLISHED["voc_denoised"]:
        assert timm.is_model_pretrained(name), name
    assert all(set(names) <= set(PUBLISHED["voc_denoised"]) for names in PUBLISHED.values())


# ------------------------------------------------------------------------------------------------------ the hub


def test_a_published_denoiser_comes_from_the_hubs_cache(tmp_path):
    name = "vit_base_patch14_dinov2.lvd142m"
    position, modules = reference_file(tmp_path / "d.pth", side=4)
    put_in_cache(tmp_path / "hub", "jjiaweiyang/DVT", f"voc_denoised/{name}.pth", tmp_path / "d.pth")
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    denoiser = Denoiser.from_published(name, "voc_denoised", **options)
    patches = torch.randn(1, 4, 4, 128, generator=generator())
    torch.testing.assert_close(denoiser(patches), modules(patches.flatten(1, 2) + position).unflatten(1, (4, 4)))
    assert denoiser.card["backbone"] == name and denoiser.card["layer"] == -1
    assert denoiser.card["data"] == "voc_denoised"
    assert Denoiser.from_pretrained(published_file(name, **options)).card["backbone"] == name
    with pytest.raises(WeightsError, match=r"(?s)imgnet_denoised/vit_base.*What helps:"):
        Denoiser.from_published(name, "imgnet_denoised", **options)
    with pytest.raises(WeightsError, match=r"known published files are voc_denoised: deit3_base"):
        Denoiser.from_published("resnet50.a1_in1k", **options)
    with pytest.raises(WeightsError, match=r"whole distilled backbones; .*published_file\('vit_base"):
        Denoiser.from_published(name, "voc_distilled", **options)


def test_a_repository_comes_from_the_hubs_cache(tmp_path):
    made().save_pretrained(tmp_path / "d")
    put_in_cache(tmp_path / "hub", "someone/denoiser", "model.safetensors", tmp_path / "d" / "model.safetensors")
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    assert torch.equal(Denoiser.from_pretrained("someone/denoiser", **options)(tokens()), made()(tokens()))
    with pytest.raises(
        WeightsError, match=r"(?s)denoiser 'someone/else', which is no file or folder here: .*What helps:"
    ):
        Denoiser.from_pretrained("someone/else", **options)
    with pytest.raises(WeightsError, match="no denoiser 'not a name!'"):
        Denoiser.from_pretrained("not a name!", **options)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a push of small files needs."""

    files: dict[str, bytes] = {}  # noqa: RUF012  filled by the test's one push

    def do_GET(self):
        self.answer({"siblings": []})

    def do_POST(self):
        body = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self.chunks()
        )
        repository = f"http://127.0.0.1:{self.server.server_port}/someone/denoiser"
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.files.update({file["path"]: base64.b64decode(file["content"]) for file in files})
            self.answer({"commitUrl": f"{repository}/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self.answer({"url": repository, "errors": [], "warnings": []})

    def chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def run_python(code, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_push_puts_the_same_files_on_the_hub(tmp_path):
    made().save_pretrained(tmp_path / "d")
    code = f"""
from dvt.denoiser import Denoiser
print(Denoiser.from_pretrained({str(tmp_path / "d")!r}).push_to_hub("someone/denoiser"))
"""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        out = run_python(code, HF_ENDPOINT=endpoint, HF_TOKEN="hf_none", HF_HOME=str(tmp_path / "home"))
        server.shutdown()
    assert out.endswith("1" * 40)
    assert Hub.files == {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()}


def test_without_a_network_the_users_own_cache_is_used(tmp_path):
    reference_file(tmp_path / "d.pth", side=4)
    name = "vit_base_patch16_224.mae"
    put_in_cache(tmp_path / "home" / "hub", "jjiaweiyang/DVT", f"voc_denoised/{name}.pth", tmp_path / "d.pth")
    code = f"from dvt.denoiser import Denoiser; print(Denoiser.from_published({name!r}).config.grid)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    assert run_python(code, **environment) == "(4, 4)"


HOSTILE = 'x"); import os; os.system("true") #\n```\n# forged | `a` <b>'


def test_a_card_s_backbone_is_data_in_the_model_card(tmp_path):
    """In the snippet it is a literal, elsewhere text: no code, table cell or heading begins in it."""
    denoiser = made()
    denoiser.card = {"backbone": HOSTILE, "no|te": "a|b\nc"}
    denoiser.save_pretrained(tmp_path / "folder")
    text = (tmp_path / "folder" / "README.md").read_text()
    code = text.split("```python\n")[1].split("\n```\n")[0]
    calls = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    (call,) = (node for node in calls if "load_b" in ast.dump(node.func))
    assert ast.literal_eval(call.args[0]) == HOSTILE
    assert "forged" not in [line.strip("# ").split()[:1] for line in text.splitlines()]
    assert text.count("\n```") == 2 and "<b>" not in text.replace(code, "")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert Denoiser.from_pretrained(tmp_path / "folder").card == denoiser.card


@pytest.mark.parametrize(
    ("part", "change"),
    [("config", {"use_prefix": "yes"}), ("config", {"depth": 1.5}), ("config", {"position": 1}), ("config", {"a": 1})]
    + [("card", {"backbone": ["x"]}), ("card", {"layer": "last"}), ("card", {"weights_sha256": 3})],
)
def test_a_file_of_other_types_is_refused(tmp_path, part, change):
    path = tmp_path / "d.safetensors"
    made().save_pretrained(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["dvt"])
    edited(path, **{part: about[part] | change})
    with pytest.raises(WeightsError, match=next(iter(change))):
        Denoiser.from_pretrained(path)


def test_the_model_card_of_the_bundled_weights_loads_what_the_denoiser_accepts(tmp_path):
    backbone = load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    denoiser = Denoiser(DenoiserConfig("subtract", 192, (14, 14)))
    denoiser.card = {"backbone": backbone.name, "layer": -1, "weights_sha256": backbone.weights_sha256}
    denoiser.card |= {"license": "cc-by-4.0", "dataset": "me/photographs", "data": {"images": 20, "held_out": 2}}
    denoiser.save_pretrained(tmp_path / "folder")
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert (card.data.license, card.data.datasets) == ("cc-by-4.0", "me/photographs")
    assert "20 images, 2 of them held out" in card.text
    code = (
        card.text.partition("```python\n")[2]
        .partition("```")[0]
        .replace("this folder or repository", str(tmp_path / "folder"))
    )
    exec(code, names := {})  # its own check of the weights accepts what it names
    assert names["clean"] is not None
    denoiser.card = {"backbone": "vit_tiny_patch16_224", "weights_sha256": "f" * 64}
    assert "ffffffffffff..." in str(denoiser.generate_model_card()) and "not stated" in str(
        denoiser.generate_model_card()
    )
