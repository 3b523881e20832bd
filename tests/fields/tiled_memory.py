"""Print by how many bytes a process's peak of memory grows from a small image to a large one, read in windows."""

import re
import sys
from pathlib import Path

import torch
from test_tiled import local

from dvt.backbones.tiles import Tiling
from dvt.fields.config import DenoiseConfig
from dvt.fields.tiled import TiledDecomposeWork
from dvt.jobs.extract import ExtractConfig, ExtractWork
from dvt.jobs.run import run


def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


torch.set_num_threads(1)
verb, folder = sys.argv[1], Path(sys.argv[2])
found = []
for name in ("small", "large"):
    backbone, tiling = local(size=512), Tiling(overlap=0)
    if verb == "extract":
        work = ExtractWork(backbone, ExtractConfig(batch=1, workers=1, tiling=tiling))
    else:
        work = TiledDecomposeWork(backbone, DenoiseConfig(views=2), tiling)
    assert run(work, [folder / f"{name}.png"], folder / f"{name}-{verb}").done == 1
    found.append(peak())
print(found[1] - found[0])
