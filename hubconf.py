"""Offer denoised backbones to torch.hub: torch.hub.load(".../dvt", "denoised", backbone, denoiser)."""

dependencies = [
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "h5py",
    "safetensors",
    "huggingface_hub",
    "lazy_loader",
]


def denoised(backbone: str, denoiser: str, weights: str | None = None, strength: float | None = None, **options):
    """Load a timm model whose features a denoiser cleans.

    Args:
        backbone: a timm name, or another that `dvt.load_backbone` takes.
        denoiser: a file, folder or hub repository, as `dvt train` and `dvt remedy` write them.
        weights: a .safetensors or .pth file instead of the hub's weights.
        strength: how much of the denoiser's change is made, from 0 to 1; its own if not given.
        options: layer, stride and size, as `dvt.load_backbone` takes them.

    Returns:
        A :class:`dvt.Backbone`: images (B, 3, H, W), RGB in [0, 1], to Tokens.
    """
    import dvt
    from dvt.denoiser import denoised_backbone

    loaded = dvt.load_backbone(backbone, weights=weights, **options)
    cleaner = dvt.Denoiser.from_pretrained(denoiser)
    cleaner.strength = cleaner.strength if strength is None else strength
    return denoised_backbone(cleaner, loaded)
