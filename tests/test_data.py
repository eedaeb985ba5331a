"""Loading: pictures as people have them, masks as tools write them, splits of any size, in all three scripts."""

import fcntl
import itertools
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
import torchvision
from conftest import ready, refused
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, features

import evolve
import search_det
import search_pose
import search_seg
from data import shapes
from data.coco import load_coco, picture_size
from data.layouts import inside, read_lines
from data.masks import find_meaning, found_meaning, plain_meaning, read_classes, read_label, read_values
from data.pictures import decode, deep, fingerprint, group_size, read_pictures, shared_bytes
from evolve import DataError
from search_seg import IGNORE, Pictures

SCRIPTS = {"seg": search_seg, "det": search_det, "pose": search_pose}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("data") / "shapes", splits={"train": 24, "val": 6, "test": 6})


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def arguments(script, root, *argv):
    return script.parse_arguments(["--data-root", str(root), "--device", "cpu", "--workers", "1", *map(str, argv)])


def save(pixels, path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, **how)
    return path


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Pictures: kept or not, shared, ahead of the step


def four_pictures(reads=None, **how):
    shapes_of_all = [(3, 5, 8), (3, 7, 2), (3, 1, 1), (3, 6, 6)]
    whole = [torch.randint(0, 255, shape, generator=torch.Generator().manual_seed(1)).byte() for shape in shapes_of_all]

    def read(numbers):
        assert numbers, "nvJPEG takes no empty list"
        if reads is not None:
            reads.extend(numbers)
        return [whole[k] for k in numbers]

    return whole, Pictures(read, 4, shapes=shapes_of_all, fill=9, **how)


@pytest.mark.parametrize("kind", ["read anew", "in memory", "in a shared file"])
def test_some_pictures_on_one_canvas(kind, monkeypatch):
    reads = []
    whole, pictures = four_pictures(reads)
    if kind == "in a shared file":
        monkeypatch.setattr(search_seg, "SMALL", 0)
    if kind != "read anew":
        assert pictures.settle(lambda: "four") is pictures, "too unlike in size for one tensor"
    assert len(reads) == (4 if kind == "in memory" else 0) and bool(pictures.nbytes) == (kind != "read anew")
    got = pictures[torch.tensor([1, 3, 1])]
    assert got.shape[:2] == (3, 3) and got.shape[2] >= 7 and got.shape[3] >= 6
    for canvas, k in zip(got, (1, 3, 1)):
        c, h, w = whole[k].shape
        assert torch.equal(canvas[:, :h, :w], whole[k]) and (canvas[:, h:] == 9).all() and (canvas[:, :, w:] == 9).all()
    assert torch.equal(pictures[1:3][1][:, :1, :1], whole[2])
    if kind == "in a shared file":
        before = len(reads)
        pictures[torch.tensor([1, 3, 1])]
        assert len(reads) == before and 0 not in reads, "decoded once, and only what was asked for"
        _, other = four_pictures(reads)
        assert torch.equal(other.settle(lambda: "four").take([3])[0], whole[3]) and len(reads) == before
        _, other = four_pictures(reads)
        assert torch.equal(other.settle(lambda: "others").take([3])[0], whole[3]) and len(reads) == before + 1


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_one_broken_picture_ends_no_search(script, monkeypatch, capsys):
    whole, broken = [torch.full((3, 5, 5 + 90 * k), k).byte() for k in range(4)], {2}

    def read(numbers):
        if gone := broken.intersection(numbers):
            raise script.DataError(f"{min(gone)}.jpg: cut off")
        return [whole[k] for k in numbers]

    def make():
        return script.Pictures(read, 4, shapes=[tuple(x.shape) for x in whole], fill=7, group=4)

    with pytest.raises(script.DataError, match="2.jpg: cut off"):
        make().settle(lambda: "few and small ones are read at once")
    monkeypatch.setattr(script, "SMALL", 0)
    for pictures in (make(), make().settle(lambda: "read when they are used")):
        for _ in range(2):
            got = pictures.take([1, 2, 3, 2])
            assert (got[1] == 7).all() and all(map(torch.equal, got[::2], [whole[1], whole[3]]))
            assert [x.shape for x in got] == [whole[k].shape for k in (1, 2, 3, 2)]
        assert capsys.readouterr().err == "warning: 2.jpg: cut off; a blank picture stands for it\n"
        broken.add(0)
        with pytest.raises(script.DataError, match="0.jpg: cut off"):
            pictures.take([0, 1])
        broken.remove(0)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_training_goes_on_over_a_broken_picture(name, tmp_path, capsys):
    root = shapes.write_shapes(tmp_path / "shapes", splits={"train": 24, "val": 6, "test": 6})
    task, draw = make(name, root, "--memory", "0", "--batch", "4")
    want = [*itertools.islice(draw(3), 20)]
    line = (root / "ImageSets/Segmentation/train.txt").read_text().split()[5]
    path = next((root / "JPEGImages").glob(f"{line}.*")).resolve()
    copies = [file for file in (root / "train2017").glob("*") if file.read_bytes() == path.read_bytes()]
    for file in (path, *copies):
        file.write_bytes(file.read_bytes()[:-200])
    for one, other in zip(want, itertools.islice(draw(3), 20)):
        assert [x.shape for x in flat(one)] == [x.shape for x in flat(other)]
    assert "a blank picture stands for it" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["header of the picture", "header of the mask", "class", "size", "end of the picture"])
def test_broken_pairs_are_blank(tmp_path, what, capsys):
    for k in range(300):
        save(noise(20 + k % 2, 30, k), tmp_path / f"{k}.png")
        save(np.full((20 + k % 2, 30), k % 3, np.uint8), tmp_path / f"{k}m.png")
    image, mask = tmp_path / "299.png", tmp_path / "299m.png"
    {
        "header of the picture": lambda: image.write_bytes(b"?"),
        "header of the mask": lambda: mask.write_bytes(b""),
        "class": lambda: save(np.full((21, 30), 9, np.uint8), mask),
        "size": lambda: save(np.zeros((40, 60), np.uint8), mask),
        "end of the picture": lambda: image.write_bytes(image.read_bytes()[:-300]),
    }[what]()
    split = search_seg.read_split(
        [(tmp_path / f"{k}.png", tmp_path / f"{k}m.png") for k in range(300)], plain_meaning(3), memory=0
    )
    images, labels = split.images.take([299])[0], split.labels.take([299])[0]
    assert images.shape[1:] == labels.shape and "299" in capsys.readouterr().err
    assert (labels == (2 if "end" in what else IGNORE)).all() and images.any() == (what == "class")
    search_seg.batch_scale_crop_flip(split, torch.tensor([299, 3]), 16, (0.5, 2.0), torch.Generator())


@pytest.mark.parametrize("width", [6, 5])
def test_small_pictures_of_one_size_become_a_tensor(width):
    """Of others each is kept by itself: a network would see where a picture ends and the canvas begins."""
    whole = [torch.full((3, 5, 6 if k % 2 else width), k).byte() for k in range(4)]
    pictures = Pictures(lambda numbers: [whole[k] for k in numbers], 4, shapes=[tuple(x.shape) for x in whole])
    settled = pictures.settle(lambda: "")
    if width == 6:
        assert torch.equal(settled, torch.stack(whole))
    else:
        assert settled is pictures and all(map(torch.equal, pictures.take(range(4)), whole))


def test_windows_of_pictures():
    whole, pictures = four_pictures()
    got = pictures.stack(pictures.take([0, 3]), [(2, 6), (0, 1)], 4, 4)
    assert torch.equal(got[0, :, :3, :2], whole[0][:, 2:5, 6:8]) and (got[0, :, 3:] == 9).all()
    assert torch.equal(got[1], whole[3][:, 0:4, 1:5])


def test_the_last_process_removes_the_shared_file(tmp_path):
    code = (
        "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from data.pictures import shared_bytes; t = shared_bytes('k', 100); t[5] += 1\n"
        "print(t[5].item(), flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    here = {"cwd": Path(search_seg.__file__).parent, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **here) as one:
        assert one.stdout.readline() == "1\n"
        with subprocess.Popen(command, **here) as two:
            assert two.stdout.readline() == "2\n", "the same bytes"
            one.communicate("\n")
            assert len([*tmp_path.glob("autoloss-*")]) == 1, "still in use"
            two.communicate("\n")
    assert not [*tmp_path.glob("autoloss-*")]
    left = tmp_path / f"autoloss-zero-{os.getuid()}-0"
    left.write_bytes(b"of a process that was killed")
    tempfile.tempdir = str(tmp_path)
    assert shared_bytes("k", 100)[5] == 0 and not left.exists()


def test_without_room_each_use_decodes(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(search_seg, "SMALL", 0)
    whole, pictures = four_pictures()
    pictures = pictures.settle(lambda: "no room")
    assert pictures.nbytes == 0 and torch.equal(pictures.take([3])[0], whole[3])
    assert not [*Path(tempfile.gettempdir()).iterdir()]


def make(name, root, *argv):
    """A split for training, and batches of it."""
    script = SCRIPTS[name]
    args = arguments(script, root, *argv)
    task = ready(getattr(script, name.capitalize() + "Task")(args))
    draw = {"seg": lambda seed: task.batches("ce", task.proxy, seed)}.get(name, lambda s: task.batches(task.proxy, s))
    return task, draw


def flat(batch):
    """All tensors of a batch."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    return [tensor for part in (batch.values() if isinstance(batch, dict) else batch) for tensor in flat(part)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_streamed_batches_are_those_of_kept_pictures(name, root, monkeypatch):
    more = ["--metric", "segm"] if name == "det" else []
    streamed, draw = make(name, root, "--memory", "0", *more)
    train = streamed.data["train"]
    assert isinstance(train.images, SCRIPTS[name].Pictures) and train.images.nbytes == 0
    want = [*itertools.islice(draw(3), 4)]
    assert not train.images.coming, "what was read ahead in vain is gone"
    monkeypatch.setattr(SCRIPTS[name], "SMALL", 0)
    kept, again = make(name, root, *more)
    assert kept.data["train"].images.nbytes > 0
    for one, other in zip(want, itertools.islice(again(3), 4)):
        assert len(flat(one)) == len(flat(other)) and all(map(torch.equal, flat(one), flat(other)))
    monkeypatch.undo()
    _, whole = make(name, root, *more)
    for one, other in zip(want, itertools.islice(whole(3), 4)):  # seg's windows are cut before they are sampled
        images, others = flat(one)[0], flat(other)[0]
        assert (images - others).abs().mean() < 1e-3 and (name == "seg" or torch.equal(images, others))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("side, alone", [(32, False), (400, True)])
def test_large_pictures_are_changed_one_by_one(name, side, alone):
    script, seen = SCRIPTS[name], []

    def change(images, factor):
        seen.append(len(images))
        return images * factor

    images, factor = torch.rand(4, 3, side, side), torch.rand(4, 1, 1, 1)
    assert torch.equal(script.map_pictures(change, images, factor), images * factor)
    assert sorted(seen) == ([1] * 4 if alone else [4])
    assert torch.equal(script.normalise(images), (images - script.MEAN) / script.STD)


@pytest.mark.parametrize("name", SCRIPTS)
def test_reading_ahead_is_not_seen_by_a_checkpoint(name, root):
    _, draw = make(name, root, "--memory", "0")
    batches = draw(5)
    stream = iter(batches)
    next(stream), next(stream)
    states = [generator.get_state() for generator in batches.generators]
    want = flat(next(stream))
    other = draw(99)
    for generator, state in zip(other.generators, states):
        generator.set_state(state)
    assert all(map(torch.equal, want, flat(next(iter(other)))))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scores_do_not_depend_on_where_pictures_are(name, root):
    scores = []
    for memory in ("0", "1"):
        task, _ = make(name, root, "--memory", memory, "--proxy-steps", "2", "--batch", "4")
        scores.append(task.train({"seg": "ce", "det": "ce+l1", "pose": "mse"}[name]))
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


def test_scores_of_pictures_of_unlike_sizes_do_not_depend_on_where_they_are(tmp_path):
    """Bit for bit; no end of a picture counts as a boundary."""
    for split, number in (("train", 4), ("val", 6)):
        for k in range(number):
            size = (64, 64) if k % 2 else (48, 56)
            save(noise(*size, k), tmp_path / f"images/{split}/{k}.png")
            mask = np.zeros(size, np.uint8)
            mask[8:30, 10 + k : 40] = 1
            save(mask, tmp_path / f"masks/{split}/{k}.png")
    scores = []
    for memory in ("0", "1"):
        flags = ["--data", "folder", "--model", "small", "--crop", "32", "--memory", memory, "--metric", "bf1"]
        task = search_seg.SegTask(arguments(search_seg, tmp_path, *flags))
        task.load()
        assert isinstance(task.data["test"].labels, Pictures)
        scores.append(task.test(task.network(task.proxy, 0), task.data["test"]))
        label = task.data["train"].labels.take([0])[0]
        weights = search_seg.with_weights(task.data["train"], search_seg.distance_weights, 2).weights.take([0])[0]
        assert torch.equal(weights, search_seg.distance_weights(label[None], 2)[0])
    assert scores[0] == scores[1] and scores[0]["bf1"] > 0


def test_weights_of_losses_are_made_as_pictures_are_read(root):
    kept, _ = make("seg", root)
    streamed, _ = make("seg", root, "--memory", "0")
    for name in ("wce", "dpce"):
        want = next(iter(kept.batches(name, kept.proxy, 0)))[2]
        got = next(iter(streamed.batches(name, streamed.proxy, 0)))[2]
        assert (want - got).abs().mean() < 0.02 * want.abs().mean(), name


def test_one_large_photograph_costs_only_itself(tmp_path):
    for k in range(6):
        size = (2300, 3000) if k == 2 else (60, 80)
        save(np.full((*size, 3), 40 * k, np.uint8), tmp_path / f"{k}.png")
        save(np.full(size, k, np.uint8), tmp_path / f"{k}m.png")
    pairs = [(tmp_path / f"{k}.png", tmp_path / f"{k}m.png") for k in range(6)]
    split = search_seg.read_split(pairs, plain_meaning(6))
    assert split.sizes[2].tolist() == [1570, 2048] and split.sizes[0].tolist() == [60, 80]
    assert sum(part.nbytes for part in split if part is not None) < 1.01 * 4 * (1570 * 2048 + 5 * 4800) + 100
    g = torch.Generator().manual_seed(0)
    images, labels = search_seg.batch_scale_crop_flip(split, torch.tensor([2, 0]), 32, (0.5, 2.0), g)
    assert (labels[0] == 2).all() and torch.allclose(images[0], torch.tensor(80.0), atol=0.1)
    assert set(labels[1].unique().tolist()) <= {0, IGNORE}


def test_windows_of_unlike_pictures_are_those_of_a_canvas(tmp_path):
    """What is cut first and sampled then is what sampling the whole picture gives."""
    g = np.random.default_rng(0)
    pairs = []
    for k, (h, w) in enumerate([(300, 260), (40, 270), (310, 30), (290, 300)]):
        coarse = Image.fromarray(noise(h // 9 + 1, w // 9 + 1, k)).resize((w, h))
        image = save(np.asarray(coarse), tmp_path / f"{k}.png")
        label = np.kron(g.integers(0, 5, (h // 5 + 1, w // 5 + 1)), np.ones((5, 5)))[:h, :w]
        pairs.append((image, save(label.astype(np.uint8), tmp_path / f"{k}m.png")))
    split = search_seg.read_split(pairs, plain_meaning(5))
    assert isinstance(split.images, Pictures)
    whole = search_seg.Split(split.images[:], split.labels[:], split.sizes)
    index = torch.arange(4).repeat(10)
    results = []
    for some in (split, whole):
        generator = torch.Generator().manual_seed(4)
        results.append(search_seg.batch_scale_crop_flip(some, index, 48, (0.5, 2.0), generator))
    (images, labels), (want_images, want_labels) = results
    assert (images - want_images).abs().max() < 0.6 and (labels != want_labels).float().mean() < 0.01
    assert (labels == IGNORE).float().mean() > 0.05


def test_memory_is_shared_out_between_splits(root):
    whole = make("seg", root)[0].data
    nbytes = {name: sum(x.nbytes for x in split[:2]) for name, split in whole.items()}
    data = make("seg", root, "--memory", (nbytes["train"] + 10) / 2**30)[0].data
    assert [isinstance(split.images, torch.Tensor) for split in data.values()] == [True, False, False]
    assert evolve.machine_memory() > 0.5


# Pictures as cameras and tools write them


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_pictures_are_turned_as_exif_says(tmp_path, orientation, suffix):
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:16, 16:] = 250  # the upper right corner
    picture = Image.fromarray(upright)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    stored = picture if undo is None else picture.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    pixels = decode(path)
    assert pixels.shape == (48, 32, 3) and (pixels.int() - torch.from_numpy(upright).int()).abs().max() < 40
    if orientation >= 5 and suffix == "jpg":  # a tool that knows nothing of EXIF lists it as it lies
        assert decode(path, listed=(32, 48)).shape == (32, 48, 3)
        with pytest.raises(search_det.DataError, match="listed as 7x9"):
            decode(path, listed=(9, 7))


@pytest.mark.parametrize("tags", [b"Exif\0\0nonsense, and more of it", b"Exif\0\0II*", b"Exif\0\0"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_broken_tags_say_nothing_of_the_pixels(tmp_path, tags, suffix):
    Image.fromarray(np.full((8, 9, 3), 200, np.uint8)).save(tmp_path / f"a.{suffix}", exif=tags)
    pixels = decode(tmp_path / f"a.{suffix}")
    assert pixels.shape == (8, 9, 3) and (pixels.float() - 200).abs().max() < 9


@pytest.mark.parametrize("suffix", ["avif", "jp2", "tga"])
def test_rarer_kinds_of_pictures(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("PIL is without it")
    root = write_folder(tmp_path, [index_map()] * 4, suffixes=(suffix, "png"))
    pairs = search_seg.folder_pairs(root)
    split = search_seg.read_split(pairs["train"], plain_meaning(21))
    assert [path.suffix for path, _ in pairs["train"]] == [f".{suffix}"] * 2 and split.images.float().std() > 40


def test_pictures_in_other_modes(tmp_path):
    pixels = noise(8, 9)
    for suffix in ("jpg", "png"):
        Image.fromarray(pixels).save(path := tmp_path / f"a.{suffix}")
        assert torch.equal(decode(path, "RGB"), decode(path))
        with Image.open(path) as picture:
            assert torch.equal(decode(path, "L"), torch.from_numpy(np.array(picture.convert("L"))))


def test_names_in_no_encoding(tmp_path):
    """As from an archive that was packed on another system."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "bilder-") + b"\xfc"))
    folder.mkdir()
    for suffix in ("jpg", "png"):
        Image.fromarray(noise(8, 9)).save(folder / f"a.{suffix}")
    deep = cv2.imencode(".png", noise(8, 9).astype(np.uint16) * 257)[1].tobytes()
    (folder / "b.png").write_bytes(deep)
    assert all(decode(folder / name).shape == (8, 9, 3) for name in ("a.jpg", "a.png", "b.png"))
    assert shared_bytes(fingerprint("x", folder.iterdir()), 10) is not None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_plain_tiffs_are_turned_rightly(tmp_path, orientation):
    """Uncompressed and grey, as PIL would map them into memory."""
    values = np.arange(600, dtype=np.uint8).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={0x0112: orientation})
    Image.fromarray(values).save(tmp_path / "b.tif", tiffinfo={0x0112: orientation}, compression="tiff_lzw")
    want, _ = read_values(tmp_path / "b.tif")
    got, _ = read_values(tmp_path / "a.tif")
    assert np.array_equal(got, want) and got.shape == ((30, 20) if orientation > 4 else (20, 30))
    assert torch.equal(decode(tmp_path / "a.tif"), decode(tmp_path / "b.tif"))


def test_a_mask_goes_with_its_turned_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = noise(48, 32)
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "a.jpg", exif=exif)
    for mask, size in ((np.zeros((48, 32), np.uint8), (48, 32)), (np.zeros((32, 48), np.uint8), (32, 48))):
        mask[:9, :5] = 1
        save(mask, tmp_path / "a.png")
        split = search_seg.read_split([(tmp_path / "a.jpg", tmp_path / "a.png")] * 2, plain_meaning(2))
        assert split.images.shape == (2, 3, *size) and split.labels[0].sum() == 45
    save(np.zeros((30, 48), np.uint8), tmp_path / "a.png")
    with pytest.raises(DataError, match="a.png: mask of 48x30 pixels, its image has 32x48"):
        search_seg.read_split([(tmp_path / "a.jpg", tmp_path / "a.png")], plain_meaning(2))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_sizes_are_told_without_decoding(tmp_path, suffix, monkeypatch):
    path = save(noise(20, 30), tmp_path / f"a.{suffix}")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert picture_size(path) == search_seg.full_size(path, path) == (20, 30)


@pytest.mark.parametrize("side", [32, 48])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_with_the_tag_of_its_picture(tmp_path, orientation, side):
    """Both lie in their files as the camera held them, and both say so: sizes do not tell, where they are square."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((32, side, 3), np.uint8)
    pixels[:9, :5] = 200
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    Image.fromarray(pixels[..., 0] // 200).save(tmp_path / "a.png", exif=exif)
    split = search_seg.read_split([(tmp_path / "a.jpg", tmp_path / "a.png")] * 2, plain_meaning(2))
    assert split.labels[0].sum() == 45 and (split.images[0, 0][split.labels[0] == 1] > 120).all()
    assert (split.images[0, 0] > 150).sum() < 60


def test_a_turned_mask_in_which_the_tag_was_left(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:16, 16:] = 200
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    Image.fromarray(upright[..., 0] // 200).save(tmp_path / "a.png", exif=exif)
    split = search_seg.read_split([(tmp_path / "a.jpg", tmp_path / "a.png")] * 2, plain_meaning(2))
    assert split.labels.shape == (2, 48, 32) and torch.equal(split.images[0, 0] > 100, split.labels[0] == 1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("most", [255, 4095, 65535])
def test_sixteen_bits_are_scaled(tmp_path, suffix, most):
    ramp = np.linspace(0, most, 64).astype(np.uint16)[None].repeat(8, 0)
    pixels = decode(save(ramp, tmp_path / f"a.{suffix}"))
    assert pixels.shape == (8, 64, 3) and pixels[0, :, 1].tolist() == pytest.approx(np.linspace(0, 255, 64), abs=1)


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2", "ppm"])
@pytest.mark.parametrize("most", [255, 4095, 65535])
def test_sixteen_bits_of_colours_are_scaled(tmp_path, suffix, most):
    ramp = np.linspace(0, most, 64).astype(np.uint16)[None].repeat(64, 0)
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), np.stack([0 * ramp, ramp // 2, ramp], -1))  # blue, green, red
    want = np.linspace(0, 255, 64)
    pixels = decode(tmp_path / f"a.{suffix}")
    assert pixels.shape == (64, 64, 3)
    for channel, share in enumerate((1, 0.5, 0)):
        assert pixels[0, :, channel].tolist() == pytest.approx(share * want, abs=1)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sixteen_bits_of_colours_are_turned(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    small = noise(20, 30)
    Image.fromarray(small).save(tmp_path / "8.png", exif=exif)
    whole = cv2.imencode(".png", small[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "16.png").write_bytes(whole[:33] + chunk + whole[33:])  # after the header
    assert torch.equal(decode(tmp_path / "16.png"), decode(tmp_path / "8.png"))


def test_eight_bits_of_jpeg_2000_are_no_sixteen(tmp_path):
    path = tmp_path / "a.jp2"
    cv2.imwrite(str(path), np.full((64, 64, 3), 9, np.uint8))
    assert not deep(Image.open(path), path) and (decode(path) == 9).all()


def test_tags_that_opencv_does_not_know_are_no_news(tmp_path, capfd):
    planes = noise(8, 9).astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "a.tif"), np.concatenate([planes, planes[..., :1]], -1))  # a fourth: near infrared
    assert decode(tmp_path / "a.tif").shape == (8, 9, 3)
    assert capfd.readouterr().err == ""


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def forbidden(*what, **more):
        raise PermissionError(13, "Permission denied", "a")

    path = save(noise(8, 9), tmp_path / "a.png")
    (tmp_path / "train.txt").write_text("a")
    (tmp_path / "a.json").write_text("{}")
    for name, read in ((Path, "read_text"), (Path, "read_bytes"), (Image, "open")):
        monkeypatch.setattr(name, read, forbidden)
    for read, file in ((decode, path), (read_lines, tmp_path / "train.txt"), (load_coco, tmp_path / "a.json")):
        with pytest.raises(DataError, match=f"{file}: no right to read it"):
            read(file)


def test_more_than_sixteen_bits_are_refused(tmp_path):
    path = save(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: values of 32 bits"):
        decode(path)
    path = save(np.full((8, 8), 70_000, np.int32), tmp_path / "b.tif")
    with pytest.raises(DataError, match="b.tif: values of 32 bits"):
        decode(path)


@pytest.mark.parametrize("mode", ["CMYK", "L", "LA", "RGBA", "P", "1", "YCbCr"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    picture = Image.new("RGB", (16, 12), (255, 255, 255)).convert(mode)
    picture.save(path := tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"))
    pixels = decode(path)
    assert pixels.shape == (12, 16, 3) and pixels.dtype == torch.uint8 and (pixels > 240).all()


def test_plain_jpegs_are_decoded_as_by_pil(tmp_path):
    assert all(script.decode is decode for script in SCRIPTS.values())
    for mode in ("RGB", "L"):
        Image.fromarray(noise(37, 53)).convert(mode).save(path := tmp_path / "a.jpg")
        want = np.asarray(Image.open(path).convert("RGB"))
        assert torch.equal(decode(path), torch.from_numpy(want.copy()))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_cut_off_are_named(tmp_path, suffix):
    path = save(noise(64, 64), tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"a.{suffix}: not a readable image, or cut off"):
        decode(path)
    with pytest.raises(DataError, match="b.jpg: not found"):
        decode(tmp_path / "b.jpg")


def test_a_damaged_second_page_is_named(tmp_path):
    """Without its width, for which PIL has a TypeError."""
    mask = Image.fromarray(index_map())
    mask.save(tmp_path / "a.tif", save_all=True, append_images=[mask])
    whole = bytearray((tmp_path / "a.tif").read_bytes())
    first = struct.unpack("<I", whole[4:8])[0]
    after = first + 2 + 12 * struct.unpack("<H", whole[first : first + 2])[0]
    second = struct.unpack("<I", whole[after : after + 4])[0] + 2
    assert whole[second : second + 2] == struct.pack("<H", 256)
    whole[second : second + 2] = struct.pack("<H", 255)
    (tmp_path / "a.tif").write_bytes(whole)
    with pytest.raises(DataError, match="a.tif: not a readable image"):
        read_values(tmp_path / "a.tif")


def test_nvjpeg_gets_plain_jpegs_in_one_call(tmp_path, monkeypatch):
    paths = [save(noise(8 + k, 9), tmp_path / f"{k}.jpg") for k in range(3)]
    calls, decoder = [], search_seg.torchvision.io.decode_jpeg

    def nvjpeg(data, mode, device="cpu"):
        if device == "cpu":
            return decoder(data, mode)
        calls.append(len(data))
        if len(data) == 2:
            raise RuntimeError("unsupported")
        return [decoder(one, mode) for one in data]

    monkeypatch.setattr(search_seg.torchvision.io, "decode_jpeg", nvjpeg)
    want = read_pictures(paths, [None] * 3, "cpu")
    got = read_pictures(paths, [(8, 9), None, None], "cuda")
    assert calls == [3] and all(map(torch.equal, got, want)) and group_size(paths, "cuda:0") > 1
    got = read_pictures(paths[:2], [None] * 2, "cuda")
    assert calls == [3, 2] and all(map(torch.equal, got, want)), "the CPU takes over"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(8, 9)).save(paths[0], exif=exif)
    assert read_pictures(paths, [None] * 3, "cuda")[0].shape == (3, 9, 8) and calls == [3, 2]
    assert group_size([tmp_path / "a.png"], "cuda") == group_size(paths, "cpu") == 1


def test_scaling_down_is_that_of_pil():
    pixels = noise(90, 70)
    want = np.asarray(Image.fromarray(pixels).resize((35, 45)))
    got = search_det.scaled(torch.from_numpy(pixels).movedim(-1, 0), (45, 35))
    assert (got.movedim(0, -1).int() - torch.from_numpy(want.copy()).int()).abs().max() <= 1


# Masks


def index_map():
    index = np.zeros((20, 30), np.uint8)
    index[4:12, 5:25], index[14:, :9] = 1, 2
    return index


COLOURS = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], np.uint8)  # VOC's first


def masks_of(index):
    """One label map as tools write it: what it is called, and the picture."""
    palette = Image.fromarray(index)
    palette.putpalette(shapes.voc_palette())
    colour = Image.fromarray(COLOURS[index])
    border = COLOURS[index]
    border[0] = (224, 224, 192)
    return {
        "grey": Image.fromarray(index),
        "palette": palette,
        "16 bits": Image.fromarray(index.astype(np.uint16)),
        "32 bits": Image.fromarray(index.astype(np.int32)),
        "floats": Image.fromarray(index.astype(np.float32)),  # as GIS programs save classes
        "grey and alpha": Image.fromarray(index).convert("LA"),
        "grey saved as RGB": Image.fromarray(index).convert("RGB"),
        "colours": colour,
        "colours and alpha": colour.convert("RGBA"),
        "borders": Image.fromarray(border),
    }


@pytest.mark.parametrize("kind", masks_of(index_map()))
def test_masks_as_tools_write_them(tmp_path, kind):
    index = index_map()
    masks_of(index)[kind].save(path := tmp_path / ("a.tif" if kind in ("32 bits", "floats") else "a.png"))
    want = torch.from_numpy(index.copy())
    if kind == "borders":
        want[0] = IGNORE
    assert torch.equal(read_label(path, plain_meaning(21)), want)


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits(tmp_path, bits):
    """PIL stretches their values: the last class would be 255, which is ignored."""
    index = np.arange(2**bits, dtype=np.uint8)[None].repeat(8, 0)
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    packed = (index.reshape(8, -1, 8 // bits) << shifts).sum(-1, dtype=np.uint8)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    header = struct.pack(">IIBBBBB", 2**bits, 8, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert torch.equal(read_label(tmp_path / "a.png", plain_meaning(2**bits)), torch.tensor(index))


@pytest.mark.parametrize("maximum", [2, 15, 200, 255, 1000, 65535])
@pytest.mark.parametrize("kind", ["P2", "P5"])
def test_masks_of_a_maximum_of_their_own(tmp_path, kind, maximum):
    index = np.minimum(index_map(), 2)
    binary = index.astype(">u2" if maximum > 255 else np.uint8).tobytes()
    values = binary if kind == "P5" else " ".join(map(str, index.flat)).encode()
    h, w = index.shape
    (tmp_path / "a.pgm").write_bytes(f"{kind}\n{w} {h}\n{maximum}\n".encode() + values)
    assert torch.equal(read_label(tmp_path / "a.pgm", plain_meaning(21)), torch.from_numpy(index))


def test_a_value_that_is_no_class_is_named(tmp_path):
    for value in (-9999, 70000):
        Image.fromarray(np.where(index_map() == 1, value, 0).astype(np.int32)).save(tmp_path / "a.tif")
        with pytest.raises(DataError, match=f"a.tif: mode I, value {value:g}; a mask has grey values 0..65535"):
            read_label(tmp_path / "a.tif", plain_meaning(21))
    (tmp_path / "b.png").write_bytes(b"?")
    with pytest.raises(DataError, match="b.png: not a readable image, or cut off; save it as PNG$"):
        read_label(tmp_path / "b.png", plain_meaning(21))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("jpeg", "a.png: a JPEG or the like, which blurs"),
        ("float", "mode F"),
        ("foreign colour", "RGB colour 1,2,3 in a mask"),
        ("class", "class 21; expected 0..20 or 255"),
        ("16 bits", "class 300; expected 0..20 or 255"),
        ("lossy webp", "a JPEG or the like, which blurs"),
        ("avif", "a JPEG or the like, which blurs"),
        ("jpeg 2000", "a JPEG or the like, which blurs"),
        ("jpeg in tiff", "a JPEG or the like, which blurs"),
        ("lab", "mode LAB"),
        ("RGB of 16 bits", "RGB with 16 bits a channel"),
        ("two pages", "2 pictures in one file"),
        ("alpha alone", "transparent pixels beside black ones"),
        ("grey and alpha alone", "transparent pixels beside black ones"),
    ],
)
def test_masks_that_make_no_sense_are_refused(tmp_path, kind, message):
    index = index_map()
    picture = {
        "jpeg": Image.fromarray(index),
        "float": Image.fromarray(index.astype(np.float32) / 2),
        "foreign colour": Image.fromarray(np.where(index[..., None] == 1, [1, 2, 3], 0).astype(np.uint8)),
        "class": Image.fromarray(np.where(index == 1, 21, 0).astype(np.uint8)),
        "16 bits": Image.fromarray(np.where(index == 1, 300, 0).astype(np.uint16)),
        "lossy webp": Image.fromarray(index),
        "avif": Image.fromarray(index),
        "jpeg 2000": Image.fromarray(index),
        "jpeg in tiff": Image.fromarray(index),
        "lab": Image.fromarray(np.stack([index] * 3, -1)).convert("RGB"),
        "RGB of 16 bits": Image.fromarray(index),
        "two pages": Image.fromarray(index),
        "alpha alone": Image.fromarray(np.stack([0 * index] * 3 + [100 * index], -1)),
        "grey and alpha alone": Image.merge("LA", [Image.fromarray(0 * index), Image.fromarray(100 * index)]),
    }[kind]
    if kind == "lab":
        picture = ImageCms.profileToProfile(
            picture, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    if kind == "avif" and not features.check("avif"):
        pytest.skip("PIL is without it")
    form = {"jpeg": "JPEG", "lossy webp": "WEBP", "avif": "AVIF", "jpeg 2000": "JPEG2000"}.get(
        kind, "TIFF" if kind in ("jpeg in tiff", "float", "lab") else "PNG"
    )
    how = {
        "jpeg in tiff": {"compression": "jpeg"},
        "two pages": {"save_all": True, "append_images": [picture.rotate(9)]},
    }
    picture.save(tmp_path / "a.png", form, **how.get(kind, {}))
    if kind == "RGB of 16 bits":
        cv2.imwrite(str(tmp_path / "a.png"), np.stack([index.astype(np.uint16)] * 3, -1))
    with pytest.raises(DataError, match=message):
        read_label(tmp_path / "a.png", plain_meaning(21))


def write_folder(root, masks, layout="lists", suffixes=("jpg", "png")):
    """Pictures and the given masks, half of them for training, in one of the layouts that are understood."""
    for k, mask in enumerate(masks):
        split, other = ("train", "training") if k < len(masks) / 2 else ("val", "validation")
        folders = {
            "lists": ("images", "masks"),
            "split first": (f"{split}/images", f"{split}/masks"),
            "split last": (f"images/{other}", f"annotations/{other}"),
            "voc": ("JPEGImages", "SegmentationClass"),
            "no splits": ("images", "labels"),
        }[layout]
        mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        for folder, picture, suffix in zip(folders, (Image.fromarray(noise(20, 30, k)), mask), suffixes):
            (root / folder).mkdir(parents=True, exist_ok=True)
            picture.save(root / folder / f"{k}.{suffix}")
        if layout in ("lists", "voc"):
            listing = root / ("" if layout == "lists" else "ImageSets/Segmentation") / f"{split}.txt"
            listing.parent.mkdir(parents=True, exist_ok=True)
            with open(listing, "a") as file:
                file.write(f"{k}\n")
    return root


def read_folder(root, *argv):
    return search_seg.read_data(arguments(search_seg, root, "--data", "folder", *argv))


@pytest.mark.parametrize("layout", ["lists", "split first", "split last", "voc", "no splits"])
def test_any_folder_of_masks(tmp_path, layout, capsys):
    masks = [index_map() * (k + 1) for k in range(8)]  # values 0, 1, 2, 3 ...
    search_seg.note.cache_clear()
    search_seg.warn_once.cache_clear()
    data = read_folder(write_folder(tmp_path, masks, layout, ("PNG", "png")))
    number = {name: len(split.images) for name, split in data.items()}
    assert number == ({"train": 6, "val": 1, "test": 1} if layout == "no splits" else {"train": 3, "val": 1, "test": 4})
    values = sorted({int(v) for mask in masks for v in np.unique(mask)})
    printed = capsys.readouterr().out
    assert f"{len(values)} classes found in 8 masks: {' '.join(map(str, values))}\n" in printed
    seen = torch.cat([split.labels.flatten() for split in data.values()]).unique().tolist()
    assert seen == [*range(len(values))]


@pytest.mark.parametrize(
    "values, classes",
    [
        ((0, 255, 255), {0: 0, 255: 1}),  # binary
        ((1, 255, 1), {1: 0, 255: 1}),
        ((0, 1, 255), {0: 0, 1: 1, 255: IGNORE}),
        ((0, 100, 200), {0: 0, 100: 1, 200: 2}),
        ((7, 9, 255), {7: 0, 9: 1, 255: IGNORE}),
    ],
)
def test_classes_are_found_in_masks(tmp_path, values, classes):
    mask = np.array(values, np.uint8)[index_map()]
    data = read_folder(write_folder(tmp_path, [mask] * 6))
    want = torch.tensor([classes[value] for value in mask.flatten().tolist()]).view(20, 30)
    assert torch.equal(data["test"].labels[0].long(), want)


def test_colours_are_found_in_masks(tmp_path, capsys):
    search_seg.note.cache_clear()
    search_seg.warn_once.cache_clear()
    masks = [Image.fromarray(np.array([(0, 0, 0), (9, 9, 9), (200, 3, 4)], np.uint8)[index_map()])] * 5
    data = read_folder(write_folder(tmp_path, [*masks, np.zeros((20, 30), np.uint8)]))
    assert "3 classes found in 6 masks: 0,0,0 9,9,9 200,3,4\n" in capsys.readouterr().out
    assert torch.equal(data["test"].labels[0], torch.from_numpy(index_map())) and not data["test"].labels[2].any()


def test_grey_masks_with_a_table_of_colours(tmp_path):
    grey = np.array([0, 127, 255], np.uint8)
    root = write_folder(tmp_path, [grey[index_map()]] * 3 + [Image.fromarray(grey[index_map()]).convert("RGB")] * 3)
    (root / "labelmap.txt").write_text("background:0,0,0::\ncell:127,127,127::\nnucleus:255,255,255::\n")
    for label in read_folder(root)["test"].labels:
        assert torch.equal(label, torch.from_numpy(index_map()))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_number_of_classes_stands(tmp_path, mode):
    """Not every value is there, and none is moved for that."""
    masks = [Image.fromarray(np.array([0, 1, 3], np.uint8)[index_map()]).convert(mode)] * 6
    data = read_folder(write_folder(tmp_path, masks), "--classes", "5")
    assert data["test"].labels.unique().tolist() == [0, 1, 3]
    with pytest.raises(DataError, match="class 3; expected 0..2 or 255"):
        read_folder(tmp_path, "--classes", "3")


def test_palettes_that_differ_are_told(tmp_path, capsys):
    search_seg.warn_once.cache_clear()
    read_folder(write_folder(tmp_path, [*own_palettes()] * 2), "--classes", "3")
    assert "is another colour in its palette than in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, number, coloured",
    [
        ("name,r,g,b\nsky,128,128,128\nsea,0,0,255\n", 2, True),  # class_dict.csv
        ("class_name,class_color\nsky,128 128 128\nsea,0 0 255\n", 2, True),  # V7
        ("64 128 64\tAnimal\n192 0 128\tArchway\n0 0 0\tVoid\n", 3, True),  # CamVid
        ("__ignore__\n_background_\ncat\ndog\n", 3, False),  # labelme
        ("id,name\n0,sky\n1,sea\n", 2, False),
        ("class_id,class_name\n0,sky\n1,sea\n", 2, False),
        ("name\nsky\nsea\n", 2, False),
        ("red\nindex\ngreen\n", 3, False),  # classes
        ("id,name,r,g,b\n0,sky,128,128,128\n1,sea,0,0,255\n", 2, True),
        ("r,g,b,name\n128,128,128,sky\n0,0,255,sea\n", 2, True),
        ("sky:128,128,128:high,low:\nsea:0,0,255::\n", 2, True),  # CVAT, with parts
    ],
)
def test_tables_of_classes(tmp_path, text, number, coloured):
    (tmp_path / "classes").write_text(text)
    found, colours = read_classes(tmp_path / "classes")
    assert (found, len(colours)) == (number, number if coloured else 0)


@pytest.mark.parametrize(
    "line",
    [
        "{}:{},{},{}::", "{}, {}, {}, {}", "{} {} {} {}", "{};{};{};{}", '"{}","{}","{}","{}"', '{},"{},{},{}"',
        "{} ({}, {}, {})", "{}: [{}, {}, {}]", "{}=rgb({},{},{})", "{} #{:02x}{:02X}{:02x}", "{}|{}|{}|{}",
    ],
)  # fmt: skip
def test_colour_table_of_a_labelling_tool(tmp_path, line):
    colours = {"cat": (250, 50, 83), "background": (0, 0, 0), "dog": (51, 221, 255)}
    table = "\n".join(line.format(name, *colour) for name, colour in colours.items())
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + table, encoding="utf-8-sig")
    look = np.array([colours["background"], colours["cat"], colours["dog"]], np.uint8)
    coloured = Image.fromarray(look[index_map()])
    palette = Image.fromarray(2 - index_map())  # indices in any order: their colours count
    palette.putpalette(look[::-1].tobytes())
    data = read_folder(write_folder(tmp_path, [coloured, palette] * 3))
    for label in data["test"].labels:
        assert torch.equal(label, torch.from_numpy(index_map()))


def test_two_kinds_of_binary_masks_are_warned_of(tmp_path, capsys):
    search_seg.warn_once.cache_clear()
    binary = np.uint8(index_map() > 0)
    args = arguments(search_seg, write_folder(tmp_path, [binary, 255 * binary] * 3), "--data", "folder")
    args.classes = 2
    find_meaning(args, search_seg.list_data(args))
    assert "255 is ignored in 3 masks, others have class 1" in capsys.readouterr().err
    find_meaning(args, {"train": [(Path(f"{k}.jpg"), tmp_path / f"masks/{k}.png") for k in (1, 3)]})
    assert not capsys.readouterr().err


def test_a_mask_whose_white_is_zero_has_the_values_of_the_file(tmp_path):
    Image.fromarray(255 - index_map()).save(tmp_path / "0.tif", tiffinfo={262: 0})  # PIL stores the inverse
    assert (np.array(Image.open(tmp_path / "0.tif")) == 255 - index_map()).all()
    values, coloured = read_values(tmp_path / "0.tif")
    assert not coloured and (values == index_map()).all()


def test_deep_tiffs_in_planes_are_refused(tmp_path):
    """PIL reads their bytes as pixels."""
    tags = {256: 4, 257: 3, 259: 1, 262: 2, 277: 3, 278: 3, 284: 2}  # width, height, plain, RGB, three, rows, in planes
    rows = [(tag, 3, 1, struct.pack("<HH", value, 0)) for tag, value in tags.items()]
    end = 8 + 2 + 12 * 10 + 4  # of the table: what is longer than four bytes lies behind it
    rows += [(258, 3, 3, struct.pack("<I", end)), (273, 4, 3, struct.pack("<I", end + 6))]
    rows += [(279, 4, 3, struct.pack("<I", end + 18))]
    table = b"".join(struct.pack("<HHI", *row[:3]) + row[3] for row in sorted(rows))
    behind = struct.pack("<3H3I3I", 16, 16, 16, *(end + 30 + 24 * k for k in range(3)), 24, 24, 24)
    file = tmp_path / "0.tif"
    file.write_bytes(b"II*\0" + struct.pack("<IH", 8, 10) + table + bytes(4) + behind + bytes(72))
    for read in (search_seg.decode, read_values):
        with pytest.raises(DataError, match="0.tif: 16 bits a channel in separate planes"):
            read(file)


def test_pictures_with_long_remarks(tmp_path):
    about = PngImagePlugin.PngInfo()
    about.add_itxt("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    Image.fromarray(noise(20, 30)).save(tmp_path / "0.png", pnginfo=about, icc_profile=bytes(1_500_000))
    assert (search_seg.decode(tmp_path / "0.png").numpy() == noise(20, 30)).all()


def test_one_mask_is_not_that_of_two_pictures(tmp_path):
    root = write_folder(tmp_path, [index_map()] * 4, "no splits")
    (root / "images/0.jpg").rename(root / "images/1_L.jpg")
    (root / "labels/0.png").unlink()
    (root / "labels/1.png").rename(root / "labels/1_L.png")
    with pytest.raises(DataError, match="1_L.png: the mask of .*1_L.jpg, and of .*1.jpg too"):
        read_folder(root)


def test_classes_by_number_and_by_names(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path, [index_map()] * 6)
    args = arguments(search_seg, tmp_path, "--data", "folder", "--classes", "5")
    assert find_meaning(args, search_seg.list_data(args)).number == 5
    names = tmp_path / "names.txt"
    names.write_text("Hintergrund\nFußgänger\n行人\n", encoding="utf-8")
    args = arguments(search_seg, tmp_path, "--data", "folder", "--classes", names)
    assert find_meaning(args, search_seg.list_data(args)).number == 3
    with pytest.raises(DataError, match="class 2; expected 0..1 or 255"):
        read_folder(tmp_path, "--classes", "2")
    names.write_text("a\nb\na\n")
    with pytest.raises(DataError, match="class 'a' stands there twice"):
        read_folder(tmp_path, "--classes", names)
    for wrong in ("1", "256", "names.csv"):
        error = refused(
            search_seg, monkeypatch, capsys, "--data", "folder", "--data-root", tmp_path, "--classes", wrong
        )
        assert "--classes" in error and wrong in error
    inside = index_map() > 0
    for name, masks in {
        "binary": [inside.astype(np.uint8) * 255] * 6,
        "of 16 bits": [inside.astype(np.uint16) * 65535] * 6,
        "mostly empty": [(inside * (k in (1, 131))).astype(np.uint8) * 255 for k in range(132)],
    }.items():
        write_folder(tmp_path / name, masks)
        assert read_folder(tmp_path / name, "--classes", "2")["test"].labels.unique().tolist() == [0, 1]


def soft(index):
    """A binary mask with one pixel of 128 in it, as scaling leaves them."""
    mask = (index > 0).astype(np.uint8) * 255
    mask[3, 7] = 128
    return mask


def own_palettes():
    """One label map, stored by programs that sort the colours of each file in another way."""
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        mask, palette = Image.fromarray(np.array(order, np.uint8)[index_map()]), np.zeros((256, 3), np.uint8)
        palette[order] = COLOURS
        mask.putpalette(palette.tobytes())
        yield mask


def smoothed(values, mode):
    """A larger label map, rotated by a program that mixes what is beside each other."""
    large = Image.fromarray(np.asarray(values, np.uint8)[index_map()]).convert(mode)
    return large.resize((300, 200), Image.Resampling.NEAREST).rotate(7, Image.Resampling.BILINEAR)


def binary(high):
    return (index_map() > 0).astype(np.uint8) * high


def matte(steps):
    """A binary mask with an edge of every grey."""
    mask = np.zeros((200, 300), np.uint8)
    mask[:, 150:] = 255
    mask[: len(steps), 149] = steps
    return mask


REFUSED_MASKS = {
    "all greys": ([matte(range(k, k + 128)) for k in (0, 128)] * 3, r"value \d+ at a few pixels"),
    "soft edges of 16 bits": ([soft(index_map()).astype(np.uint16) * 257] * 6, "value 32896 at a few pixels"),
    "no class is black": (
        [Image.fromarray(COLOURS[np.maximum(index_map(), 1)])] * 5 + [np.zeros((20, 30), np.uint8)],
        "an RGB mask, and .*5.png is none",
    ),
    "soft edges": ([soft(index_map())] * 6, "value 128 at a few pixels between others, as of soft edges"),
    "soft edges in RGB": ([Image.fromarray(soft(index_map())).convert("RGB")] * 6, "value 128 at a few pixels"),
    "smoothed greys": ([smoothed((0, 50, 100), "L")] * 6, r"value \d+ at a few pixels"),
    "smoothed colours": ([smoothed(COLOURS, "RGB")] * 6, r"value 0,\d+,0 at a few pixels"),
    "two ways": ([binary(1 + 254 * (k % 2)) for k in range(6)], "value 1, and .*1.png: value 255, never both in one"),
    "two depths": ([Image.fromarray(binary(255)).convert("1L"[k % 2]) for k in range(6)], "value 255, never both"),
    "own palettes": ([*own_palettes()] * 2, "is another colour in its palette than in"),
}


@pytest.mark.parametrize("kind", REFUSED_MASKS)
def test_masks_that_would_be_misread(tmp_path, kind):
    masks, words = REFUSED_MASKS[kind]
    with pytest.raises(DataError, match=words):
        found_meaning(masks_in(write_folder(tmp_path, masks)), None)


def masks_in(root):
    return sorted((root / "masks").iterdir())


def test_rare_classes_are_no_soft_edges(tmp_path):
    """Twelve classes of a pixel each: their values have no gap, or their colours are between no others."""
    index = np.zeros((200, 300), np.uint8)
    index[50:90, 50:90] = 1
    index[5, 10:22] = np.arange(2, 14)
    palette = np.frombuffer(shapes.voc_palette(), np.uint8).reshape(-1, 3).copy()
    palette[2:14, 1] += 7
    for kind, mask in {"grey": index, "colours": palette[index]}.items():
        assert found_meaning(masks_in(write_folder(tmp_path / kind, [mask] * 4)), None).number == 14


@pytest.mark.parametrize("values", [(0, 1, 255), (0, 128, 255), (7, 9, 255)])
def test_few_grey_values_are_classes(tmp_path, values):
    split = read_folder(write_folder(tmp_path, [np.array(values, np.uint8)[index_map()]] * 6))["test"]
    assert split.labels.unique().tolist() == [0, 1, 255]


def test_an_overview_is_no_second_mask(tmp_path):
    mask = Image.fromarray(index_map())
    mask.save(tmp_path / "a.tif", save_all=True, append_images=[mask.resize((15, 10), Image.Resampling.NEAREST)])
    label = read_label(tmp_path / "a.tif", plain_meaning(21))
    assert torch.equal(label, torch.from_numpy(index_map()))


def test_nothing_is_seen_of_transparent_colours(tmp_path):
    index = index_map()
    below = np.where(index[..., None] > 0, COLOURS[index], noise(20, 30))
    save(np.dstack([below, np.where(index > 0, 200, 0).astype(np.uint8)]), tmp_path / "a.png")
    save(np.dstack([COLOURS[index], 0 * index]), tmp_path / "b.png")  # alpha that says nothing
    for name in ("a.png", "b.png"):
        label = read_label(tmp_path / name, plain_meaning(21))
        assert torch.equal(label, torch.from_numpy(index)), name


def test_colours_in_a_mask_of_sixteen_pixels(tmp_path):
    """The sides are no bits."""
    save(COLOURS[np.eye(16, dtype=np.uint8)], tmp_path / "a.png")
    assert read_label(tmp_path / "a.png", plain_meaning(21)).sum() == 16


def test_lossless_webp_in_colour(tmp_path):
    for k in range(8):
        save(noise(20, 30, k), tmp_path / f"images/{k}.png")
        save(COLOURS[index_map()], tmp_path / f"masks/{k}.webp", lossless=True)
    green_first = np.array([0, 2, 1])[index_map()]
    assert read_folder(tmp_path)["test"].labels[0].tolist() == green_first.tolist()


def test_a_colour_that_no_class_has_though_it_is_grey(tmp_path):
    masks = [COLOURS[np.maximum(index_map(), 1)]] * 5 + [np.zeros((20, 30, 3), np.uint8)]  # one all black
    root = write_folder(tmp_path, masks)
    (root / "labelmap.txt").write_text("a:128,0,0::\nb:0,128,0::\n")
    with pytest.raises(DataError, match="RGB colour 0,0,0 in a mask, which is no class"):
        read_folder(root)


@pytest.mark.parametrize(
    "text",
    [
        '[\n "sky",\n "sea"\n]',
        "nc: 2\nnames:\n- sky\n- sea",
        "Pixel Value, Class\n0, sky",
        "sky,0,0,0,0\nsea,1,250,50,83",
    ],
)
def test_a_list_of_classes_in_another_language(tmp_path, text):
    root = write_folder(tmp_path / "data", [index_map()] * 6)
    (tmp_path / "names").write_text(text)
    with pytest.raises(DataError, match="is no class; give one name a line|give name, red, green and blue"):
        read_folder(root, "--classes", tmp_path / "names")


def test_lists_of_pictures_and_masks_in_any_folders(tmp_path):
    root = write_folder(tmp_path / "a", [index_map()] * 8, "no splits")
    (root / "images").rename(root / "rgb")
    (root / "labels").rename(root / "gt")
    (root / "train.txt").write_text("".join(f"/rgb/{k}.jpg /gt/{k}.png\n" for k in range(5)))
    (root / "val.txt").write_text("".join(f"rgb/{k}.jpg,gt/{k}.png\n" for k in range(5, 8)))
    assert len(read_folder(root)["test"].images) == 3
    root = write_folder(tmp_path / "b", [index_map()] * 8, "split last")  # a list chooses among those in its folder
    (root / "train.txt").write_text("0\n2\n3\n")
    assert {path.stem for path, _ in search_seg.folder_pairs(root)["train"]} == {"0", "2", "3"}


def splits_of(root):
    return {name: sorted(path.stem for path, _ in pairs) for name, pairs in search_seg.folder_pairs(root).items()}


def test_lists_of_paths_choose_among_folders(tmp_path, capsys):
    """A list counts, also where there is a folder of that split; unless its files are those of another machine."""
    root = write_folder(tmp_path, [index_map()] * 8, "split first")
    (root / "train.txt").write_text("train/images/0.jpg\ntrain/images/2.jpg train/masks/2.png\n")
    assert splits_of(root) == {"train": ["0", "2"], "test": ["4", "5", "6", "7"]}
    (root / "val.txt").write_text("".join(f"train/images/{k}.jpg train/masks/{k}.png\n" for k in (1, 3)))
    assert splits_of(root) == {"train": ["0", "2"], "test": ["1", "3"]}
    search_seg.warn_once.cache_clear()
    (root / "train.txt").write_text("".join(f"/data/train/{k}.jpg /data/trainannot/{k}.png\n" for k in range(2)))
    assert splits_of(root)["train"] == ["0", "1", "2", "3"]
    assert f"all of {root / 'train/images'} is used" in capsys.readouterr().err
    (root / "train.txt").write_text("train/images/0.jpg\ntrain/images/9.jpg\n")
    with pytest.raises(DataError, match="9.jpg: not found"):
        splits_of(root)


def test_a_list_of_one_split_leaves_the_rest_to_the_other(tmp_path):
    root = write_folder(tmp_path, [index_map()] * 8, "no splits")
    (root / "valid.txt").write_text("6\n7\n")
    assert splits_of(root) == {"train": [*"012345"], "test": [*"67"]}


@pytest.mark.parametrize("listed", [False, True])
def test_a_test_split_without_masks_is_left_out(tmp_path, capsys, listed):
    search_seg.warn_once.cache_clear()
    root = write_folder(tmp_path, [index_map()] * 8, "lists" if listed else "split last")
    if listed:
        save(noise(20, 30), root / "images/t.jpg")
        (root / "test.txt").write_text("t\n")
    else:
        save(noise(20, 30), root / "images/test/t.jpg")
        (root / "annotations/test").mkdir()
    assert splits_of(root) == {"train": [*"0123"], "test": [*"4567"]}
    assert "the test split is left out" in capsys.readouterr().err
    (root / ("train.txt" if listed else "annotations/training/0.png")).rename(tmp_path / "away")
    if not listed:
        with pytest.raises(DataError, match="no mask of that name"):
            splits_of(root)


def test_the_folder_that_holds_pictures_is_taken(tmp_path):
    root = write_folder(tmp_path, [index_map()] * 8, "split last")
    for split in ("training", "validation"):
        (root / "labels" / split).mkdir(parents=True)
        (root / f"labels/{split}/0.txt").write_text("0 .5 .5 .1 .1\n")
    assert splits_of(root)["train"] == [*"0123"]


def test_pictures_named_like_masks(tmp_path):
    """Left and right eyes, side by side with their masks."""
    for split in ("train", "val"):
        for k, side in enumerate("LRLR"):
            save(noise(20, 30, k), tmp_path / f"{split}/eye{k}_{side}.jpg")
            save(index_map(), tmp_path / f"{split}/eye{k}_{side}_mask.png")
    assert splits_of(tmp_path)["train"] == ["eye0_L", "eye1_R", "eye2_L", "eye3_R"]


def test_grey_values_saved_as_rgb_are_no_colours_of_voc(tmp_path):
    """Value 128 is class 128, though (128, 128, 128) is VOC's colour of class 7."""
    masks = [np.stack([np.array(values, np.uint8)[index_map()]] * 3, -1) for values in ((0, 1, 128), (0, 128, 128)) * 4]
    for split in read_folder(write_folder(tmp_path, masks), "--classes", "150").values():
        assert set(split.labels.unique().tolist()) <= {0, 1, 128}


def test_every_eighth_for_want_of_a_split_is_told(tmp_path, capsys):
    search_seg.note.cache_clear()
    read_folder(write_folder(tmp_path, [index_map()] * 8, "no splits"))
    assert "no val or test in a list or folder that is understood; every eighth" in capsys.readouterr().out


def test_lists_as_cvat_writes_them(tmp_path):
    root = write_folder(tmp_path / "a", [index_map()] * 8, "no splits")
    (root / "Train.txt").write_text("0\n1\n2\n3\n4\n")
    (root / "Validation.txt").write_text("5\n6\n7\n")
    assert len(read_folder(root)["test"].images) == 3
    root = write_folder(tmp_path / "b", [index_map()] * 9, "no splits")
    (root / "labels/3.png").unlink()  # a frame without a mask
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/default.txt").write_text("0\n1\n2\n4\n5\n6\n7\n8\n")
    assert sum(len(split.images) for split in read_folder(root).values()) == 8


def test_what_a_folder_holds_besides_is_told(tmp_path, capsys):
    search_seg.warn_once.cache_clear()
    root = write_folder(tmp_path, [index_map()] * 8, "no splits")
    for name in ("images/a.heic", "images/b.heic", "labels/z.png", "images/.DS_Store"):
        (root / name).write_bytes(b"?")
    read_folder(root)
    said = capsys.readouterr().err
    assert f"{root / 'images'}: left out 2 files or folders (first: a.heic)" in said
    assert f"{root / 'labels'}: left out 1 files or folders (first: z.png)" in said


def test_lists_from_elsewhere(tmp_path):
    root = write_folder(tmp_path, [index_map()] * 8, "no splits", ("png", "png"))
    (root / "images/7.png").rename(root / "images/e\u0301.png")  # composed in the list, and not on disk
    (root / "labels/7.png").rename(root / "labels/e\u0301.png")
    (root / "train.txt").write_text("images\\0.png\nimages/1.png,labels/1.png\nimages/2.png\tlabels/2.png\n3\n")
    (root / "val.txt").write_text("4\n5\nimages/\u00e9.png\n", "utf-8")
    assert {name: len(split.images) for name, split in read_folder(root).items()} == {"train": 3, "val": 1, "test": 3}
    (root / "images/h.heic").write_bytes(b"?")
    (root / "val.txt").write_text("h.heic\n")
    with pytest.raises(DataError, match="h.heic: no kind of picture that is read; save it as JPEG or PNG"):
        read_folder(root)


@pytest.mark.parametrize(
    "lines, message",
    [
        ("masks/0.png\nmasks/1.png", "train.txt: 'masks/0.png' is a mask; list pictures, or pictures and masks"),
        ("0\n" + "x" * 5000, r"x+: not found; .*train.txt has it"),
        ("0\n" + "x" * 5000 + ".png", r"x+: not found; .*train.txt has it"),
        ("0\n" + "x" * 300 + "/1.png", r"x+: not found; .*train.txt has it"),
        ("0\n#1", None),
    ],
)
def test_lines_that_name_no_picture(tmp_path, lines, message):
    root = write_folder(tmp_path, [index_map()] * 4, "lists", ("png", "png"))
    (root / "train.txt").write_text(lines + "\n# a remark\n")
    if message is None:
        assert len(search_seg.folder_pairs(root)["train"]) == 1
    else:
        with pytest.raises(DataError, match=message) as error:
            search_seg.folder_pairs(root)
        assert len(str(error.value)) < 300 + len(str(root)) + 100


def test_a_picture_by_which_a_loss_is_trained_and_chosen_is_told(tmp_path, capsys):
    search_seg.warn_once.cache_clear()
    root = write_folder(tmp_path, [index_map()] * 8, "no splits")
    for split, names in (("train", "01234"), ("val", "45"), ("test", "67")):
        (root / f"{split}.txt").write_text("\n".join(names))
    read_folder(root)
    assert "1 val pictures (first: " in capsys.readouterr().err


def test_more_classes_than_bits(tmp_path):
    masks = [np.arange(600).reshape(20, 30).astype(np.uint16) % 150 for _ in range(6)]
    args = arguments(search_seg, write_folder(tmp_path, masks), "--data", "folder", "--model", "small", "--crop", "16")
    task = ready(search_seg.SegTask(args))
    assert task.num_classes == 150
    wrong = task.branches["loss"].wrong.softmax(-3).amax(-3)
    assert torch.allclose(wrong, torch.tensor(0.961), atol=1e-3), "as sure as among seven classes"
    scores = search_seg.test_network(task.network(task.proxy, 0), task.data["test"], 150)
    assert all(0 <= value <= 1 for value in scores.values())
    with pytest.raises(DataError, match="599 colours or values"):
        read_folder(write_folder(tmp_path / "b", [np.arange(600).reshape(20, 30).astype(np.uint16)] * 6))


def test_splits_without_a_boundary(tmp_path, capsys):
    search_seg.note.cache_clear()
    search_seg.warn_once.cache_clear()
    flat = [np.full((20, 30), k, np.uint8) for k in (0, 1, 0)]
    root = write_folder(tmp_path, [*[index_map()] * 3, *flat])
    split = read_folder(root)["test"]
    assert "test: no mask has a boundary of a class other than 0; biou and bf1 count as 0" in capsys.readouterr().err
    net = search_seg.build_model("small", 3)
    scores = search_seg.test_network(net, split, 3)
    assert scores["biou"] == scores["bf1"] == 0 and all(map(math.isfinite, scores.values()))
    for metric in ("biou", "bf1"):
        with pytest.raises(DataError, match=f"test: .*; {metric} has nothing to measure"):
            read_folder(root, "--metric", metric)


def test_one_class_teaches_nothing(tmp_path):
    with pytest.raises(DataError, match="1 colours or values in these masks, not 2 to 255"):
        read_folder(write_folder(tmp_path, [np.zeros((20, 30), np.uint8)] * 6))


def test_pictures_of_two_splits_are_named(tmp_path, capsys):
    search_seg.note.cache_clear()
    search_seg.warn_once.cache_clear()
    root = write_folder(tmp_path, [index_map()] * 6)
    (root / "val.txt").write_text((root / "train.txt").read_text())
    read_folder(root)
    assert "warning: 3 test pictures (first: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["one", "binary in VOC", "none in train", "none in test"])
def test_masks_without_classes(tmp_path, kind, capsys):
    search_seg.note.cache_clear()
    search_seg.warn_once.cache_clear()
    masks = [index_map()] * 6
    if kind == "one":
        masks = [np.zeros((20, 30), np.uint8)] * 6
    elif kind == "binary in VOC":
        masks = [(index_map() > 0).astype(np.uint8) * 255] * 6
    elif kind == "none in train":
        masks = [np.full((20, 30), 255, np.uint8)] * 3 + masks[3:]
    else:
        masks = masks[:3] + [np.full((20, 30), 255, np.uint8)] * 3
    args = arguments(search_seg, write_folder(tmp_path, masks, "voc"), "--data", "voc")
    if "none" in kind:
        with pytest.raises(DataError, match=f"{kind.split()[-1]}: every pixel is 255, ignored"):
            search_seg.read_data(args)
    else:
        search_seg.read_data(args)
        assert "train: only class 0 in all masks (255 is ignored" in capsys.readouterr().err


# Lists and folders


def test_lists_as_people_write_them(tmp_path, capsys):
    search_seg.note.cache_clear()
    search_seg.warn_once.cache_clear()
    root = write_folder(tmp_path, [index_map()] * 6, "voc")
    (root / "JPEGImages/0.jpg").rename(root / "JPEGImages/0.JPEG")
    (root / "JPEGImages/1.jpg").rename(root / "JPEGImages/übung 1.jpg")
    (root / "SegmentationClass/1.png").rename(root / "SegmentationClass/übung 1.PNG")
    (root / "JPEGImages/._0.JPEG").write_bytes(b"what macOS leaves behind")
    lines = [
        "0",
        "übung 1",
        "2.jpg",
        "JPEGImages/3.jpg",
        "/JPEGImages/4.jpg /SegmentationClass/4.png",
        "5  -1",
        "",
        "2.jpg",
    ]
    listing = root / "ImageSets/Segmentation/train.txt"
    listing.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    pairs = search_seg.voc_pairs(root, "train")
    assert [path.stem for path, _ in pairs] == ["0", "übung 1", "2", "3", "4", "5", "2"]
    assert all(image.parent.name == "JPEGImages" and mask.stem == image.stem for image, mask in pairs)
    assert "1 of its pictures stand there more than once" in capsys.readouterr().err
    listing.write_bytes("0\n".encode("utf-16"))
    with pytest.raises(DataError, match="train.txt: not a text in UTF-8"):
        search_seg.voc_pairs(root, "train")


@pytest.mark.parametrize(
    "lines",
    [
        "image,mask\nimages/0.jpg,masks/0.png\nimages/1.jpg,masks/1.png\n",
        "images/0.jpg;masks/0.png\nimages/1.jpg;masks/1.png\n",
        '"images/0.jpg","masks/0.png"\n"images/1.jpg","masks/1.png"\n',
        "0.jpg,\n1.jpg,\n",
        "0.JPG\n1.Jpg\n",
    ],
)
def test_tables_of_pictures(tmp_path, lines):
    root = write_folder(tmp_path, [index_map()] * 4)
    (root / "train.txt").write_text(lines)
    assert splits_of(root) == {"train": [*"01"], "test": [*"23"]}


def test_names_of_folders_files_and_tables_in_capitals(tmp_path):
    (tmp_path / "Train").mkdir()
    for k in range(8):
        Image.fromarray(noise(20, 30, k)).save(tmp_path / f"Train/{k}.png")
        Image.fromarray(index_map()).save(tmp_path / f"Train/{k}_Mask.png")
    assert splits_of(tmp_path) == {"train": [*"0123456"], "test": ["7"]}
    (tmp_path / "LabelMap.txt").write_text("a:0,0,0::\nb:1,1,1::\nc:2,2,2::\nd:3,3,3::\n")
    args = arguments(search_seg, tmp_path, "--data", "folder")
    assert find_meaning(args, search_seg.list_data(args)).number == 4


def test_a_test_split_without_masks_beside_training_pictures_alone(tmp_path, capsys):
    search_seg.warn_once.cache_clear()
    root = write_folder(tmp_path, [index_map()] * 16, "split first")
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train/images", root / "test/images")
    (root / "test/masks").mkdir()
    assert splits_of(root) == {"train": [*"0123456"], "test": ["7"]}
    assert "the test split is left out" in capsys.readouterr().err


def test_a_line_of_a_list_ends_where_its_line_ends(tmp_path):
    root = write_folder(tmp_path, [index_map()] * 4)
    for folder, suffix in (("images", "jpg"), ("masks", "png")):
        (root / folder / f"0.{suffix}").rename(root / folder / f"0\u2028.x.{suffix}")
    (root / "train.txt").write_text("0\u2028.x\r1\r", encoding="utf-8")
    assert splits_of(root) == {"train": ["0\u2028.x", "1"], "test": [*"23"]}
    (root / "train.txt").write_text("0," + "x" * 200_000)
    with pytest.raises(DataError, match="not found; .*train.txt has it"):
        splits_of(root)


def test_a_link_to_a_training_picture_tests_nothing(tmp_path, capsys):
    search_seg.warn_once.cache_clear()
    root = write_folder(tmp_path, [index_map()] * 6)
    (root / "images/5.jpg").unlink()
    (root / "images/5.jpg").symlink_to(root / "images/0.jpg")
    read_folder(root)
    assert "1 test pictures (first: " in (error := capsys.readouterr().err) and "it tests nothing" in error


def test_lists_in_other_capitals_than_the_files(tmp_path):
    root = write_folder(tmp_path, [index_map()] * 4)
    (root / "images/0.jpg").rename(root / "images/IMG_0.JPG")
    (root / "masks/0.png").rename(root / "masks/img_0.png")
    for line in ("IMG_0", "img_0.jpg"):
        (root / "train.txt").write_text(line + "\n1\n")
        assert splits_of(root) == {"train": ["1", "IMG_0"], "test": [*"23"]}


def test_lists_are_read_in_any_locale(tmp_path):
    root = write_folder(tmp_path, [index_map()] * 4)
    for folder, suffix in (("images", "jpg"), ("masks", "png")):
        (root / folder / f"0.{suffix}").rename(root / folder / f"ä.{suffix}")
    (root / "train.txt").write_text("ä\n1\n", encoding="utf-8")
    code = "import search_seg, sys\nprint(len(search_seg.folder_pairs(search_seg.Path(sys.argv[1]))['train']))"
    ascii_locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    here = {"cwd": Path(search_seg.__file__).parent, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code, str(root)], env=ascii_locale, **here)
    assert done.stdout == "2\n", done.stderr


@pytest.mark.parametrize(
    "broken, message",
    [
        ("no folders", "no training pictures; it must hold folders images and masks"),
        ("no mask", "0.jpg: no mask of that name in"),
        ("two pictures", "beside 0.jpg; move away"),
        ("no pictures", "images: no pictures in it$"),
        ("pictures of another kind", "images: no pictures in it; 0.heic is of no kind that is read"),
        ("masks of another kind", "no mask of that name in .*; 0.npy is of no kind that is read"),
        ("one picture", "the only training picture; give two or more"),
        ("mixed", "an RGB mask, and .* is none"),
        ("half a table", "'dog' has no colour"),
    ],
)
def test_broken_folders_are_named(tmp_path, broken, message):
    masks = [index_map()] * 4
    if broken == "mixed":
        masks = [Image.fromarray(COLOURS[index_map()]), *masks[1:]]
    if broken != "no folders":
        write_folder(tmp_path, masks, "lists" if broken == "one picture" else "split first")
    images = tmp_path / "train/images"
    if broken == "no mask":
        (tmp_path / "train/masks/0.png").unlink()
    elif broken == "two pictures":
        (images / "0.png").write_bytes(b"")
    elif broken == "no pictures":
        for path in images.iterdir():
            path.unlink()
        (images / "Thumbs.db").write_bytes(b"")
    elif broken.endswith("another kind"):
        folder, suffix = ("images", ".heic") if broken.startswith("pictures") else ("masks", ".npy")
        for path in (tmp_path / "train" / folder).iterdir():
            path.rename(path.with_suffix(suffix))
    elif broken == "one picture":
        (tmp_path / "train.txt").write_text("1")
    elif broken == "half a table":
        (tmp_path / "labelmap.txt").write_text("cat:1,2,3::\ndog\n")
    with pytest.raises(DataError, match=message) as error:
        read_folder(tmp_path)
    assert "\n" not in str(error.value)


EXPORTS = {  # folders of pictures and masks, and their names
    "Roboflow": ("train", "train", "{}.rf.1a.jpg", "{}.rf.1a_mask.png"),
    "side by side": ("train", "train", "{}.tif", "{}_mask.tif"),
    "Carvana as it comes": ("train", "train_masks", "{}.jpg", "{}_mask.gif"),
    "SegNet": ("train", "trainannot", "{}.png", "{}.png"),
    "capitals": ("Images", "Masks", "{}.JPG", "{}_Mask.PNG"),
    "fast.ai": ("images", "labels", "{}.png", "{}_P.png"),
    "KITTI": ("training/image_2", "training/semantic", "{}.png", "{}.png"),
    "Supervisely": ("img", "masks_machine", "{}.jpg", "{}.png"),
    "labelme": ("JPEGImages", "SegmentationClassPNG", "{}.jpg", "{}.png"),
    "Carvana": ("train/images", "train/masks", "{}.jpg", "{}_mask.gif"),
    "ISIC": ("images", "masks", "{}.jpg", "{}_segmentation.png"),
    "whole names": ("images", "masks", "{}.jpg", "{}.jpg.png"),
    "DeepGlobe": ("train", "train", "{}_sat.jpg", "{}_mask.png"),
    "said in front": ("images", "masks", "image_{}.jpg", "mask_{}.png"),
    "in front of all of it": ("images", "masks", "{}.jpg", "label_{}.png"),
    "in front, side by side": ("train", "train", "img-{}.jpg", "mask_{}.png"),
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_folders_as_tools_export_them(tmp_path, tool):
    images, masks, image, mask = EXPORTS[tool]
    split_folders = "train" in images and tool != "KITTI"
    for split in ("train", "valid") if split_folders else ("",):
        for k in range(8):
            where = (folder.replace("train", split) if split else folder for folder in (images, masks))
            images_here, masks_here = (tmp_path / folder for folder in where)
            save(noise(20, 30, k), images_here / image.format(k))
            palette = masks_of(index_map())["palette"]
            masks_here.mkdir(parents=True, exist_ok=True)
            palette.save(masks_here / mask.format(k))
        if tool == "Roboflow":
            (tmp_path / split / "_classes.csv").write_text("Pixel Value, Class\n0, sky\n")
        elif tool == "labelme":
            (tmp_path / "SegmentationClass").mkdir()
            (tmp_path / "SegmentationClass/0.npy").write_bytes(b"")
    data = read_folder(tmp_path)
    assert sum(len(split.images) for split in data.values()) == (16 if split_folders else 8)
    assert torch.equal(data["test"].labels[0], torch.from_numpy(index_map()))


def test_masks_with_an_ending(tmp_path):
    write_folder(tmp_path, [index_map()] * 8, "no splits")
    for path in (tmp_path / "labels").iterdir():
        path.rename(path.with_stem(path.stem + "_mask"))
    assert len(read_folder(tmp_path)["train"].labels) == 6


# Weights from elsewhere


def test_a_download_happens_once(tmp_path, monkeypatch):
    """Not for each worker, and not again where another resume finds the data whole."""
    calls, args = [], ["--data", "voc", "--download", "--device", "cpu", "--data-root", str(tmp_path / "voc")]

    def fetch(root, year, split, download):
        calls.append(root)
        write_folder(Path(root) / "VOCdevkit/VOC2012", [index_map()] * 8, "voc")

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", fetch)
    for _ in range(3):
        pairs = search_seg.list_data(search_seg.parse_arguments(args))
        assert {name: len(chosen) for name, chosen in pairs.items()} == {"train": 3, "val": 1, "test": 4}
    assert len(calls) == 1
    (tmp_path / "voc/VOCdevkit/VOC2012/SegmentationClass/3.png").unlink()  # killed while it was unpacked
    search_seg.list_data(search_seg.parse_arguments(args))
    assert len(calls) == 2

    def waited(lock, how):  # meanwhile another process has fetched it
        write_folder(tmp_path / "shared/VOCdevkit/VOC2012", [index_map()] * 8, "voc")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", waited)
        search_seg.list_data(search_seg.parse_arguments([*args[:-1], str(tmp_path / "shared")]))
    assert len(calls) == 2

    def offline(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", offline)
    with pytest.raises(DataError, match="no download .*no route.*fetch VOC 2012 elsewhere"):
        search_seg.list_data(search_seg.parse_arguments([*args[:-1], str(tmp_path / "other")]))


def test_weights_of_a_file(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    state = search_seg.torchvision.models.resnet50(weights=None).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "w.pth")
    for script in SCRIPTS.values():
        net = script.resnet(50, str(tmp_path / "w.pth"))
        assert torch.equal(net.layer3[2].conv2.weight, state["layer3.2.conv2.weight"])
    args = ("--data-root", tmp_path, "--model", "r101-psp", "--pretrained")
    assert "no layer3.6" in refused(search_seg, monkeypatch, capsys, *args, tmp_path / "w.pth")
    assert "no readable file" in refused(search_seg, monkeypatch, capsys, *args, tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({0: torch.zeros(3)}, tmp_path / "numbers.pth")
    assert "no conv1.weight in it" in refused(search_seg, monkeypatch, capsys, *args, tmp_path / "numbers.pth")
    for name in ("text.pth", "tensor.pth"):
        assert "no readable file" in refused(search_seg, monkeypatch, capsys, *args, tmp_path / name)
    search_det.build_model("r50-fpn", 3, False, str(tmp_path / "w.pth"))  # frozen norms, that count no batches
    torch.save(state | {"layer3.6.conv1.weight": torch.zeros(1)}, tmp_path / "deeper.pth")  # as in one of ResNet-101
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit):
            script.resnet(50, str(tmp_path / "deeper.pth"))
        assert "layer3.6.conv1.weight in it, of a deeper network" in capsys.readouterr().err


@pytest.mark.parametrize("name, model", [("seg", "r50-dlv3p"), ("det", "r50-fpn"), ("pose", "r50")])
def test_without_a_network_one_line_says_what_to_do(name, model, tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    crop = ["--crop", "64", "--aspect", "1"] if name == "pose" else []
    error = refused(
        SCRIPTS[name], monkeypatch, capsys, "--model", model, "--pretrained", "--data-root", tmp_path, *crop
    )
    assert "--pretrained: no download" in error and "resnet50" in error and "--pretrained FILE" in error


# Few pictures, and none


def write_coco(root, number):
    """A COCO data set of `number` pictures a split, one object in each but every eighth of train."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        for k in range(number):
            save(noise(40, 40, k), root / f"{split}2017/{k}.jpg")
    return root


LAYOUTS = {  # of annotations and pictures, for the names of splits as they are there
    "COCO 2014": ("annotations/{kind}_{split}2014.json", "{split}2014", ("train", "val")),
    "no year": ("annotations/{kind}_{split}.json", "{split}", ("train", "val")),
    "no kind": ("annotations/{split}.json", "images/{split}", ("train", "val", "test")),
    "capitals": ("Annotations/{kind}_{split}.json", "Images/{split}", ("Train", "Validation")),
    "year of the file alone": ("annotations/{kind}_{split}2017.json", "{split}", ("train", "val")),
    "one folder of pictures": ("annotations/{kind}_{split}.json", "images", ("train", "validation")),
    "Roboflow": ("{split}/_annotations.coco.json", "{split}", ("train", "valid", "test")),
}


@pytest.mark.parametrize("script, kind", [(search_det, "instances"), (search_pose, "person_keypoints")])
@pytest.mark.parametrize("listing, folder, splits", LAYOUTS.values(), ids=LAYOUTS)
def test_coco_as_labelling_tools_lay_it_out(tmp_path, listing, folder, splits, script, kind):
    for split in splits:
        (tmp_path / listing.format(split=split, kind=kind)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / listing.format(split=split, kind=kind)).write_text("{}")
        (tmp_path / folder.format(split=split)).mkdir(parents=True, exist_ok=True)
    args = arguments(script, tmp_path, "--data", "coco", "--model", "small")
    found = {name: (source[0], source[1]) for name, source in script.list_data(args).items()}
    train, val, *test = (
        (tmp_path / listing.format(split=split, kind=kind), tmp_path / folder.format(split=split)) for split in splits
    )
    wanted = {"train": train, "val": val, "test": test[0]} if test else {"train": train, "val": train, "test": val}
    assert found == wanted


def test_a_file_of_another_name_is_told(tmp_path):
    for folder in ("annotations", "images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "annotations/instances_default.json").write_text("{}")
    (tmp_path / "annotations/captions_train2017.json").write_text("{}")
    args = arguments(search_det, tmp_path, "--data", "coco", "--model", "small")
    with pytest.raises(DataError, match="instances_train2017.json: not found; .*there is .*instances_default.json"):
        search_det.list_data(args)
    for split in ("train", "val"):
        (tmp_path / f"annotations/instances_{split}2017.json").write_text("{}")
    (tmp_path / "images").rmdir()
    with pytest.raises(DataError, match="train2017: not found") as missing:
        search_det.list_data(args)
    assert "there is" not in str(missing.value)


def test_pictures_of_the_year_of_their_annotations(tmp_path):
    for split in ("train", "val"):
        for folder in (f"images/{split}2014", f"images/{split}2017", f"{split}2017", split, f"images/{split}"):
            (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"annotations/instances_{split}2014.json").write_text("{}")
    found = search_det.list_data(arguments(search_det, tmp_path, "--data", "coco", "--model", "small"))
    assert found["train"][1] == tmp_path / "images/train2014" and found["test"][1] == tmp_path / "images/val2014"


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    def forbidden(*what):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", forbidden)
    assert inside(tmp_path, "Train", "a.json") == tmp_path / "Train/a.json"


def test_no_object_in_the_pictures_held_out(tmp_path):
    root = write_coco(tmp_path, 9)
    images = [{"id": k + 1, "file_name": f"{k}.jpg", "width": 40, "height": 40} for k in range(9)]
    entries = [
        {"id": k, "image_id": k, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
        | {"keypoints": [9, 9, 2, 15, 15, 2], "num_keypoints": 2}
        for k in range(2, 9)
    ]
    content = {"images": images, "annotations": entries}
    content["categories"] = [{"id": 1, "name": "x", "keypoints": ["a", "b"], "skeleton": []}]
    for split in ("train", "val"):
        for kind in ("instances", "person_keypoints"):
            (root / f"annotations/{kind}_{split}2017.json").write_text(json.dumps(content))
    with pytest.raises(search_det.DataError, match="no object in the 2 of its 9 pictures"):
        ready(search_det.DetTask(arguments(search_det, root, "--data", "coco", "--size", "64", "--model", "small")))
    with pytest.raises(search_pose.DataError, match="nobody with a labelled joint"):
        search_pose.read_data(arguments(search_pose, root, "--data", "coco", "--model", "small"))
    content |= {"images": images[:1], "annotations": [{**entries[0], "image_id": 1}]}
    for kind in ("instances", "person_keypoints"):
        (root / f"annotations/{kind}_train2017.json").write_text(json.dumps(content))
    with pytest.raises(search_det.DataError, match="too few pictures; give two or more"):
        ready(search_det.DetTask(arguments(search_det, root, "--data", "coco", "--size", "64", "--model", "small")))
    with pytest.raises(search_pose.DataError, match="too few pictures; give two or more"):
        search_pose.read_data(arguments(search_pose, root, "--data", "coco", "--model", "small"))


def test_a_run_on_a_folder_of_two_pictures_each(tmp_path):
    """The real command to its end, on binary masks with pictures that do not fit the memory given."""
    masks = [(index_map() > 0).astype(np.uint8) * 255] * 4
    write_folder(tmp_path / "data", masks)
    flags = "--data folder --model small --crop 16 --batch 2 --proxy-steps 2 --retrain-steps 2 --evals 1 --minutes 0.2"
    command = [sys.executable, search_seg.__file__, *flags.split(), "--seeds", "1", "--workers", "1", "--memory", "0"]
    command += ["--data-root", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "2 classes found in 4 masks: 0 255\n" in done.stdout, done.stderr
    assert "more than --memory 0 or TMPDIR holds; decoded batch by batch" in done.stdout
