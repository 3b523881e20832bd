# What the three configs share: a frozen backbone, a linear head, and the schedule of the linear protocol of
# Denoising ViT (arXiv 2401.02957): AdamW, 40,000 iterations of 16 crops, linear warm-up, then linearly to zero.
custom_imports = {"imports": ["dvt.denoiser.mmseg"], "allow_failed_imports": False}
default_scope = "mmseg"

model = {
    "type": "EncoderDecoder",
    "data_preprocessor": {
        "type": "SegDataPreProcessor",
        # RGB in [0, 1]: the backbone normalises by itself.
        "mean": [0, 0, 0],
        "std": [255, 255, 255],
        "bgr_to_rgb": True,
        # About the mean of ImageNet's colours, so that padding is close to zero where the model sees it.
        "pad_val": 0.45,
        "seg_pad_val": 255,
        "size": (512, 512),
    },
    "backbone": {"type": "DvtBackbone", "name": "vit_base_patch14_dinov2.lvd142m"},
    "decode_head": {
        "type": "DvtLinearHead",
        "in_channels": 768,
        "num_classes": None,
        "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
    },
    "train_cfg": {},
    "test_cfg": {"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)},
}
sync_bn = "torch"

optim_wrapper = {
    "type": "OptimWrapper",
    "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 1e-4, "betas": (0.9, 0.999)},
}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 1e-6, "begin": 0, "end": 1500, "by_epoch": False},
    {"type": "PolyLR", "power": 1.0, "eta_min": 0.0, "begin": 1500, "end": 40000, "by_epoch": False},
]
train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 40000, "val_interval": 10000}
val_cfg = {"type": "ValLoop"}
test_cfg = {"type": "TestLoop"}

default_hooks = {
    "timer": {"type": "IterTimerHook"},
    "logger": {"type": "LoggerHook", "interval": 50, "log_metric_by_epoch": False},
    "param_scheduler": {"type": "ParamSchedulerHook"},
    "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 10000, "max_keep_ckpts": 1},
    "sampler_seed": {"type": "DistSamplerSeedHook"},
}
log_processor = {"by_epoch": False}
env_cfg = {
    "cudnn_benchmark": True,
    "mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0},
    "dist_cfg": {"backend": "nccl"},
}
randomness = {"seed": 0}
log_level = "INFO"
load_from = None
resume = False
