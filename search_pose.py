"""Pose estimation: search a loss over heatmaps for the metric you care about.

    python search_pose.py --metric ap                         # evolve a loss on the embedded data set
    python search_pose.py --metric ap --loss l1               # train and evaluate one loss instead
    python search_pose.py --metric ar --loss "Abs(Add(p, Neg(y)))"
    python search_pose.py --compare mse,awing,RUN_DIR         # several losses, five metrics, one table
    python search_pose.py --metric ap --data coco --data-root coco --pretrained
    tensorboard --logdir runs

AutoLoss-Zero, arXiv 2103.14026 (marks [P]); Simple Baselines, arXiv 1804.06208 (marks [S]); own choices [D].
The whole task is in this file but for what data/ reads: arguments, data, networks, metrics, hand-made losses, training.

Measured (the first command, 14 minutes of two cores of an AMD EPYC, torch 2.14.1): 81,990 losses explored, 246 of them
trained; AP on test after 2,400 steps .675, squared error .651, the difference over three paired seeds +.023 (standard
error .004). A random search found +.035 (.003). tests/RESULTS.md has more.
"""

import argparse
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image  # comes with torchvision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import evolve
from data import shapes
from data.coco import (
    check_coco,
    check_joints,
    coco_files,
    column,
    entries_of,
    found_files,
    joints_in_row,
    list_results,
    load_coco,
    mirror,
    one_sided,
    read_annotations,
    uncollected,
)
from data.pictures import decode as decode  # the way in for one picture; tests and users call it
from data.pictures import fingerprint, group_size, read_pictures, shared_bytes, threads, warn_of_shared
from evolve import Branch, DataError, InvalidLoss, fail, note, warn, warn_once
from loss_ops import Expr, evaluate, python_source, sources, wide

METRICS = ("ap", "ap50", "ap75", "ar", "pck")
DATA = {"shapes": "small", "coco": "r50"}  # and the network that goes with each by default
MODELS = ("small", "r50")
STRIDE = 4  # pixels of a crop per pixel of its heatmaps [S]
COARSEST = {"small": 8, "r50": 32}  # the stride of the deepest features, which the sides of a crop are multiples of


class Schedule(NamedTuple):
    """How one network is trained: by AdamW, from random weights or ImageNet's."""

    steps: int
    batch: int
    crop: int  # height of a crop in pixels
    sigma: float  # of the target Gaussians, in pixels of a heatmap
    scale: tuple[float, float]  # range of the random scale
    rotation: float  # standard deviation of the random rotation in degrees, cut off at twice this
    lr: float  # decays to 0 as (1 - step / steps) ** 0.9 (poly)
    weight_decay: float = 5e-4
    base: tuple[int, ...] = ()  # steps with the baseline's loss from which proxy trainings go on, rising ...
    base_of: int = 1  # ... the first ones of a training of so many
    clip: float = math.inf  # norm to which longer gradients are cut


# The small network's learning rate is the best for squared error; tests/RESULTS.md ranks bases and steps [D].
# ResNet-50: crops, Gaussians, ranges of augmentation, batch and 140 epochs as published [S], the proxy a fiftieth [D].
PROXY = {
    "small": Schedule(200, 16, 64, 1.0, (0.8, 1.25), 10.0, 0.003, base=(100,), base_of=1200),
    "r50": Schedule(3200, 64, 256, 2.0, (0.7, 1.3), 40.0, 0.001, base=(3200,), base_of=80_000),
}
RETRAIN = {
    "small": PROXY["small"]._replace(steps=2400, base=(), base_of=1),
    "r50": PROXY["r50"]._replace(steps=160_000, batch=128, base=(), base_of=1),
}


# =====================================================================================================================
# Arguments


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = evolve.Parser(description=__doc__.split("\n")[0], usage="python search_pose.py --metric ap [flags]")
    others = "a formula or a run directory"
    flag = evolve.add_task_flags(parser, METRICS, LOSSES, others, tuple(DATA), MODELS)
    about = "tolerance of each joint in OKS, comma-separated, or one; by default COCO's for its own 17, else .067"
    flag("--sigmas", "NUMBERS", about, sigma_list)
    about = "average the heatmaps of each crop and of its mirror image before decoding"
    flag("--flip-test", None, about, action="store_true")
    flag("--proxy-steps", "N", f"steps of a proxy training: {evolve.told(PROXY, 'steps')}", evolve.at_least(1))
    about = f"steps of a re-training: {evolve.told(RETRAIN, 'steps')}"
    flag("--retrain-steps", "N", about, evolve.at_least(1))
    flag("--crop", "PIXELS", f"height of a person's crop: {evolve.told(PROXY, 'crop')}", evolve.at_least(8, most=8192))
    about = "width of a crop by its height; 1 suits most animals"
    flag("--aspect", "RATIO", about, evolve.at_least(0.1, float, 10), 0.75)
    about = f"images in a batch: {evolve.told(PROXY, 'batch')}; in re-training {evolve.told(RETRAIN, 'batch')}"
    flag("--batch", "N", about, evolve.at_least(2, most=4096))
    flag("--lr", "RATE", f"learning rate: {evolve.told(PROXY, 'lr')}", evolve.at_least(1e-6, float))
    evolve.add_search_flags(parser, minutes=9.5)
    args = parser.parse_args(argv)
    if args.resume:
        args = evolve.resume_arguments(parser, argv, PoseTask)
    return check_arguments(args)


def sigma_list(text: str) -> list[float]:
    """An argparse type: positive numbers, comma-separated."""
    return [evolve.at_least(1e-6, float)(number) for number in text.split(",")]


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other flags; end the program with one line where something is wrong."""
    evolve.settle_arguments(args, read_loss)
    args.model = args.model or DATA[args.data]
    args.crop = args.crop or PROXY[args.model].crop
    width, multiple = round(args.crop * args.aspect), COARSEST[args.model]
    if args.crop % multiple or width % multiple:
        height = max(1, round(args.crop / multiple)) * multiple
        least, most = math.ceil(height / 10 / multiple), height * 10 // multiple
        aspect = min(max(least, round(height * args.aspect / multiple)), most) * multiple / height
        pixels, cure = f"{args.crop}x{width} pixels", f"give --crop {height} --aspect {aspect:g}"
        fail(f"--crop {args.crop} --aspect {args.aspect:g}: {pixels}, and both must be multiples of {multiple}; {cure}")
    if args.pretrained:  # what is missing shows before the search, not after it
        build_model(args.model, 1, args.pretrained)
    return args


def read_loss(text: str, flag: str) -> str | dict[str, Expr]:
    """The name of a hand-made loss, a formula, or a run directory."""
    if text in LOSSES:
        return text
    if os.path.isdir(text):
        return evolve.read_found(Path(text), PoseTask, flag)
    if "(" not in text:
        fail(f"{flag} {text:.80}: unknown; give one of {' '.join(LOSSES)}, a formula or a run directory")
    return {"loss": evolve.read_formula(text, f"{flag} {text:.80}", "yp1")}


# =====================================================================================================================
# Data


class Skeleton(NamedTuple):
    """What the joints are."""

    names: tuple[str, ...]
    limbs: list[list[int]]  # pairs of joints to draw a line between, counted from 1 as in COCO's files
    swap: Tensor  # (J,) int64, the joint that each one is in a mirror
    sigmas: Tensor  # (J,) float64, tolerances in OKS


class Split(NamedTuple):
    """The persons of a split who have a labelled joint, each cut out of the picture once, and all that AP must know."""

    images: "Tensor | Pictures"  # (M, 3, H, W) uint8, RGB; larger than a crop, to turn and scale in; black outside
    joints: Tensor  # (M, J, 2) float32, x and y in pixels of `images`; pixel k reaches from k to k + 1
    labelled: Tensor  # (M, J) bool
    frames: Tensor  # (M, 3) float64, left and top of the cut in the picture, and the side of one of its pixels there
    sizes: Tensor  # (M,) float64, longer side of the box in the picture
    group: Tensor  # (M,) int64, as in `persons`
    category: Tensor  # (M,) int64
    persons: "Persons"  # everybody in these pictures, the unlabelled and the crowds as well


MARGIN = 1.25  # a crop is this much larger than the box, whose shorter side grows to the aspect of the crop [S]
ROOM = 1.25  # and the stored cut this much larger than a crop [D]


def list_data(args) -> dict[str, tuple[Path, Path, Callable[[list], list]]]:
    """Annotations, folder and choice of pictures of train, val (what the search sees) and test (what is reported).

    Where a data set has no third labelled split, every eighth training picture is held out for the search, and the
    official validation split is the test split [D]. Draws shapes if need be.
    """
    root = args.data_root
    if args.data == "shapes":
        if not shapes.may_lie_in(root):
            raise DataError(f"{root}: holds something other than shapes; give an empty or new folder, or its --data")
        shapes.write_shapes(root, show=shapes.show_progress)
    files = coco_files(root, "person_keypoints")
    if "test" in files:
        return {split: (*found, list) for split, found in files.items()}
    return {
        "train": (*files["train"], lambda pictures: [picture for k, picture in enumerate(pictures) if k % 8]),
        "val": (*files["train"], lambda pictures: pictures[::8]),
        "test": (*files["val"], list),
    }


@uncollected()
def read_data(args) -> tuple[dict[str, Split], Skeleton]:
    """The three splits of `list_data`, ready for use, and what their joints are."""
    data, skeletons, left, read, files = {}, [], args.memory * 2**30, None, {}
    for name, (path, folder, choose) in list_data(args).items():
        if read != path:  # train and val mostly share one file
            whole, read = read_annotations(path, folder), path
        content = {**whole, "images": choose(whole["images"])}
        files[name] = [folder.resolve() / picture["file_name"].lstrip("/") for picture in content["images"]]
        skeletons.append(read_skeleton(content, args.sigmas))
        if skeletons[-1].names != skeletons[0].names:
            raise DataError(f"{path}: other joints than in the training split")
        if len(skeletons) == 1 and len(skeletons[0].names) > 1 and (skeletons[0].swap.diff() == 1).all():
            warn_once(f"{path}: no joint is left or right by its name; mirrored pictures keep all joints as they are")
        elif len(skeletons) == 1 and (alone := one_sided(skeletons[0].names, skeletons[0].swap.tolist())):
            warn_once(
                f"{path}: {', '.join(alone)}: no joint is the other side; mirrored pictures keep them as they are"
            )
        size = (args.crop, round(args.crop * args.aspect))
        data[name] = split = read_split(content, folder, *size, left, args.device)
        left -= split.images.nbytes
        if split.images.nbytes == 0:
            number = f"{name}: {len(split.images):,} persons"
            note(f"{number}, more than --memory {args.memory:.3g} or TMPDIR holds; decoded batch by batch")
    warn_of_shared(files)
    names, limbs, *tensors = skeletons[0]
    return data, Skeleton(names, limbs, *(tensor.to(args.device) for tensor in tensors))


def read_skeleton(content: dict, sigmas: list[float] | None) -> Skeleton:
    """Joints and limbs as the category has them; left and right are told by the names."""
    category = content["categories"][0]
    names = tuple(category["keypoints"])
    if sigmas and len(sigmas) not in (1, len(names)):
        fail(f"--sigmas {','.join(map(str, sigmas))}: {len(sigmas)} numbers; give one, or {len(names)}, one per joint")
    swap = mirror(names)
    if not sigmas and len(names) == len(COCO_SIGMAS) and swap != COCO_SWAP:
        why = f"{len(names)} joints, but not COCO's left and right ones"
        warn_once(f"{why}: each has a tolerance of {OTHER_SIGMA} in OKS; --sigmas gives others")
        sigmas = [OTHER_SIGMA]
    tolerances = doubles(sigmas).expand(len(names)) if sigmas else default_sigmas(len(names))
    return Skeleton(names, category["skeleton"], torch.tensor(swap), tolerances)


def read_split(
    content: dict, folder: Path, height: int, width: int, memory: float = math.inf, device: str = "cpu"
) -> Split:
    """Everybody with a labelled joint, crowds excepted, cut out of the pictures; a crop is (height, width) pixels.

    What takes at most `memory` bytes is kept once it is decoded; few and small pictures are decoded at once. Raises
    DataError, now or when a picture is used, naming one that is missing, cannot be read or has not the size that is
    listed, or the folder if nobody is in it.
    """
    if not content["images"]:
        raise DataError(f"{folder}: too few pictures; give two or more, every eighth is held out")
    persons, entries = read_persons(content)
    persons = persons._replace(countable=torch.ones_like(persons.countable))  # and id 0, for COCO's API nobody
    pictures = {picture["id"]: picture for picture in content["images"]}
    chosen = [k for k in range(len(entries)) if not persons.ignored[k]]
    if not chosen:
        raise DataError(f"{folder}: nobody with a labelled joint in its pictures who is no crowd ('iscrowd' 1)")
    H, W = (round(side * ROOM / 2) * 2 for side in (height, width))
    boxes = persons.boxes[chosen]
    x, y, w, h = boxes.T
    pixel = MARGIN * torch.maximum(w / width, h / height).clamp(min=1 / height)
    frames = torch.stack([x + (w - pixel * W) / 2, y + (h - pixel * H) / 2, pixel], 1)
    owners = [pictures[entries[k]["image_id"]] for k in chosen]
    sizes = [(p["height"], p["width"]) if p.get("height") and p.get("width") else None for p in owners]
    paths = found_files(folder, [picture["file_name"] for picture in owners])

    def read(numbers: list[int]) -> list[Tensor]:
        whole = dict(zip((paths[k] for k in numbers), numbers))  # the persons of one picture mostly stand together
        found = read_pictures(list(whole), [sizes[k] for k in whole.values()], device)
        found = {path: Image.fromarray(p.movedim(0, -1).cpu().numpy()) for path, p in zip(whole, found)}
        return [cut(found[paths[k]], *frames[k].tolist(), H, W) for k in numbers]

    group = max(4, group_size(paths, device))
    images = Pictures(read, len(chosen), device, [(3, H, W)] * len(chosen), group=group)
    if 3 * H * W * len(chosen) <= memory:
        images = images.settle(lambda: fingerprint(f"pose {H} {W} {boxes.tolist()}", paths))
    joints = (persons.joints[chosen] - frames[:, None, :2]) / frames[:, None, 2:]
    group, category = persons.group[chosen], persons.category[chosen]
    rest = joints.float(), persons.labelled[chosen], frames, boxes[:, 2:].amax(1), group, category
    return Split(images, *(x.to(device) for x in rest), Persons(*(x.to(device) for x in persons)))


def cut(picture: Image.Image, left: float, top: float, pixel: float, height: int, width: int) -> Tensor:
    """A window (3, height, width) uint8 of `picture`, with pixels `pixel` wide there; smoothed where it shrinks."""
    if (shrink := math.floor(pixel / 4)) > 1:  # a person across a photograph: first what loses nothing, all of it
        picture, left, top, pixel = picture.reduce(shrink), left / shrink, top / shrink, pixel / shrink
    box = (left, top, left + pixel * width, top + pixel * height)
    outer = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
    inner = [edge - outer[k % 2] for k, edge in enumerate(box)]
    window = picture.crop(outer).resize((width, height), Image.Resampling.BILINEAR, inner)
    return torch.from_numpy(np.array(window)).movedim(-1, 0)


def select(split: Split, index: Tensor) -> Split:
    """Some crops of a split, as a split."""
    *parts, persons = split
    return Split(*(rows_of(part, index) for part in parts), persons)


def rows_of(part: "Tensor | Pictures", index: Tensor) -> Tensor:
    """Rows of a tensor, or some pictures."""
    return part[index] if isinstance(part, Pictures) else part[index.to(part.device, non_blocking=True)]


SMALL = 2**26  # pixels of a split: so much is decoded before the first batch [D]
AHEAD = 1  # batches that are being read while one is in use


class Pictures:
    """Pictures (..., h, w) of a split, each at its own size, decoded when they are first asked for.

    `pictures[index]` puts some of them into the upper left corners of one canvas, as large as the largest of these.
    After `settle` decoded pictures stay in memory, once for all processes of this machine, or on the GPU, where all
    have room there; else each use decodes anew. Either way threads do it, for `prefetch` while the step goes on.
    """

    def __init__(
        self,
        read: Callable[[list[int]], list[Tensor]],  # decodes; raises DataError naming the file that is broken
        number: int,
        device: str = "cpu",  # where batches go
        shapes: list[tuple[int, ...]] | Callable[[int], tuple[int, ...]] | None = None,  # of each; None: not settled
        fill: int = 0,  # outside of a picture
        dtype: torch.dtype = torch.uint8,
        group: int = 1,  # so many are read in one call: nvJPEG likes more than one
    ):
        self.read, self.number, self.device, self.shapes = read, number, device, shapes
        self.fill, self.dtype, self.group = fill, dtype, group
        self.kept: tuple[Tensor, list[int], Tensor] | None = None  # elements of all, where each begins, which are there
        self.coming: dict[int, tuple[Future, int]] = {}
        self.broken: set[str] = set()  # what is wrong with pictures for which blank ones stand
        self.strict = False

    def __len__(self) -> int:
        return self.number

    @property
    def nbytes(self) -> int:
        return 0 if self.kept is None else self.kept[0].nbytes

    def settle(self, key: Callable[[], str]) -> "Tensor | Pictures":
        """Keep what has been decoded; few small ones of one size at once, as one tensor. `key` tells splits apart."""
        self.key, sizes = key, [math.prod(shape) for shape in self.shapes]
        areas = [height * width for *_, height, width in self.shapes]
        self.strict = sum(areas) <= SMALL  # all are read now: what is broken shows at once
        if len({*self.shapes}) == 1 and areas[0] <= 2**16 and self.strict:
            return self[:]
        size = sum(sizes) * self.dtype.itemsize
        on_gpu = self.device.startswith("cuda") and size < torch.cuda.mem_get_info(self.device)[0] / 4
        if on_gpu or self.strict:
            device = self.device if on_gpu else "cpu"
            elements, there = torch.empty(sum(sizes), dtype=self.dtype, device=device), torch.zeros(self.number)
        elif (shared := shared_bytes(key(), size + self.number)) is not None:
            elements, there = shared[:size].view(self.dtype), shared[size:]
        else:
            return self
        self.kept = elements, [0, *itertools.accumulate(sizes)], there
        if self.strict:
            self.take(range(self.number))
        return self

    def decode(self, numbers: list[int]) -> list[Tensor]:
        if self.kept is None:
            return self.attempt(numbers)
        elements, start, there = self.kept
        found = [elements[start[k] : start[k + 1]].view(self.shapes[k]) for k in numbers]
        missing = [(k, place) for k, place in zip(numbers, found) if not there[k]]
        for (k, place), picture in zip(missing, self.attempt([k for k, _ in missing]) if missing else ()):
            place.copy_(picture)
            there[k] = 1  # two processes may both have written it: the same bytes
        return found

    def attempt(self, numbers: list[int]) -> list[Tensor]:
        """Read some pictures. A blank one stands for one in a thousand that is broken: no search ends for that."""
        try:
            return self.read(numbers)
        except DataError as error:
            if len(numbers) > 1:
                return [picture for k in numbers for picture in self.attempt([k])]
            known = str(error) in self.broken
            self.broken.add(str(error))
            if self.strict or len(self.broken) > max(1, self.number // 1000):
                raise
            if not known:  # each worker says it: the others may never have read this one
                warn(f"{error}; a blank picture stands for it")
            shape = self.shapes(numbers[0]) if callable(self.shapes) else self.shapes[numbers[0]]
            return [torch.full(shape, self.fill, dtype=self.dtype)]

    def prefetch(self, index: Iterable[int]) -> None:
        """Begin to decode some pictures."""
        new = [k for k in dict.fromkeys(index) if k not in self.coming]
        if self.kept is not None:
            new = [k for k in new if not self.kept[2][k]]
        for start in range(0, len(new), self.group):
            part = new[start : start + self.group]
            future = threads().submit(self.decode, part)
            self.coming |= {k: (future, place) for place, k in enumerate(part)}

    def take(self, index: Iterable[int]) -> list[Tensor]:
        """Some pictures, each at its own size."""
        index = [int(k) for k in index]
        self.prefetch(index)
        ready = {k: self.coming.pop(k) for k in set(index) & self.coming.keys()}
        return [ready[k][0].result()[ready[k][1]] if k in ready else self.decode([k])[0] for k in index]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        numbers = range(self.number)[index] if isinstance(index, slice) else index.tolist()
        pictures = self.take(numbers)
        sides = [max(picture.shape[d] for picture in pictures) for d in (-2, -1)]
        return self.stack(pictures, [(0, 0)] * len(pictures), *sides)

    def stack(self, pictures: list[Tensor], corners: list[tuple[int, int]], height: int, width: int) -> Tensor:
        """Windows (N, ..., height, width) on the device; of each picture the one that begins at its (top, left)."""
        here = any(picture.is_cuda for picture in pictures)
        staged = self.device.startswith("cuda") and not here
        canvas = torch.full(
            (len(pictures), *pictures[0].shape[:-2], height, width),
            self.fill,
            dtype=self.dtype,
            device=self.device if here else "cpu",
            pin_memory=staged,  # only a copy out of pinned memory goes on while the host does
        )
        for window, picture, (top, left) in zip(canvas, pictures, corners):
            part = picture[..., top : top + height, left : left + width]
            window[..., : part.shape[-2], : part.shape[-1]] = part
        return canvas.to(self.device, non_blocking=True)


def map_pictures(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """A function of tensors (N, ...). On the CPU a large batch goes in parts, in threads: each stays in the caches."""
    if rows[0].is_cuda or rows[0].numel() < 2**20:
        return function(*rows)
    number = max(1, 2**19 // rows[0][0].numel())
    return torch.cat(list(threads().map(function, *(row.split(number) for row in rows))))


def read_ahead(split: "Split", size: int, order: torch.Generator) -> Iterator[Tensor]:
    """Batches without end of `size` pictures, by their numbers, drawn with replacement; the next ones are being read.

    `order` is never ahead of the batch in use: its state says where in the sequence the training is.
    """
    lazy, number = [part for part in split if isinstance(part, Pictures)], len(split.images)
    coming = order.clone_state()
    try:
        for step in itertools.count(-AHEAD):
            index = torch.randint(number, (size,), generator=coming).tolist()
            for pictures in lazy:
                pictures.prefetch(index)
            if step >= 0:
                yield torch.randint(number, (size,), generator=order)
    finally:
        for pictures in lazy:
            pictures.coming.clear()


MEAN = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)  # ImageNet, as torchvision's weights expect
STD = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)


def batch_scale_rotate_flip(
    split: Split, swap: Tensor, index: Tensor, size: tuple[int, int], plan: Schedule, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, rotate and mirror persons and cut a crop of `size` (height, width) out of their middle, in one sampling.

    Returns images (N, 3, height, width) float in 0..255, joints (N, J, 2) in pixels of the crop, and which of them are
    labelled and inside of it (N, J) bool, on the split's device. The scale is log-uniform; three in five are
    rotated [S]; half of them are mirrored, left and right joints exchanged.
    """
    images = rows_of(split.images, index)
    N, (height, width), (H, W), device = len(index), size, images.shape[-2:], images.device
    u = torch.rand(3, N, generator=generator).to(device, non_blocking=True)
    angle = torch.randn(N, generator=generator).to(device, non_blocking=True)
    angle = angle.clamp(-2, 2) * math.radians(plan.rotation) * (u[0] < 0.6)
    zoom = plan.scale[0] * (plan.scale[1] / plan.scale[0]) ** u[1]
    mirror = torch.where(u[2] < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    # From pixels of the crop to pixels of the cut, both counted from the middle: the mirror first, then the rotation.
    turn = torch.stack([mirror * cos, -sin, mirror * sin, cos], -1).view(N, 2, 2)
    crop, whole = torch.tensor([[width, height], [W, H]], dtype=torch.float32).to(device, non_blocking=True)
    theta = F.pad(turn * crop / whole[:, None], (0, 1))  # the same in coordinates -1..1

    def sample(images: Tensor, theta: Tensor) -> Tensor:
        grid = F.affine_grid(theta, [len(images), 3, height, width], align_corners=False)
        return F.grid_sample(images.float(), grid, align_corners=False)

    images = map_pictures(sample, images, theta)
    index = index.to(device, non_blocking=True)
    order = torch.where(mirror[:, None] < 0, swap, torch.arange(len(swap), device=device))  # (N, J)
    joints = split.joints[index].gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
    # The inverse of `turn` is its transpose times zoom^2; a row vector times the matrix is its transpose at work.
    joints = (joints - whole / 2) @ (turn * zoom.view(N, 1, 1) ** 2) + crop / 2
    inside = ((joints >= 0) & (joints < crop)).all(-1)
    return images, joints, split.labelled[index].gather(1, order) & inside


def batch_heatmaps(joints: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Gaussians of height 1 around joints (N, J, 2), all in pixels of the heatmap: (N, J, *size)."""
    y, x = (torch.arange(n, device=joints.device) + 0.5 for n in size)
    across, down = ((-0.5 * ((c - joints[..., k, None]) / sigma) ** 2).exp() for k, c in enumerate((x, y)))
    return down.unsqueeze(-1) * across.unsqueeze(-2)


def middle(images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The crop of `size` in the middle of each cut, and x and y (2,) of where it begins there."""
    top, left = ((n - m) // 2 for n, m in zip(images.shape[-2:], size))
    return images[..., top : top + size[0], left : left + size[1]], torch.tensor([left, top])


def normalise(images: Tensor) -> Tensor:
    """0..255 to zero mean and unit variance by ImageNet's statistics."""
    mean, std = MEAN.to(images.device), STD.to(images.device)
    return map_pictures(lambda images: (images - mean) / std, images)


# =====================================================================================================================
# Network


def conv(channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, size, stride, dilation * (size // 2), dilation, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def deconv(channels_in: int, channels_out: int) -> nn.Sequential:
    """Twice the size."""
    layer = nn.ConvTranspose2d(channels_in, channels_out, 4, 2, 1, bias=False)
    nn.init.normal_(layer.weight, std=0.001)  # [S]
    return nn.Sequential(layer, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


def head(channels: int, joints: int) -> nn.Conv2d:
    """The last layer. It starts near zero [S]: a squared error collapses if it has to unlearn random heatmaps first."""
    layer = nn.Conv2d(channels, joints, 1)
    nn.init.normal_(layer.weight, std=0.001)
    nn.init.zeros_(layer.bias)
    return layer


class SmallNet(nn.Module):
    """For the embedded data: features at strides 4 and 8, one deconvolution. 141 thousand weights."""

    def __init__(self, joints: int, width: int = 16):
        super().__init__()
        wide, deep = 2 * width, 4 * width
        self.fine = nn.Sequential(conv(3, width, 2), conv(width, wide, 2), conv(wide, wide))
        self.coarse = nn.Sequential(conv(wide, deep, 2), conv(deep, deep), conv(deep, deep, 1, 2), deconv(deep, wide))
        self.skip = conv(wide, wide, size=1)
        self.head = head(wide, joints)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        return self.head(self.coarse(fine) + self.skip(fine))


def resnet(depth: int, pretrained: bool | str, **options) -> nn.Module:
    """A torchvision ResNet; `pretrained`: with its ImageNet weights, or those in a file that has its layers.

    Ends the program with one line where the weights cannot be had.
    """
    net = torchvision.models.get_model(f"resnet{depth}", weights=None, **options)
    if not pretrained:
        return net
    flag = "--pretrained" if pretrained is True else f"--pretrained {pretrained}"
    try:
        if pretrained is True:
            weights = torchvision.models.get_model_weights(f"resnet{depth}").IMAGENET1K_V1
            state = weights.get_state_dict(progress=False, check_hash=True)
        else:
            state = torch.load(pretrained, map_location="cpu", weights_only=True)
            state = dict(state.get("state_dict", state))
    except Exception as error:  # a file of anything makes torch.load raise anything
        reason = str(error).split("\n")[0]
        if pretrained is True:
            fail(f"{flag}: no download ({reason}); fetch {weights.url} elsewhere and give it as --pretrained FILE")
        fail(f"{flag}: no readable file of weights ({reason}); give one that torch.save has written")
    state = {str(name).removeprefix("module."): value for name, value in state.items() if "fc." not in str(name)}
    wanted = [name for name in net.state_dict() if not name.startswith("fc.") and "num_batches" not in name]
    if missing := [name for name in wanted if name not in state]:
        fail(f"{flag}: no {missing[0]} in it; give torchvision's resnet{depth} weights, or another --model")
    if deeper := [name for name in state if name.startswith("layer") and name not in wanted and "num_" not in name]:
        fail(f"{flag}: {deeper[0]} in it, of a deeper network; give torchvision's resnet{depth} weights")
    try:
        net.load_state_dict(state, strict=False)
    except RuntimeError:
        fail(f"{flag}: its layers have not the shapes of ResNet-{depth}'s; give torchvision's resnet{depth} weights")
    return net


class SimpleBaseline(nn.Module):
    """ResNet-50 and three deconvolutions (Xiao 2018, arXiv 1804.06208)."""

    def __init__(self, joints: int, pretrained: bool | str = False):
        super().__init__()
        net = resnet(50, pretrained)
        self.backbone = nn.Sequential(*list(net.children())[:-2])  # without mean and classifier
        self.deconvolutions = nn.Sequential(deconv(2048, 256), deconv(256, 256), deconv(256, 256))
        self.head = head(256, joints)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.deconvolutions(self.backbone(images)))


def build_model(name: str, joints: int, pretrained: bool | str = False) -> nn.Module:
    """One of MODELS: images (N, 3, H, W), normalised, to heatmaps (N, joints, H / 4, W / 4)."""
    if name == "small":
        if pretrained:
            fail(f"--pretrained: --model {name} has no such weights; leave it out, or choose another --model")
        return SmallNet(joints)
    return SimpleBaseline(joints, pretrained)


# =====================================================================================================================
# Metric


COCO_SIGMAS = (0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072,
               0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089)  # fmt: skip
COCO_SWAP = [0, *(k + 1 - 2 * (k % 2 == 0) for k in range(1, 17))]  # the nose, then left and right in turn
OTHER_SIGMA = 0.067  # for every joint of another skeleton: the mean of COCO's [D]
# Exactly COCO's numbers: a limit that differs in the last place changes a verdict.
LIMITS = torch.from_numpy(np.linspace(0.5, 0.95, 10))  # of similarity
RECALLS = torch.from_numpy(np.linspace(0, 1, 101))
AREAS = ((0, 1e10), (32**2, 96**2), (96**2, 1e10))  # all, medium, large; in square pixels
MOST = (20,)  # poses that count in one picture
PORTION = 2**13  # pairs compared at a time: what fits into a cache


def doubles(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def default_sigmas(joints: int) -> Tensor:
    return doubles(COCO_SIGMAS) if joints == len(COCO_SIGMAS) else doubles([OTHER_SIGMA] * joints)


class Persons(NamedTuple):
    """The ground truth: P persons of J joints. A group is one category in one picture, counted category by category."""

    group: Tensor  # (P,) int64
    category: Tensor  # (P,) int64
    joints: Tensor  # (P, J, 2) float64
    labelled: Tensor  # (P, J) bool
    boxes: Tensor  # (P, 4) float64: left, top, width, height
    area: Tensor  # (P,) float64
    crowd: Tensor  # (P,) bool
    ignored: Tensor  # (P,) bool, crowds and those without a labelled joint: to find them is neither right nor wrong
    countable: Tensor  # (P,) bool, False for the id 0, which COCO's API takes for "nobody"


class Poses(NamedTuple):
    """D detections."""

    group: Tensor  # (D,) int64
    category: Tensor  # (D,) int64
    joints: Tensor  # (D, J, 2) float64
    score: Tensor  # (D,) float64
    area: Tensor  # (D,) float64


def extent(joints: Tensor) -> Tensor:
    """Area of the box around all joints of a pose."""
    return (joints.amax(1) - joints.amin(1)).prod(1) if len(joints) else joints.new_zeros(0)


def read_persons(content: dict) -> tuple[Persons, list[dict]]:
    """The annotations of the listed pictures, as `check_coco` gives them, as tensors and as they are."""
    pictures = {entry["id"]: k for k, entry in enumerate(content["images"])}
    categories = {entry["id"]: k for k, entry in enumerate(content["categories"])}
    entries = [entry for entry in content["annotations"] if entry["image_id"] in pictures]
    picture = torch.tensor([pictures[entry["image_id"]] for entry in entries], dtype=torch.long)
    category = torch.tensor([categories[entry["category_id"]] for entry in entries], dtype=torch.long)
    points = doubles([entry["keypoints"] for entry in entries])
    points = points.view(len(entries), points.shape[-1] // 3, 3)
    boxes = doubles([entry["bbox"] for entry in entries]).view(-1, 4)
    area = doubles([entry["area"] for entry in entries])
    crowd = [entry["iscrowd"] for entry in entries]
    ignored = [entry["iscrowd"] or entry["num_keypoints"] == 0 for entry in entries]
    countable = [entry["id"] != 0 for entry in entries]
    flags = (torch.tensor(values, dtype=torch.bool) for values in (crowd, ignored, countable))
    group = category * len(pictures) + picture
    return Persons(group, category, points[..., :2], points[..., 2] > 0, boxes, area, *flags), entries


def read_poses(detections: Path | str | Sequence[dict], content: dict, joints: int | None = None) -> Poses:
    """COCO results as tensors; their area is the box's if the first one has a box, as in COCO's API, or the joints'.

    joints: how many they must have, None if that is unknown.
    """
    path, results, picture, category = list_results(detections, content)
    results = [result | {"keypoints": joints_in_row(result.get("keypoints"))} for result in results]
    first = results[0] if results else {"keypoints": [0] * (3 * (joints or 0))}
    length = len(first["keypoints"]) if hasattr(first.get("keypoints"), "__len__") else 0
    if length % 3:
        raise ValueError(f"{path}: result 0: {length} numbers in 'keypoints'; give x y score of each joint")
    if joints is not None and length != 3 * joints:
        raise ValueError(f"{path}: results of {length / 3:g} joints, the ground truth has {joints}")
    xy = column(results, "keypoints", length, path).view(len(results), length // 3, 3)[..., :2]
    boxed = hasattr(first.get("bbox"), "__len__") and len(first["bbox"]) > 0
    area = column(results, "bbox", 4, path)[:, 2:].prod(1) if boxed else extent(xy)
    score = column(results, "score", 1, path, nan=True).squeeze(1)
    return Poses(category * len(content["images"]) + picture, category, xy, score, area)


def pick(rows: NamedTuple, index: Tensor):
    """The same rows of all tensors."""
    return type(rows)(*(tensor[index] for tensor in rows))


def oks(persons: Persons, poses: Poses, sigmas: Tensor) -> Tensor:
    """Object keypoint similarity of the k-th person and the k-th pose.

    The mean over labelled joints of exp(-d^2 / (2 area (2 sigma)^2)). Of a person without any, d is how far each joint
    lies outside of a box of three times the width and height.
    """
    corner, size = persons.boxes.unsqueeze(1).split(2, -1)
    x = poses.joints
    beyond = (corner - size - x).clamp(min=0) + (x - (corner + 2 * size)).clamp(min=0)
    blank = ~persons.labelled.any(1, keepdim=True)
    offset = torch.where(blank.unsqueeze(-1), beyond, x - persons.joints)
    e = offset.square().sum(-1) / (2 * sigmas) ** 2 / (persons.area.unsqueeze(1) + np.spacing(1)) / 2
    counts = persons.labelled | blank
    return (e.neg().exp() * counts).sum(1) / counts.sum(1)


def ranks_within(group: Tensor) -> Tensor:
    """0, 1, 2, ... within each run of equal values of `group` (M,)."""
    _, counts = torch.unique_consecutive(group, return_counts=True)
    return torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def best_first(score: Tensor, group: Tensor) -> Tensor:
    """(M,) the order by group, then by falling score; NaN, which is no score, comes last."""
    order = (-score).argsort(stable=True)
    return order[group[order].argsort(stable=True)]


def match(
    group_f: Tensor, group_t: Tensor, similarity: Callable, ignored: Tensor, crowd: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """COCO's greedy matching in all groups at once; a loop over the rank of the detections alone.

    group_f: (M,) of the detections, best first in each group; group_t: (N,) of the truth; both rising.
    similarity: of detections f and truths t, given as the row numbers (P,) of pairs in one group, f before t rising;
    ignored: (N, A) by area range; crowd: (N,), may be matched often; counts: (N,), False: to match it is no match.
    Returns of the pairs that are similar enough for the lowest limit: the detection (P,), whether they are matched
    (P, T, A), and whether that is right, not ignored (P, A).
    """
    device, (N, A), T = group_f.device, ignored.shape, len(LIMITS)
    limits = LIMITS.clamp(max=1 - 1e-10).to(device)
    start = torch.searchsorted(group_t, group_f)
    number = torch.searchsorted(group_t, group_f, right=True) - start  # of truths that a detection may choose from
    near = []
    _, portions = torch.unique_consecutive(number.cumsum(0) // PORTION, return_counts=True)
    for rows in torch.arange(len(group_f), device=device).split(portions.tolist() or [0]):
        f = rows.repeat_interleave(number[rows])
        t = start[f] + ranks_within(f)
        value = similarity(f, t)
        keep = value >= limits[0]
        near.append((f[keep], t[keep], value[keep]))
    f, t, value = map(torch.cat, zip(*near))

    own, line = torch.unique_consecutive(f, return_inverse=True)
    turn = ranks_within(group_f[own])[line]
    order = turn.argsort(stable=True)
    f, t, line, value = f[order], t[order], line[order], value[order]
    fits, right, free = value.unsqueeze(1) >= limits, ~ignored[t], crowd[t].view(-1, 1, 1)
    # What counts goes before what is ignored, then the more similar, of equals the later one.
    wish = (1 + value.argsort(stable=True).argsort().unsqueeze(1) + len(value) * right).int()  # (P, A)
    taken = torch.zeros(N, T, A, dtype=torch.bool, device=device)
    chosen = torch.zeros(len(value), T, A, dtype=torch.bool, device=device)
    start = 0
    for size in torch.bincount(turn).tolist():  # these detections are of different groups: no two want the same
        now = slice(start, start := start + size)
        before = taken.index_select(0, t[now])
        wishes = torch.where(fits[now].unsqueeze(2) & ~before, wish[now].unsqueeze(1), 0)
        _, place = torch.unique_consecutive(line[now], return_inverse=True)
        best = torch.zeros_like(wishes).scatter_reduce_(0, place.view(-1, 1, 1).expand_as(wishes), wishes, "amax")
        chosen[now] = (wishes > 0) & (wishes == best.index_select(0, place))
        taken.index_copy_(0, t[now], before | chosen[now] & ~free[now])
    chosen &= (counts.unsqueeze(1) | ignored)[t].unsqueeze(1)
    return f, chosen, right


def accumulate(
    matches: tuple[Tensor, ...], outside: Tensor, label: Tensor, score: Tensor, rank: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor]:
    """COCO's average precision (T, A, K) and recall (len(MOST), T, A, K) of K categories; NaN where one has no truth.

    matches: as of `match`; outside: (M, A), of no area range, not to be counted where unmatched; label, score: (M,), of
    detections sorted by group; rank: (M,) in the group; positives: (A, K), how many there are to find.
    """
    (A, K), T, M, R = positives.shape, len(LIMITS), len(label), len(RECALLS)
    order = best_first(score, label)
    column = torch.empty_like(order).scatter_(0, order, torch.arange(M, device=label.device))
    first = torch.searchsorted(label[order], torch.arange(K, device=label.device))  # column of each category
    regular = F.pad((~outside)[order].T.cumsum(1), (1, 0)).flatten()  # (A * (M + 1)), what counts if nothing is matched
    by_column = column[matches[0]].argsort()
    f, chosen, right = (x[by_column] for x in matches)
    line, pair = chosen.flatten(1).T.nonzero().unbind(1)  # of each match; limit and area range are one number
    area, k = line % A, label[f][pair]
    right, out = (x.flatten()[pair * A + area].long() for x in (right, outside[f]))
    part = line * K + k
    start = torch.arange(len(part), device=part.device) - ranks_within(part)

    def up_to_here(values: Tensor) -> Tensor:
        """Their sum within a line and a category."""
        total = values.cumsum(0)
        return total - (total - values)[start]

    hits = up_to_here(right).double()
    area = area * (M + 1)
    seen = regular[area + column[f][pair] + 1] - regular[area + first[k]] + up_to_here(right + out - 1)
    precision = hits / (seen + np.spacing(1))
    # At hits alone recall rises and precision peaks.
    hits, precision, part, pair = (x[right > 0] for x in (hits, precision, part, pair))

    wanted = positives.double().repeat(T, 1).flatten()  # (T*A*K,)
    reached = torch.searchsorted(RECALLS.to(label.device), hits / wanted[part], right=True) - 1
    best = torch.zeros(len(wanted) * R, dtype=torch.float64, device=label.device)
    best = best.scatter_reduce_(0, part * R + reached, precision, "amax").view(-1, R)
    best = best.flip(1).cummax(1).values.flip(1)  # the best precision at this recall or a higher one
    ap = torch.where(wanted > 0, best.mean(1), torch.nan)
    recall = torch.stack([torch.bincount(part[rank[f][pair] < most], minlength=len(wanted)) / wanted for most in MOST])
    return ap.view(T, A, K), recall.view(-1, T, A, K)


def oks_numbers(persons: Persons, poses: Poses, sigmas: Tensor) -> dict[str, float]:
    """The ten numbers of `oks_eval`, from tensors on one device."""
    persons = pick(persons, persons.group.argsort(stable=True))
    poses = pick(poses, best_first(poses.score, poses.group))
    rank = ranks_within(poses.group)
    poses, rank = pick(poses, rank < MOST[-1]), rank[rank < MOST[-1]]

    def outside(area: Tensor) -> Tensor:
        """(M, A) bool: too small or too large for each area range."""
        low, high = doubles(AREAS).to(area.device).T
        return (area.unsqueeze(1) < low) | (area.unsqueeze(1) > high)

    def similarity(f: Tensor, t: Tensor) -> Tensor:
        return oks(pick(persons, t), pick(poses, f), sigmas)

    ignored = outside(persons.area) | persons.ignored.unsqueeze(1)
    matches = match(poses.group, persons.group, similarity, ignored, persons.crowd, persons.countable)
    K = 1 + max((int(x.category.max()) for x in (persons, poses) if len(x.category)), default=0)
    positives = torch.zeros(K, len(AREAS), dtype=torch.long, device=ignored.device)
    positives = positives.index_add_(0, persons.category, (~ignored).long()).T
    precision, recall = accumulate(matches, outside(poses.area), poses.category, poses.score, rank, positives)
    numbers = {}
    for kind, values in (("AP", precision), ("AR", recall[0])):
        rows = {"": values[:, 0], "50": values[0, 0], "75": values[5, 0], "m": values[:, 1], "l": values[:, 2]}
        numbers |= {kind + name: -1.0 if x.isnan().all() else x.nanmean().item() for name, x in rows.items()}
    return numbers


def oks_eval(
    ground_truth: Path | str | dict,
    detections: Path | str | Sequence[dict],
    sigmas: Sequence[float] | Tensor | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """COCO's ten keypoint numbers, equal to pycocotools' `COCOeval(..., "keypoints")`.

    ground_truth: a COCO file of keypoints, its content, or pycocotools' COCO; detections: a file of COCO results, the
    list in it, or what COCO.loadRes makes of it; joints may be triples or arrays.
    sigmas: (J,) tolerances, by default COCO's for any 17 joints and .067 for others. Keys: AP AP50 AP75 APm APl AR
    AR50 AR75 ARm ARl; -1 where nobody is in the ground truth. A score of NaN counts as the least, as in pycocotools.
    Raises ValueError for a detection that is damaged or on an image that `ground_truth` does not list, or if the
    numbers of joints differ, DataError for a damaged file.
    """
    ground_truth = getattr(ground_truth, "dataset", ground_truth)  # pycocotools' COCO
    given = isinstance(ground_truth, (str, Path))
    path, coco = (ground_truth, load_coco(ground_truth)) if given else ("ground truth", ground_truth)
    lists = (joints_in_row(entry.get("keypoints")) for entry in entries_of(coco, "annotations", path))
    joints = next((len(points) // 3 for points in lists if isinstance(points, (list, tuple)) and points), None)
    if joints is None and coco["annotations"]:
        raise DataError(f"{path}: no annotation has 'keypoints'; it must be a file of COCO keypoints")
    own = functools.partial(check_joints, joints=joints or 0, scoring=True)
    coco = check_coco(coco, path, own, scoring=True)
    persons, poses = read_persons(coco)[0], read_poses(detections, coco, joints)
    joints = poses.joints.shape[1]
    if not len(persons.group):
        persons = persons._replace(joints=poses.joints[:0], labelled=poses.joints[:0, :, 0] > 0)
    sigmas = default_sigmas(joints) if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64)
    sigmas = sigmas.expand(joints) if sigmas.ndim == 0 else sigmas
    if not (sigmas.isfinite() & (sigmas > 0)).all():
        raise ValueError(f"sigmas {sigmas.tolist()!s:.60}: a tolerance is a positive number")
    if len(sigmas) != joints > 0:
        raise ValueError(f"{len(sigmas)} sigmas for {joints} joints")
    sigmas = sigmas[:joints]
    persons, poses = (type(rows)(*(tensor.to(device) for tensor in rows)) for rows in (persons, poses))
    return oks_numbers(persons, poses, sigmas.to(device))


def locate(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """The highest pixel of each heatmap (N, J, h, w), a quarter pixel towards its higher neighbours [S].

    Returns joints (N, J, 2), x and y in pixels of the heatmap, and how high it is there (N, J).
    """
    h, w = heatmaps.shape[-2:]
    flat = heatmaps.flatten(2)
    height, index = flat.max(-1)
    x, y = index % w, index // w

    def shift(position: Tensor, last: int, step: int) -> Tensor:
        inside = (position > 0) & (position < last)
        after, before = (flat.gather(-1, (index + s * inside).unsqueeze(-1)).squeeze(-1) for s in (step, -step))
        return 0.25 * (after - before).sign()

    return torch.stack([x + 0.5 + shift(x, w - 1, 1), y + 0.5 + shift(y, h - 1, w)], -1), height


def pose_metrics(joints: Tensor, height: Tensor, split: Split, sigmas: Tensor) -> dict[str, float]:
    """METRICS of the joints (M, J, 2) found in the middle crops of a split, in pixels of `split.images`.

    A pose scores the mean height of its heatmaps' peaks. PCK: the share of labelled joints that are found within a
    tenth of the longer side of the box.
    """
    left_top, pixel = split.frames[:, None, :2], split.frames[:, None, 2:]
    joints, target = left_top + joints * pixel, left_top + split.joints * pixel
    poses = Poses(split.group, split.category, joints, height.double().mean(1), extent(joints))
    numbers = oks_numbers(split.persons, poses, sigmas)
    near = (joints - target).norm(dim=-1) < 0.1 * split.sizes.unsqueeze(1)
    pck = (near & split.labelled).sum() / split.labelled.sum()
    return {name: numbers[name.upper()] for name in METRICS if name != "pck"} | {"pck": pck.item()}


# =====================================================================================================================
# Losses: the hand-made ones. Each takes predicted and target heatmaps (N, J, H, W) and a weight (N, J), 0 where a joint
# has no label, and returns a scalar; without any label it is 0 and still connected to the graph


def mean_over_joints(value: Tensor, weight: Tensor) -> Tensor:
    """The mean of `value` (N, J) over the joints that have a label."""
    return (value * weight).sum() / weight.sum().clamp(min=1)


def mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared error, the mean over pixels and joints [S]; the published factor of 1/2 does nothing to AdamW."""
    return mean_over_joints((wide(prediction) - target).square().mean((2, 3)), weight)


def l1(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Absolute error, the mean over pixels and joints."""
    return mean_over_joints((wide(prediction) - target).abs().mean((2, 3)), weight)


def ce(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy of the joint's position, with heatmaps as logits: Neg(Mul(y, Log(p))), but near p = 0."""
    log = (SHARPNESS * wide(prediction)).flatten(2).log_softmax(-1).view_as(prediction)
    return mean_over_joints(-(target * log).mean((2, 3)), weight)


def ohkm(prediction: Tensor, target: Tensor, weight: Tensor, hardest: int = 8) -> Tensor:
    """Squared error of each person's hardest joints (online hard keypoints mining; Chen 2018, arXiv 1711.07319)."""
    value = (wide(prediction) - target).square().mean((2, 3)) * weight
    return value.topk(min(hardest, value.shape[1]), 1).values.mean()


def awing(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Adaptive Wing loss (Wang 2019, arXiv 1904.07399, Eqs. 6 and 7): omega 14, epsilon 1, theta 0.5, alpha 2.1."""
    omega, theta, power = 14.0, 0.5, 2.1 - wide(target)
    error = (wide(prediction) - target).abs()
    slope = omega * power * theta ** (power - 1) / (1 + theta**power)
    offset = theta * slope - omega * torch.log1p(theta**power)
    # The power of an exact zero has no finite gradient in float32 wherever its exponent is near one: kept off it.
    near = omega * torch.log1p(error.clamp(min=1e-12) ** power)
    return mean_over_joints(torch.where(error < theta, near, slope * error - offset).mean((2, 3)), weight)


LOSSES = {"mse": mse, "l1": l1, "ohkm": ohkm, "awing": awing, "ce": ce}
KNOWN = (  # what `--search cse` starts from: cross entropy, squared and absolute error, overlap
    "Neg(Mul(y, Log(p)))",
    "Square(Add(p, Neg(y)))",
    "Abs(Add(p, Neg(y)))",
    "Neg(Mul(y, p))",
)
BASELINE = "mse"


# Networks that regress heatmaps give 0 to 1: times ten, that is a softmax from flat to nearly one-hot [D].
SHARPNESS = 10.0


def heatmap_leaves(
    prediction: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Leaves and mask of heatmaps (N, J, H, W) with a weight (N, J): each joint is one sample, (N * J, 1, H, W).

    `p` is where the joint is: a softmax over the pixels. With heatmaps as they are, or their sigmoid, hardly a random
    tree in a thousand pulls a peak up and the rest down; a softmax makes the pixels compete [D]. Joints are folded
    into N because each person lacks others: where the mask varies along C, a mean over C would mix in joints without a
    label, and a loss would depend on how many joints a skeleton has [D].
    """
    shape, given = prediction.shape, None if weight is None else tuple(weight.shape)
    if len(shape) != 4 or target.shape != shape or given not in (None, shape[:2], (*shape[:2], 1)):
        raise ValueError(
            f"prediction {tuple(shape)}, target {tuple(target.shape)} and weight {given}: expected (N, J, H, W) twice, "
            "and (N, J) or None"
        )
    y, p = (wide(heatmaps).flatten(0, 1).unsqueeze(1) for heatmaps in (target, prediction))
    mask = None if weight is None else (weight > 0).reshape(-1, 1, 1, 1).expand_as(p)
    return {"y": y, "p": softmax_2d(SHARPNESS * p)}, mask


def softmax_2d(logits: Tensor) -> Tensor:
    return logits.flatten(-2).softmax(-1).view_as(logits)


def tree_loss(expr: Expr) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A searched tree as a loss of predicted and target heatmaps and weight."""

    def loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        leaves, mask = heatmap_leaves(prediction, target, weight)
        return evaluate(expr, leaves, mask)

    return loss


# The opening of the standalone file.
HEAD = f'''SHARPNESS = {SHARPNESS}


def loss(prediction, target, weight=None):
    """{{expr}}

    prediction, target: heatmaps (N, J, H, W), targets with peaks of height 1; weight: (N, J), zero where a joint has no
    label, None if all have one. Returns a scalar, float32 at least: the mean over pixels and labelled joints.
    """
    leaves, mask = heatmap_leaves(prediction, target, weight)
    y, p = leaves["y"], leaves["p"]
'''
HELPERS = sources(softmax_2d, heatmap_leaves)


def export(losses: dict[str, Expr], title: str = "A loss function found by search.") -> str:
    """A found loss as a standalone file."""
    return python_source(losses["loss"], title, HEAD, HELPERS)


# =====================================================================================================================
# Training


class Batches:
    """Batches without end (images normalised, target heatmaps, weights), drawn with replacement.

    Order and augmentation have generators of their own; their states say where in the sequence the training is. Of
    several processes each draws its share of a batch.
    """

    def __init__(self, split: Split, swap: Tensor, plan: Schedule, size: tuple[int, int], seed: int):
        rank, _ = evolve.rank_and_world()
        self.split, self.swap, self.plan, self.size = split, swap, plan, size
        self.share = evolve.share_of(plan.batch)
        seed += 1_000_003 * rank
        self.generators = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        plan, size, (order, augmentation) = self.plan, self.size, self.generators
        coarse = (size[0] // STRIDE, size[1] // STRIDE)
        for index in read_ahead(self.split, self.share, order):
            batch = batch_scale_rotate_flip(self.split, self.swap, index, size, plan, augmentation)
            images, joints, labelled = batch
            yield normalise(images), batch_heatmaps(joints / STRIDE, coarse, plan.sigma), labelled.float()


def make_optimizer(net: nn.Module, plan: Schedule) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer, and its learning rate over the steps."""
    optimizer = torch.optim.AdamW(net.parameters(), plan.lr, weight_decay=plan.weight_decay, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: (1 - step / plan.steps) ** 0.9)


def batch_loss(net: nn.Module, loss: Callable, batch: Sequence[Tensor]) -> Tensor:
    images, *targets = batch
    with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
        heatmaps = net(images)
    return loss(heatmaps.float(), *targets)


def train_network(
    net: nn.Module,
    loss: Callable,
    data,
    plan: Schedule,
    stop_invalid: bool = True,
    checkpoint: evolve.Checkpoint | None = None,
) -> list[tuple[int, float]]:
    """Train `net` on the batches of `data`; returns (step, loss) about twenty times on the way.

    Goes on from `checkpoint` where that has been written. Under torchrun the gradients are averaged over the processes,
    each of which evaluates the loss on its own part of the batch.

    Raises InvalidLoss as soon as the loss or its gradient is not finite [P]; on CUDA the test is read every ten steps
    only, so that the host seldom waits for the device.
    """
    cuda = next(net.parameters()).is_cuda
    optimizer, schedule = make_optimizer(net, plan)
    _, world = evolve.rank_and_world()
    parts = (net, optimizer, schedule)  # of which a checkpoint has the network first
    first, curve = checkpoint.load(parts, data.generators) if checkpoint else (0, [])
    weights, valid = list(net.parameters()), True
    net.train()
    if world > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if cuda else net
        net = nn.parallel.DistributedDataParallel(net)
    for step, batch in zip(range(first, plan.steps), data):
        value = batch_loss(net, loss, batch)
        if not value.requires_grad:
            raise InvalidLoss("the first step, for want of a gradient")
        shown = value.detach()
        if world > 1:  # if one process alone saw what is invalid, the others would wait for it forever
            dist.all_reduce(shown := shown / world)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        if stop_invalid:
            valid = shown.isfinite() & norm.isfinite() & valid
            if (not cuda or step % 10 == 9 or step == plan.steps - 1) and not valid:
                raise InvalidLoss(f"step {step}")
        if plan.clip < math.inf:
            torch.nn.utils.clip_grads_with_norm_(weights, plan.clip, norm)
        optimizer.step()
        schedule.step()
        if step % max(1, plan.steps // 20) == 0:
            curve.append((step, shown))
        if checkpoint and ((step + 1) % checkpoint.every == 0 or step + 1 == plan.steps):
            checkpoint.save(step + 1, curve, parts, data.generators)
    return [(step, value.item()) for step, value in curve]


@torch.no_grad()
def test_network(
    net: nn.Module, split: Split, skeleton: Skeleton, size: tuple[int, int], flip: bool = False
) -> dict[str, float]:
    """All metrics of `net` on a split; with `flip` each crop is seen in a mirror as well."""
    found = []
    number = max(1, 2**20 // (size[0] * size[1]))
    for start in range(0, len(split.images), number):
        if isinstance(split.images, Pictures):
            split.images.prefetch(range(start, min(start + 2 * number, len(split.images))))
        images, corner = middle(split.images[start : start + number], size)
        heatmaps = predict(net, images)
        if flip:
            heatmaps = (heatmaps + predict(net, images.flip(-1)).flip(-1)[:, skeleton.swap]) / 2
        found.append(locate(heatmaps))
    joints, height = (torch.cat(parts) for parts in zip(*found))
    return pose_metrics(corner.to(joints.device) + joints.double() * STRIDE, height, split, skeleton.sigmas)


@torch.no_grad()
def predict(net: nn.Module, images: Tensor) -> Tensor:
    """Heatmaps (N, J, h, w) of crops (N, 3, H, W) uint8."""
    net.eval()
    with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
        return net(normalise(images.float())).float()


def draw_predictions(
    net: nn.Module, split: Split, skeleton: Skeleton, size: tuple[int, int], path: Path, number: int = 8
) -> None:
    """The skeletons of the first few persons, as labelled and below it as predicted, as a PNG."""
    images, corner = middle(split.images[:number], size)
    joints, _ = locate(predict(net, images))
    labelled, zoom, rows = split.labelled[:number].tolist(), max(1, 256 // size[0]), []
    large = F.interpolate(images.cpu(), scale_factor=zoom).movedim(1, -1)
    for poses in (split.joints[:number].cpu() - corner, joints.cpu() * STRIDE):
        for image, pose, known in zip(large, poses, labelled):
            picture = image.numpy().copy()
            draw_skeleton(picture, pose * zoom, known, skeleton.limbs)
            rows.append(torch.from_numpy(picture).movedim(-1, 0))
    grid = torchvision.utils.make_grid(torch.stack(rows), nrow=len(images), pad_value=255)
    Image.fromarray(grid.movedim(0, -1).numpy()).save(path)


def draw_skeleton(picture: np.ndarray, pose: Tensor, known: list[bool], limbs: list[list[int]]) -> None:
    """Limbs in green, joints in red, those without a label left out."""
    points = [tuple(int(round(v)) for v in point) for point in pose.tolist()]
    for a, b in limbs:
        if known[a - 1] and known[b - 1]:
            cv2.line(picture, points[a - 1], points[b - 1], (0, 230, 0), 1, cv2.LINE_AA)
    for point, shown in zip(points, known):
        if shown:
            cv2.circle(picture, point, 2, (255, 0, 0), -1, cv2.LINE_AA)


# =====================================================================================================================
# Search


GATE_SIZE = 16  # height of the rejection samples in pixels of a heatmap [D]
GATE_SAMPLES = 5  # [P]
STATES = (0, 0.15, 1)  # shares of the base training after which the gates look at its predictions [D]


class PoseTask(evolve.Task):
    """What evolve.py needs to know of pose estimation."""

    name, baseline, metrics = "pose", BASELINE, METRICS
    symbols = {"loss": "yp1"}
    export = staticmethod(export)

    def __init__(self, args):
        self.args, self.device = args, args.device
        list_data(args)  # what is missing is said at once
        self.size = (args.crop, round(args.crop * args.aspect))
        self.proxy = self.plan(PROXY[args.model], args.proxy_steps)
        self.retraining = self.plan(RETRAIN[args.model], args.retrain_steps)
        self.whole = self.retraining.steps >= RETRAIN[args.model].steps
        self.data: dict[str, Split] = {}

    def load(self) -> None:
        if not self.data:
            self.data, self.skeleton = read_data(self.args)

    def plan(self, plan: Schedule, steps: int | None) -> Schedule:
        """A schedule with the user's flags in it."""
        share = min(1, (steps or plan.steps) / plan.steps)  # a shorter proxy goes on from a shorter training
        base, base_of = tuple(round(share * number) for number in plan.base), max(1, round(share * plan.base_of))
        flags = dict(steps=steps, batch=self.args.batch, lr=self.args.lr)
        given = {name: value for name, value in flags.items() if value is not None}
        return plan._replace(**given, base=base, base_of=base_of)

    def network(self, plan: Schedule, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = build_model(self.args.model, len(self.skeleton.names), self.args.pretrained)
        return net.to(self.device, memory_format=torch.channels_last)

    def loss(self, losses: dict[str, Expr] | str) -> Callable[..., Tensor]:
        return LOSSES[losses] if isinstance(losses, str) else tree_loss(losses["loss"])

    def batches(self, plan: Schedule, seed: int) -> Batches:
        return Batches(self.data["train"], self.skeleton.swap, plan, self.size, seed)

    @functools.cached_property
    def proxy_batches(self):
        """The batches of the proxy. Every candidate sees the same ones, so they are made once where memory allows."""
        plan, (height, width) = self.proxy, self.size
        if plan.steps * plan.batch * height * width * (12 + 4 * len(self.skeleton.names) / STRIDE**2) < 2**29:  # bytes
            return list(itertools.islice(self.batches(plan, self.args.seed), plan.steps))
        return None

    def test(self, net: nn.Module, split: Split) -> dict[str, float]:
        return test_network(net, split, self.skeleton, self.size, self.args.flip_test)

    def prepare(self, base: Path) -> None:
        """The base network: the first steps of a training with the baseline's loss.

        Proxy trainings go on from each of its states at `base`; the gates look at losses at STATES, up to the first.
        """
        self.states = evolve.base_states(base, self.device, self.train_base, self.network(self.proxy, self.args.seed))
        self.bases = len(self.states) - len(STATES) + 1
        self.branches = {"loss": self.branch()}

    def train_base(self) -> list[dict[str, Tensor]]:
        plan = self.proxy._replace(steps=self.proxy.base_of)
        if plan.base:
            note(f"training the base network: {plan.base[-1]} steps of {BASELINE}")
        first, *later = plan.base or (0,)
        steps = [*(round(first * share) for share in STATES), *later]
        net, states = self.network(plan, self.args.seed), []
        batches = evolve.on_the_way(self.batches(plan, 500 + self.args.seed), net, steps, states)
        train_network(net, LOSSES[BASELINE], batches, plan)
        return states + [net.state_dict()] * (len(steps) - len(states))

    def branch(self) -> Branch:
        """The training persons with most labelled joints, small, and what the base network makes of them on its way.

        But for the first state, which is random logits: an untrained network starts at zero, where losses that differ
        everywhere else look the same [D]. What has no label counts as empty here; training leaves it out.
        """
        train = self.data["train"]
        index = train.labelled.sum(1).sort(descending=True, stable=True).indices[:GATE_SAMPLES]
        self.few = index = index if len(index) > 1 else index.repeat(2)  # batch norm needs two
        size = (GATE_SIZE, round(GATE_SIZE * self.args.aspect))
        images, corner = middle(train.images[index], self.size)
        joints = train.joints[index] - corner.to(self.device)
        scale = torch.tensor(size) / torch.tensor(self.size)  # of height and width
        target = batch_heatmaps(joints * scale.flip(0).to(self.device), size, 1.0)
        target = (target * train.labelled[index, :, None, None]).cpu()
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(self.args.seed))
        images = normalise(images.float())
        net, logits = self.network(self.proxy, self.args.seed), [noise]
        for state in self.states[1 : len(STATES)]:
            net.load_state_dict(state)
            with torch.no_grad():
                logits.append(F.interpolate(SHARPNESS * net(images), size, mode="bilinear").cpu())
        return Branch(
            ("y", "p", "1"),
            torch.stack(logits).unsqueeze(3),  # (S, B, J, 1, H, W)
            target.unsqueeze(2),  # (B, J, 1, H, W): each joint is a sample, as in training
            self.gate_leaves,
            self.gate_score,  # the published ETA stands: hand-made losses exceed it with a margin
            scale_free=True,
            ideal=SHARPNESS * target.unsqueeze(2),
            known=KNOWN,
        )

    @staticmethod
    def gate_leaves(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"y": target.expand_as(logits), "p": softmax_2d(logits)}

    @staticmethod
    def gate_score(logits: Tensor, target: Tensor) -> Tensor:
        """The share of labelled joints whose highest pixel is at most one pixel off, diagonals included."""
        width = target.shape[-1]
        found, wanted = (heatmaps.flatten(-3).argmax(-1) for heatmaps in (logits, target))
        off = torch.maximum((found % width - wanted % width).abs(), (found // width - wanted // width).abs())
        labelled = target.flatten(-3).any(-1)
        return ((off <= 1) & labelled).sum(-1) / labelled.sum(-1)

    def train(self, losses: dict[str, Expr] | str, base: int = 0) -> float:
        return round(self.proxy_scores(losses, base)[self.args.metric], 6)

    def proxy_scores(self, losses: dict[str, Expr] | str, base: int = 0) -> dict[str, float]:
        """All metrics on the search-validation split after a proxy training."""
        net = self.network(self.proxy, self.args.seed)
        net.load_state_dict(self.states[base - self.bases])
        data = self.proxy_batches or self.batches(self.proxy, self.args.seed)
        self.curve = []
        self.curve = train_network(net, self.loss(losses), data, self.proxy, "invalid" not in self.args.without)
        return self.test(net, self.data["val"])

    def witness(self, losses: dict[str, Expr] | str, seed: int) -> float:
        plan, own = self.proxy, 1000 + seed  # as in `retrain`
        if not plan.base:
            return math.nan
        plan = plan._replace(steps=plan.base[-1] + plan.steps)
        net = self.network(plan, own)
        train_network(net, self.loss(losses), self.batches(plan, own), plan)
        return round(self.test(net, self.data["val"])[self.args.metric], 6)

    def simulate(self, losses: dict[str, Expr] | str) -> float:
        """A short training on the persons of the gates: PCK on these.

        Whatever metric is searched for: the AP of so short a training is often exactly zero [D].
        """
        few = select(self.data["train"], self.few)
        plan = self.proxy._replace(steps=max(1, self.proxy.steps // 4))
        net = self.network(plan, self.args.seed)
        data = Batches(few, self.skeleton.swap, plan, self.size, self.args.seed)
        try:
            train_network(net, self.loss(losses), data, plan)
        except InvalidLoss:
            return 0.0
        return self.test(net, few)["pck"]

    def retrain(
        self, losses: dict[str, Expr] | str, seed: int, picture: Path | None = None, checkpoint=None
    ) -> dict[str, dict[str, float]]:
        own = 1000 + seed  # never the seed of the proxy: the ranking must hold for other weights and other batches
        plan = self.retraining
        net = self.network(plan, own)
        self.curve = train_network(net, self.loss(losses), self.batches(plan, own), plan, checkpoint=checkpoint)
        if picture:
            draw_predictions(net, self.data["test"], self.skeleton, self.size, picture)
        return {name: self.test(net, self.data[name]) for name in ("val", "test")}


# =====================================================================================================================
# Main


def main() -> None:
    evolve.main(parse_arguments(sys.argv[1:]), PoseTask)


if __name__ == "__main__":
    main()
