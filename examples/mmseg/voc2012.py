# PASCAL VOC 2012, 21 classes: a linear head on the 1,464 images of train, scored on val in sliding windows.
_base_ = ["linear.py"]

dataset_type = "PascalVOCDataset"
data_root = "data/VOCdevkit/VOC2012"
crop_size = (512, 512)

model = {"decode_head": {"num_classes": 21}}

train_pipeline = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations"},
    {"type": "RandomResize", "scale": (2048, 512), "ratio_range": (0.5, 2.0), "keep_ratio": True},
    {"type": "RandomCrop", "crop_size": crop_size, "cat_max_ratio": 0.75},
    {"type": "RandomFlip", "prob": 0.5},
    {"type": "PhotoMetricDistortion"},
    {"type": "PackSegInputs"},
]
# Labels are loaded after the image is resized, so that they keep their own size and scores are taken there.
test_pipeline = [
    {"type": "LoadImageFromFile"},
    {"type": "Resize", "scale": (2048, 512), "keep_ratio": True},
    {"type": "LoadAnnotations"},
    {"type": "PackSegInputs"},
]

train_dataloader = {
    "batch_size": 16,
    "num_workers": 4,
    "persistent_workers": True,
    "sampler": {"type": "InfiniteSampler", "shuffle": True},
    "dataset": {
        "type": dataset_type,
        "data_root": data_root,
        "data_prefix": {"img_path": "JPEGImages", "seg_map_path": "SegmentationClass"},
        "ann_file": "ImageSets/Segmentation/train.txt",
        "pipeline": train_pipeline,
    },
}
val_dataloader = {
    "batch_size": 1,
    "num_workers": 4,
    "persistent_workers": True,
    "sampler": {"type": "DefaultSampler", "shuffle": False},
    "dataset": {
        "type": dataset_type,
        "data_root": data_root,
        "data_prefix": {"img_path": "JPEGImages", "seg_map_path": "SegmentationClass"},
        "ann_file": "ImageSets/Segmentation/val.txt",
        "pipeline": test_pipeline,
    },
}
test_dataloader = val_dataloader  # the labels of VOC's own test split are not public
val_evaluator = {"type": "IoUMetric", "iou_metrics": ["mIoU"]}
test_evaluator = val_evaluator
