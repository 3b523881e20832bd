# UPerHead on four blocks of the small ViT that comes with dvt, as a pyramid of maps; CamVid, as in camvid.py.
_base_ = ["./camvid.py"]

model = {
    "backbone": {"out_indices": (2, 5, 8, 11), "factors": (4, 2, 1, 0.5)},
    "decode_head": {
        "_delete_": True,
        "type": "UPerHead",
        "in_channels": [192, 192, 192, 192],
        "in_index": [0, 1, 2, 3],
        "pool_scales": (1, 2, 3, 6),
        "channels": 128,
        "dropout_ratio": 0.1,
        "num_classes": 11,
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
    },
}
