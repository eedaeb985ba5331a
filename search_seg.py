"""Semantic segmentation: search a loss for the metric you care about.

    python search_seg.py --metric miou                        # evolve a loss on the embedded data set
    python search_seg.py --metric miou --loss dice            # train and evaluate one loss instead
    python search_seg.py --metric bf1 --loss "Neg(Mul(y, Log(p)))"
    python search_seg.py --compare ce,dice,lovasz,RUN_DIR     # several losses, six metrics, one table
    python search_seg.py --metric miou --search asl           # search the parameters of Auto Seg-Loss instead
    python search_seg.py --metric miou --data voc --data-root VOCdevkit/VOC2012 --model r50-dlv3p
    tensorboard --logdir runs

AutoLoss-Zero, arXiv 2103.14026 (marks [P]); published Auto Seg-Loss configs (marks [A]); own choices [D].
The whole task is in this file but for what data/ reads: arguments, data, networks, metrics, hand-made losses, training.

Measured (the first command, a quarter of an hour of two cores of an AMD EPYC, torch 2.14.1): 49,872 losses explored,
146 of them trained; after 2,400 steps each mIoU on test .793, cross entropy .773, the difference over three paired
seeds +.019 (standard error .004). In 21 such runs it is +.007 to +.024 seventeen times, +.012 (.006), -.003, -.000 and
+.000; in eleven of versions before +.009 to +.023 nine times, and twice far worse. tests/RESULTS.md has more.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from statistics import NormalDist
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
from data.layouts import cityscapes_pairs, download_voc, folder_pairs, voc_pairs
from data.masks import CLASSES, IGNORE, Meaning, find_meaning, full_size, read_label
from data.pictures import decode as decode  # the way in for one picture; tests and users call it
from data.pictures import fingerprint, group_size, read_pictures, scaled, shared_bytes, threads, warn_of_shared
from evolve import Branch, Child, DataError, InvalidLoss, fail, note, warn, warn_once
from loss_ops import Expr, evaluate, parse, python_source, softmax_leaves, sources, standalone, wide

# A further metric: its name here, and its value in `SegMetrics.compute`, 0..1, the higher the better.
METRICS = ("miou", "fwiou", "macc", "gacc", "biou", "bf1")
WIDTHS = {"small": 16, "wide": 32}  # of SmallNet
MODELS = (*WIDTHS, "r50-dlv3p", "r101-dlv3p", "r50-psp", "r101-psp")


class Schedule(NamedTuple):
    """How one network is trained."""

    steps: int
    batch: int
    crop: int  # side of a training window in pixels
    scale: tuple[float, float]  # range of the random scale
    optimizer: str
    lr: float  # decays to 0 as (1 - step / steps) ** 0.9 (poly)
    head_lr: float = 1.0  # the head learns this much faster than the backbone
    weight_decay: float = 5e-4
    model: str = "small"
    warmup: float = 0.0  # share of the steps until the learning rate is reached
    base: tuple[int, ...] = ()  # steps with the baseline's loss from which proxy trainings go on, rising ...
    base_of: int = 1  # ... the first ones of a training of so many
    clip: float = math.inf  # norm to which longer gradients are cut


# The proxy on shapes was chosen by its rank correlation with re-training and by its cost (tests/bench_proxy.py): after
# a shorter base it favours what starts fast, and of what is ahead after the first the second tells what lasts [D].
# AdamW makes it blind to the scale of a loss, so that its ranking is about the shape of the loss alone. Without a
# warm-up its first steps are its longest: cross entropy ends .02 mIoU lower, and with some losses a network never
# learns one of the classes. On the real data sets optimizer, rates, steps, batches and crops are those of Auto Seg-Loss
# [A]; there a picture is brought to the size of a crop before it is scaled, here crops are of source pixels. That, the
# bases, chosen after those of shapes, and crops and batch of Cityscapes are ours [D].
PROXY = {
    "shapes": Schedule(120, 16, 48, (0.75, 1.5), "adamw", 0.01, warmup=0.3, base=(250, 600), base_of=600),
    "voc": Schedule(1000, 32, 128, (0.5, 2.0), "sgd", 0.02, 10.0, base=(1000, 2500), base_of=2500, model="r50-dlv3p"),
}
PROXY |= dict.fromkeys(("cityscapes", "folder"), PROXY["voc"])
RETRAIN = {
    "shapes": PROXY["shapes"]._replace(steps=2400, base=(), base_of=1),
    "voc": Schedule(10_000, 32, 512, (0.5, 2.0), "sgd", 0.02, 10.0, model="r101-dlv3p"),
    "cityscapes": Schedule(10_000, 16, 512, (0.5, 2.0), "sgd", 0.02, 10.0, model="r101-dlv3p"),
}
RETRAIN["folder"] = RETRAIN["voc"]


# =====================================================================================================================
# Arguments


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = evolve.Parser(description=__doc__.split("\n")[0], usage="python search_seg.py --metric miou [flags]")
    others = "a formula or a run directory"
    flag = evolve.add_task_flags(parser, METRICS, LOSSES, others, tuple(CLASSES), MODELS)
    about = "number of classes in own masks, or a file with their names; by default those found in the masks"
    flag("--classes", "N", about, class_list)
    flag("--download", None, "fetch VOC 2012 into --data-root through torchvision", action="store_true")
    flag("--proxy-steps", "N", f"steps of a proxy training: {evolve.told(PROXY, 'steps')}", evolve.at_least(1))
    about = f"steps of a re-training: {evolve.told(RETRAIN, 'steps')}"
    flag("--retrain-steps", "N", about, evolve.at_least(1))
    about = f"side of a training window: {evolve.told(PROXY, 'crop')}; in re-training {evolve.told(RETRAIN, 'crop')}"
    flag("--crop", "PIXELS", about, evolve.at_least(8, most=8192))
    about = f"images in a batch: {evolve.told(PROXY, 'batch')}; in re-training {evolve.told(RETRAIN, 'batch')}"
    flag("--batch", "N", about, evolve.at_least(2, most=4096))
    flag("--lr", "RATE", f"learning rate: {evolve.told(PROXY, 'lr')}", evolve.at_least(1e-6, float))
    evolve.add_search_flags(parser, {"asl": "the parameters of Auto Seg-Loss"})
    args = parser.parse_args(argv)
    if args.resume:
        args = evolve.resume_arguments(parser, argv, SegTask)
    return check_arguments(args)


def class_list(text: str) -> int | str:
    """An argparse type: a number of classes, or the name of a file."""
    if os.path.isfile(text):
        return os.path.abspath(text)
    try:
        return evolve.at_least(2)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or no file with names of classes") from None


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other flags; end the program with one line where something is wrong."""
    evolve.settle_arguments(args, read_loss)
    if args.classes is not None and args.data in ("shapes", "cityscapes"):
        fail(f"--classes {args.classes}: {args.data} has its own {CLASSES[args.data]}; leave the flag out")
    if isinstance(args.classes, int) and args.classes > 255:
        fail(f"--classes {args.classes}: too many; a label map has a byte a pixel, 255 classes at most")
    if args.download and args.data != "voc":
        fail(f"--download: fetches VOC alone, not {args.data}; leave the flag out")
    if args.metric not in ASL_THETA and "asl" in (args.search, *args.wanted.values()):
        fail(f"--metric {args.metric}: Auto Seg-Loss has no surrogate of it; give one of {' '.join(ASL_THETA)}")
    if args.pretrained:  # what is missing shows before the search, not after it
        for model in {args.model or plans[args.data].model for plans in (PROXY, RETRAIN)}:
            build_model(model, 2, args.pretrained)
    return args


def read_loss(text: str, flag: str) -> "str | dict[str, Expr | Asl]":
    """The name of a hand-made loss, a formula, Auto Seg-Loss as `str(Asl)` writes it, or a run directory."""
    if text in LOSSES:
        return text
    if os.path.isdir(text):
        return evolve.read_found(Path(text), SegTask, flag)
    if text.startswith("asl("):
        try:
            return {"loss": Asl.read(text)}
        except ValueError as error:
            fail(f"{flag} {text:.80}: {error}")
    if "(" not in text:
        fail(f"{flag} {text:.80}: unknown; give one of {' '.join(LOSSES)}, a formula or a run directory")
    return {"loss": evolve.read_formula(text, f"{flag} {text:.80}", "yp1")}


# =====================================================================================================================
# Data


class Split(NamedTuple):
    """The pictures and label maps of a split: as tensors where they are few, small and of one size."""

    images: "Tensor | Pictures"  # (M, 3, H, W) uint8, RGB
    labels: "Tensor | Pictures"  # (M, H, W) uint8, IGNORE outside the picture
    sizes: Tensor | None  # (M, 2) float32, height and width of each picture; None where each use decodes anew
    weights: "Tensor | Pictures | None" = None  # (M, H, W) float16, what a loss has made of each label map


LARGEST = 2048  # pixels: a picture with a longer side is scaled down on reading, its label map with it [D]


def read_split(
    pairs: list[tuple[Path, Path]], meaning: Meaning, memory: float = math.inf, device: str = "cpu"
) -> Split:
    """The split of some (image, label map) files; what takes at most `memory` bytes is kept once it is decoded.

    Raises DataError, now or when a picture is used, naming the file that is missing, cannot be read, does not fit its
    image or has an unknown class. `meaning` says what the values of label maps are.
    """
    images, labels = ([*map(Path, paths)] for paths in zip(*pairs))

    def read_images(numbers: list[int]) -> list[Tensor]:
        found = read_pictures([images[k] for k in numbers], [full_size(*pairs[k]) for k in numbers], device)
        return [scaled(picture, kept_size(*picture.shape[-2:])) for picture in found]

    def read_labels(numbers: list[int]) -> list[Tensor]:
        found = (read_label(labels[k], meaning, full_size(*pairs[k])) for k in numbers)
        return [F.interpolate(x[None, None], kept_size(*x.shape), mode="nearest-exact")[0, 0] for x in found]

    sample = range(0, len(pairs), math.ceil(len(pairs) / 256))  # the headers alone
    pixels = sum(math.prod(kept_size(*full_size(*pairs[k]))) for k in sample) / len(sample) * len(pairs)

    def size(k: int) -> tuple[int, int]:
        """Of one pair; any will do where nothing of it can be used."""
        with contextlib.suppress(DataError):
            return kept_size(*full_size(*pairs[k]))
        return 16, 16

    keep = 4 * pixels <= memory
    sizes = [kept_size(*full_size(*pair)) for pair in pairs] if keep else None
    image_shapes = [(3, *sides) for sides in sizes] if keep else lambda k: (3, *size(k))
    stored = (
        Pictures(read_images, len(pairs), device, image_shapes, group=group_size(images, device)),
        Pictures(read_labels, len(pairs), device, sizes or size, fill=IGNORE),
    )
    if keep:
        sizes = torch.tensor(sizes, dtype=torch.float32)
        kinds = (f"seg {LARGEST}", f"seg {LARGEST} {meaning}")
        stored = [x.settle(lambda kind=k: fingerprint(kind, itertools.chain(*pairs))) for x, k in zip(stored, kinds)]
    return Split(*stored, sizes)


def kept_size(height: int, width: int) -> tuple[int, int]:
    """The height and width that a picture of such a size is kept with."""
    factor = min(1, LARGEST / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def list_data(args) -> dict[str, list[tuple[Path, Path]]]:
    """The files of three splits: train, val (what the search sees) and test (what is reported).

    Where a data set has no third labelled split, every eighth training picture is held out for the search, and the
    official validation split is the test split [D]. Draws shapes and downloads VOC if need be.
    """
    root = args.data_root
    if args.data == "shapes":
        if not shapes.may_lie_in(root):
            raise DataError(f"{root}: holds something other than shapes; give an empty or new folder, or its --data")
        shapes.write_shapes(root, show=shapes.show_progress)
        pairs = {split: voc_pairs(root, split) for split in ("train", "val", "test")}
    elif args.data == "voc":
        if args.download:
            download_voc(root)
        nested = root / "VOCdevkit/VOC2012"
        root = nested if nested.is_dir() else root
        aug = (root / "ImageSets/Segmentation/trainaug.txt").is_file()
        train = voc_pairs(root, "trainaug" if aug else "train")
        pairs = {"train": train, "test": voc_pairs(root, "val")}
    elif args.data == "cityscapes":
        pairs = {"train": cityscapes_pairs(root, "train"), "test": cityscapes_pairs(root, "val")}
    else:
        pairs = folder_pairs(root)
    warn_of_shared({split: [image.resolve() for image, _ in chosen] for split, chosen in pairs.items()})
    if "val" not in pairs:
        if len(pairs["train"]) < 2:
            raise DataError(f"{pairs['train'][0][0]}: the only training picture; give two or more, one is held out")
        pairs["val"] = pairs["train"][::8]
        pairs["train"] = [pair for k, pair in enumerate(pairs["train"]) if k % 8]
    return pairs


def read_data(args, pairs=None, meaning: Meaning | None = None) -> dict[str, Split]:
    """The three splits of `list_data`, ready for use; DataError if one has no pixel that counts."""
    pairs = pairs or list_data(args)
    meaning = meaning or find_meaning(args, pairs)
    splits, left = {}, args.memory * 2**30
    for name, chosen in pairs.items():
        splits[name] = split = read_split(chosen, meaning, left, args.device)
        left -= sum(part.nbytes for part in split if part is not None)
        if split.images.nbytes == 0:
            number = f"{name}: {len(chosen):,} pictures"
            note(f"{number}, more than --memory {args.memory:.3g} or TMPDIR holds; decoded batch by batch")
    for name, split in splits.items():
        check_classes(split, f"{args.data_root}: {name}")
        if name != "train":
            check_boundaries(split, f"{args.data_root}: {name}", args.metric)
    return splits


def check_classes(split: Split, where: str) -> None:
    """Warn of label maps with only one class; DataError if there is none. Looks no farther than needed."""
    classes = set()
    for k in range(len(split.labels)):
        classes |= set(split.labels[torch.tensor([k])].unique().tolist()) - {IGNORE}
        if len(classes) > 1:
            return
    if not classes:
        raise DataError(f"{where}: every pixel is 255, ignored; there is nothing to learn or to measure")
    warn_once(f"{where}: only class {min(classes)} in all masks (255 is ignored; data/README.md has what masks mean)")


def check_boundaries(split: Split, where: str, metric: str) -> None:
    """Warn where no label map has a boundary; DataError if that is what the searched metric measures."""
    for k in range(len(split.labels)):
        label = split.labels[torch.tensor([k])]
        if (edges(label) & (label != IGNORE) & (label != 0)).any():
            return
    if metric in ("biou", "bf1"):
        raise DataError(f"{where}: no mask has a boundary of a class other than 0; {metric} has nothing to measure")
    warn_once(f"{where}: no mask has a boundary of a class other than 0; biou and bf1 count as 0")


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


def select(split: Split, index: Tensor) -> Split:
    """Some pictures of a split, as a split of tensors."""
    images, labels, sizes, weights = split
    if sizes is None:
        sizes = torch.tensor([picture.shape[-2:] for picture in labels.take(index)], dtype=torch.float32)
    else:
        sizes = sizes[index]
    return Split(images[index], labels[index], sizes, None if weights is None else weights[index])


def no_larger(split: Split, side: int) -> Split:
    """A split of tensors, scaled down until no side is longer."""
    H, W = split.labels.shape[-2:]
    if max(H, W) <= side:
        return split
    size = [max(1, round(length * side / max(H, W))) for length in (H, W)]
    images = F.interpolate(split.images.float(), size, mode="bilinear", antialias=True).round().to(torch.uint8)
    labels = F.interpolate(split.labels.unsqueeze(1).float(), size, mode="nearest-exact").squeeze(1).to(torch.uint8)
    sizes = (split.sizes * side / max(H, W)).round().clamp(min=1)
    return Split(images, labels, sizes)


def richest(split: Split, number: int, num_classes: int) -> Tensor:
    """The pictures with most classes; of a split that is not one tensor, among 256 at even distances."""
    if isinstance(split.labels, Tensor):
        index = torch.arange(len(split.labels))
        seen = torch.stack([(split.labels == c).flatten(1).any(1) for c in range(num_classes)]).sum(0)
    else:
        index = torch.arange(0, len(split.labels), math.ceil(len(split.labels) / 256))
        seen = torch.stack([(label.unique() != IGNORE).sum() for label in split.labels.take(index)])
    return index[seen.sort(descending=True, stable=True).indices[:number].cpu()]


def in_order(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and label maps of a whole split, a few at a time, those of unlike sizes one by one."""
    images, labels, number = split.images, split.labels, len(split.images)
    if isinstance(labels, Tensor) and (split.sizes != split.sizes[0]).any():
        for image, label, (h, w) in zip(images, labels, split.sizes.int().tolist()):
            yield image[None, :, :h, :w], label[None, :h, :w]
        return
    size = max(1, 2**18 // labels[0].numel()) if isinstance(labels, Tensor) else 1
    for start in range(0, number, size):
        for part in (images, labels):
            if isinstance(part, Pictures) and start % 8 == 0:
                part.prefetch(range(start, min(start + 16, number)))
        yield images[start : start + size], labels[start : start + size]


def with_weights(split: Split, make: Callable[..., Tensor], num_classes: int) -> Split:
    """The split with what `make(labels, num_classes, frequency)` makes of its label maps."""
    labels = split.labels
    if isinstance(labels, Tensor):
        return split._replace(weights=make(labels, num_classes).to(labels.device))
    sample = labels.take(range(0, len(labels), math.ceil(len(labels) / 1000)))
    frequency = sum(torch.bincount(label.flatten().cpu(), minlength=256) for label in sample)[:num_classes].float()

    def read(numbers: list[int]) -> list[Tensor]:
        return [make(label.cpu().unsqueeze(0), num_classes, frequency)[0] for label in labels.decode(numbers)]

    weights = Pictures(read, len(labels), labels.device, labels.shapes, dtype=torch.float16)
    if labels.kept is not None:
        weights = weights.settle(lambda: f"{make.__name__} {labels.key()}")
    return split._replace(weights=weights)


MEAN = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)  # ImageNet, as torchvision's weights expect
STD = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)


def batch_scale_crop_flip(
    split: Split, index: Tensor, crop: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Scale, flip and cut a (crop, crop) window out of each picture, in one affine sampling for images, one for labels.

    Returns images (N, 3, crop, crop) float in 0..255 and labels (N, crop, crop) uint8, IGNORE outside of the picture,
    on the split's device; the same window of the weights (N, crop, crop) float follows where the split has them. The
    scale is log-uniform in `scale`; half of the pictures are mirrored.
    """
    N, device, whole = len(index), split.images.device, isinstance(split.images, Tensor)
    parts = [part for part in (split.images, split.labels, split.weights) if part is not None]
    u = torch.rand(4, N, generator=generator)  # on the CPU: no wait for the device, and the same on each
    window = crop / (scale[0] * (scale[1] / scale[0]) ** u[0])  # side in source pixels
    if whole:
        canvases, size = [part[index.to(device)] for part in parts], split.sizes[index]
    else:
        pictures = [part.take(index.tolist()) for part in parts]
        size = torch.tensor([label.shape[-2:] for label in pictures[1]], dtype=torch.float32)
    room = size.T - window  # (2, N)
    begin = torch.where(room > 0, room * u[1:3], room / 2)  # centred where the picture is smaller than the window
    if not whole:  # of pictures that differ in size no more is put together than what a window can reach
        side, corners = math.ceil(crop / scale[0]) + 3, (begin.floor() - 1).clamp(min=0)
        places = corners.T.int().tolist()
        canvases = [part.stack(found, places, side, side) for part, found in zip(parts, pictures)]
        begin = begin - corners
    images, labels, *weights = canvases
    u, window, begin = (x.to(device, non_blocking=True) for x in (u, window, begin))
    (H, W), (top, left) = images.shape[-2:], begin
    mirror = torch.where(u[3] < 0.5, -1.0, 1.0)
    theta = torch.zeros(N, 2, 3, device=device)  # maps window coordinates in -1..1 to canvas coordinates in -1..1
    theta[:, 0, 0], theta[:, 0, 2] = mirror * window / W, (2 * left + window) / W - 1
    theta[:, 1, 1], theta[:, 1, 2] = window / H, (2 * top + window) / H - 1

    def sample(images: Tensor, theta: Tensor, mode: str = "bilinear") -> Tensor:
        grid = F.affine_grid(theta, [len(images), 3, crop, crop], align_corners=False)
        return F.grid_sample(images.float(), grid, mode, align_corners=False)

    def sample_labels(labels: Tensor, theta: Tensor) -> Tensor:
        labels = labels.unsqueeze(1).float() - IGNORE  # the zero padding of the sampling then means IGNORE
        return (sample(labels, theta, "nearest") + IGNORE).squeeze(1).round().to(torch.uint8)

    images = map_pictures(sample, images, theta)
    labels = map_pictures(sample_labels, labels, theta)
    weights = [sample(w.unsqueeze(1), theta).squeeze(1) for w in weights]
    return images, labels, *weights


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


def conv(channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, size, stride, dilation * (size // 2), dilation, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def upsample(x: Tensor, size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear")


STRIDE = 16  # of the coarsest features of any network


class Segmenter(nn.Module):
    """Images (N, 3, H, W), normalised, to logits (N, C, H, W), by the `logits` of a network.

    A further network is a subclass, a name in MODELS and a line in `build_model`; what is pretrained in it is its
    `backbone`, which learns more slowly. Images are padded to multiples of STRIDE: a feature stands for so many pixels,
    and those that reach beyond the picture would move all others when they are brought to its size.
    """

    def forward(self, images: Tensor) -> Tensor:
        H, W = images.shape[-2:]
        if H % STRIDE == W % STRIDE == 0:
            return self.logits(images)
        return self.logits(F.pad(images, (0, -W % STRIDE, 0, -H % STRIDE)))[..., :H, :W]


class SmallNet(Segmenter):
    """For the embedded data: features at strides 2 and 4, two classifiers added up; 36 thousand weights at width 16."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        deep = 2 * width
        self.fine = nn.Sequential(conv(3, width, 2), conv(width, width))
        layers = conv(width, deep, 2), conv(deep, deep), conv(deep, deep, 1, 2), conv(deep, deep, 1, 4)
        self.coarse = nn.Sequential(*layers)
        self.head_fine = nn.Conv2d(width, num_classes, 1)
        self.head_coarse = nn.Conv2d(deep, num_classes, 1)

    def logits(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        logits = self.head_fine(fine) + upsample(self.head_coarse(self.coarse(fine)), fine.shape[-2:])
        return upsample(logits, images.shape[-2:])


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


class Backbone(nn.Module):
    """A torchvision ResNet (50 or 101) of output stride 8 or 16; returns the features of stages 1 (stride 4) and 4."""

    def __init__(self, depth: int, output_stride: int, pretrained: bool | str):
        super().__init__()
        dilate = {16: [False, False, True], 8: [False, True, True]}[output_stride]
        net = resnet(depth, pretrained, replace_stride_with_dilation=dilate)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stage1, self.rest = net.layer1, nn.Sequential(net.layer2, net.layer3, net.layer4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low = self.stage1(self.stem(images))
        return low, self.rest(low)


class DeepLabV3Plus(Segmenter):
    """DeepLabv3+ (Chen 2018, arXiv 1802.02611): atrous pyramid on stride 16, decoder on the features of stride 4."""

    def __init__(self, num_classes: int, depth: int, output_stride: int = 16, pretrained: bool | str = False):
        super().__init__()
        self.backbone = Backbone(depth, output_stride, pretrained)
        rates = [rate * 16 // output_stride for rate in (6, 12, 18)]
        self.pyramid = nn.ModuleList([conv(2048, 256, size=1), *(conv(2048, 256, 1, rate) for rate in rates)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(2048, 256, size=1))
        self.project = nn.Sequential(conv(5 * 256, 256, size=1), nn.Dropout(0.1))
        self.low = conv(256, 48, size=1)
        self.decoder = nn.Sequential(
            conv(256 + 48, 256), conv(256, 256), nn.Dropout(0.1), nn.Conv2d(256, num_classes, 1)
        )

    def logits(self, images: Tensor) -> Tensor:
        low, high = self.backbone(images)
        size = high.shape[-2:]
        views = [view(high) for view in self.pyramid] + [self.pool(high).expand(-1, -1, *size)]
        x = upsample(self.project(torch.cat(views, 1)), low.shape[-2:])
        return upsample(self.decoder(torch.cat([x, self.low(low)], 1)), images.shape[-2:])


class PSPNet(Segmenter):
    """PSPNet (Zhao 2017, arXiv 1612.01105): means over 1, 2, 3 and 6 bins a side beside the features of stride 8."""

    def __init__(self, num_classes: int, depth: int, output_stride: int = 8, pretrained: bool | str = False):
        super().__init__()
        self.backbone = Backbone(depth, output_stride, pretrained)
        self.bins = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(b), conv(2048, 512, size=1)) for b in (1, 2, 3, 6))
        self.classify = nn.Sequential(conv(2048 + 4 * 512, 512), nn.Dropout(0.1), nn.Conv2d(512, num_classes, 1))

    def logits(self, images: Tensor) -> Tensor:
        _, high = self.backbone(images)
        views = [high] + [upsample(view(high), high.shape[-2:]) for view in self.bins]
        return upsample(self.classify(torch.cat(views, 1)), images.shape[-2:])


def build_model(name: str, num_classes: int, pretrained: bool | str = False) -> nn.Module:
    """One of MODELS: images (N, 3, H, W), normalised, to logits (N, num_classes, H, W).

    Without the auxiliary heads of the published settings [D].
    """
    if name in WIDTHS:
        if pretrained:
            fail(f"--pretrained: --model {name} has no such weights; leave it out, or choose another --model")
        return SmallNet(num_classes, WIDTHS[name])
    resnet, head = name.split("-")
    network = {"dlv3p": DeepLabV3Plus, "psp": PSPNet}[head]
    return network(num_classes, int(resnet[1:]), pretrained=pretrained)


# =====================================================================================================================
# Metric


def count(index, mask, length):
    """How often each of 0..length-1 occurs in `index` where `mask`, without a host synchronisation."""
    zeros = torch.zeros(length, dtype=torch.long, device=index.device)
    return zeros.scatter_add_(0, index.flatten().long(), mask.flatten().long())


def edges(label):
    """Pixels (N, H, W) whose 3x3 neighbourhood inside the image is not wholly of their class."""
    H, W = label.shape[1:]
    found = torch.zeros_like(label, dtype=torch.bool)
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):  # each pair of neighbours once
        one = slice(None), slice(down, H), slice(max(right, 0), W + min(right, 0))
        other = slice(None), slice(0, H - down), slice(max(-right, 0), W - max(right, 0))
        differ = label[one] != label[other]
        for part in (one, other):
            found[part] = found[part] | differ  # which both of torch's ONNX exporters know
    return found


BITS = 63  # classes that one integer holds


def bits_from(first, label):
    """The bit of each class in an integer that begins with class `first`, and which pixels have one there."""
    bit = label - first
    return bit.clamp(0, BITS - 1), (bit >= 0) & (bit < BITS)


def dilate_bits(bits, radius):
    """Bitwise or over a (2 radius + 1)^2 window of (N, H, W) integers: one dilation for BITS classes at once."""
    for dim in (1, 2):
        bits, reach = bits.clone(), bits
        for step in range(1, radius + 1):
            n = reach.shape[dim]
            if step >= n:
                break
            bits.narrow(dim, 0, n - step).bitwise_or_(reach.narrow(dim, step, n - step))
            bits.narrow(dim, step, n - step).bitwise_or_(reach.narrow(dim, 0, n - step))
    return bits


class SegMetrics:
    """The six metrics, accumulated on the device over any number of batches. Pixels with label 255 are ignored.

    But for predicted boundaries in BF1, which count within `tolerance` of what does: where the border of each object is
    ignored, as in VOC, they lie there. The released evaluator counts them everywhere [A].
    `groups` > 1 keeps that many independent sets of counts: the gates score many single predictions in one call.
    """

    def __init__(self, num_classes: int, device="cpu", tolerance: int = 5, groups: int = 1):
        C = self.C = num_classes
        self.tolerance, self.groups = tolerance, groups
        self.confusion = torch.zeros(groups, C, C, dtype=torch.long, device=device)  # [target, prediction]
        self.near_boundary = torch.zeros_like(self.confusion)
        self.edges = torch.zeros(4, groups, C, dtype=torch.long, device=device)  # predicted, hit; target, hit

    def update(self, pred: Tensor, label: Tensor) -> None:
        """Count label maps (M, H, W) of integers; with groups, M = groups * N and the group is the slow index."""
        C, G = self.C, self.groups
        valid = label != IGNORE
        group = torch.arange(G, device=pred.device).repeat_interleave(len(pred) // G).view(-1, 1, 1)
        pred, target = pred.long(), torch.where(valid, label, 0).long()
        pair = (group * C + target) * C + pred
        self.confusion += count(pair, valid, G * C * C).view(G, C, C)

        counts = dilate_bits(valid.long(), self.tolerance).bool()
        edge_pred, edge_target = edges(pred) & counts, edges(label) & valid
        near, hit_pred, hit_target = (torch.zeros_like(valid) for _ in range(3))
        for first in range(0, C, BITS):
            (bit_pred, own_pred), (bit_target, own_target) = (bits_from(first, x) for x in (pred, target))
            reach_pred = dilate_bits((edge_pred & own_pred).long() << bit_pred, self.tolerance)
            reach_target = dilate_bits((edge_target & own_target).long() << bit_target, self.tolerance)
            near |= reach_target >> (first == 0) != 0  # without the background, whose own boundary does not count [A]
            hit_pred |= own_pred & (reach_target >> bit_pred & 1).bool()
            hit_target |= own_target & (reach_pred >> bit_target & 1).bool()
        self.near_boundary += count(pair, near & valid, G * C * C).view(G, C, C)
        for k, (index, mask) in enumerate(
            [(pred, edge_pred), (pred, edge_pred & hit_pred), (target, edge_target), (target, edge_target & hit_target)]
        ):
            self.edges[k] += count(group * C + index, mask, G * C).view(G, C)

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name, each (groups,) float64 in 0..1, NaN where nothing counts.

        The means of miou and biou leave out a class that is neither in the target nor predicted, those of macc and bf1
        one that is not in the target.
        """

        def iou(confusion):
            hit = confusion.diagonal(dim1=1, dim2=2)
            return hit / (confusion.sum(1) + confusion.sum(2) - hit)

        confusion, total = self.confusion.double(), self.confusion.sum((1, 2))
        hit, occurs, ious = confusion.diagonal(dim1=1, dim2=2), confusion.sum(2), iou(confusion)
        edge_pred, hit_pred, edge_target, hit_target = self.edges.double()
        # F1 = 2 P R / (P + R); without any hit it is 0, without a target boundary the class is left out. The background
        # is a class like the others, which the released evaluator leaves out [D].
        precision, recall = hit_pred / edge_pred.clamp(min=1), hit_target / edge_target
        f1 = 2 * precision * recall / torch.where(precision + recall == 0, 1, precision + recall)
        return {
            "miou": ious.nanmean(1),
            "fwiou": torch.where(total > 0, (occurs / total.unsqueeze(1) * ious).nansum(1), math.nan),
            "macc": (hit / occurs).nanmean(1),
            "gacc": hit.sum(1) / total,
            "biou": iou(self.near_boundary.double()).nanmean(1),
            "bf1": f1.nanmean(1),
        }


def seg_metrics(pred: Tensor, label: Tensor, num_classes: int) -> dict[str, float]:
    """The six segmentation metrics of label maps (N, H, W).

    pred: integers 0..num_classes-1; label: the same, or 255 where a pixel does not count. Keys: miou (mean IoU), fwiou
    (IoU weighted by class frequency), macc (mean class accuracy), gacc (pixel accuracy), biou (mean IoU over the pixels
    within 5 px of a target boundary, that of class 0 not counted), bf1 (mean boundary F1 with 5 px tolerance); NaN
    where nothing counts. miou and biou leave out a class that is in neither map, macc and bf1 one that is not in the
    label. A prediction may be 255, too, where the label is: it is taken for class 0. Raises ValueError for anything
    else.
    """
    pred, label = maps = [*map(torch.as_tensor, (pred, label))]
    if pred.shape != label.shape or pred.ndim != 3 or any(x.is_floating_point() or x.is_complex() for x in maps):
        given = " and ".join(f"{x.dtype} {tuple(x.shape)}" for x in maps)
        raise ValueError(f"{given}; prediction and label must be integers of one shape (N, H, W)")
    pred, label = pred.long(), label.long()
    pred = torch.where((pred == IGNORE) & (label == IGNORE), 0, pred)
    for name, values in (("pred", pred), ("label", label[label != IGNORE])):
        if wrong := values[(values < 0) | (values >= num_classes)].tolist():
            raise ValueError(f"{name} has {wrong[0]}; expected 0..{num_classes - 1}, or 255 where nothing counts")
    metrics = SegMetrics(num_classes, pred.device)
    metrics.update(pred, label)
    return {name: value.item() for name, value in metrics.compute().items()}


# =====================================================================================================================
# Losses: the hand-made ones. Each takes logits (N, C, H, W) of any floating type and label (N, H, W) uint8, 0..C-1 or
# 255, and returns a scalar; without any pixel that counts it is 0 and still connected to the graph


def ce(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy, the mean over pixels that count."""
    return F.cross_entropy(wide(logits), label.long(), ignore_index=IGNORE, reduction="sum") / count_valid(label)


def weighted_ce(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy times a map of weights (N, H, W), the mean over pixels that count."""
    loss = F.cross_entropy(wide(logits), label.long(), ignore_index=IGNORE, reduction="none")
    return (loss * weight).sum() / count_valid(label)


def dice(logits: Tensor, label: Tensor) -> Tensor:
    """1 - soft Dice coefficient, averaged over the classes of the batch (Milletari 2016, without squares)."""
    leaves, mask = softmax_leaves(logits, label)
    y, p = leaves["y"] * mask, leaves["p"] * mask
    both, either, present = (y * p).sum((0, 2, 3)), (y + p).sum((0, 2, 3)), y.sum((0, 2, 3)) > 0
    return ((1 - 2 * both / (either + 1e-8)) * present).sum() / present.sum().clamp(min=1)


def lovasz(logits: Tensor, label: Tensor) -> Tensor:
    """Lovasz-Softmax over the classes of the batch (Berman 2018, arXiv 1705.08790, Eqs. 8 and 9)."""
    C = logits.shape[1]
    prob = wide(logits).softmax(1).movedim(1, 0).flatten(1)  # (C, N*H*W)
    label = label.flatten()
    valid = label != IGNORE
    target = (label == torch.arange(C, device=label.device).unsqueeze(1)).float()
    error, order = ((target - prob).abs() * valid).sort(dim=1, descending=True)  # ignored: no error, sorted last
    target = target.gather(1, order)
    total = target.sum(1, keepdim=True)
    jaccard = 1 - (total - target.cumsum(1)) / (total + (1 - target).cumsum(1)).clamp(min=1)
    slope = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], 1)
    present = total.squeeze(1) > 0
    return ((error * slope).sum(1) * present).sum() / present.sum().clamp(min=1)


def ssim(logits: Tensor, label: Tensor) -> Tensor:
    """1 - structural similarity of prediction and one-hot target, class by class (BASNet, Qin 2019, Eq. 5).

    Statistics over a Gaussian window of 11 x 11 pixels, sigma 1.5 (Wang 2004), zero beyond the image; ignored pixels
    are alike in both and left out of the mean.
    """
    leaves, mask = softmax_leaves(logits, label)
    y, p = leaves["y"] * mask, leaves["p"] * mask
    C = y.shape[1]
    window = torch.arange(-5, 6, device=y.device, dtype=y.dtype).div(1.5).square().mul(-0.5).exp()
    window = window / window.sum()
    maps = torch.cat([y, p, y * y, p * p, y * p], 1)
    kernel = window.expand(5 * C, 1, -1)
    with torch.autocast(maps.device.type, enabled=False):  # differences of squares need all their bits
        maps = F.conv2d(maps, kernel.unsqueeze(-1), padding=(5, 0), groups=5 * C)
        maps = F.conv2d(maps, kernel.unsqueeze(-2), padding=(0, 5), groups=5 * C)
    mean_y, mean_p, yy, pp, yp = maps.chunk(5, 1)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_y * mean_p + c1) / (mean_y**2 + mean_p**2 + c1)
    structure = (2 * (yp - mean_y * mean_p) + c2) / (yy - mean_y**2 + pp - mean_p**2 + c2)
    return ((1 - luminance * structure) * mask).sum() / (C * count_valid(label))


# Auto Seg-Loss (ASL, arXiv 2010.07930): the metric itself, its logical operations replaced by curves. The published
# control points [A], x1 y1 x2 y2 ... of each curve; the fixed ends (0, 0) and (1, 1) are left out.
ASL_THETA = {
    "miou": (5.69728440e-04, 6.43720450e-01, 3.38589169e-01, 7.05543360e-01, 6.25281252e-01, 7.79551927e-01,
             6.90375570e-01, 1.30628900e-02, 8.34170515e-01, 9.62431815e-01, 9.42998269e-01, 9.80038125e-01),
    "fwiou": (3.65390355e-04, 9.84171689e-01, 9.69491959e-01, 9.92340326e-01, 9.88328516e-01, 9.95552719e-01,
              3.54609758e-01, 2.67221928e-01, 5.60551465e-01, 4.35290039e-01, 5.65432191e-01, 6.01448298e-01),
    "macc": (2.1453928e-02, 7.3905742e-01, 4.1163361e-01, 7.9865617e-01, 9.1986191e-01, 9.5041156e-01),
    "bf1": (0.8113003373146057, 0.8526162505149841, 0.17164576053619385, 0.03164796531200409,
            0.20997394621372223, 0.44903290271759033, 0.07847517728805542, 0.8753038048744202),
}  # fmt: skip
ASL_THETA |= {"biou": ASL_THETA["fwiou"], "gacc": ASL_THETA["macc"]}
ASL_CURVES = {"miou": 2, "fwiou": 2, "biou": 2, "macc": 1, "gacc": 1, "bf1": 4}


def asl_loss(logits: Tensor, label: Tensor, theta, metric: str, ignore_index: int = IGNORE) -> Tensor:
    """1 - the surrogate of `metric` (ASL, Secs. 4.1 and 4.2): AND(p, y) = g(p) y and OR(p, y) = h(p) + y - h(p) y.

    logits and label as `softmax_leaves` takes them; biou and bf1 know neighbourhoods, as pools do.
    theta: control points as published, absolute and never falling along a curve, curve after curve: AND and OR for
    miou, fwiou and biou; AND for macc and gacc; for bf1 those of the boundary OR(p, e) - AND(p, e) of p and its 3x3
    erosion e: AND of p, AND of e, OR of p, OR of e.
    """
    leaves, mask = softmax_leaves(logits, label, ignore_index, pools=metric in ("biou", "bf1"))
    y, p = leaves["y"] * mask, leaves["p"]
    values, size = [float(value) for value in theta], len(theta) // ASL_CURVES[metric]
    curves = [list(zip(values[k : k + size : 2], values[k + 1 : k + size : 2])) for k in range(0, len(values), size)]
    frequency = y.sum((0, 2, 3))
    if metric == "bf1":
        near = F.max_pool2d(mask.to(p.dtype), 11, 1, 5)  # VOC's borders are ignored, and boundaries lie there
        score = asl_boundary_f1(y, torch.where(near > 0, wide(logits).reshape(p.shape), 0.0).softmax(1), near, curves)
    elif metric in ("macc", "gacc"):
        hit = (bezier(p, curves[0]) * y).sum((0, 2, 3))
        score = (hit / (frequency + 1e-8)).mean() if metric == "macc" else hit.sum() / (frequency.sum() + 1e-8)
    else:
        if metric == "biou":
            label = label.reshape(mask.squeeze(1).shape)
            boundary = (edges(label) & (label != 0)).unsqueeze(1) & mask  # of any class but the background
            mask = mask & (F.max_pool2d(boundary.to(p.dtype), 11, 1, 5) > 0)  # near it
            y = y * mask
        either = bezier(p, curves[1])
        either = ((either + y - either * y) * mask).sum((0, 2, 3))
        iou = (bezier(p, curves[0]) * y).sum((0, 2, 3)) / (either + 1e-8)
        score = (iou * frequency).sum() / (frequency.sum() + 1e-8) if metric == "fwiou" else iou.mean()
    return (1 - score) * mask.any()


def asl_boundary_f1(y: Tensor, p: Tensor, near: Tensor, curves: list, tolerance: int = 5) -> Tensor:
    """The surrogate of BF1: mean over the classes that have a boundary in the target.

    Predicted boundaries count where `near` (N, 1, H, W) is 1, within the tolerance of what is not ignored; in the
    released code everywhere [A].
    """

    def erode(x):
        return -F.max_pool2d(F.pad(-x, (1, 1, 1, 1), value=-1.0), 3, 1)

    def reach(x):  # along one axis after the other: a fifth of the comparisons
        x = F.max_pool2d(x, (2 * tolerance + 1, 1), 1, (tolerance, 0))
        return F.max_pool2d(x, (1, 2 * tolerance + 1), 1, (0, tolerance))

    eroded = erode(p)
    and_p, and_e, or_p, or_e = (bezier(x, c) for x, c in zip((p, eroded, p, eroded), curves))
    edge_p = (or_p + or_e - or_p * or_e - and_p * and_e) * near
    edge_y = (erode(y) != y).to(p.dtype)
    total_y = edge_y.sum((0, 2, 3))
    precision = (edge_p * reach(edge_y)).sum((0, 2, 3)) / (edge_p.sum((0, 2, 3)) + 1e-8)
    recall = (reach(edge_p) * edge_y).sum((0, 2, 3)) / (total_y + 1e-8)
    f1 = 2 * precision * recall / (precision + recall + 1e-8)
    present = total_y > 0
    return (f1 * present).sum() / present.sum().clamp(min=1)


def bezier(x: Tensor, points) -> Tensor:
    """The height at `x` in 0..1 of a chain of quadratic Bezier pieces from (0, 0) to (1, 1); rising if `points` do.

    points: the 2 K - 1 control points (x, y) between the two ends, two for each of the K pieces but the last.
    """
    points = [(0.0, 0.0), *points, (1.0, 1.0)]
    height = torch.zeros_like(x)
    for k in range(0, len(points) - 1, 2):
        (x0, y0), (x1, y1), (x2, y2) = points[k : k + 3]
        # x0 + 2 t (x1 - x0) + t^2 (x0 - 2 x1 + x2) = x, solved in the form that has no 0/0 where the piece is a line in
        # x (x0 - 2 x1 + x2 = 0). The floor keeps the slope finite where the curve rises vertically (x1 = x0).
        u, b = x.clamp(x0, x2) - x0, x1 - x0
        t = (u / (b + (b * b + (x0 - 2 * x1 + x2) * u).clamp(min=1e-10).sqrt())).clamp(max=1)
        piece = y0 + 2 * t * (1 - t) * (y1 - y0) + t * t * (y2 - y0)
        height = torch.where(x > x0, piece, height)
    return torch.where(x < 1, height, 1.0)


def count_valid(label: Tensor) -> Tensor:
    return (label != IGNORE).sum().clamp(min=1)


# Weights per pixel need OpenCV: they are made once for each label map and cut like it, never in a training step.

LARGEST_WEIGHT = 1000.0  # of a class, however rare: a few stray pixels shall not decide all, nor exceed float16 [D]
REACH = 40  # pixels beyond which the weight of a border is too small for float16


def unet_weights(labels: Tensor, num_classes: int, frequency: Tensor | None = None) -> Tensor:
    """Class and border weights (U-Net, Ronneberger 2015, Eq. 2): w_c + 10 exp(-(d1 + d2)^2 / 50), (M, H, W) float16.

    w_c: inverse frequency of the pixel's class, in these label maps unless `frequency` (num_classes,) counts more,
    scaled to a mean of 1 over all pixels; at most LARGEST_WEIGHT, and 1 for a class that was not met. d1, d2: distances
    in pixels of a background pixel to the nearest and the second nearest object, a connected region of one class.
    """
    valid = labels != IGNORE
    index = torch.where(valid, labels, 0).long()
    if frequency is None:
        frequency = count(index, valid, num_classes).float()
    balance = frequency.sum() / ((frequency > 0).sum() * frequency)
    balance = torch.where(frequency > 0, balance, 1.0).clamp(max=LARGEST_WEIGHT)
    weights = balance[index] * valid
    for label, weight in zip(labels.cpu().numpy(), weights):
        nearest = np.full((2, *label.shape), np.inf, np.float32)  # d1, d2
        for c in range(1, num_classes):
            _, regions, boxes, _ = cv2.connectedComponentsWithStats((label == c).astype(np.uint8))
            for k, (left, top, width, height, _) in enumerate(boxes[1:], 1):
                part = np.s_[max(0, top - REACH) : top + height + REACH, max(0, left - REACH) : left + width + REACH]
                distance = cv2.distanceTransform((regions[part] != k).astype(np.uint8), cv2.DIST_L2, 5)
                near = nearest[:, *part]
                near[:] = np.sort(np.stack([*near, distance]), axis=0)[:2]
        border = 10 * np.exp(-(nearest.sum(0) ** 2) / 50) * (label == 0)
        weight += torch.from_numpy(border).to(weight)
    return weights.half()


def distance_weights(labels: Tensor, num_classes: int, frequency: Tensor | None = None) -> Tensor:
    """1 + phi, the penalty of DPCE (Caliva 2019, arXiv 1908.03679, Eq. 1), (M, H, W) float16.

    phi: the distance to the nearest boundary between classes, reverted and scaled to 0 (farthest) .. 1 (at a boundary)
    within each picture; 0 in a picture without any boundary.
    """
    weights = torch.ones(labels.shape)
    boundary = edges(labels).cpu().numpy()
    for border, weight in zip(boundary, weights):
        if border.any():
            distance = cv2.distanceTransform((~border).astype(np.uint8), cv2.DIST_L2, 5)
            weight += torch.from_numpy(1 - distance / max(distance.max(), 1e-8))
    return weights.half().to(labels.device)


class Asl(NamedTuple):
    """Auto Seg-Loss with its parameters, written `asl(miou: x1 y1 x2 y2 ...)`."""

    metric: str
    theta: tuple[float, ...]  # as asl_loss takes them

    def __str__(self) -> str:
        return f"asl({self.metric}: {' '.join(map(str, self.theta))})"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        return asl_loss(logits, label, self.theta, self.metric)

    @classmethod
    def read(cls, text: str) -> "Asl":
        """The inverse of `str`; `asl(miou)` has the published parameters. Raises ValueError saying what is wrong."""
        if not text.endswith(")"):
            raise ValueError("no closing bracket")
        metric, _, numbers = text.removeprefix("asl(").removesuffix(")").partition(":")
        if metric not in ASL_THETA:
            raise ValueError(f"{metric!r} has no surrogate; write asl(miou) or asl(miou: x1 y1 x2 y2 ...)")
        theta = tuple(float(number) for number in numbers.split()) or ASL_THETA[metric]
        if len(theta) != len(ASL_THETA[metric]) or not all(0 <= value <= 1 for value in theta):
            raise ValueError(f"{metric} takes {len(ASL_THETA[metric])} numbers in 0..1, got {numbers.strip():.60}")
        curves = torch.tensor(theta, dtype=torch.float64).view(ASL_CURVES[metric], -1, 2)
        if (curves.diff(dim=1) < 0).any():
            raise ValueError("its curves fall; within each neither the xs nor the ys may")
        return cls(metric, theta)


LOSSES = dict(ce=ce, wce=weighted_ce, dice=dice, lovasz=lovasz, dpce=weighted_ce, ssim=ssim, asl=asl_loss)
WEIGHTS = {"wce": unet_weights, "dpce": distance_weights}
KNOWN = (  # what `--search cse` starts from: cross entropy, squared and absolute error, Dice, true positives
    "Neg(Mul(y, Log(p)))",
    "Square(Add(p, Neg(y)))",
    "Abs(Add(p, Neg(y)))",
    "Neg(Mul(MeanNHW(Mul(y, p)), Inv(MeanNHW(Add(y, p)))))",
    "Neg(Sqrt(MeanNHW(Mul(p, y))))",
)
BASELINE = "ce"  # of logits and label alone; as a formula it is KNOWN[0]


def tree_loss(expr: Expr) -> Callable[[Tensor, Tensor], Tensor]:
    """A searched tree as a loss of logits and label."""

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        leaves, mask = softmax_leaves(logits, label)
        if mask.device.type == "cpu" and mask.all():  # without a mask it is cheaper; on CUDA asking would cost a sync
            mask = None
        return evaluate(expr, leaves, mask)

    return loss


ASL_HELPERS = sources(edges, bezier, asl_boundary_f1, asl_loss)


def export(losses: dict[str, Expr | Asl], title: str = "A loss function found by search.") -> str:
    """A found loss as a standalone file with `loss(logits, label)`; it imports nothing of this repository."""
    loss = losses["loss"]
    if isinstance(loss, Expr):
        return python_source(loss, title)
    constants = f"IGNORE = {IGNORE}\nASL_CURVES = {ASL_CURVES}\nTHETA = {loss.theta}"
    body = f'''def loss(logits, label, ignore_index=IGNORE):
    """logits: (N, C, H, W) before softmax; label: (N, H, W), integers 0..C-1 or ignore_index. A scalar."""
    return asl_loss(logits, label, THETA, "{loss.metric}", ignore_index)'''
    about = f"Auto Seg-Loss (arXiv 2010.07930) for {loss.metric}."
    return standalone(title, about, constants, [body], ASL_HELPERS)


# =====================================================================================================================
# Training


class Batches:
    """Batches without end (images normalised, labels, weights if the split has them), drawn with replacement.

    Order and augmentation have generators of their own; their states say where in the sequence the training is. Of
    several processes each draws its share of a batch.
    """

    def __init__(self, split: Split, plan: Schedule, seed: int):
        rank, _ = evolve.rank_and_world()
        self.split, self.plan, self.share = split, plan, evolve.share_of(plan.batch)
        seed += 1_000_003 * rank
        self.generators = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order, augmentation = self.generators
        for index in read_ahead(self.split, self.share, order):
            images, *targets = batch_scale_crop_flip(self.split, index, self.plan.crop, self.plan.scale, augmentation)
            yield normalise(batch_colour_jitter(images, 0.25, augmentation)), *targets


def make_optimizer(net: nn.Module, plan: Schedule) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer, and its learning rates over the steps; all but a backbone is the head, with one of its own."""
    backbone, head = [], []
    for name, weight in net.named_parameters():
        (backbone if "backbone." in name else head).append(weight)
    groups = [{"params": backbone, "lr": plan.lr}, {"params": head, "lr": plan.lr * plan.head_lr}]
    if plan.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, weight_decay=plan.weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=plan.weight_decay, fused=True)

    def rate(step: int) -> float:
        return min(1, (step + 1) / (plan.warmup * plan.steps + 1)) * (1 - step / plan.steps) ** 0.9

    return optimizer, LambdaLR(optimizer, rate)


def batch_loss(net: nn.Module, loss: Callable, batch: Sequence[Tensor]) -> Tensor:
    images, *targets = batch
    with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
        logits = net(images)
    return loss(logits.float(), *targets)


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
def test_network(net: nn.Module, split: Split, num_classes: int) -> dict[str, float]:
    """All metrics of `net` on a split, at full size; 0 for those that it has nothing to measure by."""
    metrics = SegMetrics(num_classes, split.images.device)
    for images, labels in in_order(split):
        metrics.update(predict(net, images), labels)
    return {name: value.nan_to_num(0.0).item() for name, value in metrics.compute().items()}


@torch.no_grad()
def predict(net: nn.Module, images: Tensor) -> Tensor:
    """Label maps (N, H, W) of images (N, 3, H, W) uint8."""
    net.eval()
    with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
        return net(normalise(images.float())).argmax(1)


def draw_predictions(net: nn.Module, split: Split, path: Path, number: int = 8) -> None:
    """Pictures, targets and predictions of the first few images, one below the other, as a PNG."""
    palette = torch.frombuffer(bytearray(shapes.voc_palette()), dtype=torch.uint8).view(256, 3)
    images, labels = split.images[:number], split.labels[:number]
    coloured = [palette[label.long().cpu()].movedim(-1, 1) for label in (labels, predict(net, images))]
    grid = torchvision.utils.make_grid(torch.cat([images.cpu(), *coloured]), nrow=len(images), pad_value=255)
    Image.fromarray(grid.movedim(0, -1).numpy()).save(path)


# =====================================================================================================================
# Search


GATE_SIZE = 16  # side of the rejection samples in pixels [D]
GATE_SAMPLES = 5  # [P]
GATE_LARGEST = 512  # side to which larger pictures are scaled down before a network sees them for the gates [D]
# Shares of the base training after which the gates look at its predictions; before half of it the warm-up has hardly
# moved the network [D].
STATES = (0, 0.5, 1)
# Least gain in the rejection protocol. The published 0.6 [P] turns away the best losses known here: a pool leaves free
# logits unconstrained, a network not. About half of what the least of the good ones gains (tests/bench_gates.py) [D].
ETA = {"macc": 0.2, "bf1": 0.3}  # of other metrics 0.1


def gate_window(label: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest window that shows two classes once it is GATE_SIZE pixels wide.

    Of a label map (H, W), the upper left `height` x `width` of it: the whole, or around the middle one of all edges.
    """
    edge = edges(label[None, :height, :width])[0].nonzero()
    h, w = height, width
    while True:
        y, x = edge[len(edge) // 2].tolist() if len(edge) else (0, 0)
        top, left = min(max(0, y - h // 2), height - h), min(max(0, x - w // 2), width - w)
        window = label[top : top + h, left : left + w]
        small = F.interpolate(window[None, None].float(), (GATE_SIZE, GATE_SIZE))
        if len(small.unique()) > 1 or max(h, w) <= GATE_SIZE or not len(edge):
            return top, left, h, w
        h, w = (max(min(side, GATE_SIZE), side // 2) for side in (h, w))


class SegTask(evolve.Task):
    """What evolve.py needs to know of segmentation."""

    name, baseline, metrics = "seg", BASELINE, METRICS
    symbols = {"loss": "yp1"}
    export = staticmethod(export)

    def __init__(self, args):
        self.pairs = list_data(args)  # what is missing is said at once
        self.meaning = find_meaning(args, self.pairs)
        self.args, self.device, self.num_classes = args, args.device, self.meaning.number
        own = "shapes" if args.model in WIDTHS else args.data  # small networks are trained as on shapes [D]
        self.proxy = self.plan(PROXY[own], args.proxy_steps)
        self.retraining = self.plan(RETRAIN[own], args.retrain_steps)
        self.whole = self.retraining.steps >= RETRAIN[own].steps
        self.samplers = {"asl": lambda: AslSearch(args.metric)}
        self.data: dict[str, Split] = {}

    @staticmethod
    def read(text: str) -> Expr | Asl:
        return Asl.read(text) if text.startswith("asl(") else parse(text)

    def load(self) -> None:
        if not self.data:
            self.data = read_data(self.args, self.pairs, self.meaning)
            self.weighted: dict[str | None, Split] = {None: self.data["train"]}

    def plan(self, plan: Schedule, steps: int | None) -> Schedule:
        """A schedule with the user's flags in it."""
        args = self.args
        share = min(1, (steps or plan.steps) / plan.steps)  # a shorter proxy goes on from a shorter training
        base, base_of = tuple(round(share * number) for number in plan.base), max(1, round(share * plan.base_of))
        flags = dict(steps=steps, crop=args.crop, batch=args.batch, lr=args.lr, model=args.model)
        given = {name: value for name, value in flags.items() if value is not None}
        return plan._replace(**given, base=base, base_of=base_of)

    def network(self, plan: Schedule, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = build_model(plan.model, self.num_classes, self.args.pretrained)
        return net.to(self.device, memory_format=torch.channels_last)

    def loss(self, losses: dict[str, Expr] | str) -> Callable[..., Tensor]:
        if losses == "asl":
            return Asl(self.args.metric, ASL_THETA[self.args.metric])
        if isinstance(losses, str):
            return LOSSES[losses]
        return losses["loss"] if isinstance(losses["loss"], Asl) else tree_loss(losses["loss"])

    def batches(self, losses: dict[str, Expr] | str, plan: Schedule, seed: int) -> Batches:
        """The batches of a training; those of wce and dpce carry weights, which are made on first use."""
        name = losses if isinstance(losses, str) and losses in WEIGHTS else None
        if name not in self.weighted:
            self.weighted[name] = with_weights(self.data["train"], WEIGHTS[name], self.num_classes)
        return Batches(self.weighted[name], plan, seed)

    @functools.cached_property
    def proxy_batches(self):
        """The batches of the proxy. Every candidate sees the same ones, so they are made once where memory allows."""
        plan = self.proxy
        if plan.steps * plan.batch * plan.crop**2 * 13 < 2**29:  # bytes: a pixel has three floats and a label
            return list(itertools.islice(self.batches(BASELINE, plan, self.args.seed), plan.steps))
        return None

    def test(self, net: nn.Module, split: Split) -> dict[str, float]:
        return test_network(net, split, self.num_classes)

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
        batches = evolve.on_the_way(self.batches(BASELINE, plan, 500 + self.args.seed), net, steps, states)
        train_network(net, LOSSES[BASELINE], batches, plan)
        return states + [net.state_dict()] * (len(steps) - len(states))

    def branch(self) -> Branch:
        """The training images with most classes, small, and what the base network makes of them on its way."""
        train = self.data["train"]
        index = richest(train, GATE_SAMPLES, self.num_classes)
        self.few = index if len(index) > 1 else index.repeat(2)  # batch norm needs two
        few = no_larger(select(train, self.few), GATE_LARGEST)
        labels = torch.where(few.labels == IGNORE, 0, few.labels).cpu()  # the gates look at losses, not at data
        windows = [gate_window(label, *map(int, size)) for label, size in zip(labels, few.sizes)]

        def small(maps: Tensor, mode: str) -> Tensor:
            """The window of each map (B, C, H, W), GATE_SIZE pixels wide."""
            windowed = [one[None, :, top : top + h, left : left + w] for one, (top, left, h, w) in zip(maps, windows)]
            return torch.cat([F.interpolate(window, (GATE_SIZE, GATE_SIZE), mode=mode) for window in windowed])

        net, logits = self.network(self.proxy, self.args.seed), []
        for state in self.states[: len(STATES)]:
            net.load_state_dict(state)
            with torch.no_grad():
                logits.append(small(net(normalise(few.images.float())), "bilinear").cpu())
        # The upper left pixel of each cell, half a cell beside what is predicted there; so were all searches made that
        # tests/RESULTS.md tells of [D].
        label = small(labels.unsqueeze(1).float(), "nearest").squeeze(1).long()
        onehot = F.one_hot(label, self.num_classes).movedim(-1, 1).float().unsqueeze(1)  # (B, 1, C, H, W)
        often, generator = max(4, 420 // self.num_classes), torch.Generator().manual_seed(0)
        same = math.log(max(1, self.num_classes - 1) / 6)  # the same probability as among the seven classes of shapes
        margin = 4 + same + 16 * torch.rand(often, *label.shape, generator=generator)[:, :, None, None]
        noise = 1.5 * torch.randn(often, *onehot.shape, generator=generator)
        branch = Branch(
            ("y", "p", "1"),
            torch.stack(logits).unsqueeze(2),  # (S, B, 1, C, H, W)
            onehot,
            self.gate_leaves,
            self.gate_score,
            ETA.get(self.args.metric, 0.1),
            baseline=KNOWN[0],
            scale_free=self.proxy.optimizer == "adamw",
            ideal=10 * onehot,
            known=KNOWN,
            wrong=(5 + same) * onehot.roll(1, 2),  # of the next class
            sure=margin * onehot + noise,
        )
        return evolve.settle_limits(branch)

    @staticmethod
    def gate_leaves(logits: Tensor, onehot: Tensor) -> dict[str, Tensor]:
        return {"y": onehot.expand_as(logits), "p": logits.softmax(-3)}

    def gate_score(self, logits: Tensor, onehot: Tensor) -> Tensor:
        """The searched metric of each sample; the tolerance of boundary metrics shrinks with the picture."""
        leading = logits.shape[:-4]
        metrics = SegMetrics(self.num_classes, logits.device, tolerance=1, groups=leading.numel())
        label = onehot.argmax(-3).expand(*logits.shape[:-3], -1, -1)
        metrics.update(logits.argmax(-3).flatten(0, -3), label.flatten(0, -3))
        return metrics.compute()[self.args.metric].view(leading)

    def train(self, losses: dict[str, Expr] | str, base: int = 0) -> float:
        return round(self.proxy_scores(losses, base)[self.args.metric], 6)

    def proxy_scores(self, losses: dict[str, Expr] | str, base: int = 0) -> dict[str, float]:
        """All metrics on the search-validation split after a proxy training."""
        net = self.network(self.proxy, self.args.seed)
        net.load_state_dict(self.states[base - self.bases])
        shared = None if isinstance(losses, str) and losses in WEIGHTS else self.proxy_batches
        data = shared or self.batches(losses, self.proxy, self.args.seed)
        self.curve = []
        self.curve = train_network(net, self.loss(losses), data, self.proxy, "invalid" not in self.args.without)
        return self.test(net, self.data["val"])

    def witness(self, losses: dict[str, Expr] | str, seed: int) -> float:
        plan, own = self.proxy._replace(steps=self.proxy.base_of), 1000 + seed  # as in `retrain`
        if not plan.base:
            return math.nan
        net, batches = self.network(plan, own), itertools.islice(self.batches(losses, plan, own), plan.base[-1])
        train_network(net, self.loss(losses), batches, plan)
        return round(self.test(net, self.data["val"])[self.args.metric], 6)

    def simulate(self, losses: dict[str, Expr] | str) -> float:
        """A short training on the pictures of the gates: the score on these."""
        few = select(self.data["train"], self.few)
        plan = self.proxy._replace(steps=max(1, self.proxy.steps // 4))
        net = self.network(plan, self.args.seed)
        try:
            train_network(net, self.loss(losses), Batches(few, plan, self.args.seed), plan)
        except InvalidLoss:
            return 0.0
        return self.test(net, few)[self.args.metric]

    def retrain(
        self, losses: dict[str, Expr] | str, seed: int, picture: Path | None = None, checkpoint=None
    ) -> dict[str, dict[str, float]]:
        own = 1000 + seed  # never the seed of the proxy: the ranking must hold for other weights and other batches
        plan = self.retraining
        net = self.network(plan, own)
        self.curve = train_network(net, self.loss(losses), self.batches(losses, plan, own), plan, checkpoint=checkpoint)
        if picture:
            draw_predictions(net, self.data["test"], picture)
        return {name: self.test(net, self.data[name]) for name in ("val", "test")}


class AslSearch:
    """Auto Seg-Loss's own search (ASL, Sec. 4.3): PPO2 over the control points, drawn from a truncated normal.

    The points are relative here, each a share of the way from its predecessor to (1, 1) in either coordinate: any
    numbers in 0..1 make rising curves. A round of samples shares the mean `mu`; its update moves `mu` towards samples
    that scored above the round's mean [D]; the released configs compare them with a training of `mu` itself. A score is
    that of the proxy here, leads from the later base network included [D]. Workers draw from the `mu` that they know;
    each record says which one it was.
    """

    ROUND = 16  # samples; half as many as published, for twice the rounds out of the same budget [D]
    SIGMA, CLIP, UPDATES, LR = 0.2, 0.2, 60, 0.2  # [A]

    def __init__(self, metric: str):
        points = len(ASL_THETA[metric]) // (2 * ASL_CURVES[metric])
        start = [1 / (points + 1 - k) for k in range(points) for _ in "xy"] * ASL_CURVES[metric]  # identity curves [A]
        self.metric, self.mu = metric, torch.tensor(start, dtype=torch.float64)
        self.round: list[dict] = []
        self.rounds = self.shown = 0

    def propose(self, rng: random.Random) -> Child:
        mean, normal, sample = self.mu.tolist(), NormalDist(), []
        for mu in mean:
            low, high = normal.cdf(-mu / self.SIGMA), normal.cdf((1 - mu) / self.SIGMA)
            value = mu + self.SIGMA * normal.inv_cdf(low + (high - low) * rng.uniform(1e-9, 1 - 1e-9))
            sample.append(round(min(max(value, 0.0), 1.0), 6))
        theta = [round(value, 6) for value in self.control_points(torch.tensor(sample)).tolist()]
        tried = {"counts": {}, "verdicts": [], "reused": [], "failed": []}
        losses = {"loss": Asl(self.metric, tuple(theta))}
        return Child(losses, identity=(str(losses["loss"]),), tried=tried, more={"sample": sample, "mu": mean})

    def control_points(self, relative: Tensor) -> Tensor:
        """Absolute control points, as published: p_k = p_{k-1} + theta_k (1 - p_{k-1})."""
        share = relative.view(ASL_CURVES[self.metric], -1, 2)
        return (1 - (1 - share).cumprod(1)).flatten()

    def learn(self, record: dict) -> None:
        numbers = [float] * len(self.mu)
        self.round.append(evolve.checked(record, {"sample": numbers, "mu": numbers}))
        if len(self.round) == self.ROUND:
            self.update()
            self.round, self.rounds = [], self.rounds + 1

    def update(self) -> None:
        """The round's steps of Adam on the logit of mu: PPO2's clipped objective (Schulman 2017, Eq. 7).

        Ratios are clipped coordinate by coordinate [A].
        """
        sample, old = (torch.tensor([r[key] for r in self.round], dtype=torch.float64) for key in ("sample", "mu"))
        reward = torch.tensor([r["score"] or 0.0 for r in self.round], dtype=torch.float64)  # invalid: worth nothing
        advantage = (reward - reward.mean()).unsqueeze(1)
        before = self.log_density(sample, old)
        logit = self.mu.logit(eps=1e-6).requires_grad_()
        optimizer = torch.optim.Adam([logit], self.LR)
        for _ in range(self.UPDATES):
            ratio = (self.log_density(sample, logit.sigmoid()) - before).exp()
            clipped = ratio.clamp(1 - self.CLIP, 1 + self.CLIP)
            optimizer.zero_grad()
            (-torch.minimum(ratio * advantage, clipped * advantage).mean(0).sum()).backward()
            optimizer.step()
        self.mu = logit.detach().sigmoid()

    def log_density(self, x: Tensor, mu: Tensor) -> Tensor:
        """Of each coordinate of samples (S, D) under truncated normals around `mu` (D,) or (S, D), up to a constant."""
        inside = torch.special.ndtr((1 - mu) / self.SIGMA) - torch.special.ndtr(-mu / self.SIGMA)
        return -((x - mu) ** 2) / (2 * self.SIGMA**2) - inside.log()

    def show(self, board) -> None:
        """After each round: `mu`, and a picture of its curves."""
        if self.rounds == self.shown:
            return
        self.shown = self.rounds
        for k, value in enumerate(self.mu.tolist()):
            board.add_scalar(f"asl/mu_{k}", value, self.rounds)
        points = self.control_points(self.mu).view(ASL_CURVES[self.metric], -1, 2).tolist()
        x = torch.linspace(0, 1, 200, dtype=torch.float64)
        picture = np.full((256, 256 * len(points), 3), 255, np.uint8)
        for k, curve in enumerate(points):
            y = bezier(x, curve)
            line = torch.stack([28 + 200 * x + 256 * k, 228 - 200 * y], 1).round().int().numpy()
            cv2.rectangle(picture, (28 + 256 * k, 28), (228 + 256 * k, 228), (160, 160, 160))
            cv2.polylines(picture, [line], False, (0, 0, 0), 2, cv2.LINE_AA)
        board.add_image("asl/curves", picture, self.rounds, dataformats="HWC")


# =====================================================================================================================
# Main


def main() -> None:
    evolve.main(parse_arguments(sys.argv[1:]), SegTask)


if __name__ == "__main__":
    main()
