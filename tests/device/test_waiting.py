"""How often the host waits for the device, for an image of denoise and extract and for a step of training."""

import pytest
import torch

from dvt.denoiser import DenoiserTraining, train_denoiser
from dvt.fields.config import DenoiseConfig
from dvt.fields.images import denoise_images
from dvt.images import find_images
from dvt.jobs.extract import ExtractConfig, extract_images
from dvt.training.config import TrainingConfig
from dvt.views import ViewConfig

UPLOAD = "upload"
SHIFTS, CROPS = ViewConfig(kind="shifts", count=9, batch=5), ViewConfig(count=9, batch=5)


@pytest.fixture
def backbone(make_tiny_backbone, device):
    """The tiny backbone there; its weights are hashed, which copies them to the host, once a run."""
    made = make_tiny_backbone(64).to(device)
    made.weights_sha256  # noqa: B018
    return made


def waits(counts):
    """How often the host waited, and how often it did for an upload from pageable memory."""
    return sum(number for what, number in counts.items() if what != UPLOAD), counts.get(UPLOAD, 0)


@pytest.mark.parametrize(
    ("product", "views", "most"), [("removed", SHIFTS, 22), ("ensembled", CROPS, 16)], ids=["removed", "ensembled"]
)
def test_denoise(backbone, standin, photos, tmp_path, product, views, most):
    """Two batches of views and four maps an image; the solver of crops waits for eight images at once."""
    config = DenoiseConfig(views=views, product=product, dtype="float32")
    with standin.counted() as counts:
        assert denoise_images(backbone, find_images([photos]), tmp_path, config).done == 9
    waited, uploads = waits(counts)
    assert waited <= most * 9 and uploads <= 9, counts


def test_extract(backbone, standin, photos, tmp_path):
    with standin.counted() as counts:
        assert extract_images(backbone, find_images([photos]), tmp_path, ExtractConfig(batch=3)).done == 9
    assert waits(counts) == (6, 0), counts  # an event and a look at it for each of three batches


def test_a_step_of_training_waits_for_nothing(backbone, device, standin, photos, tmp_path):
    denoise_images(backbone, find_images([photos]), tmp_path / "store", DenoiseConfig(views=SHIFTS, dtype="float32"))
    found = []
    for steps in (4, 12):
        loop = TrainingConfig(steps=steps, batch_size=4, learning_rate=1e-3, log_every=100)
        with standin.counted() as counts:
            out = tmp_path / f"{steps}.safetensors"
            train_denoiser(tmp_path / "store", out, DenoiserTraining(loop=loop), device=device)
        found.append(dict(counts))
    assert found[0] == found[1]


def test_the_loop_over_views_waits_for_nothing(backbone, standin, photo):
    """Cutting views and the backbone only enqueue work, whatever the number of views."""
    from dvt.fields.image import TokenViews

    pixels = torch.nn.functional.avg_pool2d(photo, 4).clone()
    for views in (SHIFTS, CROPS):
        made = TokenViews(backbone, pixels, views)
        with standin.counted() as counts:
            assert sum(len(tokens) for tokens, _ in made) == 10
        assert not counts
