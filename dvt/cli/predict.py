"""Run `dvt predict`: label maps, depth maps or boxes of photographs, by a head that `dvt probe --save` kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from dvt.cli.beside import names_beside
from dvt.cli.common import print_skipped, progress_bar, resolved, save_json, shown
from dvt.cli.settings.analysis import Predict
from dvt.cli.settings.common import DEMO_BACKBONE, DenoiserOptions
from dvt.errors import ImageError, NonFiniteError
from dvt.files import writable
from dvt.images import find_images, load_image, none_usable
from dvt.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from dvt.analysis.probes.heads import HeadCard


def predict(command: Predict, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt predict`; the exit code is 0 when every photograph has a prediction, 2 when some could not be used."""
    from dvt.analysis.pictures import save
    from dvt.analysis.predictions import boxes_entry, prediction_figure, save_map
    from dvt.analysis.probes.heads import SavedHead

    # First, so that a photograph given without a head is told as such.
    head = SavedHead.load(command.head)
    paths = find_images(command.images)
    settings = resolved(command, command="predict", images=paths)
    features = _Features(command, head.card)
    writable(command.out / "index.json")
    names, index, boxes = names_beside(paths), {}, {}
    failed: list[tuple[str, str]] = []
    with progress_bar(console) as progress:
        for done, path in enumerate(paths, 1):
            try:
                pixels = load_image(path)
                found = head.predict(features(pixels), pixels)
            except (ImageError, NonFiniteError) as error:
                failed.append((str(path), str(error)))
            else:
                if head.card.task == "discovery":
                    boxes[str(path)] = boxes_entry(found, pixels)
                else:
                    save_map(found, command.out / head.card.folder / f"{names[path]}.png")
                save(prediction_figure(pixels, found, head.card), command.out / "overlays" / f"{names[path]}.png")
                index[names[path]] = str(path)
            progress("photographs", done, len(paths))
    if not index:
        print_skipped(console, failed[:-1])
        raise none_usable(len(paths), failed[-1][1])
    if boxes:
        save_json(command.out / "boxes.json", boxes)
    save_json(command.out / "index.json", index)
    console.print(f"{head.card.task}: {len(index)} of {counted(len(paths), 'photograph')}: {shown(str(command.out))}")
    print_skipped(console, failed)
    result = {"predicted": len(index), "failed": failed, "out": str(command.out), "settings": settings}
    return (2 if failed else 0), result


class _Features:
    """Make the features that a head takes, with the backbone and denoiser that it knows."""

    def __init__(self, command: Predict, card: HeadCard) -> None:
        demo = command.weights == "demo"
        options = DenoiserOptions(
            device=command.device,
            backbone=command.backbone or (DEMO_BACKBONE if demo else card.backbone),
            weights=command.weights,
            layer=card.layers[-1],
            stride=card.stride[0],
            size=command.size or card.size,
            denoiser=command.denoiser,
            strength=None if card.denoiser is None or command.denoiser is None else card.denoiser.get("strength"),
        )
        self.backbone, self.card = options.load(), card
        denoiser = options.load_denoiser(self.backbone)
        card.check_fits(self.backbone, None if denoiser is None else denoiser.identity)
        self.clean = options.variant(self.backbone)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Compute the features (h, w, C) of an image (3, H, W)."""
        import torch

        from dvt.analysis.probes.features import with_class_token
        from dvt.backbones import Backbone as Inside
        from dvt.backbones.layers import joined_tokens
        from dvt.views import resize

        size = self.backbone.input_size((pixels.shape[1], pixels.shape[2]))
        inputs = resize(pixels.to(self.backbone.device), size)[None]
        with torch.no_grad():
            model = self.clean if isinstance(self.clean, Inside) else self.backbone
            tokens = joined_tokens(model, inputs, self.card.layers).to(torch.float32)
            if self.clean is not None and model is self.backbone:
                tokens = self.clean(tokens)
        return (with_class_token(tokens) if self.card.class_token else tokens.patches[0]).cpu()
