"""What the values of segmentation masks mean: palettes, grey values, colour tables, as labelling tools write them.

`find_meaning` tells it for a data set, `read_label` reads a mask by it. What has two meanings is refused by one line.
"""

import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import shapes
from data.layouts import inside, read_lines
from data.pictures import BROKEN, deep, opened, threads, turning, unreadable
from evolve import DataError, note, warn_once

IGNORE = 255
CLASSES = {"shapes": len(shapes.CLASSES), "voc": 21, "cityscapes": 19, "folder": None}  # None: as found in its masks
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # label id of class 0..18


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading a mask


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
            if deep(picture, path):
                raise DataError(f"{path}: RGB with 16 bits a channel; save masks with 8, or as grey values")
            if getattr(picture, "n_frames", 1) > 1:
                size = picture.size
                picture.seek(1)
                if picture.size == size:  # a smaller one is an overview, as in a GeoTIFF
                    raise DataError(f"{path}: {picture.n_frames} pictures in one file; save a mask as one")
                picture.seek(0)
            step = grey_step(picture)  # of the file: a picture that is turned has no tiles any more
            inverted = picture.format == "TIFF" and picture.tag_v2.get(262) == 0
            turn, upright = turning(picture)
            if turn is not None and upright == listed:
                picture = picture.transpose(turn)
            if picture.mode == "P" and palette:
                picture = picture.convert("RGB")
            pixels = np.array(picture)
            if step != 1:
                pixels = (pixels / step).round().astype(pixels.dtype)
            if picture.mode == "L" and inverted:  # white is 0: PIL shows what the file means, not what it holds
                pixels = 255 - pixels
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
    """Whether the picture is, or may be, compressed with loss: JPEG, also inside of a TIFF, lossy WebP and the like."""
    lossy_webp = picture.format == "WEBP" and b"VP8L" not in path.read_bytes()
    lossy = picture.format in ("JPEG", "JPEG2000", "AVIF")
    return lossy or lossy_webp or picture.info.get("compression") == "jpeg"


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


# ---------------------------------------------------------------------------------------------------------------------
# Finding out what masks mean


def find_meaning(args, pairs: dict[str, list[tuple[Path, Path]]]) -> Meaning:
    """What the values of label maps stand for: by the data set, `--classes`, a labelmap.txt, or as found in them."""
    masks = list(dict.fromkeys(label for split in pairs.values() for _, label in split))
    if args.data == "cityscapes":
        kinds = [*threads().map(distinct_values, masks[:: math.ceil(len(masks) / 8)])]
        values = {value for kind in kinds for value in kind.shares}
        if 255 in values and values.isdisjoint(range(19, 34)):  # classes 0..18
            raise DataError(f"{masks[0]}: no label ids of Cityscapes, here or in others; take --data folder")
        return Meaning(19, {number: k for k, number in enumerate(CITYSCAPES_IDS)}, {}, rest=IGNORE)
    source, table = args.classes, inside(args.data_root, "labelmap.txt")
    if source is None and args.data == "folder" and table.is_file():
        source = table
    if source is None:
        return found_meaning(masks, None) if args.data == "folder" else plain_meaning(CLASSES[args.data])
    number, colours = read_classes(source)
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
    if number == 2 and {1, 255} <= values and not any({1, 255} <= kind.shares.keys() for kind in kinds):
        mixed = sum(255 in kind.shares for kind in kinds)
        warn_once(f"{args.data_root}: 255 is ignored in {mixed} masks, others have class 1; save binary ones all alike")
    if args.data == "folder" and shown:  # all grey, saved as RGB: some greys are colours of VOC's palette, too
        return plain_meaning(number)._replace(colours={})
    return plain_meaning(number)


def read_classes(source: int | Path) -> tuple[int, list[int]]:
    """The number of classes, and their colours if `source` is a file with a colour on each line.

    A line is a name, or a name and three numbers: `cat:64,0,0::` as CVAT writes it, `cat,64,0,0` below the head of a
    table, `64 0 0 cat`, `cat #400000`, with whatever brackets and quotes. Black comes first. labelme's `__ignore__` is
    no class.
    """
    if isinstance(source, int):
        return source, []
    lines = [line for line in read_lines(Path(source)) if not re.match(r"#(?!\w{6}\W)", line) and line != "__ignore__"]
    lines = lines[1:] if lines and is_head(lines[0]) else lines
    plain = [colour_line(line) for line in lines]
    found = [re.fullmatch(r"(.+?)[:,\s]\s*(\d+)[,\s]+(\d+)[,\s]+(\d+)\b.*", line) for line in plain]
    no_class = r"[\[\]{}]|- |.*(?<!:)[:\[{]$|(?i:pixel value)"
    if wrong := [line for line, match in zip(lines, found) if not match and re.match(no_class, line)]:
        raise DataError(f"{source}: '{wrong[0]:.40}' is no class; give one name a line, no JSON, YAML or other table")
    if wrong := [line for line in plain if re.search(r"\D\d+([,\s]+\d+){3}", line)]:
        raise DataError(f"{source}: '{wrong[0]:.40}': which three of these numbers? give name, red, green and blue")
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


def is_head(line: str) -> bool:
    """Whether a line of a table of classes says what is in its columns, as `name,r,g,b` or `class_id class_name`."""
    name = r"(class|label|category)?_?names?|class(es)?|labels?|categor(y|ies)"
    number = r"(class|label|category|train)?_?(id|idx|index)"
    colour = r"r|g|b|red|green|blue|value|((class_)?colou?r_?)?(rgb)?"
    words = re.findall(r"\w+", line.lower())
    known = all(re.fullmatch(f"{name}|{number}|{colour}|parts|actions", word) for word in words)
    return known and any(re.fullmatch(name, word) for word in words)


def colour_line(line: str) -> str:
    """A line of a table of classes with its colour, where it has one, in three numbers at the end, between commas."""
    line = re.sub(r"#([0-9a-fA-F]{6})\b", lambda hexadecimal: ",".join(map(str, bytes.fromhex(hexadecimal[1]))), line)
    line = re.sub(r"[,:\s]*(?:[\"'()\[\]=|;]|\brgb(?=\())+[,:\s]*", ",", line).strip(",")
    return re.sub(r"^(\d+)[,\s]+(\d+)[,\s]+(\d+)[,:\s]+(\D.*)", r"\4,\1,\2,\3", line)


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
