"""The embedded data set: deterministic, complete, and the same in both layouts."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from data import shapes

SPLITS = {"train": 30, "val": 6, "test": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("shapes") / "root", seed=3, splits=SPLITS)


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_deterministic(root, tmp_path):
    assert files(root) == files(shapes.write_shapes(tmp_path / "again", seed=3, splits=SPLITS))
    other = shapes.draw_scene(4, 0, shapes.SIZE)[0]
    assert not np.array_equal(other, shapes.draw_scene(3, 0, shapes.SIZE)[0])


def test_existing_data_is_left_alone(root):
    before = (root / "annotations").stat().st_mtime_ns
    shapes.write_shapes(root, seed=9, splits=SPLITS)
    assert (root / "annotations").stat().st_mtime_ns == before


def test_interrupted_drawing_leaves_nothing(tmp_path):
    def interrupt(split, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shapes.write_shapes(tmp_path / "root", splits=SPLITS, show=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", SPLITS)
def test_layouts_agree(root, split, capsys):
    names = (root / f"ImageSets/Segmentation/{split}.txt").read_text().split()
    coco = COCO(str(root / f"annotations/instances_{split}2017.json"))
    assert len(names) == len(coco.getImgIds()) == SPLITS[split]
    for name in names:
        label = np.array(Image.open(root / f"SegmentationClass/{name}.png"))
        rebuilt = np.zeros_like(label)
        for entry in coco.loadAnns(coco.getAnnIds(int(name))):
            mask = coco.annToMask(entry).astype(bool)
            rebuilt[mask] = entry["category_id"]
            assert entry["area"] == mask.sum()
            assert entry["bbox"] == rle.toBbox(rle.encode(np.asfortranarray(mask, np.uint8))).tolist()
        assert np.array_equal(rebuilt, label)
        info = coco.loadImgs(int(name))[0]
        assert (root / f"{split}2017" / info["file_name"]).read_bytes() == (
            root / f"JPEGImages/{name}.jpg"
        ).read_bytes()


def test_joints(root):
    content = json.loads((root / "annotations/person_keypoints_train2017.json").read_text())
    (category,) = content["categories"]
    assert category["name"] == "person" and len(category["keypoints"]) == 17
    assert content["annotations"]
    for entry in content["annotations"]:
        joints = np.array(entry["keypoints"]).reshape(17, 3)
        assert entry["num_keypoints"] == (joints[:, 2] > 0).sum()
        mask = rle.decode(entry["segmentation"]).astype(bool)
        seen = joints[joints[:, 2] == 2]
        near = [mask[max(0, int(y) - 2) : int(y) + 3, max(0, int(x) - 2) : int(x) + 3].any() for x, y, _ in seen]
        assert np.mean(near) > 0.9 if near else True
    upright = [np.array(e["keypoints"]).reshape(17, 3) for e in content["annotations"] if e["num_keypoints"] == 17]
    assert all(joints[5, 0] > joints[6, 0] for joints in upright), "the figure's left is the picture's right"


def test_every_class_occurs_and_frequencies_are_skewed():
    pixels = np.zeros(7)
    for k in range(150):
        pixels += np.bincount(shapes.draw_scene(0, k, shapes.SIZE)[1].ravel(), minlength=7)
    assert (pixels > 0).all()
    assert pixels[0] > 0.5 * pixels.sum() and pixels[1:].max() > 5 * pixels[1:].min()
