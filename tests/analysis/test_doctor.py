"""The doctor against planted diseases of growing strength, and against healthy features that look ill."""

import json

import pytest
import torch

import dvt
from dvt import grids
from dvt.analysis import Diagnosis, DoctorConfig, diagnose
from dvt.errors import ConfigError, ImageError
from dvt.tokens import Tokens

CHANNELS = 32
FAST = DoctorConfig(images=8, windows=8)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def artifact(grid, strength):
    """A smooth map of the coordinates, root mean square `strength` times that of the content."""
    x, y = grids.grid_centres(grid).unbind(-1)
    made = torch.stack((x, y, x * y, (6 * y).sin()), dim=-1) @ noise(4, CHANNELS, seed=7)
    made = made - made.mean((0, 1))
    return strength * made / made.square().mean().sqrt()


def planted(position=0.0, outliers=0.0, norm=6.0, of_each=False):
    """Normalised responses of patches, which know no position, with an artifact and with high-norm tokens.

    Which tokens are outliers hangs on the content's last digits, so that it is the same whenever the image is.
    With `of_each` the artifact's sign and size hang on the image.
    """
    weight = noise(CHANNELS, 3, 16, 16, seed=3)
    weight = weight - weight.mean((2, 3), keepdim=True)
    direction = torch.nn.functional.normalize(noise(CHANNELS, seed=11), dim=0)

    def tokens(module, images):
        raw = torch.nn.functional.conv2d(images, weight, stride=16).permute(0, 2, 3, 1)
        content = torch.nn.functional.layer_norm(raw, (CHANNELS,))
        made = artifact(tuple(content.shape[1:3]), position)
        sign = torch.where(images.mean((1, 2, 3)) > 0, 1.0, -1.0)[:, None, None, None] if of_each else 1.0
        chance = (raw[..., 0] * 97).remainder(1.0)[..., None]
        return Tokens.of(content + sign * made + (chance < outliers) * direction * norm * CHANNELS**0.5)

    return dvt.wrap(
        torch.nn.Identity(),
        tokens,
        16,
        name="planted",
        image_size=160,
        feature_dim=CHANNELS,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )


def skies(count=8):
    """Textured pictures with one layout: bright above, dark below. Every second one is darker on the whole."""
    made = []
    for number in range(count):
        texture = noise(3, 200, 240, seed=number) * 0.15
        level = (0.62 if number % 2 else 0.42) - 0.3 * (torch.linspace(0, 1, 200)[None, :, None] - 0.5)
        made.append((texture + level).clamp(0, 1))
    return made


@pytest.mark.parametrize(
    ("position", "outliers", "kind"),
    [
        (0.0, 0.0, "none"),
        (0.1, 0.0, "none"),  # 1 % of the variance
        (0.5, 0.0, "position"),
        (2.0, 0.0, "position"),
        (0.0, 0.001, "none"),
        (0.0, 0.02, "norm outliers"),
        (0.0, 0.06, "norm outliers"),
        (1.5, 0.03, "both"),
    ],
)
def test_planted_diseases_are_named(position, outliers, kind):
    found = diagnose(planted(position, outliers), skies(), config=FAST)
    assert found.kind == kind, str(found)
    assert (found.remedy == "none") == (kind == "none")


def test_the_share_grows_with_the_artifact_to_what_was_planted():
    shares = [diagnose(planted(strength), skies(), config=FAST).own.value for strength in (0.0, 0.5, 1.0, 2.0)]
    for share, strength in zip(shares, (0.0, 0.5, 1.0, 2.0), strict=True):
        assert share == pytest.approx(strength**2 / (1 + strength**2), abs=0.08)


def test_a_layout_is_no_artifact():
    """Position can be read from photographs of one layout; the doctor must not blame the backbone."""
    net = torch.nn.AvgPool2d(16)
    plain = dvt.wrap(net, lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1)), 16, name="mean colour", image_size=160)
    found = diagnose(plain, skies(), config=FAST)
    assert found.layout.value > 0.15 and found.layout.beyond_chance
    assert found.kind == "none", str(found)


@pytest.mark.parametrize("seed", range(2))
def test_random_weights_need_nothing(seed):
    torch.manual_seed(seed)
    backbone = dvt.load_backbone("vit_tiny_patch16_224", pretrained=False, size=160)
    found = diagnose(backbone, skies(6), config=FAST)
    assert found.kind == "none" and found.strength == 0, str(found)
    assert "None needed" in str(found)


def test_healthy_filter_responses_of_uneven_norm_need_nothing():
    """Norms of edges are several times those of a sky: content, not outliers."""
    weight = noise(CHANNELS, 3, 16, 16, seed=1)
    weight = weight - weight.mean((2, 3), keepdim=True)

    def tokens(module, images):
        return Tokens.of(torch.nn.functional.conv2d(images, weight, stride=16).permute(0, 2, 3, 1))

    backbone = dvt.wrap(torch.nn.Identity(), tokens, 16, name="edges", image_size=160, feature_dim=CHANNELS)
    pictures = [
        each * torch.rand(1, 1, 240, generator=torch.Generator().manual_seed(n)) for n, each in enumerate(skies())
    ]
    assert diagnose(backbone, pictures, config=FAST).kind == "none"


def test_the_trained_demo_model_has_the_position_artifact():
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    photos = sorted((dvt.demo_weights().parent / "photos").glob("*.jpg"))
    found = diagnose(backbone, photos, config=FAST)
    assert found.kind == "position" and found.own.value > 0.6 and found.strength > 0.8
    assert any("only 4 images" in each for each in found.warnings)


def test_one_artifact_for_all_is_subtracted_and_one_of_each_image_is_not():
    same, other = (diagnose(planted(1.5, of_each=each), skies(), config=FAST) for each in (False, True))
    assert same.remedy == "subtract" and same.shared.value == pytest.approx(same.own.value, abs=0.05)
    assert other.kind == "position" and other.remedy == "per image"
    assert other.shared.value < 0.3 < other.own.value
    alone = diagnose(planted(1.5), skies(1), config=FAST)
    assert alone.kind == "position" and alone.shared is None and alone.remedy == "per image"


def test_strength_is_the_least_that_is_enough():
    found = diagnose(planted(1.5), skies(), config=FAST)

    def left(strength):
        weaken = {"weaker": lambda t: t.with_patches(t.patches - strength * artifact(t.grid, 1.5))}
        return diagnose(planted(1.5), skies(), weaken, FAST).treated[0].share

    # Half a percent is what eight windows of eight images leave open.
    assert left(found.strength) < FAST.share + 0.005 < left(found.strength - 0.1)


def test_denoisers_are_tried_and_the_one_that_keeps_the_content_is_best():
    denoisers = {
        "good": lambda t: t.with_patches(t.patches - artifact(t.grid, 1.5)),
        "weak": lambda t: t.with_patches(t.patches - 0.2 * artifact(t.grid, 1.5)),
        "blind": lambda t: t.with_patches(noise(*t.patches.shape)),
    }
    found = diagnose(planted(1.5), skies(), denoisers, FAST)
    good, weak, blind = found.treated
    assert found.best == "good" and good.share < 0.03 < 0.3 < weak.share
    assert good.kept > 0.9 > 0.2 > abs(blind.kept)
    assert min(each.milliseconds for each in found.treated) > 0
    lines = [line for line in str(found).splitlines() if line.endswith("the best")]
    assert len(lines) == 1 and lines[0].split()[0] == "good"
    assert found.raw.share == found.own.value and found.raw.kept < good.kept
    assert diagnose(planted(1.5), skies(), {"weak": denoisers["weak"]}, FAST).best is None


def test_the_page_and_its_json():
    found = diagnose(planted(1.5, 0.03), skies(), config=FAST, decompose=lambda pixels: {"semantic": pixels})
    text = found.to_text()
    for part in (
        "Does planted need denoising?",
        "What was measured",
        "What to do",
        "What it costs",
        "What it may hurt",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110 and len(text.splitlines()) < 40
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["kind"] == "both" and content["own"]["value"] == found.own.value and content["text"] == text
    assert found.denoise_seconds > 0 and "dvt denoise" in text
    assert isinstance(found, Diagnosis) and found._repr_html_().startswith("<pre>")


def test_same_seed_same_answer():
    first, second = (diagnose(planted(0.5), skies(4), config=FAST) for _ in range(2))
    assert first.own == second.own and first.outliers == second.outliers and first.layout == second.layout


def test_bad_input_is_refused():
    with pytest.raises(ImageError, match="no image"):
        diagnose(planted(), [])
    with pytest.raises(ConfigError, match="shape"):
        diagnose(planted(), skies(1), {"less": lambda t: Tokens.of(t.patches[..., :2])}, FAST)
    for options in ({"windows": 5}, {"share": 0.0}, {"images": 0}, {"ratio": 1.0}):
        with pytest.raises(ConfigError):
            DoctorConfig(**options)
