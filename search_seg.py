"""Semantic segmentation: search a loss for the metric you care about.

    python search_seg.py --metric miou                        # evolve a loss on the embedded data set
    python search_seg.py --metric miou --loss dice            # train and evaluate one loss instead
    python search_seg.py --metric bf1 --loss "Neg(Mul(y, Log(p)))"
    python search_seg.py --compare ce,dice,lovasz,RUN_DIR     # several losses, six metrics, one table
    python search_seg.py --metric miou --search asl           # search the parameters of Auto Seg-Loss instead
    python search_seg.py --metric miou --data voc --data-root VOCdevkit/VOC2012 --model r50-dlv3p
    tensorboard --logdir runs

AutoLoss-Zero, arXiv 2103.14026 (marks [P]); published Auto Seg-Loss configs (marks [A]); own choices [D].
The whole task is in this file: arguments, data, networks, metrics, hand-made losses, training, what the search needs.

Measured (the first command, a quarter of an hour of two cores of an AMD EPYC, torch 2.14.1): 82,956 losses explored,
261 of them trained; after 2,400 steps each mIoU on test .789, cross entropy .773, the difference over three paired
seeds +.016 (standard error .002). tests/RESULTS.md has the other searches.
"""

import argparse
import atexit
import contextlib
import copy
import fcntl
import functools
import hashlib
import io
import itertools
import math
import mmap
import os
import random
import re
import struct
import sys
import tempfile
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from evolve import Branch, Child, DataError, InvalidLoss, fail, note, warn, warn_once
from loss_ops import Expr, evaluate, parse, python_source, softmax_leaves, sources, standalone, wide

IGNORE = 255
METRICS = ("miou", "fwiou", "macc", "gacc", "biou", "bf1")
CLASSES = {"shapes": len(shapes.CLASSES), "voc": 21, "cityscapes": 19, "folder": None}  # None: as found in its masks
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
    base: int = 0  # steps with the baseline's loss that go before ...
    base_of: int = 1  # ... as the first ones of a training of so many
    clip: float = math.inf  # norm to which longer gradients are cut


# The proxy on shapes was chosen by its rank correlation with re-training and by its cost (tests/bench_proxy.py): after
# a shorter base it favours what starts fast, after a longer one it is no better [D].
# AdamW makes it blind to the scale of a loss, so that its ranking is about the shape of the loss alone. Without a
# warm-up its first steps are its longest: cross entropy ends .02 mIoU lower, and with some losses a network never
# learns one of the classes. On the real data sets optimizer, rates, steps, batches and crops are those of Auto Seg-Loss
# [A]; there a picture is brought to the size of a crop before it is scaled, here crops are of source pixels. That, the
# base, and crops and batch of Cityscapes are ours [D].
PROXY = {
    "shapes": Schedule(120, 16, 48, (0.75, 1.5), "adamw", 0.01, warmup=0.3, base=250, base_of=600),
    "voc": Schedule(1000, 32, 128, (0.5, 2.0), "sgd", 0.02, 10.0, base=1000, base_of=2500, model="r50-dlv3p"),
    "cityscapes": Schedule(1000, 32, 128, (0.5, 2.0), "sgd", 0.02, 10.0, base=1000, base_of=2500, model="r50-dlv3p"),
}
PROXY["folder"] = PROXY["voc"]
RETRAIN = {
    "shapes": PROXY["shapes"]._replace(steps=2400, base=0),
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
    pairs: list[tuple[Path, Path]],
    num_classes: int,
    meaning: "Meaning | None" = None,
    memory: float = math.inf,
    device: str = "cpu",
) -> Split:
    """The split of some (image, label map) files; what takes at most `memory` bytes is kept once it is decoded.

    Raises DataError, now or when a picture is used, naming the file that is missing, cannot be read, does not fit its
    image or has an unknown class. `meaning` says what the values of label maps are; classes as they are without it.
    """
    images, labels = ([*map(Path, paths)] for paths in zip(*pairs))
    meaning = meaning or plain_meaning(num_classes)

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

    keep, sizes, shapes = 4 * pixels <= memory, None, (lambda k: (3, *size(k)), size)
    if keep:
        sizes = [kept_size(*full_size(*pair)) for pair in pairs]
        shapes = [(3, *size) for size in sizes], sizes
        sizes = torch.tensor(sizes, dtype=torch.float32)
    stored = (
        Pictures(read_images, len(pairs), device, shapes[0], group=group_size(images, device)),
        Pictures(read_labels, len(pairs), device, shapes[1], fill=IGNORE),
    )
    if keep:
        kinds = (f"seg {LARGEST}", f"seg {LARGEST} {meaning}")
        stored = [x.settle(lambda kind=k: fingerprint(kind, itertools.chain(*pairs))) for x, k in zip(stored, kinds)]
    return Split(*stored, sizes)


def full_size(image: Path, label: Path) -> tuple[int, int]:
    """Height and width in which an image and its label map are one size: both upright, or else as they lie in the file.

    A program may have turned a label map and left the tag in it that asks for that, or copied the tag of the image.
    """
    sides = []
    for path in (image, label):
        try:
            with Image.open(path) as picture:
                sides.append((turning(picture)[1], picture.size[::-1]))
        except BROKEN as error:
            raise unreadable(path) from error
    ((h, w), lying), (upright, size) = sides
    if upright == (h, w):
        return upright
    if size not in ((h, w), lying):
        raise DataError(f"{label}: mask of {size[1]}x{size[0]} pixels, its image has {w}x{h}")
    return size


def kept_size(height: int, width: int) -> tuple[int, int]:
    """The height and width that a picture of such a size is kept with."""
    factor = min(1, LARGEST / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


class Meaning(NamedTuple):
    """What the values of label maps stand for."""

    number: int  # of classes
    values: dict[int, int]  # grey values and palette indices to classes, or to IGNORE
    colours: dict[int, int]  # the same of colours, 65536 red + 256 green + blue; empty where nothing is known of them
    palette: bool = False  # the colours of palettes count, not their indices
    rest: int | None = None  # what any other value is; None: an error


def plain_meaning(number: int) -> Meaning:
    """Values are classes, colours those of VOC; 255 (65535 in 16 bits) and VOC's colour of borders are ignored."""
    palette = shapes.voc_palette()
    colours = {colour_number(*palette[3 * k : 3 * k + 3]): k for k in reversed(range(number))}
    ignored = {255: IGNORE, 65535: IGNORE}
    return Meaning(number, {k: k for k in range(number)} | ignored, colours | {colour_number(224, 224, 192): IGNORE})


def colour_number(red: int, green: int, blue: int) -> int:
    return 65536 * red + 256 * green + blue


def read_label(path: Path, meaning: Meaning, listed: tuple[int, int] | None = None) -> Tensor:
    """A label map (h, w) uint8: classes and IGNORE. Raises DataError naming the file and a value that is neither.

    It is turned as its EXIF tag says where that gives the height and width it is `listed` with.
    """
    values, coloured = read_values(path, meaning.palette, listed)
    known = meaning.colours if coloured else meaning.values
    found, place = np.unique(values, return_inverse=True) if coloured else small_unique(values)
    if meaning.palette and not coloured and all(colour_number(v, v, v) in meaning.colours for v in found.tolist()):
        known = {v: meaning.colours[colour_number(v, v, v)] for v in found.tolist()}  # grey is a colour of the table
    if coloured and not all(value in known for value in found.tolist()):
        red, green, blue = found >> 16, found >> 8 & 255, found & 255
        if meaning.palette or not ((red == green) & (green == blue)).all():
            value = next(value for value in found.tolist() if value not in known)
            colour = f"{value >> 16},{value >> 8 & 255},{value & 255}"
            raise DataError(
                f"{path}: RGB colour {colour} in a mask, which is no class; list it in the labelmap.txt of --data "
                "folder, or in a file given as --classes"
            )
        found, known = blue, meaning.values  # a grey mask that was saved as RGB
    classes = [known.get(value, meaning.rest) for value in found.tolist()]
    if None in classes:
        value = next(value for value in reversed(found.tolist()) if value not in known)
        raise DataError(f"{path}: class {value}; expected 0..{meaning.number - 1} or 255 (--classes says how many)")
    return torch.from_numpy(np.array(classes, np.uint8)[place].reshape(values.shape))


def small_unique(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`np.unique` with its inverse for integers 0..65535, without sorting."""
    (found,) = np.bincount(values.ravel()).nonzero()
    table = np.zeros(65536, np.int32)
    table[found] = np.arange(len(found))
    return found, table[values]


def read_values(path: Path, palette: bool = False, listed: tuple[int, int] | None = None) -> tuple[np.ndarray, bool]:
    """The values (h, w) of a label map, and whether they are colours, as those of palettes with `palette`."""
    try:
        with opened(path) as picture:
            if blurs(picture, path):
                raise DataError(f"{path}: a JPEG or the like, which blurs the classes of a mask; save masks as PNG")
            if deep(picture):
                raise DataError(f"{path}: RGB with 16 bits a channel; save masks with 8, or as grey values")
            if getattr(picture, "n_frames", 1) > 1:
                size = picture.size
                picture.seek(1)
                if picture.size == size:  # a smaller one is an overview, as in a GeoTIFF
                    raise DataError(f"{path}: {picture.n_frames} pictures in one file; save a mask as one")
                picture.seek(0)
            step = grey_step(picture)  # of the file: a picture that is turned has no tiles any more
            turn, upright = turning(picture)
            if turn is not None and upright == listed:
                picture = picture.transpose(turn)
            if picture.mode == "P" and palette:
                picture = picture.convert("RGB")
            pixels = np.array(picture)
            if step != 1:
                pixels = (pixels / step).round().astype(pixels.dtype)
            if picture.mode in ("LA", "PA", "RGBA"):
                pixels, clear = pixels[..., :-1], pixels[..., -1] == 0
                if clear.any() and not clear.all():  # transparent all over: some renderers leave alpha at 0
                    if not pixels[~clear].any(-1).all():
                        raise DataError(
                            f"{path}: transparent pixels beside black ones; save masks without transparency"
                        )
                    pixels[clear] = 0  # whatever colour lies below, nothing is seen
                pixels = pixels if picture.mode == "RGBA" else pixels[..., 0]
            if picture.mode in ("RGB", "RGBA"):
                return pixels.astype(np.int32) @ np.array([65536, 256, 1], np.int32), True
            return grey_values(pixels, picture.mode, path), False
    except BROKEN as error:
        raise unreadable(path, "PNG") from error


def grey_values(pixels: np.ndarray, mode: str, path: Path) -> np.ndarray:
    if mode[0] not in "1LPIF" or pixels.ndim != 2:
        raise DataError(f"{path}: mode {mode}; a mask has grey values 0..65535, a palette or RGB colours")
    if mode[0] not in "IF":
        return pixels.astype(np.uint8)
    possible = (0 <= pixels) & (pixels <= 65535) & (pixels % 1 == 0)
    if not possible.all():
        value = pixels[~possible][0]
        raise DataError(f"{path}: mode {mode}, value {value:g}; a mask has grey values 0..65535, 255 is ignored")
    return pixels.astype(np.uint16)


def grey_step(picture: Image.Image) -> float:
    """The distance of two neighbouring grey values.

    PIL stretches those of 2 and 4 bits, and those of a PGM with a maximum of its own, to all of 8 or 16 bits.
    """
    kind = str(picture.tile[:1])
    if maximum := re.search(r"args=\('L', (\d+)\)", kind) if picture.format == "PPM" else None:
        return (65535 if picture.mode == "I" else 255) / int(maximum[1])
    return 85 if "'L;2" in kind else 17 if "'L;4" in kind else 1


def blurs(picture: Image.Image, path: Path) -> bool:
    """Whether the picture is compressed with loss: JPEG, also inside of a TIFF, or lossy WebP."""
    lossy_webp = picture.format == "WEBP" and b"VP8L" not in path.read_bytes()
    return picture.format == "JPEG" or picture.info.get("compression") == "jpeg" or lossy_webp


def find_meaning(args, pairs: dict[str, list[tuple[Path, Path]]]) -> Meaning:
    """What the values of label maps stand for: by the data set, `--classes`, a labelmap.txt, or as found in them."""
    if args.data == "cityscapes":
        return Meaning(19, {number: k for k, number in enumerate(CITYSCAPES_IDS)}, {}, rest=IGNORE)
    masks = list(dict.fromkeys(label for split in pairs.values() for _, label in split))
    table = args.data_root / "labelmap.txt"
    if args.classes is None and args.data == "folder" and table.is_file():
        number, colours = read_classes(table)
    elif args.classes is not None:
        number, colours = read_classes(args.classes)
    elif args.data == "folder":
        return found_meaning(masks, None)
    else:
        return plain_meaning(CLASSES[args.data])
    if colours:
        colours = {colour: k for k, colour in enumerate(colours)}
        return plain_meaning(number)._replace(colours={colour_number(224, 224, 192): IGNORE} | colours, palette=True)
    sample = masks if number == 2 else masks[:: math.ceil(len(masks) / 64)]
    kinds = [*threads().map(distinct_values, sample)]
    shown = {value for kind in kinds if kind.coloured for value in kind.shares}
    if args.data == "folder" and not all(map(is_grey, shown)):
        return found_meaning(masks, number)
    if changed := other_palette(sample, kinds):
        warn_once(f"{changed}; if the colours are the classes give --classes a file with them")
    values = {value for kind in kinds if not kind.coloured for value in kind.shares} | {value & 255 for value in shown}
    if number == 2 and values in ({0, 255}, {0, 65535}):  # a binary mask as many tools save it
        return Meaning(2, {0: 0, max(values): 1}, {})
    if args.data == "folder" and shown:  # all grey, saved as RGB: some greys are colours of VOC's palette, too
        return plain_meaning(number)._replace(colours={})
    return plain_meaning(number)


def read_classes(source: int | Path) -> tuple[int, list[int]]:
    """The number of classes, and their colours if `source` is a file with a colour on each line.

    A line is a name, or a name and three numbers: `cat:64,0,0::` as CVAT writes it, `cat,64,0,0` below the head of a
    table, or `64 0 0 cat`. Black comes first. labelme's `__ignore__` is no class.
    """
    if isinstance(source, int):
        return source, []
    lines = [line for line in read_lines(Path(source)) if not line.startswith("#") and line != "__ignore__"]
    head = r"(?i)\W*(name|class|label)\w*\W+(r(ed)?\W+g.*|(id|index)\W*)|\W*(id|index)\W+(name|class|label)\w*\W*"
    lines = lines[1:] if lines and re.fullmatch(head, lines[0]) else lines
    lines = [re.sub(r"^(\d+)[,\s]+(\d+)[,\s]+(\d+)[,:\s]+(\D.*)", r"\4,\1,\2,\3", line) for line in lines]
    if wrong := [line for line in lines if re.match(r"[\[\]{}]|- |.*(?<!:)[:\[{]$|(?i:pixel value)", line)]:
        raise DataError(f"{source}: '{wrong[0]:.40}' is no class; give one name a line, no JSON, YAML or other table")
    if wrong := [line for line in lines if re.search(r"\D\d+([,\s]+\d+){3}", line)]:
        raise DataError(f"{source}: '{wrong[0]:.40}': which three of these numbers? give name, red, green and blue")
    found = [re.fullmatch(r"(.+?)[:,\s]\s*(\d+)[,\s]+(\d+)[,\s]+(\d+)\b.*", line) for line in lines]
    if None in found:
        if any(found):
            raise DataError(f"{source}: '{lines[found.index(None)]}' has no colour; give every class one, or none")
        names, colours = lines, []
    else:
        names = [match[1] for match in found]
        if large := [line for line, match in zip(lines, found) if max(map(int, match.groups()[1:])) > 255]:
            raise DataError(f"{source}: '{large[0]}' is no colour; give red, green and blue in 0..255")
        colours = sorted((colour_number(*map(int, match.groups()[1:])) for match in found), key=bool)
    if twice := [name for k, name in enumerate(names) if name in names[:k]]:
        raise DataError(f"{source}: class '{twice[0]}' stands there twice")
    if not 1 < len(names) < 256 or len(set(colours)) != len(colours):
        raise DataError(f"{source}: {len(names)} classes; 2 to 255 are possible, each of its own colour")
    return len(names), colours


def found_meaning(masks: list[Path], number: int | None) -> Meaning:
    """A class for each value, or each colour, that occurs in the masks; 255 is ignored where two others are left.

    Raises DataError if some masks are of colours and some not, or the classes are not 2 to 255, or not `number`.
    """
    if len(masks) > 5000:
        note(f"looking for the classes in {len(masks):,} masks; --classes N spares that in masks that are not RGB")
    values, colours = {}, {}  # and where they were first seen
    largest = {}, {}  # share of the pixels of a mask, of values and of colours
    together = False  # 1 and 255 in one mask
    kinds = [*threads().map(distinct_values, masks)]
    for path, (coloured, shares, _) in zip(masks, kinds):
        together |= not shares.keys().isdisjoint({1, 0x010101}) and not shares.keys().isdisjoint({255, 65535, 0xFFFFFF})
        for value, share in shares.items():
            (colours if coloured else values).setdefault(value, path)
            largest[coloured][value] = max(share, largest[coloured].get(value, 0.0))
    if changed := other_palette(masks, kinds):
        raise DataError(
            f"{changed}; save masks as RGB, give --classes a file with the colours, or --classes N if the values are "
            "the classes"
        )
    if all(map(is_grey, colours)):  # masks saved as RGB
        values, colours = {value & 255: path for value, path in colours.items()} | values, {}
        for value, share in largest[True].items():
            largest[False][value & 255] = max(share, largest[False].get(value & 255, 0.0))
    if colours and values.keys() - ({0} & colours.keys()):  # all black, a mask is stored as grey by some programs
        one, other = next(iter(colours.values())), next(iter(values.values()))
        raise DataError(f"{one}: an RGB mask, and {other} is none; save all of them in one way")
    found = sorted(colours or values)

    def shown(value: int) -> str:
        return f"{value >> 16},{value >> 8 & 255},{value & 255}" if colours else str(value)

    if len(found) <= 256 and (mixed := soft_edges(largest[bool(colours)], bool(colours))) is not None:
        raise DataError(
            f"{(colours or values)[mixed]}: value {shown(mixed)} at a few pixels between others, as of soft edges; "
            "save masks without, or say in labelmap.txt or with --classes what is a class"
        )
    if number is None and found in ([0, 1, 255], [0, 1, 65535]) and not together:
        raise DataError(
            f"{values[1]}: value 1, and {values[found[2]]}: value {found[2]}, never both in one mask; if both are the "
            f"second class save masks in one way, if {found[2]} is to be ignored give --classes 2"
        )
    ignored = {colour_number(224, 224, 192)} if colours else {255, 65535}  # VOC's borders
    ignored = ignored & set(found) if len(set(found) - ignored) > 1 else set()
    classes = {value: k for k, value in enumerate(value for value in found if value not in ignored)}
    if number not in (None, len(classes)) or not 1 < len(classes) < 256:
        many = f"{len(classes)} colours or values in these masks, not {number or '2 to 255'}"
        raise DataError(f"{masks[0].parent}: {many}; say in labelmap.txt what they mean")
    names = [*map(shown, classes)]
    names = " ".join(names if len(names) <= 30 else [*names[:29], "..."])
    said = f"; {max(ignored)} ignored" if ignored else ""
    note(f"{len(classes)} classes found in {len(masks):,} masks: {names}{said}")
    meaning = classes | dict.fromkeys(ignored, IGNORE)
    return Meaning(len(classes), {0: 0} if colours else meaning, meaning if colours else {})


def is_grey(colour: int) -> bool:
    return colour % 0x010101 == 0


def other_palette(masks: list[Path], kinds: "list[Distinct]") -> str | None:
    """Which value is another colour in one mask than in an earlier one, and where; None if none is."""
    looks = {}
    for path, kind in zip(masks, kinds):
        for value in kind.shares if kind.palette else ():
            look = kind.palette[3 * value : 3 * value + 3]
            if look and looks.setdefault(value, (look, path))[0] != look:
                return f"{path}: value {value} is another colour in its palette than in {looks[value][1]}"
    return None


def soft_edges(largest: dict[int, float], coloured: bool) -> int | None:
    """A value or colour that seems to be a mixture of two others, as smoothing leaves them; None if none does.

    `largest` says what share of a mask each has at most. What is never a hundredth and lies between others is a mixture
    if all between 0 and 255 is such, or if there is more of it than of others and than eight [D]. Values without a gap
    are classes, however rare, unless all 256 are there.
    """
    found, common = sorted(largest), [value for value, share in largest.items() if share >= 0.01]
    rare = [value for value in found if largest[value] < 0.01]
    if coloured:
        places = {value: np.array([value >> 16, value >> 8 & 255, value & 255], float) for value in found}
        lines = [(places[a], places[b] - places[a]) for a, b in itertools.combinations(common, 2)]

        def mixes(c: np.ndarray) -> bool:
            return any(
                0 < (share := d @ (c - a) / (d @ d)) < 1 and abs(a + share * d - c).max() < 1.5 for a, d in lines
            )

        mixed = [value for value in rare if mixes(places[value])]
    elif len(found) < 256 and [*range(len(found) - 1)] == found[:-1]:
        return None
    else:
        mixed = [value for value in rare if found[0] < value < found[-1]]
    binary = not coloured and (found[0], found[-1]) in ((0, 255), (0, 65535)) and len(mixed) == len(found) - 2
    return mixed[0] if mixed and (binary or len(mixed) > max(8, len(found) - len(mixed))) else None


class Distinct(NamedTuple):
    """What a mask is made of."""

    coloured: bool
    shares: dict[int, float]  # of the pixels, by value or colour
    palette: list[int]  # red green blue red ... of value 0, 1, ..., as far as it has one


def distinct_values(path: Path) -> Distinct:
    values, coloured = read_values(path)
    found, number = np.unique(values, return_counts=True)
    with Image.open(path) as picture:
        palette = (picture.getpalette() if picture.mode == "P" else None) or []
    return Distinct(coloured, dict(zip(found.tolist(), (number / values.size).tolist())), palette)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, without blank ones."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError:
        raise DataError(f"{path}: not found") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text in UTF-8; save it so") from None


IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGES and not path.name.startswith(".")


def named_files(folder: Path) -> dict[str, Path]:
    """The pictures in a folder by their names without suffix, in order; hidden files are none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: not found")
    found = {}
    for path in sorted(folder.iterdir()):
        if is_picture(path):
            name = plain_name(path.stem)
            if name in found:
                raise DataError(f"{path}: beside {found[name].name}; move away the one that is not to be used")
            found[name] = path
    return found


def plain_name(name: str) -> str:
    """A file's name so that it can be compared: in any locale, and with accents written in any way."""
    if name.isascii():
        return name
    return unicodedata.normalize("NFC", name.encode(errors="surrogateescape").decode(errors="replace"))


class Elsewhere(DataError):
    """The first picture of a list is not there."""


class NoMask(DataError):
    """A picture without a mask."""


def listed_pairs(root: Path, listing: Path, images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Image and label files of a list: on a line a name or path for both, or one for each."""
    files: dict[Path, dict[str, Path]] = {}

    def find(text: str, folder: Path, endings: tuple[str, ...] = ("",)) -> Path | None:
        text = text.replace("\\", "/")  # as Windows writes it
        for path in (root / text.lstrip("/"), folder / text):
            if path.suffix.lower() in IMAGES and os.path.isfile(path):  # unlike Path's, of no name too long
                return path
        text = text[: text.rindex(".")] if text.lower().endswith(IMAGES) else text
        for path in (folder / text, root / text.lstrip("/")):
            if path.parent not in files:
                files[path.parent] = named_files(path.parent) if os.path.isdir(path.parent) else {}
            names = (plain_name(path.name + ending) for ending in endings)
            if found := next((files[path.parent][name] for name in names if name in files[path.parent]), None):
                return found
        return None

    pairs = []
    for line in read_lines(listing):
        names, image = re.split(r"\s*[,\t]\s*" if re.search("[,\t]", line) else r"\s+", line), find(line, images)
        if image is None and len(names) == 2:
            image = find(names[0], images)
            if names[1] in ("-1", "0", "1"):  # in VOC's lists by class it says whether a picture has some of it
                names = names[:1]
        else:
            names = [line]
        if image is None and line.startswith("#"):
            continue
        if image is None:
            missing = images / (names[0] if Path(names[0]).suffix else f"{names[0]}.jpg")
            what = "no kind of picture that is read; save it as JPEG or PNG" if os.path.exists(missing) else "not found"
            raise (DataError if pairs else Elsewhere)(f"{str(missing)[:300]}: {what}; {listing} has it")
        if image.is_relative_to(masks) and not image.is_relative_to(images):
            raise DataError(f"{listing}: '{line:.80}' is a mask; list pictures, or pictures and masks on one line")
        inside = image.relative_to(images) if image.is_relative_to(images) else Path(image.name)
        wanted = names[1] if len(names) == 2 else str(inside.with_suffix(""))
        alone = masks == images and len(names) == 1  # then the bare name is the picture's own
        label = find(wanted, masks, (*MASK_ENDINGS[alone:], image.suffix))  # also a.jpg.png
        if label is None:
            raise NoMask(f"{masks / wanted}{'' if Path(wanted).suffix else '.png'}: not found; the mask of {image}")
        pairs.append((image, label))
    if not pairs:
        raise DataError(f"{listing}: empty; it must list one image name per line")
    if double := len(pairs) - len(set(pairs)):
        warn_once(f"{listing}: {double} of its pictures stand there more than once")
    return pairs


def voc_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Image and label files of ImageSets/Segmentation/<split>.txt; SBD's "aug" masks where they are."""
    listing = root / "ImageSets/Segmentation" / f"{split}.txt"
    if not listing.is_file():
        raise DataError(f"{listing}: not found; --data-root must be the folder with JPEGImages and ImageSets")
    masks = root / "SegmentationClassAug"
    masks = masks if split.endswith("aug") and masks.is_dir() else root / "SegmentationClass"
    return listed_pairs(root, listing, root / "JPEGImages", masks)


def download_voc(root: Path) -> None:
    """Fetch VOC 2012 unless it is there, whole. Of several processes one does; the others wait. Raises DataError."""

    def whole(folder: Path) -> bool:
        with contextlib.suppress(DataError):
            return all(voc_pairs(folder, split) for split in ("train", "val"))
        return False

    places = root, root / "VOCdevkit/VOC2012"
    if any(map(whole, places)):
        return
    root.mkdir(parents=True, exist_ok=True)
    with (root / "download.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if any(map(whole, places)):
            return
        try:
            torchvision.datasets.VOCSegmentation(str(root), "2012", "trainval", download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise DataError(f"{root}: no download ({reason}); fetch VOC 2012 elsewhere, see data/README.md") from None


def cityscapes_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    found = sorted((root / "leftImg8bit" / split).glob("*/[!.]*_leftImg8bit.png"))
    if not found:
        raise DataError(f"{root / 'leftImg8bit' / split}: no pictures; --data-root must hold leftImg8bit and gtFine")
    return [
        (path, root / "gtFine" / split / path.parent.name / path.name.replace("leftImg8bit", "gtFine_labelIds"))
        for path in found
    ]


CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # label id of class 0..18

# What folders and splits of a data set are called, in any case.
FOLDERS = (
    ("images", "masks"),
    ("images", "labels"),
    ("images", "annotations"),
    ("image", "mask"),
    ("image", "label"),
    ("imgs", "masks"),
    ("img_dir", "ann_dir"),
    ("img", "masks_machine"),  # Supervisely
    ("image_2", "semantic"),  # KITTI
    ("data", "labels"),  # FiftyOne
    ("JPEGImages", "SegmentationClassPNG"),  # labelme
    ("JPEGImages", "SegmentationClass"),
    ("JPEGImages", "SegmentationClassContext"),
)
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
BESIDE = ("_masks", "_mask", "_labels", "_label", "annot")  # what a folder of masks has more than its pictures'
# What the name of a mask has more than its picture's.
MASK_ENDINGS = ("", "_mask", "-mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_gt", "_L", "_P")
MASK_ENDINGS += ("_labelIds", "_labelTrainIds")


@functools.lru_cache(maxsize=64)
def entries(folder: Path) -> dict[str, Path]:
    """What lies in a folder, by its name in small letters."""
    return {path.name.lower(): path for path in sorted(folder.iterdir(), reverse=True)} if folder.is_dir() else {}


def inside(folder: Path, *names: str) -> Path:
    """A path within a folder, its names in any case."""
    for name in names:
        folder = folder / name if (folder / name).exists() else entries(folder).get(name.lower(), folder / name)
    return folder


def folder_pairs(root: Path) -> dict[str, list[tuple[Path, Path]]]:
    """Image and label files of any folder of images and masks, by split.

    Lists (train.txt) or folders (train/images or images/train, and so for masks) say what belongs to a split; without
    any, every eighth picture is for the test. Raises DataError if nothing of all this is there.
    """
    entries.cache_clear()
    pairs = {}
    whole = in_use((inside(root, images), inside(root, masks)) for images, masks in FOLDERS)
    for split, names in SPLITS.items():
        try:
            if found := split_pairs(root, names, whole):
                pairs[split] = found
        except NoMask as error:
            if split != "test" or "val" not in pairs:
                raise
            warn_once(f"{error}; the test split is left out")  # as it is published without masks
    if "train" not in pairs:  # all that no list and no folder has
        listing = root / "ImageSets/Segmentation/default.txt"  # CVAT's, of all frames that have a mask
        if whole and listing.is_file():
            found = listed_pairs(root, listing, *whole[0])
        else:
            found = paired(*whole[0]) if whole else []
        others = {pair for others in pairs.values() for pair in others}
        pairs["train"] = [pair for pair in found if pair not in others]
        if not pairs["train"]:
            raise DataError(
                f"{root}: no training pictures; it must hold folders images and masks, and train.txt and val.txt"
            )
    if "test" not in pairs and "val" in pairs:
        pairs["test"] = pairs.pop("val")
    if "test" not in pairs:
        note(f"{root}: no val or test in a list or folder that is understood; every eighth picture is for the test")
        pairs = {"train": [p for k, p in enumerate(pairs["train"]) if k % 8 != 7], "test": pairs["train"][7::8]}
        if not pairs["test"]:
            raise DataError(f"{root}: {len(pairs['train'])} pictures and no val.txt; list some for the test there")
    return pairs


def split_pairs(root: Path, names: Sequence[str], whole: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Image and label files of the split that has these names; [] where there is none. A list that is there counts."""
    places, lists = [], []
    for name in names:
        for images, masks in FOLDERS:
            places.append((inside(root, name, images), inside(root, name, masks)))
            places.append((inside(root, images, name), inside(root, masks, name)))
            places.append((inside(root, f"{name}_{images}"), inside(root, f"{name}_{masks}")))
        places += [(inside(root, name), inside(root, name + ending)) for ending in BESIDE]
        if any(inside(root, name).glob("*_mask.*")):  # beside the pictures, as Roboflow writes them
            places.append((inside(root, name), inside(root, name)))
        lists += [inside(root, f"{name}.txt"), inside(root, "ImageSets", "Segmentation", f"{name}.txt")]
    folders = in_use(places)
    listing = next((path for path in lists if path.is_file()), None)
    if listing is None:
        return paired(*folders[0]) if folders else []
    lines = [line for line in read_lines(listing) if not line.startswith("#")]
    both = [(root, root)] * any(re.search(r"[,\t ]", line) for line in lines[:1])  # pictures and masks are listed
    if not (choices := folders or whole or both):
        return []
    try:
        return listed_pairs(root, listing, *choices[0])
    except Elsewhere as error:
        if not folders or not any(re.search(r"[/\\]", line) for line in lines):
            raise
        warn_once(f"{error}; all of {folders[0][0]} is used")  # paths of another machine
        return paired(*folders[0])


def in_use(places: Iterable[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Of folders of images and of masks those that are there, such that hold pictures first."""
    there = [(images, masks) for images, masks in places if images.is_dir() and masks.is_dir()]
    return sorted(there, key=lambda pair: not all(any(map(is_picture, folder.iterdir())) for folder in pair))


def paired(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """All pictures of a folder with their masks in another."""
    found, labels = named_files(images), named_files(masks)
    endings = MASK_ENDINGS
    if images == masks:  # side by side
        endings = MASK_ENDINGS[1:]
        masks_of = {name + ending for name in found for ending in endings}
        found = {name: path for name, path in found.items() if name not in masks_of and not name.endswith("_mask")}
    if not found:
        lists = "; list those in its folders in train.txt" * any(path.is_dir() for path in images.iterdir())
        raise DataError(f"{images}: no pictures in it{lists}")
    labels |= {name.lower(): path for name, path in labels.items() if name.lower() not in labels}
    pairs = []
    for name, path in found.items():
        names = [name + ending for ending in (*endings, path.suffix)]  # also a.jpg.png
        label = next((labels[name] for name in (*names, *map(str.lower, names)) if name in labels), None)
        if label is None:
            raise NoMask(f"{path}: no mask of that name in {masks}; list those that have one in train.txt")
        pairs.append((path, label))
    used = {path for pair in pairs for path in pair}
    for folder, why in {masks: "masks of no picture", images: "no pictures of a kind that is read"}.items():
        rest = {path for path in folder.iterdir() if not re.match(r"\.|Thumbs\.db|desktop\.ini", path.name)} - used
        if rest:
            warn_once(f"{folder}: left out {len(rest):,} files or folders (first: {min(rest).name}), {why}")
    return pairs


def list_data(args) -> dict[str, list[tuple[Path, Path]]]:
    """The files of three splits: train, val (what the search sees) and test (what is reported).

    Where a data set has no third labelled split, every eighth training picture is held out for the search, and the
    official validation split is the test split [D]. Draws shapes and downloads VOC if need be.
    """
    root = args.data_root
    if args.data == "shapes":
        if root.is_dir() and any(root.iterdir()) and not (root / "annotations").is_dir():
            raise DataError(f"{root}: holds something other than shapes; give an empty or new folder")
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
    evolve.warn_of_shared({split: [image for image, _ in chosen] for split, chosen in pairs.items()})
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
        splits[name] = split = read_split(chosen, meaning.number, meaning, left, args.device)
        left -= sum(part.nbytes for part in split if part is not None)
        if split.sizes is None:
            note(f"{name}: {len(chosen):,} pictures do not fit --memory {args.memory:.3g}; decoded batch by batch")
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

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that would hold all of them on one canvas."""
        return self.number, *(max(sides) for sides in zip(*self.shapes))

    @property
    def nbytes(self) -> int:
        return 0 if self.kept is None else self.kept[0].nbytes

    def settle(self, key: Callable[[], str]) -> "Tensor | Pictures":
        """Keep what has been decoded; few small ones of one size at once, as one tensor. `key` tells splits apart."""
        sizes = [math.prod(shape) for shape in self.shapes]
        self.key, (H, W) = key, self.shape[-2:]
        pixels = sum(shape[-2] * shape[-1] for shape in self.shapes)
        if len({*self.shapes}) == 1 and H * W <= 2**16 and pixels <= SMALL:
            self.strict = True
            return self[:]
        size, cuda = sum(sizes) * self.dtype.itemsize, self.device.startswith("cuda")
        if cuda and size < torch.cuda.mem_get_info(self.device)[0] / 4:
            elements, there = torch.empty(sum(sizes), dtype=self.dtype, device=self.device), torch.zeros(self.number)
        elif pixels <= SMALL:
            elements, there = torch.empty(sum(sizes), dtype=self.dtype), torch.zeros(self.number)
        elif (shared := shared_bytes(key(), size + self.number)) is not None:
            elements, there = shared[:size].view(self.dtype), shared[size:]
        else:
            return self
        self.kept = elements, [0, *itertools.accumulate(sizes)], there
        if pixels <= SMALL:
            self.strict = True  # what is broken shows at once
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
        new = [k for k in dict.fromkeys(map(int, index)) if k not in self.coming]
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
        sides = [max((p.shape[d] for p in pictures), default=0) for d in (-2, -1)]
        return self.stack(pictures, [(0, 0)] * len(pictures), *sides)

    def stack(self, pictures: list[Tensor], corners: list[tuple[int, int]], height: int, width: int) -> Tensor:
        """Windows (N, ..., height, width) on the device; of each picture the one that begins at its (top, left)."""
        leading = pictures[0].shape[:-2] if pictures else self.shapes[0][:-2]
        here = any(picture.is_cuda for picture in pictures)
        staged = self.device.startswith("cuda") and not here
        canvas = torch.full(
            (len(pictures), *leading, height, width),
            self.fill,
            dtype=self.dtype,
            device=self.device if here else "cpu",
            pin_memory=staged,  # only a copy out of pinned memory goes on while the host does
        )
        for window, picture, (top, left) in zip(canvas, pictures, corners):
            part = picture[..., top : top + height, left : left + width]
            window[..., : part.shape[-2], : part.shape[-1]] = part
        return canvas.to(self.device, non_blocking=True)


@functools.cache
def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


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
    coming, waiting = order.clone_state(), deque()
    try:
        while True:
            while len(waiting) <= AHEAD:
                waiting.append(torch.randint(number, (size,), generator=coming))
                for pictures in lazy:
                    pictures.prefetch(waiting[-1].tolist())
            torch.randint(number, (size,), generator=order)
            yield waiting.popleft()
    finally:
        for pictures in lazy:
            pictures.coming.clear()


def shared_bytes(key: str, size: int) -> Tensor | None:
    """`size` bytes, zeros at first, shared by all processes of this machine that give `key`; None if there is no room.

    A file in the folder for temporary ones (TMPDIR says which). The last process that uses it removes it; what killed
    ones have left behind goes when the next one starts.
    """
    folder, prefix = Path(tempfile.gettempdir()), f"autoloss-zero-{os.getuid()}-"
    path = folder / (prefix + hashlib.sha256(os.fsencode(key)).hexdigest()[:24])

    def open_locked(path: Path, how: int) -> int:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(number, how)
        return number

    def remove_unused(path: Path, number: int) -> None:
        with contextlib.suppress(OSError):  # others have it in use
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()

    for other in set(folder.glob(prefix + "*")) - {path}:
        with contextlib.suppress(OSError):
            number = open_locked(other, fcntl.LOCK_SH)
            remove_unused(other, number)
            os.close(number)
    try:
        number = open_locked(path, fcntl.LOCK_SH)
    except OSError:
        return None
    atexit.register(remove_unused, path, number)
    try:
        reserve = getattr(os, "posix_fallocate", None)  # a full disk shows now, not as a crash on the way
        reserve(number, 0, size) if reserve else os.ftruncate(number, size)
        return torch.frombuffer(mmap.mmap(number, size), dtype=torch.uint8)
    except OSError:
        remove_unused(path, number)
        return None


def decode(path: Path, mode: str = "RGB", listed: tuple[int, int] | None = None) -> Tensor:
    """The pixels (h, w, 3) uint8 of a picture, in another of PIL's modes if asked for, turned as its EXIF tag says.

    It stays as it lies in the file where that is the height and width it is `listed` with. Palettes, grey, CMYK and
    transparency become RGB, 16 bits become 8. Raises DataError naming the file and what is wrong with it.
    """
    try:
        with opened(path) as picture:
            turn, upright = turning(picture)
            if listed not in (None, upright, picture.size[::-1]):
                (h, w), (height, width) = upright, listed
                raise DataError(f"{path}: {w}x{h} pixels, listed as {width}x{height}; mend the list")
            turn = turn if listed in (None, upright) else None
            if picture.format == "JPEG" and picture.mode in ("RGB", "L") and turn is None and mode == "RGB":
                # The same bytes as by PIL, in two thirds of the time.
                return torchvision.io.decode_jpeg(encoded(path), torchvision.io.ImageReadMode.RGB).movedim(0, -1)
            if picture.mode[0] in "IF":
                picture = eight_bits(np.array(picture), path)
            elif deep(picture):
                picture = eight_bits(all_bits(path), path)
            picture = picture.convert(mode)
            return torch.from_numpy(np.array(picture if turn is None else picture.transpose(turn)))
    except BROKEN as error:
        raise unreadable(path) from error


def encoded(path: Path) -> Tensor:
    """The bytes of a file, whose name may be in no encoding at all."""
    return torch.from_numpy(np.fromfile(path, np.uint8))


def opened(path: Path) -> Image.Image:
    """The picture in a file. PIL scrambles an uncompressed TIFF that it maps into memory and has to turn."""
    picture = Image.open(path)
    if picture.format != "TIFF":
        return picture
    picture.close()
    return Image.open(io.BytesIO(path.read_bytes()))


def turning(picture: Image.Image) -> tuple[int | None, tuple[int, int]]:
    """PIL's transposition that EXIF asks for, if any, and the height and width that come of it."""
    try:
        tags = Image.Image.getexif(picture)  # PNG's own would decode all of it, to look for tags behind the pixels
    except BROKEN:  # which says nothing of the pixels
        tags = {}
    turn = None if picture.format == "TIFF" else TURNS.get(tags.get(0x0112))  # PIL turns TIFFs itself
    return turn, picture.size if turn in (2, 4, 5, 6) else picture.size[::-1]


TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation to PIL's transposition
# What PIL and torchvision raise over a file that is no whole picture.
BROKEN = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)
BROKEN += (Image.DecompressionBombError, struct.error)


def unreadable(path: Path, kinds: str = "JPEG or PNG") -> "DataError":
    if isinstance(sys.exception(), Image.DecompressionBombError):
        return DataError(f"{path}: more pixels than PIL reads; scale it down")
    unread = f"not a readable image, or cut off; save it as {kinds}"
    return DataError(f"{path}: {unread if os.path.exists(path) else 'not found'}")


def deep(picture: Image.Image) -> bool:
    """Whether a colour picture has 16 bits a channel, of which PIL reads the upper eight alone."""
    return picture.mode[:3] == "RGB" and any(";16" in str(tile.args) for tile in picture.tile)


def all_bits(path: Path) -> np.ndarray:
    """The pixels (h, w, 3) uint16 of such a picture."""
    pixels = cv2.imdecode(encoded(path).numpy(), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise unreadable(path)
    return pixels[..., 2::-1]


def eight_bits(pixels: np.ndarray, path: Path) -> Image.Image:
    """A picture of up to 16 bits, scaled down from as many of 8, 12 and 16 as its largest value needs [D]."""
    most = pixels.max(initial=0)
    if pixels.dtype.kind == "f" or most > 65535 or pixels.min(initial=0) < 0:
        raise DataError(f"{path}: values of 32 bits ({pixels.dtype}); save it with 8 or 16 bits a channel")
    bits = next(bits for bits in (8, 12, 16) if most < 2**bits)
    return Image.fromarray((pixels * (255 / (2**bits - 1))).round().astype(np.uint8))


def read_pictures(paths: list[Path], listed: list[tuple[int, int] | None], device: str) -> list[Tensor]:
    """`decode` of each as (3, h, w); plain JPEGs on a GPU by nvJPEG, all of them in one call."""
    if device.startswith("cuda") and all(map(is_plain_jpeg, paths, listed)):
        with contextlib.suppress(RuntimeError):  # what nvJPEG does not know the CPU may
            return torchvision.io.decode_jpeg([*map(encoded, paths)], torchvision.io.ImageReadMode.RGB, device=device)
    return [decode(path, listed=size).movedim(-1, 0).contiguous() for path, size in zip(paths, listed)]


def is_plain_jpeg(path: Path, listed: tuple[int, int] | None) -> bool:
    """A JPEG in which nothing has to be turned or converted, of the size it is listed with."""
    try:
        with Image.open(path) as picture:
            plain = picture.format == "JPEG" and picture.mode == "RGB" and turning(picture)[0] is None
            return plain and listed in (None, picture.size[::-1])
    except BROKEN as error:
        raise unreadable(path) from error


def group_size(paths: list[Path], device: str) -> int:
    """How many pictures to decode in one call: nvJPEG is fastest with many, threads share out single ones."""
    return 32 if device.startswith("cuda") and paths[0].suffix.lower() in (".jpg", ".jpeg") else 1


def scaled(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture (3, h, w) uint8 in another size, smoothed where it shrinks."""
    if picture.shape[-2:] == size:
        return picture
    if picture.is_cuda:  # where it takes no integers
        pixels = F.interpolate(picture.unsqueeze(0).float(), size, mode="bicubic", antialias=True)
        return pixels[0].round().clamp(0, 255).to(torch.uint8)
    return F.interpolate(picture.unsqueeze(0), size, mode="bicubic", antialias=True)[0]


def fingerprint(kind: str, paths: Iterable[Path]) -> str:
    """Tells apart what was made of files: their names, sizes and times."""
    found = ((path.absolute(), path.stat()) for path in paths)
    return "\n".join([kind, *(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in found)])


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

    Images are padded to multiples of STRIDE: a feature stands for so many pixels, and those that reach beyond the
    picture would move all others when they are brought to its size.
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

    def head(self) -> list[nn.Module]:
        return [self.head_fine, self.head_coarse]

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
    state = {name.removeprefix("module."): value for name, value in state.items() if "fc." not in name}
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

    def head(self) -> list[nn.Module]:
        return [self.pyramid, self.pool, self.project, self.low, self.decoder]

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

    def head(self) -> list[nn.Module]:
        return [self.bins, self.classify]

    def logits(self, images: Tensor) -> Tensor:
        _, high = self.backbone(images)
        views = [high] + [upsample(view(high), high.shape[-2:]) for view in self.bins]
        return upsample(self.classify(torch.cat(views, 1)), images.shape[-2:])


def build_model(
    name: str, num_classes: int, pretrained: bool | str = False, output_stride: int | None = None
) -> nn.Module:
    """One of MODELS: images (N, 3, H, W), normalised, to logits (N, num_classes, H, W).

    Without the auxiliary heads of the published settings [D].
    """
    if name in WIDTHS:
        if pretrained:
            fail(f"--pretrained: --model {name} has no such weights; leave it out, or choose another --model")
        return SmallNet(num_classes, WIDTHS[name])
    resnet, head = name.split("-")
    network = {"dlv3p": DeepLabV3Plus, "psp": PSPNet}[head]
    stride = {} if output_stride is None else {"output_stride": output_stride}
    return network(num_classes, int(resnet[1:]), pretrained=pretrained, **stride)


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
        found[one] |= differ
        found[other] |= differ
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
        C, self.tolerance, self.groups = num_classes, tolerance, groups
        self.C = C
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
        """The metrics by name, each (groups,) float64 in 0..1; a class that does not occur is left out of the means."""

        def iou(confusion):
            hit = confusion.diagonal(dim1=1, dim2=2)
            return hit / (confusion.sum(1) + confusion.sum(2) - hit)

        confusion, total = self.confusion.double(), self.confusion.sum((1, 2), keepdim=True)
        hit, occurs = confusion.diagonal(dim1=1, dim2=2), confusion.sum(2)
        edge_pred, hit_pred, edge_target, hit_target = self.edges.double()
        # F1 = 2 P R / (P + R); without any hit it is 0, without a target boundary the class is left out. The background
        # is a class like the others, which the released evaluator leaves out [D].
        precision, recall = hit_pred / edge_pred.clamp(min=1), hit_target / edge_target
        f1 = 2 * precision * recall / torch.where(precision + recall == 0, 1, precision + recall)
        return {
            "miou": iou(confusion).nanmean(1),
            "fwiou": (occurs / total[:, 0] * iou(confusion)).nansum(1),
            "macc": (hit / occurs).nanmean(1),
            "gacc": hit.sum(1) / total[:, 0, 0],
            "biou": iou(self.near_boundary.double()).nanmean(1),
            "bf1": f1.nanmean(1),
        }


def seg_metrics(pred: Tensor, label: Tensor, num_classes: int) -> dict[str, float]:
    """The six segmentation metrics of label maps (N, H, W).

    pred: integers 0..num_classes-1; label: the same, or 255 where a pixel does not count. Keys: miou (mean IoU), fwiou
    (IoU weighted by class frequency), macc (mean class accuracy), gacc (pixel accuracy), biou (mean IoU over the pixels
    within 5 px of a target boundary), bf1 (mean boundary F1 with 5 px tolerance).
    """
    metrics = SegMetrics(num_classes, pred.device)
    metrics.update(pred, label)
    return {name: value.item() for name, value in metrics.compute().items()}


# =====================================================================================================================
# Losses: the hand-made ones. Each takes logits (N, C, H, W) and label (N, H, W) of 0..C-1 or 255 and returns a scalar;
# without any pixel that counts it is 0 and still connected to the graph


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
        t = u / (b + (b * b + (x0 - 2 * x1 + x2) * u).clamp(min=1e-10).sqrt())
        t = t.clamp(max=1)
        piece = y0 + 2 * t * (1 - t) * (y1 - y0) + t * t * (y2 - y0)
        height = torch.where(x > x0, piece, height)
    return torch.where(x < 1, height, 1.0)


def count_valid(label: Tensor) -> Tensor:
    return (label != IGNORE).sum().clamp(min=1)


# Weights per pixel need OpenCV: they are made once for each label map and cut like it, never in a training step.

LARGEST_WEIGHT = 1000.0  # of a class, however rare: a few stray pixels shall not decide all, nor exceed float16 [D]


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
            number, regions = cv2.connectedComponents((label == c).astype(np.uint8))
            for k in range(1, number):
                distance = cv2.distanceTransform((regions != k).astype(np.uint8), cv2.DIST_L2, 5)
                nearest = np.sort(np.stack([*nearest, distance]), axis=0)[:2]
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
        if metric not in METRICS:
            raise ValueError(f"{metric!r} is no metric; write asl(miou) or asl(miou: x1 y1 x2 y2 ...)")
        theta = tuple(float(number) for number in numbers.split()) or ASL_THETA[metric]
        if len(theta) != len(ASL_THETA[metric]) or not all(0 <= value <= 1 for value in theta):
            raise ValueError(f"{metric} takes {len(ASL_THETA[metric])} numbers in 0..1, got {len(theta)}")
        return cls(metric, theta)


LOSSES = {
    "ce": ce,
    "wce": weighted_ce,
    "dice": dice,
    "lovasz": lovasz,
    "dpce": weighted_ce,
    "ssim": ssim,
    "asl": asl_loss,
}
WEIGHTS = {"wce": unet_weights, "dpce": distance_weights}
KNOWN = (  # what `--search cse` starts from: cross entropy, squared and absolute error, Dice, true positives
    "Neg(Mul(y, Log(p)))",
    "Square(Add(p, Neg(y)))",
    "Abs(Add(p, Neg(y)))",
    "Neg(Mul(MeanNHW(Mul(y, p)), Inv(MeanNHW(Add(y, p)))))",
    "Neg(Sqrt(MeanNHW(Mul(p, y))))",
)
BASELINE = "ce"


def tree_loss(expr: Expr) -> Callable[[Tensor, Tensor], Tensor]:
    """A searched tree as a loss of logits and label."""

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        leaves, mask = softmax_leaves(logits, label)
        if mask.device.type == "cpu" and mask.all():  # without a mask it is cheaper; on CUDA asking would cost a sync
            mask = None
        return evaluate(expr, leaves, mask)

    return loss


def read_searched(text: str) -> Expr | Asl:
    """A searched loss from its text."""
    return Asl.read(text) if text.startswith("asl(") else parse(text)


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

    def __init__(self, split: Split, plan: Schedule, seed: int, device: str):
        rank, world = evolve.rank_and_world()
        self.split, self.plan, self.share = split, plan, max(1, plan.batch // world)
        seed += 1_000_003 * rank
        self.generators = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order, augmentation = self.generators
        for index in read_ahead(self.split, self.share, order):
            images, *targets = batch_scale_crop_flip(self.split, index, self.plan.crop, self.plan.scale, augmentation)
            yield normalise(batch_colour_jitter(images, 0.25, augmentation)), *targets


def make_optimizer(net: nn.Module, plan: Schedule) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer, and its learning rates over the steps; the layers after a backbone have one of their own."""
    head = {id(weight) for module in net.head() for weight in module.parameters()}
    groups = [
        {"params": [w for w in net.parameters() if id(w) not in head], "lr": plan.lr},
        {"params": [w for w in net.parameters() if id(w) in head], "lr": plan.lr * plan.head_lr},
    ]
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
    weights, valid = list(net.parameters()), None
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
            finite = shown.isfinite() & norm.isfinite()
            valid = finite if valid is None else valid & finite
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
def test_network(net: nn.Module, split: Split, num_classes: int, device: str) -> dict[str, float]:
    """All metrics of `net` on a split, at full size; 0 for those that it has nothing to measure by."""
    metrics = SegMetrics(num_classes, device)
    for images, labels in in_order(split):
        metrics.update(predict(net, images.to(device)), labels.to(device))
    return {name: value.nan_to_num(0.0).item() for name, value in metrics.compute().items()}


@torch.no_grad()
def predict(net: nn.Module, images: Tensor) -> Tensor:
    """Label maps (N, H, W) of images (N, 3, H, W) uint8."""
    net.eval()
    with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
        return net(normalise(images.float())).argmax(1)


def draw_predictions(net: nn.Module, split: Split, path: Path, device: str, number: int = 8) -> None:
    """Pictures, targets and predictions of the first few images, one below the other, as a PNG."""
    palette = torch.frombuffer(bytearray(shapes.voc_palette()), dtype=torch.uint8).view(256, 3)
    images = split.images[:number].cpu()
    pred = predict(net, split.images[:number].to(device)).cpu()
    coloured = [palette[label.long()].movedim(-1, 1) for label in (split.labels[:number].cpu(), pred)]
    grid = torchvision.utils.make_grid(torch.cat([images, *coloured]), nrow=len(images), pad_value=255)
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
ETA = {"miou": 0.1, "fwiou": 0.1, "macc": 0.2, "gacc": 0.1, "biou": 0.1, "bf1": 0.3}


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
    export, read = staticmethod(export), staticmethod(read_searched)

    def __init__(self, args):
        self.pairs = list_data(args)  # what is missing is said at once
        self.meaning = find_meaning(args, self.pairs)
        self.args, self.device, self.num_classes = args, args.device, self.meaning.number
        self.proxy = self.plan(PROXY[args.data], args.proxy_steps)
        self.retraining = self.plan(RETRAIN[args.data], args.retrain_steps)
        self.whole = self.retraining.steps >= RETRAIN[args.data].steps
        self.samplers = {"asl": lambda: AslSearch(args.metric)}
        self.data: dict[str, Split] = {}

    def load(self) -> None:
        if not self.data:
            self.data = read_data(self.args, self.pairs, self.meaning)
            self.weighted: dict[str | None, Split] = {None: self.data["train"]}

    def plan(self, plan: Schedule, steps: int | None) -> Schedule:
        """A schedule with the user's flags in it; small networks have their own optimizer on all data sets."""
        args = self.args
        if args.model in WIDTHS:
            own = ("optimizer", "lr", "head_lr", "warmup")
            plan = plan._replace(**{name: getattr(PROXY["shapes"], name) for name in own})
        base = round(plan.base * (steps or plan.steps) / plan.steps)  # a shorter proxy has a shorter base
        flags = dict(steps=steps, crop=args.crop, batch=args.batch, lr=args.lr, model=args.model, base=base)
        return plan._replace(**{name: value for name, value in flags.items() if value is not None})

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
        return Batches(self.weighted[name], plan, seed, self.device)

    @functools.cached_property
    def proxy_batches(self):
        """The batches of the proxy. Every candidate sees the same ones, so they are made once where memory allows."""
        plan = self.proxy
        if plan.steps * plan.batch * plan.crop**2 * 13 < 2**29:  # bytes: a pixel has three floats and a label
            return list(itertools.islice(self.batches(BASELINE, plan, self.args.seed), plan.steps))
        return None

    def test(self, net: nn.Module, split: Split) -> dict[str, float]:
        return test_network(net, split, self.num_classes, self.device)

    def prepare(self, base: Path) -> None:
        """The base network: the first steps of a training with the baseline's loss.

        Proxy trainings go on from its last state; the gates look at losses at all of STATES.
        """
        self.states = evolve.base_states(base, self.device, self.train_base, self.network(self.proxy, self.args.seed))
        self.branches = {"loss": self.branch()}

    def train_base(self) -> list[dict[str, Tensor]]:
        plan = self.proxy._replace(steps=self.proxy.base_of)
        if plan.base:
            note(f"training the base network: {plan.base} steps of {BASELINE}")
        steps = [round(plan.base * share) for share in STATES]
        net, states = self.network(plan, self.args.seed), []

        def batches() -> Iterator[tuple[Tensor, ...]]:
            for step, batch in enumerate(self.batches(BASELINE, plan, 500 + self.args.seed)):
                for _ in range(steps.count(step)):  # mostly none; several at once in a short base
                    states.append(copy.deepcopy(net.state_dict()))
                if step == steps[-1]:
                    return
                yield batch

        train_network(net, LOSSES[BASELINE], batches(), plan)
        return states

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
        for state in self.states:
            net.load_state_dict(state)
            with torch.no_grad():
                logits.append(small(net(normalise(few.images.to(self.device).float())), "bilinear").cpu())
        # The upper left pixel of each cell, half a cell beside what is predicted there; so were all searches made that
        # tests/RESULTS.md tells of [D].
        label = small(labels.unsqueeze(1).float(), "nearest").squeeze(1).long()
        onehot = F.one_hot(label, self.num_classes).movedim(-1, 1).float()
        branch = Branch(
            ("y", "p", "1"),
            torch.stack(logits).unsqueeze(2),  # (S, B, 1, C, H, W)
            onehot.unsqueeze(1),
            self.gate_leaves,
            self.gate_score,
            ETA[self.args.metric],
            baseline=KNOWN[0],
            scale_free=self.proxy.optimizer == "adamw",
            ideal=10 * onehot.unsqueeze(1),
            known=KNOWN,
        )
        return evolve.settle_rejection(branch)

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

    def train(self, losses: dict[str, Expr] | str) -> float:
        return round(self.proxy_scores(losses)[self.args.metric], 6)

    def proxy_scores(self, losses: dict[str, Expr] | str) -> dict[str, float]:
        """All metrics on the search-validation split after a proxy training."""
        net = self.network(self.proxy, self.args.seed)
        net.load_state_dict(self.states[-1])
        shared = None if isinstance(losses, str) and losses in WEIGHTS else self.proxy_batches
        data = shared or self.batches(losses, self.proxy, self.args.seed)
        self.curve = []
        self.curve = train_network(net, self.loss(losses), data, self.proxy, "invalid" not in self.args.without)
        return self.test(net, self.data["val"])

    def simulate(self, losses: dict[str, Expr] | str) -> float:
        """A short training on the pictures of the gates: the score on these."""
        few = select(self.data["train"], self.few)
        plan = self.proxy._replace(steps=max(1, self.proxy.steps // 4))
        net = self.network(plan, self.args.seed)
        try:
            train_network(net, self.loss(losses), Batches(few, plan, self.args.seed, self.device), plan)
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
            draw_predictions(net, self.data["test"], picture, self.device)
        return {name: self.test(net, self.data[name]) for name in ("val", "test")}


class AslSearch:
    """Auto Seg-Loss's own search (ASL, Sec. 4.3): PPO2 over the control points, drawn from a truncated normal.

    The points are relative here, each a share of the way from its predecessor to (1, 1) in either coordinate: any
    numbers in 0..1 make rising curves. A round of samples shares the mean `mu`; its update moves `mu` towards samples
    that scored above the round's mean [D]; the released configs compare them with a training of `mu` itself. Workers
    draw from the `mu` that they know; each record says which one it was.
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
