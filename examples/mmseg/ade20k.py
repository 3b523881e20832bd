# ADE20K (SceneParse150), 150 classes: a linear head on the training images, scored on validation in sliding windows.
_base_ = ["linear.py", "data.py"]

model = {"decode_head": {"num_classes": 150}}

# Id 0 in the files is "other" and does not count; the data set class says so, and all ids go down by one.
ade20k = {"type": "ADE20KDataset", "data_root": "data/ADEChallengeData2016"}
train = {"img_path": "images/training", "seg_map_path": "annotations/training"}
val = {"img_path": "images/validation", "seg_map_path": "annotations/validation"}

train_dataloader = {"dataset": {**ade20k, "data_prefix": train}}
val_dataloader = {"dataset": {**ade20k, "data_prefix": val}}
test_dataloader = val_dataloader  # the labels of ADE20K's own test split are not public
