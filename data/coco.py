"""COCO files as they are found: annotations checked, ids made alike, results of detectors and pose estimators read.

`check_coco` gives all that is read of a file, in one form; what is damaged is a `DataError` of one line that names the
file, the entry and the cure. Masks are for search_det.py, joints for search_pose.py.
"""

import contextlib
import functools
import gc
import itertools
import json
import math
import os
import re
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor

from data.layouts import inside
from data.pictures import BROKEN, plain_name, turning, unreadable
from evolve import DataError, warn_once

LARGEST = 2**24  # up to here float32 counts pixels exactly; a number beyond it is damaged [D]
FAR = 10  # and so is a place further out of its picture than this many of its longer sides [D]


class EmptyObject(Exception):
    """An annotation that annotates nothing; the message says in what way."""


def coco_files(root: Path, kind: str) -> dict[str, tuple[Path, Path]]:
    """The annotations and the folder of pictures of "train", "val" and, where there is one, "test".

    kind: "instances" or "person_keypoints", as COCO names its files. Labelling tools leave out the year or the kind,
    put the pictures into `images`, or (Roboflow) all of a split into one folder. Raises DataError where one is missing.
    """
    found, tables = {}, inside(root, "annotations")
    for split, names in {"train": ["train"], "val": ["val", "valid", "validation"], "test": ["test"]}.items():
        named = [name + year for year in ("2017", "2014", "") for name in names]
        listings = [inside(tables, f"{start}{name}.json") for start in (f"{kind}_", "") for name in named]
        listings += [inside(root, name, "_annotations.coco.json") for name in names]
        listing = next((path for path in listings if path.exists()), listings[0])
        together = [listing.parent] if listing.parent.name.lower() in names else []
        own = inside(root, listing.stem.removeprefix(f"{kind}_"))
        named = [own.name, *named]
        elsewhere = [inside(root, *folder, name) for folder in (("images",), ()) for name in named]
        folders = [*together, own, *elsewhere, inside(root, "images")]
        found[split] = listing, next((path for path in folders if path.is_dir()), folders[0])
    if not found["test"][0].exists():
        del found["test"]
    for path in (path for files in found.values() for path in files):
        if not path.exists():
            cure = "--data-root must hold annotations, train2017 and val2017 (or see data/README.md)"
            others = [other for folder in (tables, root) for other in folder.glob("*.json") if path.suffix == ".json"]
            others.sort(key=lambda other: (kind not in other.name, other))
            raise DataError(f"{path}: not found; {cure}" + (f"; there is {others[0]}" if others else ""))
    return found


@contextlib.contextmanager
def uncollected():
    """No garbage collection meanwhile: among the million entries of a COCO file it would take most of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def load_coco(path: Path | str):
    """What a COCO json file holds, in UTF-8, -16 or -32, with a byte order mark or without; DataError if it is none."""
    try:
        return json.loads(Path(path).read_bytes())  # of bytes, json tells the encoding, whatever the locale says
    except OSError as error:
        what = "no right to read it; mend that" if isinstance(error, PermissionError) else "cannot be read"
        raise DataError(f"{path}: {what if os.path.exists(path) else 'not found'}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; unpack it, or save it in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a json file; unpack it, or fetch or export it again ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Annotations


def check_coco(
    coco,
    path: Path | str,
    own: Callable[[dict, tuple[int, int] | None], dict],
    folder: Path | None = None,
    advice: str | None = None,
    scoring: bool = False,
) -> dict:
    """All that is read of a COCO file; DataError names the first entry that is damaged, and the cure.

    Ids are made alike, pictures and categories sorted by them, what may be missing is filled in. One warning counts
    what is of no use and left out: entries that are listed twice, annotations of pictures or categories that are not
    listed, macOS' hidden files, and empty objects where there is no `advice` on what to do about them.
    own: what the task reads of an annotation, given the (height, width) of its picture, None where that is unknown;
    folder: where the pictures are, which tell their size where the file does not;
    scoring: the truth for an evaluator, as pycocotools takes it: with empty objects, without names of files.
    """

    def shown(k: int, entry: dict) -> str:
        return f"annotation {entry.get('id', f'no. {k}')!r:.40}"

    left_out: dict[str, list[str]] = {}  # by reason
    annotations, known = [], {}
    categories = by_id(coco, "categories", path, left_out, scoring)
    images = check_images(coco, path, folder, scoring, left_out)
    sizes = {number: image["height"] and (image["height"], image["width"]) for number, image in images.items()}
    for k, entry in enumerate(entries_of(coco, "annotations", path)):
        number, image, category = map(identity, map(entry.get, ("id", "image_id", "category_id")))
        again = number is not None and known.setdefault(number, entry) is not entry and known[number] == entry
        if again and not scoring:
            reason, about = "annotations listed twice", ""
        elif image not in images:
            reason, about = "annotations of unlisted images", f" of image {entry.get('image_id')!r:.40}"
        elif category not in categories:
            reason, about = "annotations of unlisted categories", f" of category {entry.get('category_id')!r:.40}"
        else:
            try:
                found = check_annotation(entry, sizes[image], scoring) | own(entry, sizes[image])
                annotations.append({"id": number, "image_id": image, "category_id": category} | found)
                continue
            except DataError as problem:
                raise DataError(f"{path}: {shown(k, entry)}: {problem}") from None
            except EmptyObject as problem:
                if advice:
                    raise DataError(f"{path}: {shown(k, entry)}: {problem}; {advice}") from None
                reason, about = "empty annotations", f": {problem}"
        left_out.setdefault(reason, []).append(shown(k, entry) + about)
    if annotations and not scoring:
        check_boxes(path, annotations, sizes)
    reasons = ", ".join(f"{len(entries)} {reason} (first: {entries[0]})" for reason, entries in left_out.items())
    if not annotations and not scoring:
        raise DataError(f"{path}: no annotations to learn from{'; left out ' * bool(reasons)}{reasons}")
    if reasons:
        warn_once(f"{path}: left out {reasons}")
    return {"images": [*images.values()], "categories": [*categories.values()], "annotations": annotations}


def check_images(coco, path: Path | str, folder: Path | None, scoring: bool, left_out: dict[str, list[str]]) -> dict:
    """The pictures of a COCO file by their ids, each file once, without macOS' hidden ones."""
    images, files = {}, {}
    for number, entry in by_id(coco, "images", path, left_out, scoring).items():
        try:
            images[number] = {"id": number} | check_image(entry, scoring)
        except DataError as problem:
            raise DataError(f"{path}: image {number!r}: {problem}") from None
        name = images[number]["file_name"]
        if not scoring and Path(name).name.startswith("._"):
            left_out.setdefault("of macOS' hidden files", []).append(name)
            del images[number]
        elif not scoring and (other := files.setdefault(os.path.normpath(name), number)) != number:
            raise DataError(f"{path}: images {other!r} and {number!r} are both {name}; list each picture once")
    unknown = [image for image in images.values() if folder and image["height"] is None]
    for image, found in zip(unknown, found_files(folder, [image["file_name"] for image in unknown])):
        image["height"], image["width"] = picture_size(found)  # the picture tells where the file does not
    return images


def check_image(entry: dict, scoring: bool) -> dict:
    """Name, height and width of a picture; the sides are None where the file does not tell them."""
    name, url = entry.get("file_name"), entry.get("coco_url")
    if "file_name" not in entry and isinstance(url, str):  # as in LVIS
        name = url.rpartition("/")[2]
    if not scoring and not (
        isinstance(name, str) and name.strip() and not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name)
    ):
        raise DataError(f"its 'file_name' is {name!r:.40}; give the name of a picture")
    name = None if scoring else name.replace("\\", "/")  # as Windows writes it
    sides = [entry.get("height") or None, entry.get("width") or None]
    if None in sides:
        sides = [None, None]
    elif not (good := floats(sides, 2)) or min(good) < 1 or any(side % 1 for side in good):
        raise DataError(f"height and width are {sides!r:.60}; give them in pixels, or leave both out")
    else:
        sides = [int(side) for side in good]
    return {"file_name": name, "height": sides[0], "width": sides[1]}


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture as it is meant to be seen, from its first bytes."""
    try:
        with Image.open(path) as picture:
            return turning(picture)[1]
    except BROKEN as error:
        raise unreadable(path) from error


def check_annotation(entry: dict, size: tuple[int, int] | None, scoring: bool) -> dict:
    """Box, area and iscrowd of an annotation whose picture has this (height, width), if that is known."""
    box, crowd, area = floats(entry.get("bbox", ()), 4), entry.get("iscrowd") or 0, entry.get("area")
    crowd = crowd if isinstance(crowd, bool) else identity(crowd)
    if box is None:
        raise DataError(f"box {entry.get('bbox')!r:.60}; it must be four finite numbers: x y width height")
    if crowd not in (0, 1):
        raise DataError(f"'iscrowd' is {entry['iscrowd']!r:.40}; it must be 0 or 1")
    x, y, w, h = box
    area = (w * h,) if area is None else floats((area,), 1, LARGEST**2)
    area = (w * h,) if area == [0] and not scoring else area  # as tools write that do not know it
    if area is None or area[0] < 0 < min(w, h):
        raise DataError(f"'area' is {entry['area']!r:.40}; give the square pixels of the object, or leave it out")
    if not scoring:
        if min(w, h) <= 0:
            raise EmptyObject(f"empty box {entry['bbox']!r:.60}")
        picture = f"in a picture of {size[1]}x{size[0]} pixels" if size else ""
        if size and (x + w <= 0 or y + h <= 0 or x >= size[1] or y >= size[0]):
            raise EmptyObject(f"box {entry['bbox']!r:.60} outside, {picture}")
        if size and not within_reach((x, y, x + w, y + h), size):
            raise DataError(f"box {entry['bbox']!r:.60} {picture}; give x y width height in pixels")
    found = {"bbox": box, "area": area[0], "iscrowd": bool(crowd)}
    if scoring:
        return found
    known = area[0] if entry.get("area") else extent_area(entry.get("segmentation"))
    return found | {"size_told": known or w * h}  # besides its box, for `check_boxes`


def extent_area(polygons) -> float | None:
    """Square pixels of the box around all points of an object's polygons; None where it has none."""
    try:
        xs, ys = ([float(place) for polygon in polygons for place in polygon[k::2]] for k in (0, 1))
        area = (max(xs) - min(xs)) * (max(ys) - min(ys))
    except (TypeError, ValueError, LookupError, OverflowError, RuntimeError):
        return None
    return area if 0 < area < LARGEST**2 else None


def check_boxes(path: Path | str, annotations: list[dict], sizes: dict) -> None:
    """Warn of boxes that reach out of their pictures; DataError where all seem to be no x y width height in pixels."""
    boxes = np.array([entry["bbox"] for entry in annotations])  # (N, 4)
    limits = np.array([(sizes[entry["image_id"]] or (math.inf, math.inf))[::-1] for entry in annotations])  # (N, 2)
    (start, side), first = np.split(boxes, 2, 1), boxes[0].tolist()
    if (boxes.max(1) <= 1.01).mean() > 0.5:
        raise DataError(f"{path}: most boxes are within 0..1 (first: {first}); give pixels, not shares of the picture")
    out = ((start < -2) | (start + side > limits + 2)).any(1)  # by more than rounding does
    corners = ((0 <= start) & (start < side) & (side <= limits)).all()
    areas = np.array([entry.pop("size_told") for entry in annotations])
    meant = np.isclose((side - start).prod(1), areas, rtol=0.01) & ~np.isclose(side.prod(1), areas, rtol=0.01)
    if len(boxes) > 3 and corners and (out.mean() > 0.25 or meant.mean() > 0.75):
        raise DataError(f"{path}: boxes seem to be x1 y1 x2 y2 (first: {first}); give x y width height")
    crowds = sum(entry["iscrowd"] for entry in annotations)
    if 0.1 * len(annotations) < crowds > 1:  # CVAT calls everything a crowd that was drawn with the brush
        warn_once(f"{path}: {crowds} of {len(annotations)} objects are crowds ('iscrowd' 1), which teach nothing")
    if out.any():
        entry = annotations[out.argmax()]
        warn_once(f"{path}: {out.sum()} boxes reach out of their pictures (first: annotation {entry['id']!r:.40})")


def within_reach(places: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether no x and y of x y x y ... is FAR out of a picture of this (height, width)."""
    (height, width), room, xs, ys = size, FAR * max(size), places[::2], places[1::2]
    across = -room <= min(xs, default=0) and max(xs, default=0) <= width + room
    return across and -room <= min(ys, default=0) and max(ys, default=0) <= height + room


def entries_of(coco, kind: str, path: Path | str) -> Sequence[dict]:
    """The entries of one kind."""
    entries = coco.get(kind) if isinstance(coco, dict) else None
    if not isinstance(entries, (list, tuple)):
        raise DataError(f"{path}: no list of {kind!r}; it must be a COCO file with images, annotations and categories")
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: entry {k} of {kind!r} is {entry!r:.40}; remove it")
    return entries


def by_id(coco, kind: str, path: Path | str, left_out: dict[str, list[str]], scoring: bool) -> dict[int | str, dict]:
    """The entries of one kind by their ids, which rise, numbers before names."""
    found = {}
    for k, entry in enumerate(entries_of(coco, kind, path)):
        number = identity(entry.get("id"))
        if number is None:
            raise DataError(f"{path}: entry {k} of {kind!r} has the id {entry.get('id')!r:.40}; give it a number")
        if found.setdefault(number, entry) is not entry:
            if found[number] != entry:
                raise DataError(f"{path}: {kind!r} has the id {number!r} twice; give each entry its own")
            left_out.setdefault(f"{kind} listed twice", []).append(f"id {number!r}")
    if not found and not scoring:
        raise DataError(f"{path}: its list of {kind!r} is empty; export it with them")
    return {key: found[key] | {"id": key} for key in sorted(found, key=lambda key: (isinstance(key, str), key))}


def identity(value) -> int | str | None:
    """An id as one and the same thing, whether it is written 7, 7.0 or "7"; None if it is none."""
    if type(value) is int:
        return value
    if isinstance(value, (Tensor, np.generic, np.ndarray)):
        value = value.item() if math.prod(value.shape) == 1 else None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?(0|[1-9]\d{0,17})", value, re.ASCII) else value or None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def floats(values, number: int, limit: float = LARGEST) -> list[float] | None:
    """`values` as so many finite numbers within +-limit; None if they are anything else."""
    if isinstance(values, (str, bytes, dict)):
        return None
    try:
        values = [*map(float, values)]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    good = len(values) == number and math.isfinite(sum(values)) and max(map(abs, values), default=0) <= limit
    return values if good else None


def in_row(value, width: int):
    """The numbers of a list of lists of so many, in one list; anything else as it is."""
    kinds = list, tuple
    if isinstance(value, kinds) and all(isinstance(part, kinds) and len(part) == width for part in value):
        return [*itertools.chain.from_iterable(value)]
    return value


def found_files(folder: Path, names: list[str]) -> list[Path]:
    """The pictures of these names, accents and capitals written in any way; DataError naming one that is not there.

    What is not where its name says, as it was elsewhere when the file was written, may lie in the folder itself.
    """
    there: dict[Path, list[dict[str, str]]] = {}  # names of files as they are compared, exactly and without capitals
    found: dict[str, Path] = {}
    owners: dict[Path, str] = {}
    elsewhere: list[str] = []
    for name in dict.fromkeys(names):
        path = folder / name
        as_link = urllib.parse.unquote(re.sub(r".*\?d=|\?.*", "", name))  # what labelling tools make of a file
        for place, file in itertools.product((path.parent, folder), (path.name, Path(as_link).name)):
            if place not in there:
                listed = sorted(os.listdir(place)) if os.path.isdir(place) else ()  # unlike Path's, of no name too long
                there[place] = [{key(file): file for file in listed} for key in (plain_name, capless_name)]
            exact, capless = there[place]
            if file := exact.get(plain_name(file)) or capless.get(capless_name(file)):
                found[name] = place / file
                elsewhere += [name] * (place != path.parent)
                break
        else:
            raise DataError(f"{str(path)[:300]}: not found; the annotations name it, names count from {folder}")
        if (other := owners.setdefault(found[name], name)) != name:
            raise DataError(
                f"{found[name]}: the annotations mean it by {other!r:.80} and by {name!r:.80}; list it once"
            )
    if elsewhere:
        many = f"{len(elsewhere)} pictures (first: {elsewhere[0]:.80})"
        warn_once(f"{folder}: {many} are not where the annotations say; those of the same name in it are taken")
    return [found[name] for name in names]


def capless_name(name: str) -> str:
    return plain_name(name).casefold()


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def check_mask(entry: dict, size: tuple[int, int] | None, scoring: bool = False) -> dict:
    """The mask of an annotation: its polygons of three points and more, or run lengths that add up."""
    code = points_in_row(entry.get("segmentation"))
    code = code[0] if isinstance(code, list) and len(code) == 1 and isinstance(code[0], dict) else code
    if isinstance(code, dict) and {"size", "counts"} & code.keys():
        return {"segmentation": check_runs(code, size, scoring)}
    code = None if code == {} else code
    if not isinstance(code, (list, tuple, type(None))):
        raise DataError(f"'segmentation' is {in_line(code, 40)}; it must be polygons or run lengths")
    if size is None:
        raise DataError("a polygon; its image must have a height and a width")
    alone = code and not isinstance(code[0], (list, tuple, np.ndarray, Tensor))  # one polygon on its own
    polygons = []
    for polygon in map(points_in_row, [code] if alone else code or ()):
        places = floats(polygon, len(polygon) if isinstance(polygon, (list, tuple)) else 0)
        if places is None or len(places) % 2 or not within_reach(places, size):
            raise DataError(
                f"polygon {in_line(polygon)} in a picture of {size[1]}x{size[0]} pixels; it must be x y x y ..."
            )
        if len(places) >= 6:  # points and lines are left out
            polygons.append(places)
    if not scoring and not any(overlaps(places, size) for places in polygons):
        raise EmptyObject(f"empty mask {entry.get('segmentation')!r:.60}")
    return {"segmentation": polygons}


def no_mask(entry: dict, size: tuple[int, int] | None) -> dict:
    """What is read of an annotation where boxes are all that is asked for."""
    return {}


def points_in_row(value):
    """x y x y ... of a polygon that comes as points, or as an array of them; anything else as it is."""
    if isinstance(value, (np.ndarray, Tensor)) and (value.ndim == 1 or value.shape[-1] == 2):
        return value.reshape(-1).tolist()
    return in_row(value, 2)


def in_line(value, most: int = 60) -> str:
    """The beginning of what Python shows of a value, an array too, in a single line."""
    return " ".join(repr(value).split())[:most]


def overlaps(places: list[float], size: tuple[int, int]) -> bool:
    """Whether a polygon covers a pixel in a picture of this (height, width); of large ones an extent will do."""
    x, y = places[::2], places[1::2]
    across, down = min(size[1], max(x)) - max(0, min(x)), min(size[0], max(y)) - max(0, min(y))
    if across <= 0 or down <= 0:
        return False
    return across * down >= 4 or rle.area(run_lengths([places], size)) > 0


def check_runs(code: dict, size: tuple[int, int] | None, scoring: bool) -> dict:
    """A run-length code, compressed or not, that has been found to fill its picture; pycocotools would not look."""
    own, counts = floats(code.get("size", ()), 2), code.get("counts")
    if own is None or min(own) < 1:
        raise DataError(f"mask of size {code.get('size')!r:.40}; it must be the height and width of its image")
    if size and own != list(size):
        raise DataError(f"mask of {own[1]:.0f}x{own[0]:.0f} pixels, its image has {size[1]}x{size[0]}; export it again")
    counts = counts.tolist() if isinstance(counts, (np.ndarray, Tensor)) else counts
    if isinstance(counts, (str, bytes)):
        runs = read_runs(counts)
    else:
        runs = floats(counts, len(counts)) if isinstance(counts, (list, tuple)) else None
    if not runs or min(runs) < 0 or any(run % 1 for run in runs) or sum(runs) != own[0] * own[1]:
        raise DataError(f"its run lengths {counts!r:.40} do not fill {own[1]:.0f}x{own[0]:.0f} pixels; export it again")
    if not scoring and not sum(runs[1::2]):
        raise EmptyObject("mask of no pixel")
    counts = counts if isinstance(counts, (str, bytes)) else [int(run) for run in runs]
    return {"size": [int(side) for side in own], "counts": counts}


def read_runs(text: str | bytes) -> list[int] | None:
    """The run lengths in COCO's compressed form; None if it is damaged.

    Five bits of a number to a byte, lowest first, a sixth where it goes on; from the fourth number on the difference to
    the last but one.
    """
    runs, value, shift = [], 0, 0
    for byte in text.encode() if isinstance(text, str) else text:
        if not 48 <= byte < 112:
            return None
        value |= (byte - 48 & 31) << shift
        shift += 5
        if not byte - 48 & 32:
            value -= (byte - 48 & 16 and 1) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def run_lengths(code: list | dict, size: tuple[int, int]) -> dict:
    """The compressed run-length code of polygons, of an uncompressed or of a compressed mask."""
    if code == []:
        code = {"size": size, "counts": [size[0] * size[1]]}
    if isinstance(code, list):
        return rle.merge(rle.frPyObjects(code, *size))
    return rle.frPyObjects(code, *size) if isinstance(code["counts"], list) else code


def check_extents(path: Path | str, coco: dict) -> None:
    """DataError where most masks lie elsewhere than the boxes of their objects; of many, a sample is looked at."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    objects = [entry for entry in coco["annotations"] if not entry["iscrowd"]]
    sample, elsewhere = objects[:: math.ceil(len(objects) / 2000) or 1], []
    for entry in sample:
        boxes = [*rle.toBbox(run_lengths(entry["segmentation"], sizes[entry["image_id"]]))], entry["bbox"]
        if rle.iou(*(np.array([box], float) for box in boxes), [0]) < 0.25:
            elsewhere.append(entry)
    if 2 * len(elsewhere) > len(sample):
        entry = elsewhere[0]
        about = f"(first: annotation {entry['id']!r:.40}: {entry['segmentation']!r:.40}, box {entry['bbox']})"
        raise DataError(f"{path}: most masks are elsewhere than their boxes {about}; give both in pixels")


# ---------------------------------------------------------------------------------------------------------------------
# Joints


def read_annotations(path: Path, folder: Path | None = None) -> dict:
    """A file of COCO keypoints, checked (see `check_coco`); raises DataError naming what is missing or does not fit."""
    coco = load_coco(path)
    categories = [category for category in entries_of(coco, "categories", path) if category.get("keypoints")]
    kinds = []
    for category in categories:
        names = category["keypoints"]
        if not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
            raise DataError(f"{path}: category {category.get('id')!r:.40}: 'keypoints' must be the names of its joints")
        kinds.append(tuple(names))
    if not kinds:
        raise DataError(f"{path}: no category has 'keypoints', the names of its joints; it must be a COCO file of them")
    if twice := [name for name in kinds[0] if kinds[0].count(name) > 1]:
        raise DataError(f"{path}: 'keypoints' names the joint {twice[0]!r:.40} twice; give each a name of its own")
    if len(set(kinds)) != 1:
        raise DataError(f"{path}: its categories must name the same joints ('keypoints')")
    own = functools.partial(check_joints, joints=len(kinds[0]))
    content = check_coco({**coco, "categories": categories}, path, own, folder)
    check_distances(path, content["annotations"])
    for category in content["categories"]:
        try:
            category["skeleton"] = check_skeleton(category, kinds[0])
        except DataError as problem:
            raise DataError(f"{path}: category {category['id']!r}: {problem}") from None
    return content


def check_joints(entry: dict, size: tuple[int, int] | None, joints: int, scoring: bool = False) -> dict:
    """The joints of an annotation and how many are labelled, counted, though pycocotools asks the file.

    Joints without a label may be anywhere, also at NaN.
    """
    given, number = joints_in_row(entry.get("keypoints")), entry.get("num_keypoints") if scoring else None
    if given is None or isinstance(given, (list, tuple)) and not given:
        given = [0.0] * (3 * joints)
    points = floats(given, 3 * joints) or mend_joints(given, joints)
    places = [place for k in range(0, len(points), 3) if points[k + 2] > 0 for place in points[k : k + 2]]
    if size and not scoring and not within_reach(places, size):
        raise DataError(f"a joint far outside of its picture of {size[1]}x{size[0]} pixels; give x and y in pixels")
    if number is not None and floats((number,), 1) is None:
        raise DataError(f"'num_keypoints' is {number!r:.40}; give the number of labelled joints, or leave it out")
    return {"keypoints": points, "num_keypoints": len(places) // 2 if number is None else number}


def joints_in_row(value):
    """x y visibility x y ... of joints that come as triples, or as an array; anything else as it is."""
    return in_row(value.tolist() if isinstance(value, (np.ndarray, Tensor)) else value, 3)


def mend_joints(given, joints: int) -> list[float]:
    """Joints that are not all finite, with zeros for those without a label."""
    try:
        points = np.array(given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        points = np.zeros(0)
    if points.shape not in ((3 * joints,), (joints, 3)):
        length = len(given) if isinstance(given, (list, tuple)) else f"{given!r:.40}"
        raise DataError(f"'keypoints' is not 3 x {joints} numbers, x y visibility of each joint, but {length}")
    points = points.reshape(joints, 3)
    sane = (np.abs(points) <= LARGEST).all(1)
    for k in np.flatnonzero(~sane):
        if points[k, 2] != 0 and not np.isnan(points[k]).all():  # as of null three times
            wrong = points[k].tolist()
            raise DataError(f"joint {k + 1} is {wrong}; it must be three finite numbers, the last 0 if unknown")
    return np.where(sane[:, None], points, 0.0).flatten().tolist()


def check_distances(path: Path, annotations: list[dict]) -> None:
    """Warn of joints that are far from their boxes, where no cut shows them; DataError where most are."""
    joints = np.array([entry["keypoints"] for entry in annotations]).reshape(len(annotations), -1, 3)
    boxes = np.array([entry["bbox"] for entry in annotations])[:, None]  # (N, 1, 4)
    labelled = joints[..., 2] > 0
    if not labelled.any():
        return
    first = joints[labelled][0, :2].tolist()
    if ((0 <= joints[labelled]) & (joints[labelled] <= 1.01))[:, :2].all(1).mean() > 0.9:
        raise DataError(f"{path}: most joints are within 0..1 (first: {first}); give x and y in pixels of the picture")
    areas = np.array([entry["area"] for entry in annotations])
    if np.median(areas / boxes[:, 0, 2:].prod(-1)) < 0.01:
        entry = annotations[0]
        raise DataError(
            f"{path}: most areas are no hundredth of their boxes (first: annotation {entry['id']!r:.40}: "
            f"{entry['area']}, box {entry['bbox']}); OKS is measured by them: give square pixels, or leave 'area' out"
        )
    low, side = boxes[..., :2], boxes[..., 2:]
    room = side.max(-1, keepdims=True) / 2
    far = ((joints[..., :2] < low - room) | (joints[..., :2] > low + side + room)).any(-1) & labelled
    if (share := far.sum() / labelled.sum()) > 0.01:
        k = far.any(1).argmax()
        joint, entry = joints[k][far[k]][0, :2].tolist(), annotations[k]
        about = f"(first: annotation {entry['id']!r:.40}: {joint}, box {entry['bbox']})"
        if share > 0.5:
            raise DataError(f"{path}: most joints are far from their boxes {about}; give both in pixels of the picture")
        warn_once(f"{path}: {far.sum()} of {labelled.sum()} joints are far from their boxes {about}")


def check_skeleton(category: dict, names: tuple[str, ...]) -> list[list[int]]:
    """The limbs of a category as pairs of joints counted from 1, whether it has them so, from 0 or by name."""
    limbs = category.get("skeleton") or []
    by_name = {name: k for k, name in enumerate(names, 1)}
    try:
        limbs = [[by_name.get(joint, identity(joint)) for joint in limb] for limb in limbs]
        joints = {joint for limb in limbs for joint in limb}
        shift = int(0 in joints)
        good = all(len(limb) == 2 for limb in limbs) and all(joint in range(len(names) + 1 - shift) for joint in joints)
    except (TypeError, ValueError):
        good = False
    if not good:
        given = f"{category['skeleton']!r:.60}"
        raise DataError(f"'skeleton' must be pairs of joints 1..{len(names)}, not {given}; or remove it")
    return [[int(joint) + shift for joint in limb] for limb in limbs]


# In whatever case, as a word or where a word begins or ends; whatever comes behind them is the same for both.
SIDES = [("left", "right"), ("l", "r"), ("link", "recht"), ("gauche", "droite"), ("gauche", "droit")]
SIDES += [("izquierd", "derech"), ("izq", "der"), ("esquerd", "direit"), ("sinistr", "destr"), ("sx", "dx")]
SIDES += [("izdo", "dcho"), ("esq", "dir"), ("лев", "прав"), ("左", "右")]
SIDES += [(right, left) for left, right in SIDES]


def mirror(names: tuple[str, ...]) -> list[int]:
    """The joint that each one is in a mirror, told by the names: left_eye, LEye, eye.L, "Left Eye", leftEye, eyeL ...

    The other name must be there and point back; otherwise a joint is its own mirror image.
    """
    names = tuple(name.strip() for name in names)
    bare = tuple(re.sub(r"^\d+[\W_]*", "", name) for name in names)
    if all(bare) and len({*bare}) == len(names):  # 1_left_eye and 2_right_eye; numbers alone tell no joints apart
        names = bare
    exact = {name.lower(): k for k, name in enumerate(names)}
    known = {re.sub(r"[\W_]", "", name): k for name, k in exact.items()}

    def other(own: int, name: str) -> int | None:
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+|[\W\d_]+", name)
        words = [word.lower() for word in words]
        ways = [[dict(SIDES).get(word, word) for word in words]]
        for k, word in enumerate(words):
            for side, opposite in SIDES:
                if word.startswith(side):
                    ways.append([*words[:k], opposite + word[len(side) :], *words[k + 1 :]])
                if word.endswith(side):
                    ways.append([*words[:k], word[: -len(side)] + opposite, *words[k + 1 :]])
        ways = ["".join(way) for way in ways]
        found = [exact.get(way) for way in ways]
        found += [known.get(re.sub(r"[\W_]", "", way)) for way in ways]  # left_eye and right-eye are a pair
        return next((k for k in found if k not in (None, own)), None)

    others = [other(k, name) for k, name in enumerate(names)]
    return [k if n is None or others[n] != k else n for k, n in enumerate(others)]


def one_sided(names: tuple[str, ...], others: list[int]) -> list[str]:
    """The joints that are left or right by their names and are no other joint in a mirror."""
    words = "|".join(side for side, _ in SIDES if len(side) > 3 or side in "左右")
    return [name for k, name in enumerate(names) if others[k] == k and re.search(words, name, re.IGNORECASE)]


# ---------------------------------------------------------------------------------------------------------------------
# Results of detectors and pose estimators


def list_results(
    detections: Path | str | Sequence[dict], coco: dict
) -> tuple[Path | str, Sequence[dict], Tensor, Tensor]:
    """COCO results, what to call them in a message, and the places (M,) of their pictures and categories in `coco`.

    Those of unlisted categories are left out, as in pycocotools; all of them with a warning. Raises ValueError if a
    result is on no picture of the ground truth, or has no category.
    """
    if hasattr(detections, "dataset"):  # pycocotools' COCO
        detections = detections.dataset["annotations"]
    given = isinstance(detections, (str, Path))
    path, results = (detections, load_coco(detections)) if given else ("detections", detections)
    if not (isinstance(results, (list, tuple)) and all(issubclass(kind, dict) for kind in set(map(type, results)))):
        raise ValueError(f"{path}: it must be a list of COCO results")
    image, category = places(results, "image_id", coco["images"]), places(results, "category_id", coco["categories"])
    if (image < 0).any():
        k = int((image < 0).nonzero()[0])
        raise ValueError(f"{path}: result {k}: image {results[k].get('image_id')!r:.40} is not in the ground truth")
    known = category >= 0
    if known.all():
        return path, results, image, category
    for k in (~known).nonzero().flatten().tolist():
        if identity(named := results[k].get("category_id")) is None:
            cure = "it must be one of the ground truth's"
            raise ValueError(f"{path}: result {k}: 'category_id' is {named!r:.40}; {cure}")
    if not known.any():
        first = results[0]["category_id"]
        warn_once(f"{path}: no result is of a category of the ground truth (first: {first!r:.40})")
    results = [result for result, good in zip(results, known.tolist()) if good]
    return path, results, image[known], category[known]


def places(results: Sequence[dict], key: str, known: list[dict]) -> Tensor:
    """(M,) int64, where among the `known` entries the id stands that each result has under `key`; -1 if nowhere."""
    row = {entry["id"]: k for k, entry in enumerate(known)}
    try:
        found = np.fromiter(map(row.get, [result[key] for result in results], itertools.repeat(-1)), np.int64)
    except (KeyError, TypeError):
        found = np.full(len(results), -1)
    for k in np.flatnonzero(found < 0):  # or the id is written in another way
        found[k] = row.get(identity(results[k].get(key)), -1)
    return torch.from_numpy(found)


def column(results: Sequence[dict], key: str, width: int, path: Path | str, nan: bool = False) -> Tensor:
    """(M, width) float64, the numbers that each result has under `key`; ValueError names the first that has not.

    nan: whether they may be infinite or none.
    """

    def read(some: Sequence[dict]) -> Tensor:
        values = [result[key] for result in some]
        if width == 1:
            flat = map(float, values)  # None is no number, to NumPy it is NaN
        elif {*map(len, values)} != {width} or {str, dict} & {*map(type, values)}:
            raise ValueError(f"not {width} numbers")
        elif isinstance(values[0], Tensor):
            flat = torch.stack(values).flatten().tolist()
        else:
            flat = itertools.chain.from_iterable(values)
        values = torch.from_numpy(np.fromiter(flat, np.float64, width * len(some))).view(-1, width)
        if not (nan or values.isfinite().all()):
            raise ValueError("not finite")
        return values

    wrong = KeyError, TypeError, ValueError, OverflowError, RuntimeError
    try:
        return read(results) if results else torch.zeros(0, width, dtype=torch.float64)
    except wrong:  # find out which, or read each on its own if they are of several kinds
        rows = []
    for k, result in enumerate(results):
        try:
            rows.append(read([result]))
        except wrong:
            what = f"{width} finite numbers" if width > 1 else "a number"
            raise ValueError(f"{path}: result {k}: {key!r} is {in_line(result.get(key))}; it must be {what}") from None
    return torch.cat(rows)
