"""Pictures as they lie in files: whatever cameras and labelling tools write, as pixels.

Loaders of the three scripts decode by these functions; what cannot be read is a `DataError` of one line that names the
file and the cure.
"""

import atexit
import contextlib
import fcntl
import functools
import hashlib
import io
import mmap
import os
import struct
import sys
import tempfile
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, PngImagePlugin  # comes with torchvision
from torch import Tensor

from evolve import DataError, warn_once

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)  # no line for each tag that it does not know
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28  # profiles and notes of some megabytes


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
            elif deep(picture, path):
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
    picture = Image.open(io.BytesIO(path.read_bytes()))
    if picture.tag_v2.get(284) == 2 and max(picture.tag_v2.get(258, (8,))) > 8:
        raise DataError(f"{path}: 16 bits a channel in separate planes; save its channels side by side, or with 8 bits")
    return picture


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
    if isinstance(sys.exception(), PermissionError):
        return DataError(f"{path}: no right to read it; mend that")
    unread = f"not a readable image, or cut off; save it as {kinds}"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(4) in (b"II*\0", b"MM\0*"):
            unread = f"not a readable image: a TIFF cut off, or of a kind that is not read; save it as {kinds}"
    return DataError(f"{path}: {unread if os.path.exists(path) else 'not found'}")


def deep(picture: Image.Image, path: Path) -> bool:
    """Whether a colour picture has 16 bits a channel, of which PIL reads the upper eight alone, or less."""
    if picture.format == "JPEG2000" and picture.mode[:3] == "RGB":
        _, _, codestream = path.read_bytes().partition(b"\xff\x4f\xff\x51")
        return codestream[38] & 127 > 7  # bits of the first channel, less one
    tiles = [] if picture.mode[:3] != "RGB" else [(codec, str(args)) for codec, _, _, args in picture.tile]
    return any(";16" in args or codec == "ppm" and "65535" in args for codec, args in tiles)


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


def scaled(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture (3, h, w) uint8 in another size, smoothed where it shrinks."""
    if picture.shape[-2:] == size:
        return picture
    if picture.is_cuda:  # where it takes no integers
        pixels = F.interpolate(picture.unsqueeze(0).float(), size, mode="bicubic", antialias=True)
        return pixels[0].round().clamp(0, 255).to(torch.uint8)
    return F.interpolate(picture.unsqueeze(0), size, mode="bicubic", antialias=True)[0]


def warn_of_shared(pictures: dict[str, list[Path]]) -> None:
    """Warn of pictures by which a loss is trained, or chosen, and tested."""
    for split, others in (("test", ("train", "val")), ("val", ("train",))):
        known = {path for other in others for path in pictures.get(other, ())}
        if shared := [path for path in pictures.get(split, ()) if path in known]:
            many = f"{len(shared)} {split} pictures (first: {shared[0]})"
            warn_once(f"{many} are in another split, too; it tests nothing")


def fingerprint(kind: str, paths: Iterable[Path]) -> str:
    """Tells apart what was made of files: their names, sizes and times."""
    found = ((path.absolute(), path.stat()) for path in paths)
    return "\n".join([kind, *(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in found)])


def plain_name(name: str) -> str:
    """A file's name so that it can be compared: in any locale, and with accents written in any way."""
    if name.isascii():
        return name
    return unicodedata.normalize("NFC", name.encode(errors="surrogateescape").decode(errors="replace"))


@functools.cache
def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


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
