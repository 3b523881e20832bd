"""AnyUp from weights of the published names: against torch's own modules, its laws, and files that are no weights."""

import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file
from torch import nn

from dvt.denoiser import anyup
from dvt.denoiser.anyup import AnyUp
from dvt.errors import ConfigError, ShapeError, WeightsError

WIDTH = 32


@pytest.fixture(scope="module")
def state():
    """Random weights of a narrow network, with the names of the published files."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    found = {"rope.freqs": draw(2, WIDTH), "key_features_encoder.0.basis": draw(WIDTH, 1, 5, 5)}
    inputs = {"image_encoder": (3, 1), "key_encoder": (WIDTH, 1), "query_encoder": (WIDTH, 1)}
    for name, (channels, side) in {**inputs, "aggregation": (2 * WIDTH, 3)}.items():
        found[f"{name}.0.weight"] = draw(WIDTH, channels, side, side, scale=channels**-0.5)
    for name in (*inputs, "aggregation", "key_features_encoder"):
        for number in (1, 2):
            for norm, conv in ((0, 2), (3, 5)):
                at = f"{name}.{number}.block"
                found[f"{at}.{norm}.weight"], found[f"{at}.{norm}.bias"] = 1 + draw(WIDTH, scale=0.1), draw(WIDTH)
                found[f"{at}.{conv}.weight"] = draw(WIDTH, WIDTH, 1, 1, scale=WIDTH**-0.5)
    at = "cross_decode.cross_attn."
    found[f"{at}norm_q.weight"], found[f"{at}norm_k.weight"] = 1 + draw(WIDTH, scale=0.1), 1 + draw(WIDTH, scale=0.1)
    found[f"{at}attention.in_proj_weight"] = draw(3 * WIDTH, WIDTH, scale=0.5)
    found[f"{at}attention.in_proj_bias"] = draw(3 * WIDTH)
    found["cross_decode.conv2d.weight"] = draw(WIDTH, WIDTH, 3, 3, scale=0.1)
    return found


def reference(state, tokens, image, size):
    """The same network from torch's modules, one cell of the result at a time."""

    def modules(name, first):
        layers = [first]
        for number in (1, 2):
            for norm, conv in ((0, 2), (3, 5)):
                group, kernel = nn.GroupNorm(8, WIDTH), nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
                group.weight.data = state[f"{name}.{number}.block.{norm}.weight"]
                group.bias.data = state[f"{name}.{number}.block.{norm}.bias"]
                kernel.weight.data = state[f"{name}.{number}.block.{conv}.weight"]
                layers.append(nn.Sequential(group, nn.SiLU(), kernel))
        return layers

    def encode(name, x):
        kernel = state[f"{name}.0.weight"]
        first = nn.Conv2d(
            kernel.shape[1], WIDTH, kernel.shape[2], padding=kernel.shape[2] // 2, padding_mode="reflect", bias=False
        )
        first.weight.data = kernel
        layers = modules(name, first)
        x = layers[0](x)
        for one, two in (layers[1:3], layers[3:5]):
            x = x + two(one(x))
        return x

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = encode("image_encoder", ((image - mean.view(3, 1, 1)) / std.view(3, 1, 1))[None])
    turned = torch.empty_like(x)
    for i, y_place in enumerate(torch.linspace(0, 1, x.shape[2])):
        for j, x_place in enumerate(torch.linspace(0, 1, x.shape[3])):
            angle = torch.stack((y_place, x_place)) @ state["rope.freqs"]
            value = x[0, :, i, j]
            rotated = torch.cat((-value[WIDTH // 2 :], value[: WIDTH // 2]))
            turned[0, :, i, j] = value * angle.cos() + rotated * angle.sin()
    grid = tokens.shape[:2]
    queries = nnf.adaptive_avg_pool2d(encode("query_encoder", turned), size)
    queries = nnf.conv2d(queries, state["cross_decode.conv2d.weight"], padding=1)
    own = nnf.adaptive_avg_pool2d(encode("key_encoder", turned), grid)
    unit = nnf.normalize(tokens, dim=-1)
    basis = state["key_features_encoder.0.basis"]
    answers = []
    for channel in range(tokens.shape[2]):
        covered = nnf.conv2d(torch.ones(1, 1, *grid), torch.ones(1, 1, 5, 5), padding=2)
        answers.append(nnf.conv2d(unit[None, None, :, :, channel], basis, padding=2)[0] / covered[0])
    shares = torch.cat(answers).view(WIDTH, tokens.shape[2], *grid).softmax(0).mean(1)
    layers = modules("key_features_encoder", nn.Identity())
    unified = shares[None]
    for one, two in (layers[1:3], layers[3:5]):
        unified = unified + two(one(unified))
    keys = encode("aggregation", torch.cat((own, unified), 1))
    attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    attention.in_proj_weight.data = state["cross_decode.cross_attn.attention.in_proj_weight"]
    attention.in_proj_bias.data = state["cross_decode.cross_attn.attention.in_proj_bias"]
    norms = []
    for name in ("q", "k"):
        norm = nn.RMSNorm(WIDTH)
        norm.weight.data = state[f"cross_decode.cross_attn.norm_{name}.weight"]
        norms.append(norm)
    flat, result = norms[1](keys[0].flatten(1).T), torch.empty(*size, tokens.shape[2])
    for i in range(size[0]):
        for j in range(size[1]):
            near = torch.zeros(grid, dtype=torch.bool)
            spans = []
            for place, count, length in ((i, size[0], grid[0]), (j, size[1], grid[1])):
                low, high = max(0.0, (place + 0.5) / count - 0.1), min(1.0, (place + 0.5) / count + 0.1)
                spans.append(slice(int(low * length // 1), int(-(-high * length // 1))))
            near[spans[0], spans[1]] = True
            query = norms[0](queries[0, :, i, j])[None, None]
            _, shares = attention(query, flat[None], flat[None], attn_mask=~near.flatten()[None])
            result[i, j] = shares[0, 0] @ tokens.flatten(0, 1)
    return result


@pytest.mark.parametrize("size", [(12, 20), (18, 16)])
def test_it_is_what_torch_s_modules_compute(state, size, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    tokens, image = torch.randn(6, 5, 7, generator=generator), torch.rand(3, 24, 40, generator=generator)
    with torch.no_grad():
        expected = reference(state, tokens, image, size)
    found = AnyUp(state).upsample(tokens, image, size=size)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(anyup, "_SCORES", 2000)  # a few rows at a time
    torch.testing.assert_close(AnyUp(state).upsample(tokens, image, size=size), found, atol=1e-5, rtol=1e-5)


def test_cells_are_means_of_tokens_near_them(state):
    generator = torch.Generator().manual_seed(2)
    tokens, image = torch.randn(8, 8, 5, generator=generator).half(), torch.rand(3, 32, 32, generator=generator)
    fine = AnyUp(state).upsample(tokens, image, 4)
    assert fine.shape == (32, 32, 5) and fine.dtype == torch.float16
    assert (fine <= tokens.amax((0, 1)) + 1e-3).all() and (fine >= tokens.amin((0, 1)) - 1e-3).all()
    marked = torch.zeros(8, 8, 1)
    marked[0, 0] = 1
    reached = AnyUp(state).upsample(torch.cat((tokens.float(), marked), -1), image, 4)[..., -1]
    assert reached[:4, :4].min() > 0 and reached[9:].max() == 0 and reached[:, 9:].max() == 0


def test_weights_come_from_files_of_either_kind(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    tokens, image = torch.randn(4, 4, 3), torch.rand(3, 16, 16)
    one, two = (AnyUp.load(tmp_path / name).upsample(tokens, image, 2) for name in ("a.safetensors", "b.pth"))
    assert torch.equal(one, two)
    save_file({"other": torch.ones(3)}, tmp_path / "c.safetensors")
    with pytest.raises(WeightsError, match=r"no weights of AnyUp: 'image_encoder.0.weight' is missing, and 10 more"):
        AnyUp.load(tmp_path / "c.safetensors")
    with pytest.raises(WeightsError, match="no weights file"):
        AnyUp.load(tmp_path / "none.safetensors")


def test_what_cannot_be_downloaded_is_said(monkeypatch):
    monkeypatch.setitem(anyup.URLS, "anyup", "http://127.0.0.1:1/anyup.pth")
    monkeypatch.setenv("TORCH_HOME", "/nonexistent/cache")
    with pytest.raises(WeightsError, match=r"cannot download http://127.0.0.1:1/anyup.pth.*give the file"):
        AnyUp.load("anyup")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokens": torch.zeros(2, 2)}, ShapeError, "must be"),
        ({"image": torch.zeros(1, 8, 8)}, ShapeError, "must be"),
        ({"factor": 0}, ConfigError, "factor"),
        ({"size": (8, 8)}, ConfigError, "either"),
        ({"factor": None, "size": (1, 8)}, ConfigError, "smaller than the grid"),
    ],
)
def test_bad_input_is_refused(state, change, error, words):
    given = {"tokens": torch.zeros(2, 2, 3), "image": torch.zeros(3, 8, 8), "factor": 2, **change}
    with pytest.raises(error, match=words):
        AnyUp(state).upsample(**given)


def test_extract_and_denoise_take_it(state, photo, tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    from dvt.cli import main

    monkeypatch.chdir(tmp_path)
    save_file(state, "anyup.safetensors")
    Image.fromarray(photo[:, :96, :128].mul(255).byte().movedim(0, -1).numpy()).save("a.png")
    options = ("a.png", "--backbone", "vit_tiny_patch16_224", "--weights", "demo", "--size", "64", "--upsample", "2")
    for command in (("extract", "--out", "one"), ("denoise", "--views", "2", "--no-pictures", "--out", "two")):
        assert main([command[0], *options, *command[1:], "--upsampler", "anyup.safetensors"]) == 0
        (path,) = (tmp_path / command[-1] / "upsampled").glob("*-x2-anyup.npy")
        assert np.load(path).shape == (8, 10, 192)
    assert main(["extract", *options, "--out", "three", "--upsampler", "none.pth"]) == 2
    assert not (tmp_path / "three").exists()
