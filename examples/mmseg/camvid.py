# CamVid, 11 classes: a linear head on train, validated on val, scored on test. The backbone is the small ViT that comes
# with dvt, so nothing but the data is downloaded; `run.py --backbone NAME` takes another.
#
# Data: images/{train,val,test}/NAME.jpg with annotations/{train,val,test}/NAME.png. For SegNet's release, {train,val,
# test}/NAME.png with {train,val,test}annot/NAME.png, change the data_prefix and give each data set img_suffix=".png".
_base_ = ["linear.py", "data.py"]

# The height of the images; two windows cover their width.
crop_size = (360, 360)

model = {
    "data_preprocessor": {"size": crop_size},
    "backbone": {"name": "vit_tiny_patch16_224", "weights": "demo"},
    "decode_head": {"in_channels": 192, "num_classes": 11},
    "test_cfg": {"crop_size": crop_size, "stride": (240, 240)},
}

# The pipelines of data.py at the images' own height.
train_pipeline = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations"},
    {"type": "RandomResize", "scale": (1440, 360), "ratio_range": (0.5, 2.0), "keep_ratio": True},
    {"type": "RandomCrop", "crop_size": crop_size, "cat_max_ratio": 0.75},
    {"type": "RandomFlip", "prob": 0.5},
    {"type": "PhotoMetricDistortion"},
    {"type": "PackSegInputs"},
]
test_pipeline = [
    {"type": "LoadImageFromFile"},
    {"type": "Resize", "scale": (1440, 360), "keep_ratio": True},
    {"type": "LoadAnnotations"},
    {"type": "PackSegInputs"},
]

camvid = {"type": "CamVidDataset", "data_root": "data/camvid"}
train = {"img_path": "images/train", "seg_map_path": "annotations/train"}
val = {"img_path": "images/val", "seg_map_path": "annotations/val"}
test = {"img_path": "images/test", "seg_map_path": "annotations/test"}

train_dataloader = {"dataset": {**camvid, "data_prefix": train, "pipeline": train_pipeline}}
val_dataloader = {"dataset": {**camvid, "data_prefix": val, "pipeline": test_pipeline}}
test_dataloader = {"dataset": {**camvid, "data_prefix": test, "pipeline": test_pipeline}}
