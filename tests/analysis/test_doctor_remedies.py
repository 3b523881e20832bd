"""The doctor compares remedies that act on tokens and inside the backbone, and says how to get the one to take."""

import pytest
import torch

import dvt
from dvt.analysis import DoctorConfig, diagnose
from dvt.errors import ConfigError, ImageError
from dvt.tokens import Tokens

FAST = DoctorConfig(images=6, windows=8)
CHANNELS = 32


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def backbone(strength):
    """Responses to patches with an artifact of position of this strength."""
    weight, artifact = noise(CHANNELS, 3, 16, 16, seed=3) / 16, noise(10, 10, CHANNELS, seed=5)
    artifact = artifact - artifact.mean((0, 1))

    def tokens(module, images):
        content = torch.nn.functional.conv2d(images, weight, stride=16).permute(0, 2, 3, 1)
        rows, columns = (torch.arange(n) % 10 for n in content.shape[1:3])
        return Tokens.of(content + strength * artifact[rows][:, columns])

    return dvt.wrap(torch.nn.Identity(), tokens, 16, name="planted", image_size=160, feature_dim=CHANNELS)


def said(found):
    """The page in one line, however it is broken for the terminal."""
    return " ".join(str(found).replace("\\\n", "").split())


def pictures(count):
    return list(torch.rand(count, 3, 160, 200, generator=torch.Generator().manual_seed(1)))


def test_a_backbone_whose_inside_was_changed_is_tried_like_a_denoiser_and_its_command_named():
    remedies = {"inside": backbone(0.0), "tokens": lambda tokens: tokens.with_patches(0.5 * tokens.patches)}
    found = diagnose(backbone(2.0), pictures(6), remedies, FAST, commands={"inside": "dvt remedy inside --out x"})
    inside, tokens = found.treated
    assert found.kind == "position" and found.best == "inside"
    assert inside.share < 0.03 and tokens.share > 0.3 and inside.kept > 0.9
    assert found.command == "dvt remedy inside --out x" and "Take inside: dvt remedy inside --out x" in said(found)


def test_where_none_is_enough_the_nearest_is_named_as_such():
    found = diagnose(backbone(2.0), pictures(6), {"half": backbone(0.9)}, FAST, commands={"half": "dvt remedy half"})
    assert found.best is None and found.nearest == "half"
    assert "None of those given removes enough. half leaves least." in str(found)
    assert "The nearest half: dvt remedy half" in said(found)
    useless = diagnose(backbone(2.0), pictures(6), {"same": backbone(2.0)}, FAST, commands={"same": "dvt remedy same"})
    assert useless.nearest is None and useless.command is None


def product(strength):
    """What stage one would make: the same responses with the artifact at this strength."""
    made = backbone(strength)
    return lambda pixels: {"semantic": made(pixels[None]).patches[0]}


def test_products_of_stage_one_are_compared_with_denoisers_on_a_few_images():
    denoisers = {"weak": backbone(1.0), "fair": backbone(0.1)}
    commands = {"removed": "dvt denoise --product removed", "fair": "dvt remedy fair"}
    config = DoctorConfig(images=6, windows=8, product_images=2, product_windows=4)
    products = {"removed": product(0.0), "smooth": lambda pixels: {"semantic": torch.ones(10, 10, CHANNELS)}}
    found = diagnose(backbone(2.0), pictures(6), denoisers, config, commands=commands, products=products)
    rows = {each.name: each for each in found.treated}
    assert [*rows] == ["weak", "fair", "removed", "smooth"] and found.products == ("removed", "smooth")
    assert rows["removed"].images == 2 and rows["weak"].images == 6
    assert rows["removed"].kept > 0.9 > rows["weak"].kept and abs(rows["smooth"].kept) < 0.01
    assert found.best == "removed" and found.one_pass == "fair"
    assert "Take removed: dvt denoise --product removed" in said(found)
    assert "In one pass an image, fair: dvt remedy fair" in said(found)


def test_a_product_that_cannot_be_made_is_said_and_the_others_are_compared():
    def refuse(pixels):
        raise ImageError("patches do not meet")

    found = diagnose(backbone(2.0), pictures(3), {}, FAST, products={"removed": refuse, "other": product(0.0)})
    assert found.products == ("other",) and found.best == "other"
    assert "removed was not tried: patches do not meet" in str(found)
    with pytest.raises(ConfigError, match="both called 'removed'"):
        diagnose(backbone(2.0), pictures(1), {"removed": backbone(0.0)}, FAST, products={"removed": product(0.0)})
    for options in ({"product_images": 0}, {"product_windows": 3}):
        with pytest.raises(ConfigError, match="product_"):
            DoctorConfig(**options)


def test_one_image_claims_nothing_about_all_images():
    page = said(diagnose(backbone(2.0), pictures(1), config=FAST))
    assert "one image does not tell" in page
    for claim in ("the same in all images", "differs from image to image", "images that have such tokens"):
        assert claim not in page.replace("artifact is the same in all images, so that", "")
