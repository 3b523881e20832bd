"""Write docs/backbones.md: what dvt can do with each family of timm models.

Tries the smallest architecture of every family with random weights; takes two or three minutes, needs no network.

    python examples/list_backbones.py docs/backbones.md
"""

import sys
from pathlib import Path

import timm

from dvt.backbones.catalogue import FamilyRow, family_table

INTRODUCTION = """# Backbones

`dvt.load_backbone(NAME)` and `--backbone NAME` take every timm model whose blocks keep one grid of patches.
This table was made by `python examples/list_backbones.py docs/backbones.md` with timm {version}: {count} architectures
in {families} families (a family is one of timm's modules), each tried on its smallest architecture with random weights.

| Family | Architectures | Tried on | Supported | Prefix tokens, last / earlier | Input size | Overlap |
| --- | ---: | --- | --- | --- | --- | --- |
"""

NOTES = """
- **Last layer.** `layer=-1` is what timm's `forward_features` returns: after the final norm. Models that norm after
  pooling (`fc_norm`, as most average-pooled models) have no norm there, so the tokens are the last block's. SAM's
  neck belongs to the last layer and can change the number of channels; XCiT's class attention belongs to it and
  changes the patch tokens. DeepSeek, Gemma and Qwen are read before their pooling or merging of patches.
- **Earlier layers** are read after the block, without the norm. CaiT and XCiT add the class token after all blocks
  and ConViT's is left out by timm there, so their earlier layers have no prefix tokens.
- **Input size.** "any, in each forward pass": position embeddings are resampled to the image's own grid, and its
  aspect ratio is kept. "chosen at load": give `size=(height, width)` to `load_backbone`; every image is then brought
  to that size. Mixers hold the number of patches in their weights and take their own size only.
- **Overlapping stride** needs a plain patch convolution. Families with a convolutional stem, with patches cut by
  `unfold` or by a linear layer, and the mixers refuse it with an error.
- **Weights** come from the Hugging Face hub or from a file (`weights=FILE`, `--weights FILE`): .safetensors, or a .pth
  of tensors; pickled code is never run. Position embeddings of another grid are resampled where timm's own
  conversion of the family does so; for CaiT and ConViT give the `size` that the file was made for.
- **Hierarchical models** (Swin, ConvNeXt, ResNet, PVT, Hiera, MViT ...) are refused: their blocks work at several
  scales, so there is no one grid of patch tokens to clean.
- **Anything else**, such as transformers or torch.hub models: see [models.md](models.md).
"""


def line(row: FamilyRow) -> str:
    supported = "yes" if row.supported else f"no: {row.notes}"
    stride = "yes" if row.stride else "no"
    cells = (row.family, row.architectures, f"`{row.smallest}`", supported, row.prefix, row.size, stride)
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def main(path: Path) -> None:
    rows = family_table()
    count = sum(row.architectures for row in rows)
    introduction = INTRODUCTION.format(version=timm.__version__, count=count, families=len(rows))
    path.write_text(introduction + "".join(map(line, rows)) + NOTES, encoding="utf-8")
    print(f"{path}: {count} architectures in {len(rows)} families, {sum(row.supported for row in rows)} supported")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/backbones.md"))
