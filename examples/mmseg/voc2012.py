# PASCAL VOC 2012, 21 classes: a linear head on the 1,464 images of train, scored on val in sliding windows.
_base_ = ["linear.py", "data.py"]

model = {"decode_head": {"num_classes": 21}}

voc = {
    "type": "PascalVOCDataset",
    "data_root": "data/VOCdevkit/VOC2012",
    "data_prefix": {"img_path": "JPEGImages", "seg_map_path": "SegmentationClass"},
}

train_dataloader = {"dataset": {**voc, "ann_file": "ImageSets/Segmentation/train.txt"}}
val_dataloader = {"dataset": {**voc, "ann_file": "ImageSets/Segmentation/val.txt"}}
test_dataloader = val_dataloader  # the labels of VOC's own test split are not public
