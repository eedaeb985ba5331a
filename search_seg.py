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

The first command, measured on two CPU cores (AMD EPYC, torch 2.14.1): 8.6 minutes, 4,499 losses explored, 219 trained;
mIoU on test over three seeds .513 +- .003, cross entropy .446 +- .012, with
Log(MeanNHW(Add(Inv(Mul(p, Add(Inv(Mul(y, 1)), y))), MinPool3(p)))).
"""

import argparse
import copy
import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator
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

import evolve
from data import shapes
from evolve import Branch, Child, DataError, InvalidLoss, fail
from loss_ops import Expr, evaluate, is_dead, leaves_of, parse, python_source, softmax_leaves, sources, standalone, wide

IGNORE = 255
METRICS = ("miou", "fwiou", "macc", "gacc", "biou", "bf1")
CLASSES = {"shapes": len(shapes.CLASSES), "voc": 21, "cityscapes": 19}
MODELS = ("small", "r50-dlv3p", "r101-dlv3p", "r50-psp", "r101-psp")


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
    base: int = 0  # steps with the baseline's loss that go before


# The proxy on shapes was chosen by its rank correlation with re-training and by its cost (README, "The proxy") [D].
# AdamW makes it blind to the scale of a loss, so that its ranking is about the shape of the loss alone. On the real
# data sets: the published settings [A]; the batch of re-training and the crops of Cityscapes are ours [D].
PROXY = {
    "shapes": Schedule(120, 16, 48, (0.75, 1.5), "adamw", 0.01, base=100),
    "voc": Schedule(1000, 32, 128, (0.5, 2.0), "sgd", 0.02, 10.0, model="r50-dlv3p"),
    "cityscapes": Schedule(1000, 32, 128, (0.5, 2.0), "sgd", 0.02, 10.0, model="r50-dlv3p"),
}
RETRAIN = {
    "shapes": PROXY["shapes"]._replace(steps=600),
    "voc": Schedule(10_000, 16, 512, (0.5, 2.0), "sgd", 0.02, 10.0, model="r101-dlv3p"),
    "cityscapes": Schedule(10_000, 16, 512, (0.5, 2.0), "sgd", 0.02, 10.0, model="r101-dlv3p"),
}


# =====================================================================================================================
# Arguments


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = evolve.Parser(description=__doc__.split("\n")[0], usage="python search_seg.py --metric miou [flags]")
    task = parser.add_argument_group("task")
    task.add_argument(
        "--metric",
        type=evolve.one_of(METRICS),
        default="miou",
        metavar="NAME",
        help="what to search for: " + " ".join(METRICS) + " (%(default)s)",
    )
    task.add_argument(
        "--loss",
        metavar="LOSS",
        help="train and evaluate this loss instead of searching: "
        + " ".join(LOSSES)
        + ", a formula or a run directory",
    )
    task.add_argument(
        "--compare",
        metavar="LOSSES",
        help="the same for several, comma-separated, as one table: losses x metrics",
    )
    task.add_argument(
        "--data",
        type=evolve.one_of(tuple(CLASSES)),
        default="shapes",
        metavar="NAME",
        help="data set: " + " ".join(CLASSES) + " (%(default)s)",
    )
    task.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="where the data set lies; shapes are drawn there if need be (data/generated/shapes)",
    )
    task.add_argument("--download", action="store_true", help="fetch VOC 2012 into --data-root through torchvision")
    task.add_argument(
        "--model",
        type=evolve.one_of(MODELS),
        metavar="NAME",
        help="network: " + " ".join(MODELS) + " (the data set's own, for proxy and re-training)",
    )
    task.add_argument(
        "--pretrained",
        action="store_true",
        help="start ResNets from torchvision's ImageNet weights (downloaded on first use)",
    )
    task.add_argument(
        "--proxy-steps",
        type=evolve.at_least(1),
        metavar="N",
        help="steps of a proxy training (shapes 80, others 1000)",
    )
    task.add_argument(
        "--retrain-steps",
        type=evolve.at_least(1),
        metavar="N",
        help="steps of a re-training (shapes 130, others 10000)",
    )
    task.add_argument(
        "--crop",
        type=evolve.at_least(8),
        metavar="PIXELS",
        help="side of a training window (shapes 48, others 128 in the proxy and 512 in re-training)",
    )
    task.add_argument(
        "--batch",
        type=evolve.at_least(2),
        metavar="N",
        help="images in a batch (shapes 16, others 32 in the proxy and 16 in re-training)",
    )
    task.add_argument(
        "--lr", type=evolve.at_least(1e-6, float), metavar="RATE", help="learning rate (small 0.01, others 0.02)"
    )
    task.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="NAME",
        help="where to compute: cpu, cuda or cuda:1 (%(default)s here)",
    )
    evolve.add_search_arguments(parser, {"asl": "the parameters of Auto Seg-Loss"})
    args = parser.parse_args(argv)
    if args.resume:
        args = evolve.resume_arguments(args, evolve.given_flags(parser, argv), "seg")
    return check_arguments(args)


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other flags; end the program with one line where something is wrong."""
    evolve.settle_device_and_workers(args)
    if args.data_root is None and args.data != "shapes":
        fail(f"--data {args.data}: needs --data-root DIR, the folder that holds it (see data/README.md)")
    args.data_root = Path(args.data_root or Path(__file__).parent / "data/generated/shapes")
    if args.loss and args.compare:
        fail(f"--compare {args.compare}: not together with --loss; give one of them")
    listed = split_outside_brackets(args.compare) if args.compare else [args.loss] if args.loss else []
    flag = "--compare" if args.compare else "--loss"
    args.wanted = {text: read_loss(text, flag) for text in listed}
    return args


def split_outside_brackets(text: str) -> list[str]:
    """The parts between the commas that are not inside of a formula."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def read_loss(text: str, flag: str) -> "str | dict[str, Expr | Asl]":
    """The name of a hand-made loss, a formula, Auto Seg-Loss as `str(Asl)` writes it, or a run directory."""
    if text in LOSSES:
        return text
    if text.startswith("asl("):
        try:
            return {"loss": Asl.read(text)}
        except ValueError as error:
            fail(f"{flag} {text}: {error}")
    if "(" not in text:
        if Path(text).is_dir():
            return evolve.read_found(Path(text), "seg", flag, read_searched)
        fail(f"{flag} {text}: unknown; give one of {' '.join(LOSSES)}, a formula or a run directory")
    try:
        expr = parse(text)
    except ValueError as error:
        fail(f"{flag} {text}: {error}")
    if foreign := leaves_of(expr) - set("yp1"):
        fail(f"{flag} {text}: '{min(foreign)}' has no meaning in segmentation; use y, p and 1")
    if is_dead(expr):
        fail(f"{flag} {text}: its gradient knows nothing of prediction and target together; it cannot teach")
    return {"loss": expr}


# =====================================================================================================================
# Data


class Split(NamedTuple):
    """A whole split, decoded: smaller pictures sit in the upper left corner of a common canvas, ignored around it."""

    images: Tensor  # (M, 3, H, W) uint8, RGB
    labels: Tensor  # (M, H, W) uint8, IGNORE outside the picture
    sizes: Tensor  # (M, 2) float32, height and width of each picture
    weights: Tensor | None = None  # (M, H, W) float16, what a loss with a map of weights has made of each label map


def read_split(pairs: list[tuple[Path, Path]], num_classes: int, lookup: Tensor | None = None) -> Split:
    """Decode (image, label map) files; `lookup` (256,) uint8 translates the values of label maps to classes.

    Raises DataError naming the file that is missing, cannot be read, does not fit its image or has an unknown class.
    """
    sizes = torch.tensor([open_picture(path).size[::-1] for path, _ in pairs])  # (M, 2); reads the headers alone
    H, W = sizes.amax(0).tolist()
    images = torch.zeros(len(pairs), 3, H, W, dtype=torch.uint8)
    labels = torch.full((len(pairs), H, W), IGNORE, dtype=torch.uint8)
    for k, (image_path, label_path) in enumerate(pairs):
        h, w = sizes[k].tolist()
        images[k, :, :h, :w] = decode(image_path, "RGB").movedim(-1, 0)
        label = decode(label_path)
        if label.shape != (h, w):
            size = "x".join(map(str, label.shape[1::-1]))
            raise DataError(f"{label_path}: mask of {size} pixels, its image has {w}x{h}")
        label = label if lookup is None else lookup[label.long()]
        if ((label >= num_classes) & (label != IGNORE)).any():
            raise DataError(f"{label_path}: class {label[label != IGNORE].max()}; expected 0..{num_classes - 1} or 255")
        labels[k, :h, :w] = label
    return Split(images, labels, sizes.float())


def open_picture(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except OSError as error:
        raise unreadable(path) from error


def decode(path: Path, mode: str | None = None) -> Tensor:
    """The pixels of a picture, (H, W) or (H, W, 3) uint8; without `mode` as stored: palette PNGs give their indices."""
    with open_picture(path) as picture:
        try:
            return torch.from_numpy(np.array(picture.convert(mode) if mode else picture, dtype=np.uint8))
        except OSError as error:
            raise unreadable(path) from error


def unreadable(path: Path) -> "DataError":
    return DataError(f"{path}: {'not a readable image' if path.exists() else 'not found'}")


def voc_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Image and label files of ImageSets/Segmentation/<split>.txt; SBD's "aug" masks where they are."""
    listing = root / "ImageSets/Segmentation" / f"{split}.txt"
    if not listing.is_file():
        raise DataError(f"{listing}: not found; --data-root must be the folder with JPEGImages and ImageSets")
    names = listing.read_text().split()
    if not names:
        raise DataError(f"{listing}: empty; it must list one image name per line")
    masks = root / "SegmentationClassAug"
    masks = masks if split.endswith("aug") and masks.is_dir() else root / "SegmentationClass"
    return [(root / "JPEGImages" / f"{name}.jpg", masks / f"{name}.png") for name in names]


def cityscapes_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    found = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not found:
        raise DataError(f"{root / 'leftImg8bit' / split}: no pictures; --data-root must hold leftImg8bit and gtFine")
    return [
        (path, root / "gtFine" / split / path.parent.name / path.name.replace("leftImg8bit", "gtFine_labelIds"))
        for path in found
    ]


CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # label id of class 0..18


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
            torchvision.datasets.VOCSegmentation(str(root), "2012", "trainval", download=True)
        nested = root / "VOCdevkit/VOC2012"
        root = nested if nested.is_dir() else root
        aug = (root / "ImageSets/Segmentation/trainaug.txt").is_file()
        train = voc_pairs(root, "trainaug" if aug else "train")
        pairs = {"train": train, "test": voc_pairs(root, "val")}
    else:
        pairs = {"train": cityscapes_pairs(root, "train"), "test": cityscapes_pairs(root, "val")}
    if "val" not in pairs:
        pairs["val"] = pairs["train"][::8]
        pairs["train"] = [pair for k, pair in enumerate(pairs["train"]) if k % 8]
    return pairs


def read_data(args) -> dict[str, Split]:
    """The three splits of `list_data`, decoded and on the device."""
    lookup = None
    if args.data == "cityscapes":
        lookup = torch.full((256,), IGNORE, dtype=torch.uint8)
        lookup[list(CITYSCAPES_IDS)] = torch.arange(19, dtype=torch.uint8)
    pairs = list_data(args)
    return {name: place(read_split(chosen, CLASSES[args.data], lookup), args.device) for name, chosen in pairs.items()}


def place(split: Split, device: str) -> Split:
    """Move a split to the device, once; what would fill over half of its free memory stays in pinned host memory."""
    if not device.startswith("cuda"):
        return split
    tensors = [tensor for tensor in split if tensor is not None]
    size = sum(tensor.nbytes for tensor in tensors)
    if size > torch.cuda.mem_get_info(device)[0] / 2:
        print(f"a split of {size / 2**30:.1f} GiB stays in pinned host memory", flush=True)
        return Split(*(tensor.pin_memory() for tensor in tensors))
    return Split(*(tensor.to(device) for tensor in tensors))


MEAN = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)  # ImageNet, as torchvision's weights expect
STD = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)


def batch_scale_crop_flip(
    split: Split, index: Tensor, crop: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Scale, flip and cut a (crop, crop) window out of each picture, in one affine sampling for images, one for labels.

    Returns images (N, 3, crop, crop) float in 0..255 and labels (N, crop, crop) uint8, IGNORE outside of the picture,
    on the generator's device; the same window of the weights (N, crop, crop) float follows where the split has them.
    The scale is log-uniform in `scale`; half of the pictures are mirrored.
    """
    N, (H, W), device = len(index), split.images.shape[-2:], generator.device
    u = torch.rand(4, N, generator=generator, device=device)
    index = index.to(split.images.device)
    images, labels, size, *weights = (t[index].to(device, non_blocking=True) for t in split if t is not None)
    size = size.T  # (2, N)
    window = crop / (scale[0] * (scale[1] / scale[0]) ** u[0])  # side in source pixels
    room = size - window
    top, left = torch.where(room > 0, room * u[1:3], room / 2)  # centred where the picture is smaller than the window
    mirror = torch.where(u[3] < 0.5, -1.0, 1.0)
    theta = torch.zeros(N, 2, 3, device=device)  # maps window coordinates in -1..1 to canvas coordinates in -1..1
    theta[:, 0, 0], theta[:, 0, 2] = mirror * window / W, (2 * left + window) / W - 1
    theta[:, 1, 1], theta[:, 1, 2] = window / H, (2 * top + window) / H - 1
    grid = F.affine_grid(theta, [N, 3, crop, crop], align_corners=False)
    images = F.grid_sample(images.float(), grid, align_corners=False)
    labels = labels.unsqueeze(1).float() - IGNORE  # the zero padding of the sampling then means IGNORE
    labels = F.grid_sample(labels, grid, mode="nearest", align_corners=False).squeeze(1) + IGNORE
    weights = [F.grid_sample(w.unsqueeze(1).float(), grid, align_corners=False).squeeze(1) for w in weights]
    return images, labels.round().to(torch.uint8), *weights


def batch_colour_jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation of each picture (N, 3, H, W), each times a factor of 1 +- strength."""
    a = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=generator, device=images.device) - 1)
    images = images * a[0]
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, a[1])
    return torch.lerp(images.mean(1, keepdim=True), images, a[2]).clamp_(0, 255)


def normalise(images: Tensor) -> Tensor:
    """0..255 to zero mean and unit variance by ImageNet's statistics."""
    return (images - MEAN.to(images.device)) / STD.to(images.device)


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


class SmallNet(nn.Module):
    """For the embedded data: features at strides 2 and 4, two classifiers added up. 36 thousand weights."""

    def __init__(self, num_classes: int, width: int = 16):
        super().__init__()
        wide = 2 * width
        self.fine = nn.Sequential(conv(3, width, 2), conv(width, width))
        self.coarse = nn.Sequential(
            conv(width, wide, 2), conv(wide, wide), conv(wide, wide, 1, 2), conv(wide, wide, 1, 4)
        )
        self.head_fine = nn.Conv2d(width, num_classes, 1)
        self.head_coarse = nn.Conv2d(wide, num_classes, 1)

    def head(self) -> list[nn.Module]:
        return [self.head_fine, self.head_coarse]

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        logits = self.head_fine(fine) + upsample(self.head_coarse(self.coarse(fine)), fine.shape[-2:])
        return upsample(logits, images.shape[-2:])


class Backbone(nn.Module):
    """A torchvision ResNet (50 or 101) of output stride 8 or 16; returns the features of stages 1 (stride 4) and 4."""

    def __init__(self, depth: int, output_stride: int, pretrained: bool):
        super().__init__()
        build = {50: torchvision.models.resnet50, 101: torchvision.models.resnet101}[depth]
        dilate = {16: [False, False, True], 8: [False, True, True]}[output_stride]
        net = build(weights="IMAGENET1K_V1" if pretrained else None, replace_stride_with_dilation=dilate)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stage1, self.rest = net.layer1, nn.Sequential(net.layer2, net.layer3, net.layer4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low = self.stage1(self.stem(images))
        return low, self.rest(low)


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+ (Chen 2018, arXiv 1802.02611): atrous pyramid on stride 16, decoder on the features of stride 4."""

    def __init__(self, num_classes: int, depth: int, output_stride: int = 16, pretrained: bool = False):
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

    def forward(self, images: Tensor) -> Tensor:
        low, high = self.backbone(images)
        size = high.shape[-2:]
        views = [view(high) for view in self.pyramid] + [self.pool(high).expand(-1, -1, *size)]
        x = upsample(self.project(torch.cat(views, 1)), low.shape[-2:])
        return upsample(self.decoder(torch.cat([x, self.low(low)], 1)), images.shape[-2:])


class PSPNet(nn.Module):
    """PSPNet (Zhao 2017, arXiv 1612.01105): means over 1, 2, 3 and 6 bins a side beside the features of stride 8."""

    def __init__(self, num_classes: int, depth: int, output_stride: int = 8, pretrained: bool = False):
        super().__init__()
        self.backbone = Backbone(depth, output_stride, pretrained)
        self.bins = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(b), conv(2048, 512, size=1)) for b in (1, 2, 3, 6))
        self.classify = nn.Sequential(conv(2048 + 4 * 512, 512), nn.Dropout(0.1), nn.Conv2d(512, num_classes, 1))

    def head(self) -> list[nn.Module]:
        return [self.bins, self.classify]

    def forward(self, images: Tensor) -> Tensor:
        _, high = self.backbone(images)
        views = [high] + [upsample(view(high), high.shape[-2:]) for view in self.bins]
        return upsample(self.classify(torch.cat(views, 1)), images.shape[-2:])


def build_model(name: str, num_classes: int, pretrained: bool = False, output_stride: int | None = None) -> nn.Module:
    """One of MODELS: images (N, 3, H, W), normalised, to logits (N, num_classes, H, W)."""
    if name == "small":
        return SmallNet(num_classes)
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
    x = label.float().unsqueeze(1)
    return ((F.max_pool2d(x, 3, 1, 1) != x) | (-F.max_pool2d(-x, 3, 1, 1) != x)).squeeze(1)


def dilate_bits(bits, radius):
    """Bitwise or over a (2 radius + 1)^2 window of (N, H, W) integers: one dilation for up to 63 classes at once."""
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
    """The six metrics, accumulated on the device over any number of batches; pixels with label 255 never count.

    `groups` > 1 keeps that many independent sets of counts: the gates score many single predictions in one call.
    """

    def __init__(self, num_classes: int, device="cpu", tolerance: int = 5, groups: int = 1):
        if num_classes > 63:
            raise ValueError(f"{num_classes} classes: the boundary metrics hold one class per bit, 63 at most")
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

        edge_pred, edge_target = edges(pred) & valid, edges(label) & valid
        reach_pred = dilate_bits(edge_pred.long() << pred, self.tolerance)
        reach_target = dilate_bits(edge_target.long() << target, self.tolerance)
        near = valid & (reach_target >> 1 != 0)  # bit 0 is the background, whose own boundary does not count [A]
        self.near_boundary += count(pair, near, G * C * C).view(G, C, C)
        hit_pred, hit_target = (reach_target >> pred & 1).bool(), (reach_pred >> target & 1).bool()
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
        # F1 = 2 P R / (P + R); without any hit it is 0, without a target boundary the class is left out.
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
    """The six segmentation metrics of label maps (N, H, W); definitions in README, "Metrics".

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
    """1 - structural similarity of prediction and one-hot target, class by class (BASNet, Qin 2019, Eq. 4).

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
    """1 - the surrogate of `metric` (ASL, Sec. 3): AND(p, y) = g(p) y and OR(p, y) = h(p) + y - h(p) y.

    logits and label as `softmax_leaves` takes them; biou and bf1 know neighbourhoods, as pools do.
    theta: control points as published, absolute and never falling along a curve, curve after curve: AND and OR for
    miou, fwiou and biou; AND for macc and gacc; for bf1 those of the boundary OR(p, e) - AND(p, e) of p and its 3x3
    erosion e: AND of p, AND of e, OR of p, OR of e.
    """
    leaves, mask = softmax_leaves(logits, label, ignore_index, pools=metric in ("biou", "bf1"))
    y, p = leaves["y"] * mask, leaves["p"]
    points = torch.as_tensor(theta, dtype=p.dtype, device=p.device).view(ASL_CURVES[metric], -1, 2)
    frequency = y.sum((0, 2, 3))
    if metric == "bf1":
        score = asl_boundary_f1(y, p, mask, points)
    elif metric in ("macc", "gacc"):
        hit = (bezier(p, points[0]) * y).sum((0, 2, 3))
        score = (hit / (frequency + 1e-8)).mean() if metric == "macc" else hit.sum() / (frequency.sum() + 1e-8)
    else:
        if metric == "biou":
            label = label.reshape(mask.squeeze(1).shape)
            near = dilate_bits(edges(label) & (label != 0) & mask.squeeze(1), 5)
            mask = mask & near.unsqueeze(1)  # near the boundary of any class but the background
            y = y * mask
        either = bezier(p, points[1])
        either = ((either + y - either * y) * mask).sum((0, 2, 3))
        iou = (bezier(p, points[0]) * y).sum((0, 2, 3)) / (either + 1e-8)
        score = (iou * frequency).sum() / (frequency.sum() + 1e-8) if metric == "fwiou" else iou.mean()
    return (1 - score) * mask.any()


def asl_boundary_f1(y: Tensor, p: Tensor, mask: Tensor, points: Tensor, tolerance: int = 5) -> Tensor:
    """The surrogate of BF1: mean over the classes that have a boundary in the target."""

    def erode(x):
        return -F.max_pool2d(F.pad(-x, (1, 1, 1, 1), value=-1.0), 3, 1)

    def reach(x):  # along one axis after the other: a fifth of the comparisons
        x = F.max_pool2d(x, (2 * tolerance + 1, 1), 1, (tolerance, 0))
        return F.max_pool2d(x, (1, 2 * tolerance + 1), 1, (0, tolerance))

    eroded = erode(p)
    and_p, and_e, or_p, or_e = (bezier(x, c) for x, c in zip((p, eroded, p, eroded), points))
    edge_p = (or_p + or_e - or_p * or_e - and_p * and_e) * mask
    edge_y = (erode(y) != y).to(p.dtype) * mask
    total_y = edge_y.sum((0, 2, 3))
    precision = (edge_p * reach(edge_y)).sum((0, 2, 3)) / (edge_p.sum((0, 2, 3)) + 1e-8)
    recall = (reach(edge_p) * edge_y).sum((0, 2, 3)) / (total_y + 1e-8)
    f1 = 2 * precision * recall / (precision + recall + 1e-8)
    present = total_y > 0
    return (f1 * present).sum() / present.sum().clamp(min=1)


def bezier(x: Tensor, points: Tensor) -> Tensor:
    """The height at `x` in 0..1 of a chain of quadratic Bezier pieces from (0, 0) to (1, 1); rising if `points` do.

    points: (2 K - 1, 2), the control points between the two ends, two for each of the K pieces but the last.
    """
    ends = points.new_tensor([[0.0, 0.0], [1.0, 1.0]])
    points = torch.cat([ends[:1], points, ends[1:]])
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


def unet_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Class and border weights (U-Net, Ronneberger 2015, Eq. 2): w_c + 10 exp(-(d1 + d2)^2 / 50), (M, H, W) float16.

    w_c: inverse frequency of the pixel's class, scaled to a mean of 1 over all pixels. d1, d2: distances in pixels of
    a background pixel to the nearest and the second nearest object, which is a connected region of one class.
    """
    valid = labels != IGNORE
    index = torch.where(valid, labels, 0).long()
    frequency = count(index, valid, num_classes).float()
    balance = frequency.sum() / ((frequency > 0).sum() * frequency.clamp(min=1))
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


def distance_weights(labels: Tensor, num_classes: int) -> Tensor:
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
KNOWN = (  # what `--search cse` starts from: cross entropy, squared and absolute error, Dice, soft recall
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


ASL_HELPERS = sources(edges, dilate_bits, bezier, asl_boundary_f1, asl_loss)


def export(found: dict[str, Expr | Asl], title: str = "A loss function found by search.") -> str:
    """A found loss as a standalone file with `loss(logits, label)`; it imports nothing of this repository."""
    loss = found["loss"]
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
        self.split, self.plan, self.size = split, plan, max(1, plan.batch // world)
        seed += 1_000_003 * rank
        self.generators = torch.Generator().manual_seed(2 * seed), torch.Generator(device).manual_seed(2 * seed + 1)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order, augmentation = self.generators
        while True:
            index = torch.randint(len(self.split.images), (self.size,), generator=order)
            images, *targets = batch_scale_crop_flip(self.split, index, self.plan.crop, self.plan.scale, augmentation)
            yield normalise(batch_colour_jitter(images, 0.25, augmentation)), *targets


def make_optimizer(net: nn.Module, plan: Schedule) -> torch.optim.Optimizer:
    head = {id(weight) for module in net.head() for weight in module.parameters()}
    groups = [
        {"params": [w for w in net.parameters() if id(w) not in head], "lr": plan.lr},
        {"params": [w for w in net.parameters() if id(w) in head], "lr": plan.lr * plan.head_lr},
    ]
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=plan.weight_decay, fused=True)
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=plan.weight_decay, fused=True)


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
    optimizer = make_optimizer(net, plan)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / plan.steps) ** 0.9)
    _, world = evolve.rank_and_world()
    parts = (net, optimizer, schedule)  # of which a checkpoint has the network first
    first, curve = checkpoint.load(parts, data.generators) if checkpoint else (0, [])
    weights, valid = list(net.parameters()), None
    net.train()
    if world > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if cuda else net
        net = nn.parallel.DistributedDataParallel(net)
    for step, (images, *targets) in zip(range(first, plan.steps), data):
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            logits = net(images)
        value = loss(logits.float(), *targets)
        if not value.requires_grad:
            raise InvalidLoss("the first step, for want of a gradient")
        shown = value.detach()
        if world > 1:  # if one process alone saw what is invalid, the others would wait for it forever
            dist.all_reduce(shown := shown / world)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if stop_invalid:
            norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
            finite = shown.isfinite() & norm.isfinite()
            valid = finite if valid is None else valid & finite
            if (not cuda or step % 10 == 9 or step == plan.steps - 1) and not valid:
                raise InvalidLoss(f"step {step}")
        optimizer.step()
        schedule.step()
        if step % max(1, plan.steps // 20) == 0:
            curve.append((step, shown))
        if checkpoint and ((step + 1) % checkpoint.every == 0 or step + 1 == plan.steps):
            checkpoint.save(step + 1, curve, parts, data.generators)
    return [(step, value.item()) for step, value in curve]


@torch.no_grad()
def test_network(net: nn.Module, split: Split, num_classes: int, device: str) -> dict[str, float]:
    """All metrics of `net` on a split, at full size."""
    metrics = SegMetrics(num_classes, device)
    size = max(1, 2**18 // split.labels[0].numel())
    for start in range(0, len(split.images), size):
        part = slice(start, start + size)
        pred = predict(net, split.images[part].to(device, non_blocking=True))
        metrics.update(pred, split.labels[part].to(device, non_blocking=True))
    return {name: value.item() for name, value in metrics.compute().items()}


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
STATES = (0, 0.15, 1)  # shares of the base training after which the gates look at its predictions [D]


class SegTask(evolve.Task):
    """What evolve.py needs to know of segmentation."""

    name, baseline, metrics = "seg", BASELINE, METRICS
    export, read = staticmethod(export), staticmethod(read_searched)

    def __init__(self, args):
        self.args, self.device, self.num_classes = args, args.device, CLASSES[args.data]
        list_data(args)  # what is missing is said at once
        self.proxy, self.retraining = (
            self.plan(plans[args.data], steps)
            for plans, steps in ((PROXY, args.proxy_steps), (RETRAIN, args.retrain_steps))
        )
        self.converged = self.retraining.steps >= RETRAIN[args.data].steps
        self.samplers = {"asl": lambda: AslSearch(args.metric)}
        self.data: dict[str, Split] = {}

    def plan(self, plan: Schedule, steps: int | None) -> Schedule:
        """A schedule with the user's flags in it; the small network has its own optimizer on all data sets."""
        args = self.args
        if args.model == "small":
            plan = plan._replace(**{name: getattr(PROXY["shapes"], name) for name in ("optimizer", "lr", "head_lr")})
        base = round(plan.base * (steps or plan.steps) / plan.steps)  # a shorter proxy has a shorter base
        flags = {
            "steps": steps,
            "crop": args.crop,
            "batch": args.batch,
            "lr": args.lr,
            "model": args.model,
            "base": base,
        }
        return plan._replace(**{name: value for name, value in flags.items() if value is not None})

    def load(self) -> None:
        if not self.data:
            self.data = read_data(self.args)
            self.weighted: dict[str | None, Split] = {None: self.data["train"]}

    def prepare(self, base: Path) -> None:
        """The base network: the baseline's loss for the first steps of the converged schedule.

        Proxy trainings go on from its last state; the gates look at losses at all of STATES.
        """
        if not base.exists():
            evolve.save_once(base, self.train_base())
        self.states = torch.load(base, map_location=self.device, weights_only=True)
        self.branches = {"loss": self.branch()}

    def train_base(self) -> list[dict[str, Tensor]]:
        plan = self.proxy._replace(steps=RETRAIN[self.args.data].steps)
        steps = [round(plan.base * share) for share in STATES]
        net, states = self.network(plan, self.args.seed), []

        def batches() -> Iterator[tuple[Tensor, ...]]:
            for step, batch in enumerate(self.batches(BASELINE, plan, 500 + self.args.seed)):
                states.extend(copy.deepcopy(net.state_dict()) for _ in range(steps.count(step)))
                if step == steps[-1]:
                    return
                yield batch

        train_network(net, LOSSES[BASELINE], batches(), plan)
        return states

    def branch(self) -> Branch:
        """The training images with most classes, small, and what the base network makes of them on its way."""
        train = self.data["train"]
        seen = torch.stack([(train.labels == c).flatten(1).any(1) for c in range(self.num_classes)]).sum(0)
        self.few = index = seen.sort(descending=True, stable=True).indices[:GATE_SAMPLES]
        label = F.interpolate(train.labels[index].unsqueeze(1).float(), (GATE_SIZE, GATE_SIZE)).squeeze(1)
        label = torch.where(label == IGNORE, 0, label).long().to(self.device)  # the gates look at losses, not at data
        net, logits = self.network(self.proxy, self.args.seed), []
        for state in self.states:
            net.load_state_dict(state)
            with torch.no_grad():
                raw = net(normalise(train.images[index].to(self.device).float()))
            logits.append(F.interpolate(raw, (GATE_SIZE, GATE_SIZE), mode="bilinear"))
        onehot = F.one_hot(label, self.num_classes).movedim(-1, 1).float()
        return Branch(
            ("y", "p", "1"),
            torch.stack(logits).unsqueeze(2),  # (S, B, 1, C, H, W)
            onehot.unsqueeze(1),
            self.gate_leaves,
            self.gate_score,
            ETA[self.args.metric],
            scale_free=self.proxy.optimizer == "adamw",
            ideal=10 * onehot.unsqueeze(1),
            known=KNOWN,
        )

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
            train = self.data["train"]
            self.weighted[name] = place(
                train._replace(weights=WEIGHTS[name](train.labels, self.num_classes)), self.device
            )
        return Batches(self.weighted[name], plan, seed, self.device)

    @functools.cached_property
    def proxy_batches(self):
        """The batches of the proxy. Every candidate sees the same ones, so they are made once where memory allows."""
        plan = self.proxy
        if plan.steps * plan.batch * plan.crop**2 * 13 < 2**29:
            return list(itertools.islice(self.batches(BASELINE, plan, self.args.seed), plan.steps))
        return None

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
        return test_network(net, self.data["val"], self.num_classes, self.device)

    def simulate(self, losses: dict[str, Expr] | str) -> float:
        """A short training on the pictures of the gates: the score on these."""
        few = Split(*(tensor[self.few] for tensor in self.data["train"] if tensor is not None))
        plan = self.proxy._replace(steps=max(1, self.proxy.steps // 4))
        net = self.network(plan, self.args.seed)
        try:
            train_network(net, self.loss(losses), Batches(few, plan, self.args.seed, self.device), plan)
        except InvalidLoss:
            return 0.0
        return test_network(net, few, self.num_classes, self.device)[self.args.metric]

    def retrain(
        self, losses: dict[str, Expr] | str, seed: int, picture: Path | None = None, checkpoint=None
    ) -> dict[str, dict[str, float]]:
        own = 1000 + seed  # never the seed of the proxy: the ranking must hold for other weights and other batches
        plan = self.retraining
        net = self.network(plan, own)
        self.curve = train_network(net, self.loss(losses), self.batches(losses, plan, own), plan, checkpoint=checkpoint)
        if picture:
            draw_predictions(net, self.data["test"], picture, self.device)
        return {name: test_network(net, self.data[name], self.num_classes, self.device) for name in ("val", "test")}


class AslSearch:
    """Auto Seg-Loss's own search (ASL, Sec. 3.4): PPO2 over the control points, drawn from a truncated normal.

    The points are relative here, each a share of the way from its predecessor to (1, 1) in either coordinate: any
    numbers in 0..1 make rising curves. A round of samples shares the mean `mu`; its update moves `mu` towards what
    scored above the round's average. Workers draw from the `mu` that they know; each record says which one it was.
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
        self.round.append(record)
        if len(self.round) == self.ROUND:
            self.update()
            self.round, self.rounds = [], self.rounds + 1

    def update(self) -> None:
        """The round's steps of Adam on the logit of mu: PPO2's clipped objective (Schulman 2017, Eq. 7)."""
        sample, old = (torch.tensor([r[key] for r in self.round], dtype=torch.float64) for key in ("sample", "mu"))
        reward = torch.tensor([r["score"] or 0.0 for r in self.round], dtype=torch.float64)  # invalid: worth nothing
        advantage = reward - reward.mean()
        before = self.log_density(sample, old)
        logit = self.mu.logit(eps=1e-6).requires_grad_()
        optimizer = torch.optim.Adam([logit], self.LR)
        for _ in range(self.UPDATES):
            ratio = (self.log_density(sample, logit.sigmoid()) - before).exp()
            clipped = ratio.clamp(1 - self.CLIP, 1 + self.CLIP)
            optimizer.zero_grad()
            (-torch.minimum(ratio * advantage, clipped * advantage).mean()).backward()
            optimizer.step()
        self.mu = logit.detach().sigmoid()

    def log_density(self, x: Tensor, mu: Tensor) -> Tensor:
        """Of samples (S, D) under truncated normals around `mu` (D,) or (S, D), up to a constant; (S,)."""
        inside = torch.special.ndtr((1 - mu) / self.SIGMA) - torch.special.ndtr(-mu / self.SIGMA)
        return (-((x - mu) ** 2) / (2 * self.SIGMA**2) - inside.log()).sum(-1)

    def show(self, board) -> None:
        """After each round: `mu`, and a picture of its curves."""
        if self.rounds == self.shown:
            return
        self.shown = self.rounds
        for k, value in enumerate(self.mu.tolist()):
            board.add_scalar(f"asl/mu_{k}", value, self.rounds)
        points = self.control_points(self.mu).view(ASL_CURVES[self.metric], -1, 2)
        x = torch.linspace(0, 1, 200, dtype=torch.float64)
        picture = np.full((256, 256 * len(points), 3), 255, np.uint8)
        for k, curve in enumerate(points):
            y = bezier(x, curve)
            line = torch.stack([28 + 200 * x + 256 * k, 228 - 200 * y], 1).round().int().numpy()
            cv2.rectangle(picture, (28 + 256 * k, 28), (228 + 256 * k, 228), (160, 160, 160))
            cv2.polylines(picture, [line], False, (0, 0, 0), 2, cv2.LINE_AA)
        board.add_image("asl/curves", picture, self.rounds, dataformats="HWC")


# Least gain in the rejection protocol. The published 0.6 [P] turns away the best losses known here: a pool leaves free
# logits unconstrained, a network not. About half of what the least of the good ones gains (tests/bench_gates.py) [D].
ETA = {"miou": 0.1, "fwiou": 0.1, "macc": 0.2, "gacc": 0.1, "biou": 0.1, "bf1": 0.3}


# =====================================================================================================================
# Main


def main() -> None:
    evolve.main(parse_arguments(sys.argv[1:]), SegTask)


if __name__ == "__main__":
    main()
