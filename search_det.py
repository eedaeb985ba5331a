"""Object detection and instance segmentation: search the losses for the metric you care about.

    python search_det.py --metric bbox                        # evolve its four losses on the embedded data set
    python search_det.py --metric bbox --branches rcnn_cls,rcnn_reg   # two of them; the others keep the baseline's
    python search_det.py --metric segm                        # with masks: five losses
    python search_det.py --metric bbox --loss giou            # train and evaluate instead
    python search_det.py --metric bbox --loss "rcnn_cls=Neg(Mul(y, Log(p))), rcnn_reg=iou"
    python search_det.py --compare "ce+l1,iou,giou,cse-a,RUN_DIR"    # several losses, one table
    python search_det.py --metric bbox --data coco --data-root coco2017 --model r50-fpn
    tensorboard --logdir runs

AutoLoss-Zero, arXiv 2103.14026 (marks [P]); own choices [D]. The detectors are torchvision's Faster and Mask R-CNN.
The whole task is in this file but for what data/ reads: arguments, data, networks, metric, hand-made losses, training.

Measured (the first command, twenty minutes of two cores of an AMD EPYC, torch 2.14.1): 37,348 losses explored, 113 of
them trained; AP on test after 2,400 steps .498, cross entropy and L1 .484, the difference over three paired seeds +.014
(standard error .003), with one over the IoU for the boxes of proposals and detections. tests/RESULTS.md has more.
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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image  # comes with torchvision
from pycocotools import mask as rle
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models.detection import _utils as detection_utils
from torchvision.models.detection import roi_heads, rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

import evolve
from data import shapes
from data.coco import (
    check_coco,
    check_extents,
    check_mask,
    check_runs,
    coco_files,
    column,
    found_files,
    in_line,
    list_results,
    load_coco,
    no_mask,
    run_lengths,
    uncollected,
)
from data.pictures import decode as decode  # the way in for one picture; tests and users call it
from data.pictures import fingerprint, group_size, read_pictures, scaled, shared_bytes, threads, warn_of_shared
from evolve import Branch, DataError, InvalidLoss, fail, note, warn
from loss_ops import Expr, evaluate, parse, python_module, softmax_leaves, sources, wide

METRICS = {
    "bbox": ("bbox", "bbox50", "bbox75"),
    "segm": ("segm", "segm50", "segm75", "bbox", "bbox50", "bbox75"),
}
DATA = ("shapes", "coco")
MODELS = ("small", "r50-fpn")
COARSEST = {"small": 16, "r50-fpn": 64}  # the stride of the deepest features, which windows are multiples of


class Schedule(NamedTuple):
    """How one network is trained."""

    steps: int
    batch: int
    size: int  # side of a training window in pixels; the longer side of a picture in a test
    scale: tuple[float, float]  # range of the random scale; at 1 the longer side of a picture fills the window
    optimizer: str
    lr: float  # decays to 0 as (1 - step / steps) ** 0.9 (poly)
    weight_decay: float
    model: str = "small"
    warmup: float = 0.0  # share of the steps until the learning rate is reached
    base: tuple[int, ...] = ()  # steps with the baseline's losses from which proxy trainings go on, rising ...
    base_of: int = 1  # ... the first ones of a training of so many
    clip: float = math.inf  # norm to which longer gradients are cut


# The proxy on shapes starts from random weights, as its ranking is best there (tests/bench_det.py --proxies): a base
# network hides what is wrong with a loss, for its proposals are good already. What is ahead from there must show on a
# base network that it lasts [D]. The gradient of the logarithm or the inverse of an intersection that is nearly nothing
# is as long as 1e11, once in a thousand steps, and would end a training, valid though it is; that of the baseline stays
# below 9 on shapes. On COCO 35 is what others take [D].
PROXY = {
    "shapes": Schedule(150, 8, 64, (0.8, 1.25), "adamw", 0.003, 1e-4, "small", 10 / 150, (0, 600), 2400, 10.0),
    "coco": Schedule(2000, 16, 512, (0.8, 1.25), "sgd", 0.02, 1e-4, "r50-fpn", 500 / 2000, clip=35.0),
}
RETRAIN = {
    "shapes": PROXY["shapes"]._replace(steps=2400, base=(), base_of=1, warmup=10 / 1200),
    "coco": Schedule(90_000, 16, 1024, (0.8, 1.25), "sgd", 0.02, 1e-4, "r50-fpn", 500 / 90_000, clip=35.0),
}


# =====================================================================================================================
# Arguments


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = evolve.Parser(description=__doc__.split("\n")[0], usage="python search_det.py --metric bbox [flags]")
    others = "a run directory, or BRANCH=NAME and BRANCH=FORMULA, comma-separated, with semicolons in --compare"
    flag = evolve.add_task_flags(parser, tuple(METRICS), LOSSES, others, DATA, MODELS)
    about = f"losses to search, comma-separated, of {' '.join(BRANCHES)}; by default all, mask with --metric segm"
    flag("--branches", "NAMES", about, evolve.some_of(tuple(BRANCHES)))
    about = "leave out annotations with an empty box or mask instead of complaining"
    flag("--skip-empty", None, about, action="store_true")
    flag("--proxy-steps", "N", f"steps of a proxy training: {evolve.told(PROXY, 'steps')}", evolve.at_least(1))
    about = f"steps of a re-training: {evolve.told(RETRAIN, 'steps')}"
    flag("--retrain-steps", "N", about, evolve.at_least(1))
    about = "side of a training window, to which the longer side of a picture is scaled: "
    about += f"{evolve.told(PROXY, 'size')}; in re-training {evolve.told(RETRAIN, 'size')}"
    flag("--size", "PIXELS", about, evolve.at_least(64, most=8192))
    flag("--batch", "N", f"images in a batch: {evolve.told(PROXY, 'batch')}", evolve.at_least(1, most=4096))
    flag("--lr", "RATE", f"learning rate: {evolve.told(PROXY, 'lr')}", evolve.at_least(1e-6, float))
    masks = "segm" in {word.removeprefix("--metric=") for word in argv}
    evolve.add_search_flags(parser, minutes=6 if masks else 11)  # with the closing round less than twenty
    args = parser.parse_args(argv)
    if args.resume:
        args = evolve.resume_arguments(parser, argv, DetTask)
    return check_arguments(args)


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other flags; end the program with one line where something is wrong."""
    evolve.settle_arguments(args, read_loss)
    possible = [name for name in BRANCHES if name != "mask" or args.metric == "segm"]
    args.branches = args.branches or possible
    flag = "--loss" if args.compare is None else "--compare"
    asked = [("--branches mask", args.branches), *((f"{flag} {text:.80}", loss) for text, loss in args.wanted.items())]
    for text, losses in asked:
        if "mask" in losses and args.metric != "segm":
            fail(f"{text}: there are no masks to train; give --metric segm with it")
    for model in {args.model or plans[args.data].model for plans in (PROXY, RETRAIN)}:
        if args.size and args.size % COARSEST[model]:
            fail(f"--size {args.size}: give a multiple of {COARSEST[model]}, the coarsest stride of --model {model}")
        if args.pretrained:  # what is missing shows before the search, not after it
            build_model(model, 2, False, args.pretrained)
    return args


def read_loss(text: str, flag: str) -> str | dict[str, Expr | str]:
    """The name of a hand-made set of losses, a run directory, or a name or a formula for some of the branches."""
    if text in LOSSES:
        return text
    if os.path.isdir(text):
        return evolve.read_found(Path(text), DetTask, flag)
    if "=" not in text:
        known = f"{' '.join(LOSSES)}, a run directory, or BRANCH=LOSS with a branch of {' '.join(BRANCHES)}"
        fail(f"{flag} {text:.80}: unknown; give one of {known}")
    losses = {}
    for part in evolve.split_outside_brackets(text, ",;"):
        branch, _, term = (piece.strip() for piece in part.partition("="))
        if branch not in BRANCHES:
            fail(f"{flag} {text:.80}: unknown branch {branch!r:.40}; choose one of {' '.join(BRANCHES)}")
        if branch in losses:
            fail(f"{flag} {text:.80}: {branch} twice; give each branch one loss")
        losses[branch] = read_term(branch, term, f"{flag} {part}")
    return losses


def read_term(branch: str, text: str, shown: str) -> Expr | str:
    """The loss of one branch: the name of a hand-made one, or a formula."""
    symbols, known = BRANCHES[branch]
    if text in known:
        return text
    if "(" not in text:
        fail(f"{shown}: unknown; give one of {' '.join(known)} or a formula")
    return evolve.read_formula(text, shown, symbols)


# =====================================================================================================================
# Data


class Objects(NamedTuple):
    """Ground truth or detections of a whole split, one row each."""

    image: Tensor  # (M,) int64, 0..I-1 in the order of image ids
    label: Tensor  # (M,) int64, 0..K-1 in the order of category ids
    box: Tensor  # (M, 4) float64, x y w h in pixels of the original picture
    area: Tensor  # (M,) float64
    score: Tensor  # (M,) float64; 0 for ground truth
    crowd: Tensor  # (M,) bool
    counts: Tensor  # (M,) bool; pycocotools takes a match with annotation id 0 for none
    masks: list | None = None  # M run-length codes


class Truth(NamedTuple):
    """What the evaluator compares with: the annotations of a split."""

    objects: Objects
    sizes: list[tuple[int, int]]  # height and width of each picture
    categories: list[int]  # ids, rising


class Split(NamedTuple):
    """The pictures of a split, on a common canvas where some are put together, and the objects in them."""

    images: "Tensor | Pictures"  # (M, 3, H, W) uint8, RGB; scaled down where a side is longer than any window
    sizes: Tensor  # (M, 2) float32, height and width of each picture on the canvas
    originals: Tensor  # (M, 2) float32, the same before it was scaled down
    boxes: Tensor  # (M, G, 4) float32, x1 y1 x2 y2 on the canvas
    labels: Tensor  # (M, G) int64, 1..K; 0 where a picture has fewer than G objects
    crowd: Tensor  # (M, G) bool
    frames: Tensor  # (M, G, 5) int64, in pixels of the original: x y w h around a mask, and the index of its first bit
    bits: "Tensor | Pictures"  # (M, 1, B) uint8, masks inside of their frames, row by row, eight pixels in a byte
    truth: Truth


class Source(NamedTuple):
    """Where a split comes from."""

    annotations: Path
    folder: Path
    keep: Callable[[int], bool] = lambda k: True  # which pictures, by their number in the order of ids


def read_objects(coco: dict, masks: bool) -> Truth:
    """The annotations of the listed pictures, as `check_coco` gives them."""
    row, label = ({entry["id"]: k for k, entry in enumerate(coco[key])} for key in ("images", "categories"))
    sizes = [(image["height"] or 0, image["width"] or 0) for image in coco["images"]]
    entries = [entry for entry in coco["annotations"] if entry["image_id"] in row]

    def told(values, kind):
        return torch.tensor(list(values), dtype=kind)

    objects = Objects(
        told((row[entry["image_id"]] for entry in entries), torch.long),
        told((label[entry["category_id"]] for entry in entries), torch.long),
        told((entry["bbox"] for entry in entries), torch.float64).view(-1, 4),
        told((entry["area"] for entry in entries), torch.float64),
        torch.zeros(len(entries), dtype=torch.float64),
        told((entry["iscrowd"] for entry in entries), torch.bool),
        told((entry["id"] != 0 for entry in entries), torch.bool),
        [run_lengths(entry["segmentation"], sizes[row[entry["image_id"]]]) for entry in entries] if masks else None,
    )
    return Truth(objects, sizes, list(label))


def check_source(source: Source, masks: bool, skip_empty: bool) -> dict:
    """The COCO file of a split, checked."""
    advice = None if skip_empty else "repair it, or leave it out with --skip-empty"
    own, path = check_mask if masks else no_mask, source.annotations
    coco = check_coco(load_coco(path), path, own, source.folder, advice)
    if masks:
        check_extents(path, coco)
    return coco


def read_split(
    source: Source, coco: dict, largest: int, masks: bool, memory: float = math.inf, device: str = "cpu"
) -> Split:
    """The pictures of a COCO file, scaled down where a side is longer than `largest` pixels, and their objects.

    coco: as of `check_source`. What takes at most `memory` bytes is kept once it is decoded; few and small pictures are
    decoded at once. Raises DataError, now or when a picture is used, naming what is missing, cannot be read or does not
    fit.
    """
    path = source.annotations
    listed = [image for k, image in enumerate(coco["images"]) if source.keep(k)]
    if not listed:
        raise DataError(f"{path}: too few pictures; give two or more, every eighth is held out")
    truth = read_objects({**coco, "images": listed}, masks)
    all_count = torch.ones_like(truth.objects.counts)  # also an object of id 0, which pycocotools takes for none
    truth = truth._replace(objects=truth.objects._replace(counts=all_count))
    crowd, own = truth.objects.crowd, f"the {len(listed)} of its {len(coco['images'])} pictures for this split"
    if not len(crowd):
        raise DataError(f"{path}: no object in {own}")
    if crowd.all():
        raise DataError(f"{path}: all objects in {own} are crowds ('iscrowd' 1), which teach nothing; set it to 0")
    original = torch.tensor(truth.sizes)  # (M, 2)
    sizes = (original * (largest / original.amax(1, keepdim=True)).clamp(max=1)).round().long().clamp(min=1)
    paths = found_files(source.folder, [image["file_name"] for image in listed])

    def read_images(numbers: list[int]) -> list[Tensor]:
        found = read_pictures([paths[k] for k in numbers], [truth.sizes[k] for k in numbers], device)
        return [scaled(picture, tuple(sizes[k].tolist())) for k, picture in zip(numbers, found)]

    shapes_of_all = [(3, *size) for size in sizes.tolist()]
    images = Pictures(read_images, len(paths), device, shapes_of_all, group=group_size(paths, device))
    if 3 * sizes.prod(1).sum() <= memory:
        images = images.settle(lambda: fingerprint(f"det {largest}", paths))

    order = truth.objects.image.argsort(stable=True)
    objects = take(truth.objects, order)
    number = torch.bincount(objects.image, minlength=len(listed))  # of objects in a picture
    where = objects.image, ranks_within(objects.image)  # picture and number of each object in it

    def by_picture(values: Tensor) -> Tensor:
        """(M, most objects of one, ...)"""
        table = values.new_zeros(len(listed), int(number.max()), *values.shape[1:])
        table[where] = values
        return table

    corners = torch.cat([objects.box[:, :2], objects.box[:, :2] + objects.box[:, 2:]], 1)
    corners = corners * (sizes / original).flip(1).repeat(1, 2)[objects.image]  # x y x y as the pictures are kept
    corners = corners.clamp(min=0).minimum(sizes.flip(1).repeat(1, 2)[objects.image])
    boxes, labels, crowd = by_picture(corners.float()), by_picture(objects.label + 1), by_picture(objects.crowd)
    frames, bits = labels.new_zeros(len(listed), 1, 5), torch.zeros(len(listed), 1, 1, dtype=torch.uint8, device=device)
    if masks:
        key = functools.partial(fingerprint, "det bits", [path, *paths])
        frames, bits = read_bits(objects.masks, number, memory - images.nbytes, device, key)
        frames = by_picture(frames)
    rest = (x.to(device) for x in (sizes.float(), original.float(), boxes, labels, crowd, frames))
    return Split(images, *rest, bits, truth)


def read_bits(
    codes: list[dict], number: Tensor, memory: float, device: str, key: Callable[[], str]
) -> "tuple[Tensor, Tensor | Pictures]":
    """Frames (n, 5) of run-length codes, and the bits of pictures with `number` (M,) of them each; see `Split`."""
    frames = torch.from_numpy(rle.toBbox(codes)).long()
    begin = F.pad(number.cumsum(0), (1, 0))  # of each picture among the codes, and where the last one ends
    before = F.pad(frames[:, 2:].prod(1).cumsum(0), (1, 0))  # how many bits, in the order of the codes
    first = before[begin]  # the same of the pictures
    start = 8 + before[:-1] - first[:-1].repeat_interleave(number)
    sides = ((8 + first.diff() + 7) // 8).tolist()  # bytes of a picture, rounded up

    def read(numbers: list[int]) -> list[Tensor]:
        return [pack_masks(codes[begin[k] : begin[k + 1]], sides[k]) for k in numbers]

    bits = Pictures(read, len(number), device, [(1, side) for side in sides])
    frames = torch.cat([frames, start.unsqueeze(1)], 1)
    return frames, bits.settle(key) if sum(sides) <= memory else bits


def pack_masks(codes: list[dict], size: int) -> Tensor:
    """The bits (1, size) of the masks of a picture, as a `Split` has them."""
    pixels = [np.zeros(8, np.uint8)]
    for code in codes:
        x, y, w, h = map(int, rle.toBbox(code))
        pixels.append(rle.decode(code)[y : y + h, x : x + w].flatten())
    return torch.from_numpy(np.packbits(np.concatenate(pixels), bitorder="little")).view(1, size)


def list_data(args) -> dict[str, Source]:
    """The files of three splits: train, val (what the search sees) and test (what is reported).

    Where there is no third labelled split every eighth training picture is held out for the search, and the official
    validation split is the test split [D]. Draws shapes if need be.
    """
    root = args.data_root
    if args.data == "shapes":
        if not shapes.may_lie_in(root):
            raise DataError(f"{root}: holds something other than shapes; give an empty or new folder, or its --data")
        shapes.write_shapes(root, show=shapes.show_progress)
    files = coco_files(root, "instances")
    if "test" in files:
        return {split: Source(*found) for split, found in files.items()}
    return {
        "train": Source(*files["train"], lambda k: k % 8),
        "val": Source(*files["train"], lambda k: k % 8 == 0),
        "test": Source(*files["val"]),
    }


@uncollected()
def read_data(args, size: int, masks: bool) -> dict[str, Split]:
    """The three splits of `list_data`, ready for use in windows of up to `size` pixels."""
    splits, left, read, names, files = {}, args.memory * 2**30, None, {}, {}
    for name, source in list_data(args).items():
        if read != source.annotations:  # train and val mostly share one file
            coco, read = check_source(source, masks, args.skip_empty), source.annotations
            own = {category["id"]: category.get("name") for category in coco["categories"]}
            names = names or own
            if changed := [number for number in {**names, **own} if names.get(number) != own.get(number)]:
                here, there = own.get(changed[0]), names.get(changed[0])
                raise DataError(
                    f"{read}: category {changed[0]!r} is {here!r:.40}, in the training split {there!r:.40}; give "
                    "both the same categories"
                )
        chosen = [image["file_name"] for k, image in enumerate(coco["images"]) if source.keep(k)]
        files[name] = [source.folder.resolve() / file.lstrip("/") for file in chosen]
        splits[name] = split = read_split(source, coco, size, masks, left, args.device)
        left -= split.images.nbytes + split.bits.nbytes
        if 0 in (split.images.nbytes, split.bits.nbytes):
            number = f"{name}: {len(split.images):,} pictures"
            note(f"{number}, more than --memory {args.memory:.3g} or TMPDIR holds; decoded batch by batch")
    warn_of_shared(files)
    return splits


def select(split: Split, index: Tensor) -> Split:
    """Some pictures of a split, as a split."""
    *parts, truth = split
    place = {k: n for n, k in enumerate(index.tolist())}
    keep = torch.isin(truth.objects.image, index)
    objects = take(truth.objects, torch.where(keep)[0])
    objects = objects._replace(image=torch.tensor([place[k] for k in objects.image.tolist()], dtype=torch.long))
    truth = truth._replace(objects=objects, sizes=[truth.sizes[k] for k in place])
    return Split(*(rows_of(part, index) for part in parts), truth)


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
SMALLEST = 2  # px: what a window leaves less of is no target [D]
PORTION_OF_MASKS = 2**26  # pixels of masks that are cut, or pasted, at once: some bytes go with each


def batch_scale_flip(
    split: Split, index: Tensor, size: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Scale, flip and cut a (size, size) window out of each picture, in one affine sampling; objects follow.

    Returns images (N, 3, size, size) float in 0..255 and, in torchvision's form, the boxes (n, 4), labels (n,) and,
    where the split has them, masks (n, size, size) uint8 of each, on the split's device. At scale 1 the longer side of
    a picture fills the window; the scale is log-uniform in `scale`; half of the pictures are mirrored. Crowds are no
    targets.
    """
    N, device = len(index), split.images.device
    u = torch.rand(4, N, generator=generator).to(device, non_blocking=True)
    images, sizes, originals, boxes, labels, crowd, frames = (rows_of(part, index) for part in split[:7])
    side = sizes.amax(1) / (scale[0] * (scale[1] / scale[0]) ** u[0])  # of the window, in pixels of the canvas
    room = sizes.T - side
    top, left = torch.where(room > 0, room * u[1:3], room / 2)  # centred where the picture is smaller than the window
    mirror = torch.where(u[3] < 0.5, -1.0, 1.0)
    images = cut(images, left, top, side, mirror, size)

    boxes = (boxes - torch.stack([left, top, left, top], -1).unsqueeze(1)) * (size / side).view(N, 1, 1)
    flipped = torch.stack([size - boxes[..., 2], boxes[..., 1], size - boxes[..., 0], boxes[..., 3]], -1)
    boxes = torch.where(mirror.view(N, 1, 1) < 0, flipped, boxes).clamp(0, size)
    keep = (labels > 0) & ~crowd & (boxes[..., 2:] - boxes[..., :2] >= SMALLEST).all(-1)  # (N, G)
    targets = [{"boxes": b[k], "labels": c[k]} for b, c, k in zip(boxes, labels, keep)]
    if split.truth.objects.masks is not None:
        owner = torch.where(keep)[0]
        window = (x[owner] for x in (left, top, side, mirror, originals / sizes))
        bits = rows_of(split.bits, index)  # (N, 1, B)
        frames[..., 4] += 8 * bits.shape[-1] * torch.arange(N, device=device).view(N, 1)
        some = max(1, PORTION_OF_MASKS // size**2)
        portions = zip(*(x.split(some) for x in (frames[keep], *window)))
        cut_out = torch.cat([cut_masks(bits.flatten(), *portion, size) for portion in portions])
        for target, mask in zip(targets, cut_out.split(keep.sum(1).tolist())):
            target["masks"] = mask
    return images, targets


def cut(images: Tensor, left: Tensor, top: Tensor, side: Tensor, mirror: Tensor, size: int) -> Tensor:
    """Square windows (N, 3, size, size) float of images (N, 3, H, W); `side`, `left` and `top` in their pixels."""
    N, _, H, W = images.shape
    theta = torch.zeros(N, 2, 3, device=images.device)  # maps window coordinates in -1..1 to canvas coordinates
    theta[:, 0, 0], theta[:, 0, 2] = mirror * side / W, (2 * left + side) / W - 1
    theta[:, 1, 1], theta[:, 1, 2] = side / H, (2 * top + side) / H - 1

    def sample(images: Tensor, theta: Tensor) -> Tensor:
        grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
        return F.grid_sample(images.float(), grid, align_corners=False)

    return map_pictures(sample, images, theta)


def cut_masks(
    bits: Tensor, frames: Tensor, left: Tensor, top: Tensor, side: Tensor, mirror: Tensor, zoom: Tensor, size: int
) -> Tensor:
    """The same windows (n, size, size) uint8 of n masks, nearest pixel; `zoom` (n, 2): original over canvas pixels."""
    x0, y0, w, h, start = frames.T[..., None, None]  # each (n, 1, 1)
    along = (torch.arange(size, device=bits.device) + 0.5) / size - 0.5
    x = left.view(-1, 1) + (along * mirror.view(-1, 1) + 0.5) * side.view(-1, 1)
    y = top.view(-1, 1) + (along + 0.5) * side.view(-1, 1)
    x = (x * zoom[:, 1:]).floor().long().unsqueeze(1) - x0
    y = (y * zoom[:, :1]).floor().long().unsqueeze(2) - y0
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    position = torch.where(inside, start + y * w + x, 0)
    return bits[position >> 3] >> (position & 7).to(torch.uint8) & inside.to(torch.uint8)


def batch_colour_jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation of each picture (N, 3, H, W), each times a factor of 1 +- strength."""
    a = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=generator) - 1)
    a = a.to(images.device, non_blocking=True)

    def change(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
        images = images * brightness
        images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
        return torch.lerp(images.mean(1, keepdim=True), images, saturation).clamp_(0, 255)

    return map_pictures(change, images, *a)


def normalise(images: Tensor) -> Tensor:
    """0..255 to zero mean and unit variance by ImageNet's statistics."""
    mean, std = MEAN.to(images.device), STD.to(images.device)
    return map_pictures(lambda images: (images - mean) / std, images)


# =====================================================================================================================
# Network


class RegionProposals(rpn.RegionProposalNetwork):
    """torchvision's region proposal network; its two losses are whatever stands in `losses`."""

    losses: dict[str, Callable[..., Tensor]]

    def assign_targets_to_anchors(self, anchors, targets):
        self.anchors = torch.cat(anchors)  # compute_loss is not told them
        return super().assign_targets_to_anchors(anchors, targets)

    def compute_loss(self, objectness, deltas, labels, targets):
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        logit = objectness.flatten()[sampled]
        logits = torch.stack([torch.zeros_like(logit), logit], 1)  # the softmax of these two is the sigmoid [D]
        deltas, wanted = deltas[positive], torch.cat(targets)[positive]
        codes = Boxes(deltas, wanted, self.anchors[positive], self.box_coder, len(logit))
        label = torch.cat(labels)[sampled].long()
        return self.losses["rpn_cls"](logits, label, None), self.losses["rpn_reg"](codes)


class Heads(roi_heads.RoIHeads):
    """torchvision's heads for boxes and masks; in training their losses are whatever stands in `losses`."""

    losses: dict[str, Callable[..., Tensor]]

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        label = torch.cat(labels)
        positive = torch.where(label > 0)[0]
        deltas, wanted = deltas.view(len(label), -1, 4)[positive, label[positive]], torch.cat(regression)[positive]
        codes = Boxes(deltas, wanted, torch.cat(proposals)[positive], self.box_coder, len(label))
        losses = {"rcnn_cls": self.losses["rcnn_cls"](logits, label, codes), "rcnn_reg": self.losses["rcnn_reg"](codes)}
        if self.has_mask():
            keep = [own > 0 for own in labels]
            proposals = [boxes[k] for boxes, k in zip(proposals, keep)]
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, proposals, image_shapes)))
            logits = logits[torch.arange(len(logits), device=logits.device), label[positive]]
            masks = [
                roi_heads.project_masks_on_boxes(target["masks"], boxes, index[k], logits.shape[-1])
                for target, boxes, index, k in zip(targets, proposals, matched, keep)
            ]
            losses["mask"] = self.losses["mask"](logits, torch.cat(masks))
        return [], losses


class Boxes(NamedTuple):
    """Predicted and wanted boxes of the P sampled positives, encoded relative to the boxes they start from."""

    deltas: Tensor  # (P, 4)
    targets: Tensor  # (P, 4)
    start: Tensor  # (P, 4), anchors or proposals, x1 y1 x2 y2
    coder: detection_utils.BoxCoder
    sampled: int  # positives and negatives

    def decode(self) -> tuple[Tensor, Tensor]:
        """Both as x1 y1 x2 y2, (P, 4)."""
        return tuple(self.coder.decode_single(wide(codes), self.start) for codes in (self.deltas, self.targets))


class Detector(nn.Module):
    """Faster R-CNN (Ren 2015, arXiv 1506.01497) or Mask R-CNN (He 2017, arXiv 1703.06870) on a feature pyramid.

    torchvision's parts without its transform: pictures come as one batch, normalised and of one size.
    """

    def __init__(self, backbone: nn.Module, proposals: RegionProposals, heads: Heads):
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, proposals, heads

    def forward(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
        losses: dict[str, Callable[..., Tensor]] | None = None,
    ):
        """In training `losses` by branch; else for each picture boxes (n, 4), labels, scores and masks (n, 1, h, w).

        images: (N, 3, H, W); sizes: height and width of each picture on them.
        """
        self.rpn.losses = self.roi_heads.losses = losses
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):  # boxes need more than eight bits
            features = {name: x.float() for name, x in self.backbone(images).items()}
        proposals, first = self.rpn(ImageList(images, sizes), features, targets)
        found, second = self.roi_heads(features, proposals, sizes, targets)
        if not targets:
            return found
        return {"rpn_cls": first["loss_objectness"], "rpn_reg": first["loss_rpn_box_reg"], **second}


def conv(channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, size, stride, dilation * (size // 2), dilation, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


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


class SmallBackbone(nn.Module):
    """For the embedded data: a feature pyramid at strides 4, 8 and 16."""

    out_channels = 32

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = conv(3, width, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(conv(width * k, width * 2 * k, 2), conv(width * 2 * k, width * 2 * k)) for k in (1, 2, 4)
        )
        self.pyramid = FeaturePyramidNetwork([width * 2, width * 4, width * 8], self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, features = self.stem(images), {}
        for k, stage in enumerate(self.stages):
            x = features[str(k)] = stage(x)
        return self.pyramid(features)


class Settings(NamedTuple):
    """The numbers of a detector; those of r50-fpn are torchvision's [P], those of small are ours [D]."""

    anchors: tuple[int, ...]  # side in pixels on each level of the pyramid, in three shapes
    proposals: dict[str, int]  # how many leave the first stage, on each level and then in all, in training and testing
    object: float  # least IoU of an anchor that is trained to find an object
    sampled: tuple[int, int]  # anchors and proposals of a picture that enter the losses
    levels: list[str]  # of the pyramid, where the second stage looks
    points: int  # sampled per side of a bin
    bins: int  # per side of a box
    width: int  # of the head's layers
    least: float  # score of a detection
    mask_bins: int
    mask_layers: tuple[int, ...]


SETTINGS = {
    "small": Settings(
        (10, 20, 40), {"training": 32, "testing": 64}, 0.5, (64, 32), ["0"], 1, 5, 128, 0.01, 7, (32, 32)
    ),
    "r50-fpn": Settings(
        (32, 64, 128, 256, 512), {"training": 2000, "testing": 1000}, 0.7, (256, 512), ["0", "1", "2", "3"], 2, 7, 1024,
        0.05, 14, (256, 256, 256, 256),
    ),
}  # fmt: skip


def aligned_pool(levels: list[str], bins: int, points: int) -> MultiScaleRoIAlign:
    """torchvision's, told the strides 4, 8, ... of its levels: it would guess them from the first pictures it sees."""
    pool = MultiScaleRoIAlign(levels, bins, points)
    pool.scales = [2.0 ** -(k + 2) for k in range(len(levels))]
    pool.map_levels = initLevelMapper(2, len(levels) + 1)
    return pool


def build_model(name: str, num_classes: int, masks: bool, pretrained: bool | str = False) -> Detector:
    """One of MODELS, a Mask R-CNN if it has `masks`; `num_classes` counts the background."""
    own = SETTINGS[name]
    if name == "small":
        if pretrained:
            fail(f"--pretrained: --model {name} has no such weights; leave it out, or choose another --model")
        backbone = SmallBackbone()
    else:
        net = resnet(50, pretrained, norm_layer=FrozenBatchNorm2d if pretrained else nn.BatchNorm2d)
        backbone = _resnet_fpn_extractor(net, 3 if pretrained else 5)
    channels = backbone.out_channels
    anchors = AnchorGenerator(tuple((side,) for side in own.anchors), ((0.5, 1.0, 2.0),) * len(own.anchors))
    proposals = RegionProposals(
        anchors, rpn.RPNHead(channels, 3), own.object, 0.3, own.sampled[0], 0.5, own.proposals, own.proposals, 0.7
    )
    heads = Heads(
        aligned_pool(own.levels, own.bins, own.points),
        TwoMLPHead(channels * own.bins**2, own.width),
        FastRCNNPredictor(own.width, num_classes),
        0.5, 0.5, own.sampled[1], 0.25, None, own.least, 0.5, 100,
    )  # fmt: skip
    if masks:
        heads.mask_roi_pool = aligned_pool(own.levels, own.mask_bins, own.points)
        heads.mask_head = MaskRCNNHeads(channels, own.mask_layers, 1)
        heads.mask_predictor = MaskRCNNPredictor(own.mask_layers[-1], own.mask_layers[-1], num_classes)
    return Detector(backbone, proposals, heads)


# =====================================================================================================================
# Metric


# Exactly COCO's numbers: a limit that differs in the last place changes a verdict.
LIMITS = torch.from_numpy(np.linspace(0.5, 0.95, 10))  # of similarity
RECALLS = torch.from_numpy(np.linspace(0, 1, 101))
AREAS = torch.tensor([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]], dtype=torch.float64)
MOST = (1, 10, 100)  # detections per image and class
PORTION = 2**18  # pairs compared at a time: what fits into a cache


def box_ious(a: Tensor, b: Tensor, crowd: Tensor) -> Tensor:
    """IoU (P,) of P pairs of boxes x y w h (P, 4), found and true; with a crowd, intersection over the found area."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    width, height = (high - low).clamp(min=0).unbind(1)
    both, area = width * height, a[:, 2] * a[:, 3]
    either = torch.where(crowd, area, area + b[:, 2] * b[:, 3] - both)
    return torch.where(both > 0, both / either, 0.0)


def mask_ious(found: Objects, truth: Objects, f: Tensor, t: Tensor) -> Tensor:
    """As `box_ious`, from run-length codes, by pycocotools: decoding them would cost more than it saves.

    f, t: (P,) rows of the pairs; one after the other, each found mask is paired with the same true ones.
    """
    values, crowd = [torch.zeros(0, dtype=torch.float64)], truth.crowd.tolist()
    _, counts = torch.unique_consecutive(torch.stack([found.image[f], found.label[f]], 1), dim=0, return_counts=True)
    for rows, columns in zip(*(x.cpu().split(counts.tolist()) for x in (f, t))):
        rows, columns = rows.unique().tolist(), columns.unique().tolist()
        codes = [found.masks[row] for row in rows], [truth.masks[column] for column in columns]
        values.append(torch.from_numpy(rle.iou(*codes, [crowd[column] for column in columns]).flatten()))
    return torch.cat(values).to(f.device)


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


def outside(objects: Objects) -> Tensor:
    """(M, A) bool: whether each object is too small or too large for each area range."""
    area = objects.area.unsqueeze(1)
    low, high = AREAS.to(area.device).T
    return (area < low) | (area > high)


def take(objects: Objects, index: Tensor) -> Objects:
    masks = objects.masks and [objects.masks[k] for k in index.tolist()]
    return Objects(*(tensor[index] for tensor in objects[:-1]), masks)


def coco_metrics(truth: Truth, found: Objects, device: str) -> dict[str, float]:
    """The twelve numbers of COCO for detections of a split; see `coco_eval`."""
    K = max(1, len(truth.categories))
    truth, found = (Objects(*(x.to(device) for x in objects[:-1]), objects.masks) for objects in (truth.objects, found))
    truth = take(truth, (truth.image * K + truth.label).argsort(stable=True))
    group = found.image * K + found.label
    order = best_first(found.score, group)
    rank = ranks_within(group[order])
    found, rank = take(found, order[rank < MOST[-1]]), rank[rank < MOST[-1]]

    def similarity(f: Tensor, t: Tensor) -> Tensor:
        if found.masks is None:
            return box_ious(found.box[f], truth.box[t], truth.crowd[t])
        return mask_ious(found, truth, f, t)

    ignored = outside(truth) | truth.crowd.unsqueeze(1)
    groups = (x.image * K + x.label for x in (found, truth))
    matches = match(*groups, similarity, ignored, truth.crowd, truth.counts)
    positives = torch.zeros(K, len(AREAS), dtype=torch.long, device=device)
    positives = positives.index_add_(0, truth.label, (~ignored).long()).T
    precision, recall = accumulate(matches, outside(found), found.label, found.score, rank, positives)
    ar1, ar10, ar100 = recall
    rows = {"AP": precision[:, 0], "AP50": precision[0, 0], "AP75": precision[5, 0]}
    rows |= {"APs": precision[:, 1], "APm": precision[:, 2], "APl": precision[:, 3]}
    rows |= {"AR1": ar1[:, 0], "AR10": ar10[:, 0], "AR100": ar100[:, 0]}
    rows |= {"ARs": ar100[:, 1], "ARm": ar100[:, 2], "ARl": ar100[:, 3]}
    return {name: -1.0 if x.isnan().all() else x.nanmean().item() for name, x in rows.items()}


def read_results(detections: Path | str | Sequence[dict] | Tensor | np.ndarray, coco: dict, masks: bool) -> Objects:
    """COCO results on the pictures of `coco`; those of unlisted categories are left out, as in pycocotools."""
    if isinstance(detections, (Tensor, np.ndarray)):  # image x y w h score category
        numbers = isinstance(detections, Tensor) or detections.dtype.kind in "biuf"
        if len(detections) and (detections.ndim != 2 or detections.shape[1] != 7 or not numbers):
            raise ValueError(f"detections: an array of shape {tuple(detections.shape)}; it must be (M, 7) numbers")
        rows = torch.as_tensor(detections).view(-1, 7)
        if rows.is_floating_point() and len(rows) and rows[:, 0].abs().max() > 1 / torch.finfo(rows.dtype).eps:
            raise ValueError(f"detections: {rows.dtype} does not hold such image ids exactly; give float64")
        rows = rows.tolist()
        detections = [{"image_id": a, "bbox": box, "score": b, "category_id": c} for a, *box, b, c in rows]
    path, results, image, label = list_results(detections, coco)
    score = column(results, "score", 1, path, nan=True).squeeze(1)
    # As in pycocotools the first result decides for all whether boxes and areas are given or those of the masks.
    boxed = len(results) == 0 or (hasattr(results[0].get("bbox"), "__len__") and len(results[0]["bbox"]) > 0)
    box, codes = column(results, "bbox", 4, path) if boxed else None, None
    if masks or not boxed:
        codes = []
        for k, (result, place) in enumerate(zip(results, image.tolist())):
            size = coco["images"][place]["height"], coco["images"][place]["width"]
            try:
                codes.append(result_mask(result, size if all(size) else None, box[k].tolist() if boxed else None))
            except ValueError as problem:
                raise ValueError(f"{path}: result {k}: {problem}") from None
    if boxed:
        area = box[:, 2] * box[:, 3]
    else:
        area = torch.tensor([rle.area(code) for code in codes], dtype=torch.float64)
        box = torch.from_numpy(rle.toBbox(codes).astype(np.float64))
    no = torch.zeros(len(box), dtype=torch.bool)
    return Objects(image, label, box, area, score, no, no, codes if masks else None)


def result_mask(result: dict, size: tuple[int, int] | None, box: list[float] | None) -> dict:
    """The compressed run-length code of a result; where it has no mask, of its box."""
    code = result.get("segmentation")
    if code is None and not box:
        raise ValueError("it has neither 'bbox' nor 'segmentation'")
    if code is None:
        x, y, w, h = box
        code = [[x, y, x, y + h, x + w, y + h, x + w, y]]
    try:
        if isinstance(code, dict) and isinstance(code["counts"], (str, bytes)):
            return check_runs(code, size, True)
        return run_lengths(check_mask({"segmentation": code}, size, True)["segmentation"], size or code["size"])
    except (DataError, KeyError, OverflowError, TypeError, ValueError) as problem:
        raise ValueError(f"its mask {in_line(code)} is damaged ({problem})") from None


def coco_eval(
    ground_truth: Path | str | dict,
    detections: Path | str | Sequence[dict] | Tensor | np.ndarray,
    iou_type: str,
    device: str | None = None,
) -> dict[str, float]:
    """COCO's average precision and recall of boxes or masks, equal to pycocotools' COCOeval.

    ground_truth: a COCO json file, its content, or pycocotools' COCO; detections: COCO results, a file with them, what
    COCO.loadRes makes of it, or, for boxes, an array (M, 7) of image x y w h score category; iou_type: bbox or segm.
    Returns AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl in 0..1; -1 where there is no truth.
    Raises ValueError for another iou_type or a detection that is damaged or on an image that `ground_truth` does not
    list, DataError for a file that is; those of unlisted categories are left out, and all of them with a warning. A
    score of NaN counts as the least, as in pycocotools; unlike there, truth needs its `bbox` for segm, too.
    """
    if iou_type not in METRICS:
        raise ValueError(f"iou_type {iou_type!r}: choose one of {' '.join(METRICS)}")
    masks = iou_type == "segm"
    ground_truth = getattr(ground_truth, "dataset", ground_truth)  # pycocotools' COCO
    given = isinstance(ground_truth, (str, Path))
    path, coco = (ground_truth, load_coco(ground_truth)) if given else ("ground truth", ground_truth)
    own = functools.partial(check_mask, scoring=True) if masks else no_mask
    coco = check_coco(coco, path, own, scoring=True)
    truth = read_objects(coco, masks)
    found = read_results(detections, coco, masks)
    return coco_metrics(truth, found, device or ("cuda" if torch.cuda.is_available() else "cpu"))


# =====================================================================================================================
# Losses: the hand-made ones. Classification takes logits (N, C), label (N,) and the boxes of the positives; regression
# takes `Boxes`; masks take logits and target (N, H, W). Each returns a scalar


def ce(logits: Tensor, label: Tensor, boxes: Boxes | None) -> Tensor:
    """Cross entropy, the mean over samples."""
    return F.cross_entropy(wide(logits), label)


def l1(boxes: Boxes) -> Tensor:
    """Smooth L1 on encoded boxes over the number of samples, background included, as torchvision has it."""
    loss = F.smooth_l1_loss(wide(boxes.deltas), boxes.targets, beta=1 / 9, reduction="sum")
    return loss / boxes.sampled


def mask_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy, the mean over pixels."""
    logits = wide(logits)
    return F.binary_cross_entropy_with_logits(logits, target.to(logits)) if len(logits) else logits.sum()


def box_leaves(found: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Intersection i, union u and enclosing area e of boxes x1 y1 x2 y2 (..., N, 4), each (..., N, 1, 1, 1).

    In units of the wanted box's own area, not 0 [D]: a tree then means the same for small and large objects and
    pictures.
    """

    def area(low, high):
        width, height = (high - low).clamp(min=0).unbind(-1)
        return width * height

    (a, b), (c, d) = wide(found).split(2, -1), wide(wanted).split(2, -1)
    own = area(c, d)
    i = area(torch.maximum(a, c), torch.minimum(b, d)) / own
    u = area(a, b) / own + 1 - i
    e = area(torch.minimum(a, c), torch.maximum(b, d)) / own
    return {name: value[..., None, None, None] for name, value in zip("iue", (i, u, e))}


def cse_cls(logits: Tensor, label: Tensor, boxes: Boxes) -> Tensor:
    """Cross entropy times 1 + sin w, w the IoU of the predicted box, 0 for background (CSE-Auto-A, Liu 2021)."""
    logits = wide(logits)
    weight = torch.ones_like(logits[:, 0])
    leaves = box_leaves(*(x.detach() for x in boxes.decode()))
    weight[label > 0] += (leaves["i"] / leaves["u"]).flatten().sin()
    return (weight * F.cross_entropy(logits, label, reduction="none")).mean()


def cse_reg(boxes: Boxes) -> Tensor:
    """(1 - i / u) + (1 - (i + 2) / e), areas in pixels, the mean over positives (CSE-Auto-A, Liu 2021)."""
    found, wanted = boxes.decode()
    area = (wanted[:, 2:] - wanted[:, :2]).prod(-1)
    i, u, e = (value.flatten() * area for value in box_leaves(found, wanted).values())
    return (2 - i / u - (i + 2) / e).sum() / max(1, len(area))


CLASSIFICATION = {"ce": ce}
REGRESSION = {
    "l1": l1,
    "iou": parse("Neg(Log(Mul(i, Inv(u))))"),
    "giou": parse("Neg(Add(Mul(i, Inv(u)), Mul(u, Inv(e))))"),
}
BRANCHES = {  # the symbols of its trees, and the hand-made losses by name, the baseline's first
    "rpn_cls": (("y", "p", "1"), CLASSIFICATION),
    "rpn_reg": (("i", "u", "e", "1"), REGRESSION),
    "rcnn_cls": (("y", "p", "1"), CLASSIFICATION | {"cse-a": cse_cls}),
    "rcnn_reg": (("i", "u", "e", "1"), REGRESSION | {"cse-a": cse_reg}),
    "mask": (("y", "p", "1"), {"ce": mask_ce}),
}
KNOWN = dict.fromkeys(("cls", "mask"), ("Neg(Mul(y, Log(p)))", "Square(Add(p, Neg(y)))", "Abs(Add(p, Neg(y)))"))
KNOWN["reg"] = tuple(str(REGRESSION[name]) for name in ("iou", "giou"))  # what `--search cse` starts from
BASELINE = "ce+l1"
LOSSES = {
    "ce+l1": {},
    "iou": {"rcnn_reg": "iou"},
    "giou": {"rcnn_reg": "giou"},
    "cse-a": {"rcnn_cls": "cse-a", "rcnn_reg": "cse-a"},
}


def tree_loss(branch: str, expr: Expr) -> Callable[..., Tensor]:
    """A searched tree as a loss of its branch; the mean over samples, or over positives where boxes are compared."""

    def classify(logits: Tensor, label: Tensor, boxes: Boxes | None) -> Tensor:
        leaves, _ = softmax_leaves(logits, label, ignore_index=-1)  # none is ignored, and class 255 is one of many
        return evaluate(expr, leaves)

    def regress(boxes: Boxes) -> Tensor:
        return evaluate(expr, box_leaves(*boxes.decode())) if len(boxes.deltas) else boxes.deltas.sum()

    def segment(logits: Tensor, target: Tensor) -> Tensor:
        return evaluate(expr, mask_leaves(logits, target)) if len(logits) else logits.sum()

    return {"reg": regress, "cls": classify}.get(branch.split("_")[-1], segment)


def mask_leaves(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Outside and inside as two classes (..., N, 2, H, W), for logits and targets (..., N, H, W) [D]."""
    logits = wide(logits)
    target = target.to(logits)
    y = torch.stack([1 - target, target], -3)
    return {"y": y, "p": torch.stack([(-logits).sigmoid(), logits.sigmoid()], -3)}


def export(losses: dict[str, Expr], title: str = "Loss functions of a detector, found by search.") -> str:
    """The found losses as one standalone file with a function per branch; it imports nothing of this repository."""
    heads = {branch: HEADS[branch.split("_")[-1]] for branch in losses} | {"rpn_cls": RPN_HEAD}
    parts = [(expr, heads[branch].replace("NAME", branch)) for branch, expr in losses.items()]
    return python_module(parts, title, HELPERS)


RPN_HEAD = '''def NAME(objectness, label, ignore_index=-1):
    """{expr}

    objectness: (N,) logits of the sampled anchors; label: (N,) integers, 0 background, 1 object, or ignore_index.
    Returns a scalar, float32 at least, averaged over anchors.
    """
    x = wide(objectness)
    leaves, mask = softmax_leaves(torch.stack([torch.zeros_like(x), x], 1), label, ignore_index)  # sigmoid as softmax
    y, p = leaves["y"], leaves["p"]
'''
HEADS = {
    "cls": '''def NAME(logits, label, ignore_index=-1):
    """{expr}

    logits: (N, C) of the sampled proposals, before softmax; label: (N,) integers 0..C-1, 0 background, or ignore_index.
    Returns a scalar, float32 at least, averaged over proposals.
    """
    leaves, mask = softmax_leaves(logits, label, ignore_index)
    y, p = leaves["y"], leaves["p"]
''',
    "reg": '''def NAME(boxes, target):
    """{expr}

    boxes, target: (N, 4) predicted (decoded) and true boxes x1 y1 x2 y2 of the sampled positives; true ones have area.
    i, u, e: intersection, union and enclosing area, in units of the true box's own area.
    Returns a scalar, float32 at least, averaged over boxes; 0 where there are none.
    """
    if boxes.shape != target.shape or boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes {tuple(boxes.shape)} and target {tuple(target.shape)}: expected (N, 4) twice")
    if not len(boxes):
        return wide(boxes).sum()
    i, u, e = box_leaves(boxes, target).values()
    mask = None
''',
    "mask": '''def NAME(logits, target):
    """{expr}

    logits, target: (N, H, W), the mask of the true class of each positive, before sigmoid; target in 0..1 or bool.
    Returns a scalar, float32 at least, averaged over pixels; 0 where there is no mask.
    """
    if logits.shape != target.shape or logits.dim() != 3:
        raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)}: expected (N, H, W) twice")
    if not len(logits):
        return wide(logits).sum()
    leaves = mask_leaves(logits, target)
    y, p, mask = leaves["y"], leaves["p"], None
''',
}
HELPERS = sources(box_leaves, mask_leaves)


# =====================================================================================================================
# Training


class Batches:
    """Batches without end (images normalised, targets), drawn with replacement.

    Order and augmentation have generators of their own; torchvision samples anchors and proposals with the default one.
    Their states say where in the sequence the training is. Of several processes each draws its share of a batch.
    """

    def __init__(self, split: Split, plan: Schedule, seed: int):
        rank, _ = evolve.rank_and_world()
        self.split, self.plan, self.share = split, plan, evolve.share_of(plan.batch, 1)
        seed += 1_000_003 * rank
        cuda = split.sizes.is_cuda
        default = torch.cuda.default_generators[torch.cuda.current_device()] if cuda else torch.default_generator
        own = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)
        self.generators = *own, default

    def __iter__(self) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
        plan, (order, augmentation, _) = self.plan, self.generators
        for index in read_ahead(self.split, self.share, order):
            images, targets = batch_scale_flip(self.split, index, plan.size, plan.scale, augmentation)
            yield normalise(batch_colour_jitter(images, 0.25, augmentation)), targets


def make_optimizer(net: nn.Module, plan: Schedule) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer, and its learning rate over the steps."""
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    if plan.optimizer == "adamw":
        optimizer = torch.optim.AdamW(weights, plan.lr, weight_decay=plan.weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(weights, plan.lr, momentum=0.9, weight_decay=plan.weight_decay, fused=True)

    def rate(step: int) -> float:
        return min(1, (step + 1) / (plan.warmup * plan.steps + 1)) * (1 - step / plan.steps) ** 0.9

    return optimizer, LambdaLR(optimizer, rate)


def batch_loss(net: nn.Module, losses: dict[str, Callable[..., Tensor]], batch: tuple) -> Tensor:
    images, targets = batch
    return sum(net(images, [tuple(images.shape[-2:])] * len(images), targets, losses).values())


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
def detect(net: Detector, split: Split, part: slice, size: int) -> list[dict[str, Tensor]]:
    """What `net` finds on some pictures of a split, boxes in pixels of the canvas.

    Each picture, its longer side `size` pixels, fills a square window from its upper left corner (in training it lies
    in the middle): what is found in it depends neither on what lies beside it nor on how it is kept.
    """
    net.eval()
    sizes = split.sizes[part]
    side = sizes.amax(1)
    corner = torch.zeros_like(side)
    images = cut(split.images[part], corner, corner, side, torch.ones_like(side), size)
    factor = size / side
    found = net(normalise(images), [tuple(pair) for pair in (sizes * factor.view(-1, 1)).round().int().tolist()])
    return [{**result, "boxes": result["boxes"] / own} for result, own in zip(found, factor)]


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks (n, 1, M, M) in their boxes (n, 4) of a picture, (n, width, height): torchvision's, all at once.

    Bilinear interpolation is separable: each row, and each column, of the picture weighs those of a mask.
    """
    M = masks.shape[-1] + 2
    masks = F.pad(masks[:, 0], (1, 1, 1, 1))
    low, high = roi_heads.expand_boxes(boxes, M / (M - 2)).long().view(-1, 2, 2).unbind(1)
    cells = torch.arange(M, device=masks.device)

    def weights(side: int, axis: int) -> Tensor:
        """(n, side, M)"""
        extent = (high - low + 1)[:, axis, None].clamp(min=1)
        place = torch.arange(side, device=masks.device) - low[:, axis, None]
        inside = (place >= 0) & (place < extent)
        source = ((place + 0.5) * (M / extent) - 0.5).clamp(0, M - 1)
        return (1 - (source.unsqueeze(-1) - cells).abs()).clamp(min=0) * inside.unsqueeze(-1)

    return weights(width, 0) @ masks.mT @ weights(height, 1).mT


@torch.no_grad()
def test_network(net: Detector, split: Split, size: int) -> dict[str, float]:
    """COCO's average precisions of `net` on a split."""
    found, device = [], split.sizes.device
    number = max(1, 2 ** (23 if device.type == "cuda" else 19) // size**2)
    for start in range(0, len(split.images), number):
        if isinstance(split.images, Pictures):
            split.images.prefetch(range(start, min(start + 2 * number, len(split.images))))
        found += detect(net, split, slice(start, start + number), size)
    zoom = (split.originals / split.sizes).flip(1).repeat(1, 2)  # of x y x y
    corners = torch.cat([result["boxes"] * own for result, own in zip(found, zoom)]).double()
    box = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    counts = torch.tensor([len(result["boxes"]) for result in found], device=device)
    image = torch.arange(len(found), device=device).repeat_interleave(counts)
    label, score = (torch.cat([result[key] for result in found]) for key in ("labels", "scores"))
    no = torch.zeros(len(box), dtype=torch.bool, device=device)
    objects = Objects(image, label - 1, box, box[:, 2:].prod(1), score.double(), no, no)
    kinds = {"bbox": objects}
    if net.roi_heads.has_mask():
        areas, masks = [no[:0].double()], []
        for result, own, (height, width) in zip(found, zoom, split.truth.sizes):
            some = max(1, PORTION_OF_MASKS // (height * width))
            for part, boxes in zip(result["masks"].split(some), (result["boxes"] * own).split(some)):
                pixels = paste_masks(part, boxes, height, width) > 0.5
                areas.append(pixels.sum((1, 2)).double())
                masks += rle.encode(pixels.byte().cpu().numpy().T)  # (h, w, n) in Fortran's order
        kinds["segm"] = objects._replace(area=torch.cat(areas), masks=masks)
    scores = {}
    for kind, objects in kinds.items():
        twelve = coco_metrics(split.truth, objects, device)
        scores |= {kind: twelve["AP"], f"{kind}50": twelve["AP50"], f"{kind}75": twelve["AP75"]}
    return scores


def draw_predictions(net: Detector, split: Split, path: Path, size: int, number: int = 8) -> None:
    """The first few pictures with their true boxes and, below, with as many of the best predicted ones, as a PNG."""
    palette = [tuple(shapes.voc_palette()[3 * k : 3 * k + 3]) for k in range(256)]
    images = split.images[:number].cpu()
    zoom = max(1, 192 // max(images.shape[-2:]))
    rows, draw = ([], []), torchvision.utils.draw_bounding_boxes
    for k, found in enumerate(detect(net, split, slice(0, number), size)):
        real = split.labels[k] > 0
        most = int(real.sum())
        drawn = (split.boxes[k, real], split.labels[k, real]), (found["boxes"][:most], found["labels"][:most])
        large = F.interpolate(images[k : k + 1], scale_factor=zoom)[0]
        for row, (boxes, labels) in zip(rows, drawn):
            colours = [palette[label % 256] for label in labels.tolist()]
            row.append(draw(large, boxes.cpu() * zoom, None, colours, width=2) if colours else large)
    grid = torchvision.utils.make_grid(torch.stack(rows[0] + rows[1]), nrow=len(images), pad_value=255)
    Image.fromarray(grid.movedim(0, -1).numpy()).save(path)


# =====================================================================================================================
# Search


GATE_SAMPLES = 5  # [P]
GATE_SIZE = {"cls": 32, "reg": 16, "mask": 8}  # predictions in a sample [D]
CODER = detection_utils.BoxCoder((10.0, 10.0, 5.0, 5.0))  # of the boxes in all gates; one unit is a tenth of a box
# Least gain in the rejection protocol, as a share of what is left to gain: the boxes of a random network start near the
# right ones, more or less so by its seed, and one of two classes is right by chance. Hand-made losses gain all of it,
# to a hundredth, whereas the published 0.6 would reject all losses of boxes [D].
ETA = {"rpn_cls": 0.7, "rpn_reg": 0.6, "rcnn_cls": 0.7, "rcnn_reg": 0.7, "mask": 0.5}


def class_leaves(logits: Tensor, onehot: Tensor) -> dict[str, Tensor]:
    """Gate leaves (..., B, N, C, 1, 1) of a classification."""
    return {"y": onehot.expand_as(logits), "p": logits.softmax(-3)}


def class_score(logits: Tensor, onehot: Tensor) -> Tensor:
    """Mean accuracy of the classes that a sample has, (..., B): most of the samples are background."""
    hit = logits.argmax(-3, keepdim=True) == onehot.argmax(-3, keepdim=True)
    return ((hit * onehot).sum(-4) / onehot.sum(-4)).flatten(-3).nanmean(-1)


def decode_boxes(deltas: Tensor, start: Tensor) -> Tensor:
    """CODER.decode_single with leading dimensions, in fewer steps: boxes (..., N, 4) of codes (..., N, 4, 1, 1)."""
    shift, growth = deltas[..., 0, 0].split(2, -1)
    side = start[..., 2:] - start[..., :2]
    centre = start[..., :2] + side * (0.5 + shift / CODER.weights[0])
    half = side / 2 * (growth / CODER.weights[2]).clamp(max=CODER.bbox_xform_clip).exp()
    return torch.cat([centre - half, centre + half], -1)


def box_branch_functions(start: Tensor) -> tuple[Callable, Callable]:
    """Leaves and score (mean IoU) of codes relative to `start` (B, N, 4); targets are boxes (..., B, N, 4, 1, 1)."""

    def leaves(deltas: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        return box_leaves(decode_boxes(deltas, start), wanted[..., 0, 0])

    def score(deltas: Tensor, wanted: Tensor) -> Tensor:
        values = leaves(deltas, wanted)
        return (values["i"] / values["u"]).flatten(-4).mean(-1)

    return leaves, score


def farther_half(boxes: Boxes) -> Boxes:
    """The half with the lower IoU; torchvision adds the true boxes to the proposals, which have nothing to gain."""
    leaves = box_leaves(*boxes.decode())
    rows = (leaves["i"] / leaves["u"]).flatten().argsort()[: (len(boxes.start) + 1) // 2]
    return boxes._replace(deltas=boxes.deltas[rows], targets=boxes.targets[rows], start=boxes.start[rows])


def mask_gate_leaves(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    logits = logits.squeeze(-3)
    return mask_leaves(logits, target.squeeze(-3).expand_as(logits))


def mask_score(logits: Tensor, target: Tensor) -> Tensor:
    """Mean IoU of the masks of a sample, (..., B)."""
    inside, wanted = logits > 0, target > 0.5
    both, either = (inside & wanted).sum((-3, -2, -1)), (inside | wanted).sum((-3, -2, -1))
    return (both / either.clamp(min=1)).mean(-1)


class DetTask(evolve.Task):
    """What evolve.py needs to know of detection."""

    name, baseline, metrics = "det", BASELINE, METRICS["bbox"]
    symbols = {branch: symbols for branch, (symbols, _) in BRANCHES.items()}
    export = staticmethod(export)
    rungs = ((4, 1),)  # a re-training takes a minute and a half of a core, with masks two and more

    def __init__(self, args):
        self.args, self.device, self.masks = args, args.device, args.metric == "segm"
        list_data(args)  # what is missing is said at once
        self.metrics = METRICS[args.metric]
        self.symbols = {branch: BRANCHES[branch][0] for branch in args.branches}
        own = "shapes" if args.model == "small" else args.data  # its anchors are as small as the objects there
        self.proxy = self.plan(PROXY[own], args.proxy_steps)
        self.retraining = self.plan(RETRAIN[own], args.retrain_steps)
        self.whole = self.retraining.steps >= RETRAIN[own].steps
        self.data: dict[str, Split] = {}

    def load(self) -> None:
        if not self.data:
            self.data = read_data(self.args, max(self.proxy.size, self.retraining.size), self.masks)

    def plan(self, plan: Schedule, steps: int | None) -> Schedule:
        """A schedule with the user's flags in it."""
        args = self.args
        share = min(1, (steps or plan.steps) / plan.steps)  # a shorter proxy goes on from a shorter training
        base, base_of = tuple(round(share * number) for number in plan.base), max(1, round(share * plan.base_of))
        flags = dict(steps=steps, size=args.size, batch=args.batch, lr=args.lr, model=args.model)
        given = {name: value for name, value in flags.items() if value is not None}
        return plan._replace(**given, base=base, base_of=base_of)

    def network(self, plan: Schedule, seed: int) -> Detector:
        torch.manual_seed(seed)
        classes = 1 + len(self.data["train"].truth.categories)
        net = build_model(plan.model, classes, self.masks, self.args.pretrained)
        return net.to(self.device, memory_format=torch.channels_last)

    def losses(self, losses: dict[str, Expr | str] | str) -> dict[str, Callable[..., Tensor]]:
        """One callable per branch; a branch without a loss has the baseline's."""
        chosen = LOSSES[losses] if isinstance(losses, str) else losses
        found = {}
        for branch, (_, known) in BRANCHES.items():
            term = chosen.get(branch, next(iter(known)))
            term = known[term] if isinstance(term, str) else term
            found[branch] = tree_loss(branch, term) if isinstance(term, Expr) else term
        return found

    def batches(self, plan: Schedule, seed: int) -> Batches:
        return Batches(self.data["train"], plan, seed)

    @functools.cached_property
    def proxy_batches(self):
        """The batches of the proxy. Every candidate sees the same ones, so they are made once where memory allows."""
        plan = self.proxy
        if plan.steps * plan.batch * plan.size**2 * (24 if self.masks else 12) < 2**29:  # bytes
            return list(itertools.islice(self.batches(plan, self.args.seed), plan.steps))
        return None

    def test(self, net: nn.Module, split: Split, size: int | None = None) -> dict[str, float]:
        return test_network(net, split, size or self.proxy.size)

    def prepare(self, base: Path) -> None:
        """The base network: the first steps of a training with the baseline's losses.

        Proxy trainings start where it started, and go on from it. The gates look at losses at the predictions of a
        random network alone: those of another state would be of other proposals, with targets of their own.
        """
        self.states = evolve.base_states(base, self.device, self.train_base, self.network(self.proxy, self.args.seed))
        self.bases = len(self.states)
        self.branches = self.make_branches()

    def train_base(self) -> list[dict[str, Tensor]]:
        plan = self.proxy._replace(steps=self.proxy.base_of)
        if plan.base:
            note(f"training the base network: {plan.base[-1]} steps of {BASELINE}")
        steps = plan.base or (0,)
        net, states = self.network(plan, self.args.seed), []
        batches = evolve.on_the_way(self.batches(plan, 500 + self.args.seed), net, steps, states)
        train_network(net, self.losses(BASELINE), batches, plan)
        return states + [net.state_dict()] * (len(steps) - len(states))

    def make_branches(self) -> dict[str, Branch]:
        """The training images with most objects, and what the losses of a random network see of each."""
        train, net = self.data["train"], self.network(self.proxy, self.args.seed)
        seen = {branch: [] for branch in BRANCHES}

        def keep(branch, *what):
            seen[branch].append(what)
            return torch.zeros((), device=self.device)

        losses = {branch: functools.partial(keep, branch) for branch in BRANCHES}
        net.train()
        size = self.proxy.size
        zoom = size / train.sizes.amax(1).view(-1, 1, 1)
        large = ((train.boxes[..., 2:] - train.boxes[..., :2]) * zoom >= SMALLEST).all(-1)  # enough to be a target
        number = (large & (train.labels > 0) & ~train.crowd).sum(1)
        if not number.any():
            raise DataError(f"all objects are less than {SMALLEST} pixels wide at --size {size}; give a larger one")
        rich = number.sort(descending=True, stable=True).indices[: int((number > 0).sum())].cpu()
        self.few = rich[torch.arange(GATE_SAMPLES) % len(rich)]
        for index in self.few:
            augmentation = torch.Generator().manual_seed(self.args.seed)
            images, targets = batch_scale_flip(train, index.view(1), size, (1.0, 1.0), augmentation)
            with torch.no_grad():
                net(normalise(images), [(size, size)], targets, losses)
        return {branch: self.make_branch(branch, seen[branch]) for branch in self.args.branches}

    def make_branch(self, branch: str, seen: list[tuple]) -> Branch:
        """A sample is what the loss of this branch has seen of one picture, as many predictions from each."""
        kind = branch.split("_")[-1]

        def alike(tensors, first: Sequence[Tensor] | None = None) -> Tensor:
            """(B, N, ...): N rows of each tensor at even distances, some of them repeatedly where there are fewer.

            Those of `first`, up to a quarter of N, take the first places where no other row is one of them.
            """
            N, taken = GATE_SIZE[kind], []
            for k, tensor in enumerate(tensors):
                rows = torch.arange(N) * len(tensor) // N
                if first is not None and not torch.isin(rows, first[k]).any():
                    some = first[k][: N // 4]
                    rows[: len(some)] = some
                taken.append(tensor.cpu()[rows])
            return torch.stack(taken).float()

        if kind == "reg":
            boxes = [farther_half(boxes) for (boxes,) in seen]
            start = alike(b.start for b in boxes)
            found, wanted = (alike(b.decode()[k] for b in boxes) for k in (0, 1))
            flat = start.view(-1, 4)
            prediction, ideal = (CODER.encode_single(b.view(-1, 4), flat).view_as(start) for b in (found, wanted))
            prediction, target, ideal = (x[..., None, None] for x in (prediction, wanted, ideal))
            leaves, score = box_branch_functions(start)
        elif kind == "cls":
            positive = [label.cpu().nonzero()[:, 0] for _, label, _ in seen]  # few among hundreds of proposals
            prediction = alike([logits for logits, *_ in seen], positive)[..., None, None]
            labels = [F.one_hot(label, prediction.shape[2]) for _, label, _ in seen]
            target = alike(labels, positive)[..., None, None]
            ideal, leaves, score = 10 * target, class_leaves, class_score
        else:
            prediction, target = (alike(column).unsqueeze(2) for column in zip(*seen))
            ideal, leaves, score = 20 * target - 10, mask_gate_leaves, mask_score
        baseline = "" if kind == "reg" else KNOWN[kind][0]  # smooth L1 is no tree
        simulation = {"ideal": ideal, "known": KNOWN[kind]}
        eta = ETA[branch] * (1 - score(prediction, target).mean().item())
        return Branch(
            BRANCHES[branch][0], prediction[None], target, leaves, score, eta, baseline=baseline, **simulation
        )

    def train(self, losses: dict[str, Expr | str] | str, base: int = 0) -> float:
        return round(self.proxy_scores(losses, base)[self.args.metric], 6)

    def proxy_scores(self, losses: dict[str, Expr | str] | str, base: int = 0) -> dict[str, float]:
        """All metrics on the search-validation split after a proxy training."""
        net = self.network(self.proxy, self.args.seed)
        net.load_state_dict(self.states[base - self.bases])
        data = self.proxy_batches or self.batches(self.proxy, self.args.seed)
        self.curve = []
        self.curve = train_network(net, self.losses(losses), data, self.proxy, "invalid" not in self.args.without)
        return self.test(net, self.data["val"])

    def simulate(self, losses: dict[str, Expr] | str) -> float:
        """A short training on the pictures of the gates: the score on these."""
        few = select(self.data["train"], self.few.unique())
        plan = self.proxy._replace(steps=max(1, self.proxy.steps // 4))
        net = self.network(plan, self.args.seed)
        try:
            train_network(net, self.losses(losses), Batches(few, plan, self.args.seed), plan)
        except InvalidLoss:
            return 0.0
        return self.test(net, few)[self.args.metric]

    def retrain(
        self, losses: dict[str, Expr | str] | str, seed: int, picture: Path | None = None, checkpoint=None
    ) -> dict[str, dict[str, float]]:
        own = 1000 + seed  # never the seed of the proxy: the ranking must hold for other weights and other batches
        plan = self.retraining
        net = self.network(plan, own)
        self.curve = train_network(net, self.losses(losses), self.batches(plan, own), plan, checkpoint=checkpoint)
        if picture:
            draw_predictions(net, self.data["test"], picture, plan.size)
        return {name: self.test(net, self.data[name], plan.size) for name in ("val", "test")}


# =====================================================================================================================
# Main


def main() -> None:
    evolve.main(parse_arguments(sys.argv[1:]), DetTask)


if __name__ == "__main__":
    main()
