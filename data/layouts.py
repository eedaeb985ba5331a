"""Where the pictures and masks of segmentation lie: VOC, Cityscapes, and any folder of images and masks."""

import contextlib
import csv
import fcntl
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torchvision

from data.pictures import plain_name
from evolve import DataError, note, warn_once

IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
IMAGES += (".avif", ".jp2", ".tga")
CLUTTER = r"\.|Thumbs\.db|desktop\.ini"  # names of what systems leave in folders


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGES and not path.name.startswith(".")


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
MASK_ENDINGS = ("_mask", "-mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_gt", "_L", "_P")
MASK_ENDINGS += ("_labelIds", "_labelTrainIds")
MASK_BEGINNINGS = ("mask_", "mask-", "masks_", "label_", "labels_", "seg_", "gt_")
# ... and what the name of a picture may have where that of its mask has one of these.
PICTURE_ENDINGS, PICTURE_BEGINNINGS = r"[_-](image|img|sat|rgb)$", r"^(image|img|im|frame)[_-]"


def mask_names(name: str, suffix: str, alone: bool = False) -> list[str]:
    """What the mask of a picture may be called, the likeliest first; `alone`: not as the picture itself."""
    stems = dict.fromkeys((name, re.sub(PICTURE_ENDINGS, "", name), re.sub(PICTURE_BEGINNINGS, "", name)))
    ended = [stem + ending for stem in stems for ending in MASK_ENDINGS]
    begun = [beginning + stem for stem in stems for beginning in MASK_BEGINNINGS]
    return [name][alone:] + ended + begun + [name + suffix]  # the last one of a.jpg.png


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


class Elsewhere(DataError):
    """The first picture of a list is not there."""


class NoMask(DataError):
    """A picture without a mask."""


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
            if split != "test" or not {"train", "val"} & pairs.keys():
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
        if any(re.match(r".*_mask\.|mask_", file) for file in entries(inside(root, name))):  # beside, as by Roboflow
            places.append((inside(root, name), inside(root, name)))
        lists += [inside(root, f"{name}.txt"), inside(root, "ImageSets", "Segmentation", f"{name}.txt")]
    folders = in_use(places)
    listing = next((path for path in lists if path.is_file()), None)
    if listing is None:
        return paired(*folders[0]) if folders else []
    lines = [line for line in read_lines(listing) if not line.startswith("#")]
    both = [(root, root)] * any(re.search(r"[,;\t ]", line) for line in lines[:1])  # pictures and masks are listed
    if not (choices := folders or whole or both):
        return []
    try:
        return listed_pairs(root, listing, *choices[0])
    except Elsewhere as error:
        if not folders or not any(re.search(r"[/\\]", line) for line in lines):
            raise
        warn_once(f"{error}; all of {folders[0][0]} is used")  # paths of another machine
        return paired(*folders[0])


def listed_pairs(root: Path, listing: Path, images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Image and label files of a list: on a line a name or path for both, or one for each."""
    files: dict[Path, dict[str, Path]] = {}

    def find(text: str, folder: Path, called: Callable[[str], list[str]] = lambda name: [name]) -> Path | None:
        text = text.replace("\\", "/")  # as Windows writes it
        for path in (root / text.lstrip("/"), folder / text):
            if path.suffix.lower() in IMAGES and os.path.isfile(path):  # unlike Path's, of no name too long
                return path
        text = text[: text.rindex(".")] if text.lower().endswith(IMAGES) else text
        for path in (folder / text, root / text.lstrip("/")):
            if path.parent not in files:
                files[path.parent] = in_any_case(named_files(path.parent)) if os.path.isdir(path.parent) else {}
            there, names = files[path.parent], [*map(plain_name, called(path.name))]
            if found := next((there[name] for name in (*names, *map(str.lower, names)) if name in there), None):
                return found
        return None

    pairs = []
    for line in read_lines(listing):
        names, image = columns(line), find(line, images)
        if image is not None or len(names) not in (1, 2):
            names = [line]
        else:
            image = find(names[0], images)
            if len(names) == 2 and names[1] in ("-1", "0", "1"):  # in VOC: whether a class is there
                names = names[:1]
        if image is None and (line.startswith("#") or not pairs and re.fullmatch(HEAD, line)):
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
        label = find(wanted, masks, functools.partial(mask_names, suffix=image.suffix, alone=alone))
        if label is None:
            raise NoMask(f"{masks / wanted}{'' if Path(wanted).suffix else '.png'}: not found; the mask of {image}")
        pairs.append((image, label))
    if not pairs:
        raise DataError(f"{listing}: empty; it must list one image name per line")
    if double := len(pairs) - len(set(pairs)):
        warn_once(f"{listing}: {double} of its pictures stand there more than once")
    return pairs


HEAD = r"(?i)\W*(images?|pictures?|file_?names?|(image_?)?paths?)\W+(masks?|labels?|annotations?)(_?paths?)?\W*"


def columns(line: str) -> list[str]:
    """The columns of a line, between tabs, semicolons or commas, in quotes or not, else between blanks."""
    mark = next((mark for mark in "\t;," if mark in line), None)
    if mark is None:
        return [line.strip('"')] if line.startswith('"') else line.split()
    with contextlib.suppress(csv.Error):  # a line of a hundred thousand letters
        (row,) = csv.reader([line], delimiter=mark, skipinitialspace=True)
        return [column.strip() for column in row if column.strip()]
    return [line]


def paired(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """All pictures of a folder with their masks in another."""
    found, labels = named_files(images), named_files(masks)
    beside = images == masks
    if beside:
        masks_of = {mask for name, path in found.items() for mask in mask_names(name, path.suffix, beside)}
        masks_of |= {name for name in found if name.lower().endswith("_mask")}
        found = {name: path for name, path in found.items() if name not in masks_of}
    if not found:
        lists = "; list those in its folders in train.txt" * any(path.is_dir() for path in images.iterdir())
        raise DataError(f"{images}: no pictures in it{other_kinds(images.iterdir()) or lists}")
    labels = in_any_case(labels)
    pairs, owners = [], {}
    for name, path in found.items():
        names = mask_names(name, path.suffix, beside)
        label = next((labels[name] for name in (*names, *map(str.lower, names)) if name in labels), None)
        if label is None:
            kinds = other_kinds(other for other in masks.iterdir() if other.stem in names)
            cure = kinds or "; list those that have one in train.txt"
            raise NoMask(f"{path}: no mask of that name in {masks}{cure}")
        if (other := owners.setdefault(label, path)) != path:
            raise DataError(f"{label}: the mask of {path}, and of {other} too; list each picture with its own")
        pairs.append((path, label))
    used = {path for pair in pairs for path in pair}
    for folder, why in {masks: "masks of no picture", images: "no pictures of a kind that is read"}.items():
        rest = {path for path in folder.iterdir() if not re.match(CLUTTER, path.name)} - used
        if rest:
            warn_once(f"{folder}: left out {len(rest):,} files or folders (first: {min(rest).name}), {why}")
    return pairs


def in_any_case(files: dict[str, Path]) -> dict[str, Path]:
    """Files by their names, and by these in small letters where no other file has them."""
    return {name.lower(): path for name, path in files.items()} | files


def other_kinds(paths: Iterable[Path]) -> str:
    """What to say of files that are no pictures; nothing where there are none."""
    first = min((path for path in paths if path.is_file() and not re.match(CLUTTER, path.name)), default=None)
    return f"; {first.name} is of no kind that is read: save it, and those like it, as PNG" if first else ""


def in_use(places: Iterable[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Of folders of images and of masks those that are there, such that hold pictures first."""
    there = [(images, masks) for images, masks in places if images.is_dir() and masks.is_dir()]
    return sorted(there, key=lambda pair: not all(any(map(is_picture, folder.iterdir())) for folder in pair))


@functools.lru_cache(maxsize=64)
def entries(folder: Path) -> dict[str, str]:
    """The names of what lies in a folder, by the same in small letters; none where that may not be seen."""
    try:
        return {name.lower(): name for name in sorted(os.listdir(folder), reverse=True)}
    except OSError:
        return {}


def inside(folder: Path, *names: str) -> Path:
    """A path within a folder, its names in any case."""
    for name in names:
        folder /= name if (folder / name).exists() else entries(folder).get(name.lower(), name)
    return folder


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, without blank ones."""
    try:
        lines = re.split(r"[\r\n]+", path.read_text(encoding="utf-8-sig"))  # str.splitlines knows others, too
        return [line.strip() for line in lines if line.strip()]
    except OSError as error:
        what = "no right to read it; mend that" if isinstance(error, PermissionError) else "not found"
        raise DataError(f"{path}: {what}") from error
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text in UTF-8; save it so") from None
