"""shapes: the embedded data set, drawn on the spot, in VOC *and* COCO layout.

    python -m data.shapes --root data/generated/shapes        # 2,000 train, 300 val, 500 test images of 64 x 64 pixels

Textured clutter with discs, boxes, triangles, rings, sticks and an articulated figure on top. It is small enough for a
proxy training of a second or two on one CPU core and hard enough that losses differ and metrics disagree: class
frequencies are skewed, sticks and rings are thin, objects occlude each other, and colour only hints at the class.

    root/JPEGImages/000000.jpg                      images
    root/SegmentationClass/000000.png               VOC: class of every pixel (palette PNG); no 255
    root/ImageSets/Segmentation/{train,val,test}.txt
    root/annotations/instances_{train,val,test}2017.json          COCO: boxes, RLE masks, areas
    root/annotations/person_keypoints_{train,val,test}2017.json   COCO: the figure's 17 joints
    root/{train,val,test}2017/000000.jpg            the same images (hard links)

Image k of a seed is always the same picture, whatever the split sizes are. Three splits: `val` is what a search sees,
`test` is what is reported.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image  # comes with torchvision; OpenCV cannot write the palette PNGs of VOC
from pycocotools import mask as rle

CLASSES = ("background", "disc", "box", "triangle", "ring", "stick", "person")
FREQUENCY = (0.30, 0.26, 0.14, 0.12, 0.10, 0.08)  # of the six objects; skewed, so that class-balanced losses matter
HUE = (105, 15, 45, 75, 135, 165)  # mean hue of a class (OpenCV: 0..180) ...
HUE_SPREAD = 6  # ... and its standard deviation: colour hints at the class, it does not tell
SPLITS = {"train": 2000, "val": 300, "test": 500}
SIZE = 64

# COCO's joints and limbs (1-based, as in person_keypoints_*.json).
JOINTS = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
    "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
).split()
LIMBS = (
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9),
    (8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip

OVERSAMPLE = 4  # shapes are drawn this much larger and averaged down: smooth edges, exact masks


def draw_texture(rng: np.random.Generator, size: int, colour: np.ndarray, contrast: float, *cells: int) -> np.ndarray:
    """A (size, size, 3) float image around `colour`: blobs, `cells` of them along a side, and grain."""
    image = np.broadcast_to(np.asarray(colour, np.float32), (size, size, 3)) + rng.normal(0, 7, (size, size, 1))
    for count in cells:
        blobs = rng.normal(0, contrast, (count, count, 3)).astype(np.float32)
        image += cv2.resize(blobs, (size, size), interpolation=cv2.INTER_LINEAR)
    return image


def draw_figure(rng: np.random.Generator, canvas: np.ndarray, centre: np.ndarray, height: float) -> np.ndarray:
    """Draw a figure that faces the viewer; returns its 17 joints (17, 2) in canvas pixels."""

    def swing(origin, length, angle):
        return origin + length * np.array([np.sin(angle), np.cos(angle)])

    lean, turn = rng.normal(0, 0.15), rng.uniform(0.8, 1.0)
    hip = centre + [0, 0.05 * height]
    neck = swing(hip, 0.30 * height, np.pi + lean)
    head = swing(neck, 0.13 * height, np.pi + lean + rng.normal(0, 0.15))
    joints = np.zeros((17, 2))
    r = 0.08 * height
    joints[0] = head + [0, 0.1 * r]
    for side, sign in ((0, 1), (1, -1)):  # the figure's left is the picture's right
        joints[1 + side] = head + [sign * 0.4 * r * turn, -0.3 * r]
        joints[3 + side] = head + [sign * 0.95 * r * turn, 0]
        joints[5 + side] = neck + [sign * 0.11 * height * turn, 0.02 * height]
        upper, fore = sign * rng.uniform(0.05, 2.3), sign * rng.uniform(-0.6, 1.4)
        joints[7 + side] = swing(joints[5 + side], 0.16 * height, upper)
        joints[9 + side] = swing(joints[7 + side], 0.15 * height, upper + fore)
        joints[11 + side] = hip + [sign * 0.07 * height * turn, 0]
        thigh, shin = sign * rng.uniform(-0.1, 0.7), sign * rng.uniform(-0.5, 0.2)
        joints[13 + side] = swing(joints[11 + side], 0.21 * height, thigh)
        joints[15 + side] = swing(joints[13 + side], 0.20 * height, thigh + shin)

    def point(xy):
        return tuple(int(round(v)) for v in xy)

    width = max(1, int(0.08 * height))
    for a, b in ((5, 7), (7, 9), (6, 8), (8, 10), (11, 13), (13, 15), (12, 14), (14, 16)):
        cv2.line(canvas, point(joints[a]), point(joints[b]), 255, width)
    torso = np.array([point(joints[k]) for k in (5, 6, 12, 11)])
    cv2.fillPoly(canvas, [torso], 255)
    cv2.line(canvas, point(neck), point(head), 255, width)
    cv2.circle(canvas, point(head), int(r), 255, -1)
    return joints


def draw_object(rng: np.random.Generator, kind: int, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Coverage (size, size) in 0..1 of one object of class `kind` (1..6) and, for the figure, its joints (17, 2)."""
    big = size * OVERSAMPLE
    canvas = np.zeros((big, big), np.uint8)
    centre = rng.uniform(0.1, 0.9, 2) * big
    scale = rng.uniform(0.07, 0.20) * big
    angle, joints = rng.uniform(0, 2 * np.pi), None
    x, y = (int(v) for v in centre)
    name = CLASSES[kind]
    if name in ("disc", "ring"):
        thickness = -1 if name == "disc" else int(rng.uniform(0.18, 0.30) * scale)
        cv2.ellipse(
            canvas, (x, y), (int(scale), int(scale * rng.uniform(0.75, 1))), np.degrees(angle), 0, 360, 255, thickness
        )
    elif name in ("box", "triangle"):
        turns = np.array([0.5, 1.5, 2.5, 3.5]) * np.pi / 2 if name == "box" else np.arange(3) * 2 * np.pi / 3
        corners = np.stack([np.cos(turns), np.sin(turns)], 1) * [1, rng.uniform(0.6, 1)] * scale * 1.15
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        cv2.fillPoly(canvas, [np.round(corners @ turn.T + centre).astype(np.int32)], 255)
    elif name == "stick":
        offset = 1.5 * scale * np.array([np.cos(angle), np.sin(angle)])
        ends = [tuple(int(v) for v in centre + s * offset) for s in (-1, 1)]
        cv2.line(canvas, *ends, 255, int(rng.uniform(0.03, 0.05) * big))
    else:
        joints = draw_figure(rng, canvas, rng.uniform(0.3, 0.7, 2) * big, rng.uniform(0.6, 0.95) * big) / OVERSAMPLE
    coverage = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return coverage, joints


def draw_scene(seed: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Picture `index` of `seed`: image (size, size, 3) uint8 BGR, label map (size, size) uint8, visible instances.

    An instance has `kind`, `mask` (size, size) bool of its visible pixels and `joints` (17, 3) x, y, v or None.
    """
    rng = np.random.default_rng([seed, index])
    image = draw_texture(rng, size, rng.uniform(70, 180) + rng.normal(0, 15, 3), 13, 4, 13)
    owner = np.full((size, size), -1)  # which object is on top
    drawn = []
    for _ in range(rng.integers(3, 7)):
        kind = 1 + int(rng.choice(6, p=FREQUENCY))
        hue = (HUE[kind - 1] + rng.normal(0, HUE_SPREAD)) % 180
        hsv = np.array([[[hue, rng.uniform(90, 230), rng.uniform(100, 240)]]], np.uint8)
        colour = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)
        coverage, joints = draw_object(rng, kind, size)
        alpha = coverage[..., None]
        image += (draw_texture(rng, size, colour, 18, 5) - image) * alpha
        owner[coverage >= 0.5] = len(drawn)
        drawn.append((kind, joints))

    label = np.zeros((size, size), np.uint8)
    instances = []
    for k, (kind, joints) in enumerate(drawn):
        mask = owner == k
        if mask.sum() < 6:  # hidden
            continue
        label[mask] = kind
        if joints is not None:
            column, row = np.floor(joints).astype(int).T
            inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
            on_top = inside & (owner[row.clip(0, size - 1), column.clip(0, size - 1)] <= k)
            joints = np.column_stack([joints, np.where(on_top, 2, 1)]) * inside[:, None]
        instances.append({"kind": kind, "mask": mask, "joints": joints})
    return image.clip(0, 255).astype(np.uint8), label, instances


def coco_annotation(number: int, image_id: int, instance: dict) -> dict:
    """One COCO annotation; a person also has keypoints."""
    code = rle.encode(np.asfortranarray(instance["mask"], np.uint8))
    entry = {
        "id": number,
        "image_id": image_id,
        "category_id": instance["kind"],
        "iscrowd": 0,
        "area": float(rle.area(code)),
        "bbox": [float(v) for v in rle.toBbox(code)],
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
    }
    if instance["joints"] is not None:
        entry["num_keypoints"] = int((instance["joints"][:, 2] > 0).sum())
        entry["keypoints"] = np.round(instance["joints"], 2).flatten().tolist()
    return entry


def voc_palette() -> bytes:
    """The 256 colours of VOC's label maps."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for bit in range(8):
            for channel in range(3):
                colours[index, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.tobytes()


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy(source, target)


def write_split(root: Path, split: str, indices: range, seed: int, size: int, show) -> None:
    palette = voc_palette()
    images, annotations = [], []
    (root / f"{split}2017").mkdir(parents=True)
    for done, index in enumerate(indices):
        image, label, instances = draw_scene(seed, index, size)
        name = f"{index:06d}"
        picture = root / "JPEGImages" / f"{name}.jpg"
        cv2.imwrite(str(picture), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
        link_or_copy(picture, root / f"{split}2017" / f"{name}.jpg")
        mask = Image.fromarray(label)
        mask.putpalette(palette)
        mask.save(root / "SegmentationClass" / f"{name}.png")
        images.append({"id": index, "file_name": f"{name}.jpg", "height": size, "width": size})
        for instance in instances:
            annotations.append(coco_annotation(len(annotations) + 1, index, instance))
        show(split, done + 1, len(indices))

    (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{index:06d}\n" for index in indices))
    categories = [{"id": kind, "name": name, "supercategory": "shape"} for kind, name in enumerate(CLASSES) if kind]
    person = {**categories[-1], "keypoints": JOINTS, "skeleton": LIMBS}
    files = {
        "instances": (categories, annotations),
        "person_keypoints": ([person], [entry for entry in annotations if "keypoints" in entry]),
    }
    for kind, (known, entries) in files.items():
        content = {"info": {"description": "shapes"}, "images": images, "annotations": entries, "categories": known}
        (root / "annotations" / f"{kind}_{split}2017.json").write_text(json.dumps(content))


def write_shapes(root: str | Path, seed: int = 0, size: int = SIZE, splits: dict[str, int] = SPLITS, show=None) -> Path:
    """Write the data set below `root`, unless it is already there; a few seconds for the default 2,800 images.

    It is drawn in a folder beside `root` and moved there when complete: an interrupted run leaves nothing behind that
    looks like a data set. `show(split, done, total)` is called after each image.
    """
    root = Path(root)
    if (root / "annotations").is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "annotations"):
            (work / folder).mkdir(parents=True)
        first = 0
        for split, count in splits.items():
            write_split(work, split, range(first, first + count), seed, size, show or (lambda *_: None))
            first += count
        work.chmod(0o755)
        try:
            work.rename(root)
        except OSError:  # another process was faster; its pictures are the same
            if not (root / "annotations").is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root


def may_lie_in(root: Path) -> bool:
    """Whether shapes lie in a folder, or may be drawn there."""
    free = not root.is_dir() or not any(root.iterdir())
    return free or all((root / part).is_dir() for part in ("annotations", "JPEGImages"))


def show_progress(split: str, done: int, total: int) -> None:
    """A line that counts up on a terminal; elsewhere one line a split."""
    if done == total or (sys.stdout.isatty() and done % 50 == 0):
        print(f"\rdrawing shapes: {split} {done}/{total}", end="\n" if done == total else "", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the shapes data set in VOC and COCO layout.")
    parser.add_argument("--root", default="data/generated/shapes", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="every seed is another data set")
    parser.add_argument("--size", type=int, default=SIZE, help="height and width of an image in pixels")
    args = parser.parse_args()
    print(write_shapes(args.root, args.seed, args.size, show=show_progress))
