"""Detection, piece by piece and as the real command: evaluator, loader, losses, gates, files, resume, wrong input."""

import contextlib
import copy
import functools
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import damaged, journal, ready, refused
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection import FasterRCNN, MaskRCNN, roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

import evolve
import search_det
from data import shapes
from data.coco import check_annotation, read_runs
from loss_ops import parse
from search_det import DataError, InvalidLoss, coco_eval

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared/data"
SMALL = ("--proxy-steps", "2", "--retrain-steps", "2", "--batch", "4", "--device", "cpu")
NUMBERS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("data") / "shapes", splits={"train": 40, "val": 10, "test": 10})


def arguments(root, *argv):
    return search_det.parse_arguments(["--data-root", str(root), "--workers", "1", *SMALL, *argv])


@pytest.fixture(scope="module")
def task(root):
    return ready(search_det.DetTask(arguments(root)))


@pytest.fixture(scope="module")
def mask_task(root):
    return ready(search_det.DetTask(arguments(root, "--metric", "segm")))


# Metric, against pycocotools


def oracle(truth, found, iou_type):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(found)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NUMBERS, evaluation.stats.tolist()))


def random_case(seed, iou_type):
    """Truth and results with crowds, ties in score and IoU, empty pictures and classes, and far too many boxes."""
    rng = np.random.default_rng(seed)
    side, coarse, crowded = int(rng.choice([40, 100, 300])), rng.random() < 0.5, rng.random() < 0.25
    images = rng.choice(1000, int(rng.integers(1, 8)), replace=False).tolist()
    classes = sorted(rng.choice(90, int(rng.integers(1, 6)), replace=False).tolist())

    def random_box():
        w, h = rng.uniform(2, 0.7 * side, 2)
        box = [rng.uniform(0, side - w), rng.uniform(0, side - h), w, h]
        return [round(v / 8) * 8.0 or 8.0 for v in box] if coarse else [float(v) for v in box]

    def random_mask(box):
        pixels = np.zeros((side, side), np.uint8)
        x, y, w, h = map(int, box)
        pixels[y : y + h + 1, x : x + w + 1] = 1
        pixels *= rng.random(pixels.shape) < (0.8 if rng.random() < 0.5 else 1)
        code = rle.encode(np.asfortranarray(pixels))
        return {"size": code["size"], "counts": code["counts"].decode()}

    entries, found = [], []
    first = int(rng.integers(2))  # pycocotools takes a match with annotation 0 for none
    for image in images:
        for _ in range(int(rng.integers(9)) * (3 if crowded else 1)):
            box = random_box()
            area = rng.choice([100, 1024, 5000, 9216]) if rng.random() < 0.2 else box[2] * box[3] * rng.uniform(0.3, 1)
            entry = {"id": first + len(entries), "image_id": image, "bbox": box, "area": float(area)}
            entry |= {"category_id": int(rng.choice(classes[: len(classes) - 1] or classes))}
            entry |= {"iscrowd": int(rng.random() < 0.2), "ignore": int(rng.random() < 0.1)}
            entries.append(entry)
    for image in images:
        own = [entry for entry in entries if entry["image_id"] == image]
        for _ in range(int(rng.integers(110, 250) if crowded and rng.random() < 0.4 else rng.integers(20))):
            box, category = random_box(), int(rng.choice(classes))
            if own and rng.random() < 0.7:
                near = own[int(rng.integers(len(own)))]
                noise = rng.choice([0, 0, 8, -8], 4) if coarse else rng.normal(0, 0.02 * side, 4)
                box = np.maximum(np.add(near["bbox"], noise), [0, 0, 1, 1]).tolist()
                category = near["category_id"] if rng.random() < 0.9 else category
            score = rng.random() if rng.random() < 0.3 else round(rng.random(), 1)
            score = np.nan if seed % 4 == 3 and rng.random() < 0.2 else score
            found.append({"image_id": image, "category_id": category, "score": float(score), "bbox": box})
    if iou_type == "segm":
        for entry in entries + found:
            entry["segmentation"] = random_mask(entry["bbox"])
        if seed % 2:  # then the area of a result is its mask's
            found = [{key: value for key, value in entry.items() if key != "bbox"} for entry in found]
    rng.shuffle(found)
    truth = {
        "images": [{"id": image, "height": side, "width": side} for image in images],
        "categories": [{"id": k, "name": str(k)} for k in classes],
        "annotations": entries,
    }
    return truth, found


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(24))
def test_evaluator_equals_pycocotools(seed, iou_type):
    truth, found = random_case(seed, iou_type)
    got = coco_eval(truth, found, iou_type)
    assert list(got) == NUMBERS
    if found:
        assert got == pytest.approx(oracle(truth, found, iou_type), rel=0, abs=1e-12)


def test_empty_masks_stay_in_the_truth():
    """A mask of no pixel cannot be found, and is missed; as in pycocotools."""
    truth, found = random_case(4, "segm")
    truth["annotations"][0]["segmentation"] = {
        "size": truth["annotations"][0]["segmentation"]["size"],
        "counts": [300**2],
    }
    found[0]["segmentation"] = rle.encode(np.zeros((300, 300), np.uint8, order="F"))
    assert coco_eval(truth, found, "segm") == pytest.approx(oracle(truth, found, "segm"), rel=0, abs=1e-12)
    whole = {**truth, "annotations": [e | {"iscrowd": 0, "id": 1 + k} for k, e in enumerate(truth["annotations"][:1])]}
    assert coco_eval(whole, [], "segm")["AP"] == 0, "-1 if nothing were there"


def test_of_equal_ious_the_later_one_is_taken():
    about = {"image_id": 1, "category_id": 1}
    boxes = [[0, 0, 10, 10], [4, 0, 10, 10]]
    truth = {
        "images": [{"id": 1, "height": 20, "width": 20}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{**about, "id": k, "bbox": box, "area": 100, "iscrowd": 0} for k, box in enumerate(boxes, 1)],
    }
    # The first lies in the middle of both and takes the second away from the one that is exactly there.
    found = [{**about, "bbox": box, "score": score} for box, score in (([2, 0, 10, 10], 0.9), ([4, 0, 10, 10], 0.8))]
    got = coco_eval(truth, found, "bbox")
    assert got == pytest.approx(oracle(truth, found, "bbox"), abs=1e-9)
    assert got["AR100"] == pytest.approx(0.5), "one of two at every threshold; .7 if the first were taken"


def test_an_annotation_listed_twice_counts_twice():
    """As in pycocotools."""
    truth, found = random_case(0, "bbox")
    truth["annotations"] += [dict(one) for one in truth["annotations"][:4]]
    assert search_det.coco_eval(truth, found, "bbox", "cpu") == pytest.approx(oracle(truth, found, "bbox"), nan_ok=True)


def test_evaluator_in_small_portions(monkeypatch):
    """The groups of a case, matched a few at a time, as those of a large data set are."""
    truth, found = random_case(13, "bbox")
    whole = coco_eval(truth, found, "bbox")
    monkeypatch.setattr(search_det, "PORTION", 1)
    assert coco_eval(truth, found, "bbox") == whole


def test_evaluator_without_detections_or_truth():
    truth, found = random_case(2, "bbox")
    nothing = coco_eval(truth, [], "bbox")
    full = oracle(truth, found, "bbox")
    assert nothing == {name: min(value, 0.0) for name, value in full.items()}, "-1 where there is no truth, else 0"
    assert set(coco_eval({**truth, "annotations": []}, found, "bbox").values()) == {-1.0}


def test_evaluator_reads_files_and_complains(tmp_path):
    truth, found = random_case(5, "bbox")
    for name, content in (("truth", truth), ("found", found)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert coco_eval(tmp_path / "truth.json", str(tmp_path / "found.json"), "bbox") == coco_eval(truth, found, "bbox")
    with pytest.raises(ValueError, match="keypoints"):
        coco_eval(truth, found, "keypoints")
    with pytest.raises(ValueError, match="image 5000"):
        coco_eval(truth, [{**found[0], "image_id": 5000}], "bbox")


def test_evaluator_takes_tuples_tensors_and_arrays():
    truth, found = random_case(4, "bbox")
    want = oracle(truth, found, "bbox")
    rows = [[r["image_id"], *r["bbox"], r["score"], r["category_id"]] for r in found]
    tensors = [{key: torch.tensor(value, dtype=torch.float64) for key, value in r.items()} for r in found]
    mixed = [found[0], *tensors[1:]]
    strings = [r | {"image_id": str(r["image_id"]), "category_id": float(r["category_id"])} for r in found]
    for given in (tuple(found), tensors, mixed, strings, torch.tensor(rows, dtype=torch.float64), np.array(rows)):
        assert coco_eval(truth, given, "bbox") == pytest.approx(want, rel=0, abs=1e-12)
    lists = ("images", "annotations", "categories")
    assert coco_eval({key: tuple(truth[key]) for key in lists}, found, "bbox") == pytest.approx(want, rel=0, abs=1e-12)


def test_evaluator_takes_masks_in_all_forms():
    truth, found = random_case(4, "segm")
    corners = [[20, 30], [90, 25], [80, 110], [15, 100]]
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    flat = [value for point in corners for value in point]
    forms = [[flat], flat, corners, [corners], np.array(corners), [np.array(corners)], np.array(corners)[:, None]]
    for result in found[:3]:
        (code,) = rle.frPyObjects([flat], *sizes[result["image_id"]])
        want = oracle(truth, [result | {"segmentation": code}], "segm")
        counts = read_runs(code["counts"])
        for form in (*forms, [code], {**code, "counts": counts}, {**code, "counts": np.array(counts)}):
            given = coco_eval(
                truth, [{k: v for k, v in result.items() if k != "bbox"} | {"segmentation": form}], "segm"
            )
            assert given == pytest.approx(want, rel=0, abs=1e-12), form
    bare = np.zeros((300, 300), np.uint8)
    with pytest.raises(ValueError, match="result 0: its mask"):
        coco_eval(truth, [found[0] | {"segmentation": bare}], "segm")


def test_evaluator_takes_what_pycocotools_has_read(tmp_path):
    truth, found = random_case(5, "bbox")
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    theirs = COCO(tmp_path / "truth.json")
    assert coco_eval(theirs, theirs.loadRes(found), "bbox") == coco_eval(truth, found, "bbox")


def test_evaluator_of_an_empty_split():
    nothing = {"images": [], "annotations": [], "categories": []}
    assert set(coco_eval(nothing, [], "bbox").values()) == {-1.0}


def test_results_of_no_known_category_are_told(capsys):
    evolve.warn_once.cache_clear()
    truth, found = random_case(4, "bbox")
    assert coco_eval(truth, [result | {"category_id": 77} for result in found], "bbox")["AP"] == 0
    assert "no result is of a category of the ground truth (first: 77)" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ids_that_are_not_exact_are_refused(dtype):
    truth = {"images": [{"id": 2**25 + 2}], "annotations": [], "categories": [{"id": 1}]}
    number = {torch.float32: 2**25 + 2}.get(dtype, 5001)
    row = torch.tensor([[number, 0, 0, 5, 5, 0.5, 1]], dtype=dtype)
    with pytest.raises(ValueError, match="does not hold such image ids exactly; give float64"):
        coco_eval(truth, row, "bbox")
    row = torch.tensor([[2**25 + 2, 0, 0, 5, 5, 0.5, 1]], dtype=torch.float64)
    assert coco_eval(truth, row, "bbox")["AP"] == -1


WRONG_RESULTS = {
    "'category_id' is None": {"category_id": None},
    "image array": {"image_id": np.array([1, 2])},
    "it has neither 'bbox' nor 'segmentation'": {"bbox": None, "segmentation": None},
    "image 5000": {"image_id": 5000},
    "image None": {"image_id": None},
    "'bbox' is .1, 2, 3.": {"bbox": [1, 2, 3]},
    "'bbox' is .1, 2, 3, nan.": {"bbox": [1, 2, 3, np.nan]},
    "'bbox' is .*'x'": {"bbox": ["x", 2, 3, 4]},
    "'score' is None": {"score": None},
}


@pytest.mark.parametrize("message", WRONG_RESULTS)
def test_evaluator_names_the_result_that_is_damaged(message):
    truth, found = random_case(4, "bbox")
    found[2] = found[2] | WRONG_RESULTS[message]
    if "neither" in message:  # the first one says whether there are boxes
        found[0] |= WRONG_RESULTS[message]
    with pytest.raises(ValueError, match=f"^detections: result {0 if 'neither' in message else 2}: {message}"):
        coco_eval(truth, found, "bbox")
    for nothing in ({}, "x", [7], None):
        with pytest.raises((ValueError, DataError)):
            coco_eval(truth, nothing, "bbox")


@pytest.mark.skipif(not (SHARED / "coco_eval").is_dir(), reason="COCO's published example is not here")
@pytest.mark.parametrize(
    "iou_type, published",
    [
        ("bbox", [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564]),
        ("segm", [0.320, 0.562, 0.299, 0.387, 0.310, 0.327, 0.268, 0.415, 0.417, 0.469, 0.377, 0.381]),
    ],
)
def test_evaluator_gives_the_published_figures(iou_type, published):
    folder = SHARED / "coco_eval"
    got = coco_eval(folder / "instances_val2014_100.json", folder / f"fake{iou_type}100_results.json", iou_type)
    assert [round(value, 3) for value in got.values()] == published


# Losses, against torchvision's


def unmodified(net, masks):
    """torchvision's own model with the settings and weights of `net`."""
    own = search_det.SETTINGS["small"]
    kinds = dict(rpn_pre_nms_top_n_train=own.proposals["training"], rpn_post_nms_top_n_train=own.proposals["training"])
    extra = dict(mask_roi_pool=net.roi_heads.mask_roi_pool, mask_head=net.roi_heads.mask_head,
                 mask_predictor=net.roi_heads.mask_predictor) if masks else {}  # fmt: skip
    theirs = (MaskRCNN if masks else FasterRCNN)(
        net.backbone,
        rpn_anchor_generator=AnchorGenerator(tuple((a,) for a in own.anchors), ((0.5, 1.0, 2.0),) * 3),
        rpn_head=net.rpn.head,
        rpn_fg_iou_thresh=own.object,
        rpn_batch_size_per_image=own.sampled[0],
        box_batch_size_per_image=own.sampled[1],
        box_roi_pool=net.roi_heads.box_roi_pool,
        box_head=net.roi_heads.box_head,
        box_predictor=net.roi_heads.box_predictor,
        **kinds,
        **extra,
    )
    return theirs.train()


@pytest.mark.parametrize("masks", [False, True])
def test_baseline_is_torchvisions_own_training(task, mask_task, masks):
    task = mask_task if masks else task
    images, targets = task.proxy_batches[0]
    sizes = [tuple(images.shape[-2:])] * len(images)
    net = task.network(task.proxy, 3).train()
    theirs = unmodified(net, masks)
    runs = []
    for _ in range(2):
        net.zero_grad()
        torch.manual_seed(7)  # both draw the sampled anchors and proposals
        if runs:
            features = theirs.backbone(images)
            proposals, first = theirs.rpn(ImageList(images, sizes), features, targets)
            values = {**first, **theirs.roi_heads(features, proposals, sizes, targets)[1]}
        else:
            values = net(images, sizes, targets, task.losses("ce+l1"))
        sum(values.values()).backward()
        runs.append((sorted(v.item() for v in values.values()), [w.grad.clone() for w in net.parameters()]))
    assert len(runs[0][0]) == 4 + masks and runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    for mine, own in zip(runs[0][1], runs[1][1]):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-6)


def sample(seed=0, N=12, C=4):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, C, generator=g, dtype=torch.float64)
    label = torch.randint(0, C, (N,), generator=g)
    label[:2] = torch.tensor([0, 1])
    start = torch.rand(int((label > 0).sum()), 4, generator=g, dtype=torch.float64) * 20
    start[:, 2:] += start[:, :2] + 8
    deltas, targets = torch.randn(2, len(start), 4, generator=g, dtype=torch.float64)
    return logits, label, search_det.Boxes(deltas, targets, start, search_det.CODER, N)


def test_trees_of_known_losses():
    logits, label, boxes = sample()
    ce = parse("Neg(Mul(y, Log(p)))")
    got = search_det.tree_loss("rcnn_cls", ce)(logits, label, boxes)
    torch.testing.assert_close(got, F.cross_entropy(logits, label))
    objectness = torch.stack([torch.zeros_like(logits[:, 0]), logits[:, 0]], 1)
    got = search_det.tree_loss("rpn_cls", ce)(objectness, (label > 0).long(), None)
    torch.testing.assert_close(got, F.binary_cross_entropy_with_logits(logits[:, 0], (label > 0).double()))
    maps, target = torch.randn(3, 5, 5, dtype=torch.float64), torch.rand(3, 5, 5, dtype=torch.float64)
    got = search_det.tree_loss("mask", ce)(maps, target)
    torch.testing.assert_close(got, F.binary_cross_entropy_with_logits(maps, target))
    found, wanted = boxes.decode()
    for name, want in (
        ("iou", -torch.log(torch.diagonal(torchvision.ops.box_iou(found, wanted)) + 1e-12).mean()),
        ("giou", torchvision.ops.generalized_box_iou_loss(found, wanted, reduction="mean", eps=0) - 2),
    ):
        got = search_det.tree_loss("rcnn_reg", search_det.REGRESSION[name])(boxes)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_cse_a():
    logits, label, boxes = sample(1)
    found, wanted = boxes.decode()
    want, k = 0.0, 0
    for row in range(len(label)):
        w = 0.0
        if label[row]:
            w = torchvision.ops.box_iou(found[k : k + 1], wanted[k : k + 1]).item()
            k += 1
        want -= (1 + np.sin(w)) * logits[row].log_softmax(0)[label[row]] / len(label)
    torch.testing.assert_close(search_det.cse_cls(logits, label, boxes), want)
    terms = []
    for a, b in zip(found, wanted):
        i = (min(a[2], b[2]) - max(a[0], b[0])).clamp(min=0) * (min(a[3], b[3]) - max(a[1], b[1])).clamp(min=0)
        u = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - i
        e = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        terms.append((1 - i / u) + (1 - (i + 2) / e))
    torch.testing.assert_close(search_det.cse_reg(boxes), torch.stack(terms).mean())


def test_losses_without_any_positive():
    logits, label, boxes = sample()
    label[:] = 0
    empty = boxes._replace(
        **{name: getattr(boxes, name)[:0].requires_grad_() for name in ("deltas", "targets", "start")}
    )
    maps = torch.zeros(0, 5, 5, requires_grad=True)
    for name in ("l1", "iou", "giou", "cse-a"):
        term = search_det.BRANCHES["rcnn_reg"][1][name]
        loss = term if callable(term) else search_det.tree_loss("rcnn_reg", term)
        assert loss(empty) == 0 and loss(empty).requires_grad
    assert search_det.cse_cls(logits, label, empty).isfinite()
    for loss in (search_det.mask_ce, search_det.tree_loss("mask", parse("Neg(Mul(y, Log(p)))"))):
        assert loss(maps, maps.detach()) == 0 and loss(maps, maps.detach()).requires_grad


# Data


def test_splits_are_what_was_drawn(mask_task):
    data = mask_task.data
    assert {name: len(split.images) for name, split in data.items()} == {"train": 40, "val": 10, "test": 10}
    image, _, instances = shapes.draw_scene(0, 40, shapes.SIZE)  # the first of val
    val = data["val"]
    difference = val.images[0].float() - torch.from_numpy(image[:, :, ::-1].copy()).movedim(-1, 0)
    assert difference.abs().mean() < 8, "only JPEG stands between the drawing and the split, and channels are RGB"
    assert val.labels[0][val.labels[0] > 0].tolist() == [instance["kind"] for instance in instances]


def test_windows_carry_boxes_and_masks_along(mask_task):
    """Unscaled windows hold the drawn masks to the pixel, mirrored or not, and boxes that fit them."""
    split, g = mask_task.data["train"], torch.Generator().manual_seed(0)
    index = torch.arange(40)
    images, targets = search_det.batch_scale_flip(split, index, 64, (1.0, 1.0), g)
    mirrored = 0
    for k, target in enumerate(targets):
        _, _, instances = shapes.draw_scene(0, k, shapes.SIZE)
        drawn = torch.stack([torch.from_numpy(instance["mask"]) for instance in instances])
        flipped = (images[k] - split.images[k].flip(-1)).abs().mean() < 1e-3
        mirrored += flipped
        drawn = drawn.flip(-1) if flipped else drawn
        kept = torch.tensor([all(side >= 2 for side in rle.toBbox(rle.encode(np.asfortranarray(m.byte().numpy())))[2:])
                             for m in drawn])  # fmt: skip
        assert torch.equal(target["masks"].bool(), drawn[kept])
        torch.testing.assert_close(
            target["boxes"], torchvision.ops.masks_to_boxes(drawn[kept]) + torch.tensor([0, 0, 1, 1])
        )
        assert target["labels"].tolist() == [i["kind"] for i, good in zip(instances, kept) if good]
    assert 10 <= mirrored <= 30


@pytest.mark.parametrize("scale", [0.6, 1.7])
def test_scaled_windows(mask_task, scale):
    split, g = mask_task.data["train"], torch.Generator().manual_seed(1)
    _, targets = search_det.batch_scale_flip(split, torch.arange(40), 96, (scale, scale), g)
    for target in targets:
        assert (target["boxes"] >= 0).all() and (target["boxes"] <= 96).all()
        for box, mask in zip(target["boxes"], target["masks"]):
            assert mask.shape == (96, 96)
            if mask.sum() > 40 and scale < 1:  # whole objects: the mask fills its box
                around = torchvision.ops.masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
                torch.testing.assert_close(around, box, atol=1.5, rtol=0)
            outside = mask.clone()
            outside[int(box[1]) : int(box[3].ceil()), int(box[0]) : int(box[2].ceil())] = 0
            assert not outside.any()


def write_coco(root, pictures, entries, categories=(3, 7)):
    """A COCO folder with random pictures of the given (height, width), the same in both splits."""
    (root / "annotations").mkdir(parents=True)
    images = [{"id": k, "file_name": f"{k}.jpg", "height": h, "width": w} for k, (h, w) in pictures.items()]
    content = {"images": images, "annotations": entries, "categories": [{"id": k, "name": str(k)} for k in categories]}
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        for k, size in pictures.items():
            pixels = np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2017/{k}.jpg")
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return content


def entry(number, image, category=3, box=(2, 3, 8, 6), **more):
    x, y, w, h = box
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": w * h,
            "iscrowd": 0, "segmentation": polygon} | more  # fmt: skip


def read_split(source, masks, skip_empty, memory=float("inf")):
    """The split of a COCO file for windows of 64 pixels."""
    return search_det.read_split(source, search_det.check_source(source, masks, skip_empty), 64, masks, memory)


def test_coco_layout(tmp_path):
    """Pictures of several sizes, gaps in ids and categories, an uncompressed crowd, pictures without objects."""
    pictures = {5 * k + 2: (40 + k, 80 - k) for k in range(16)}
    crowd = {"size": [40, 80], "counts": [40, 100, 3060]}
    entries = [
        entry(9, 2, 7),
        entry(4, 2, iscrowd=1, segmentation=crowd),
        entry(5, 12),
        entry(6, 77, box=(0, 0, 50, 55)),
    ]
    write_coco(tmp_path, pictures, entries)
    task = ready(
        search_det.DetTask(
            arguments(tmp_path, "--data", "coco", "--size", "64", "--metric", "segm", "--model", "small")
        )
    )
    assert {name: len(split.images) for name, split in task.data.items()} == {"train": 14, "val": 2, "test": 16}
    test = task.data["test"]
    assert (
        test.truth.categories == [3, 7]
        and test.labels[0].tolist() == [2, 1]
        and test.crowd[0].tolist() == [False, True]
    )
    assert test.sizes[0].tolist() == [32, 64] and test.originals[0].tolist() == [40, 80]
    torch.testing.assert_close(test.boxes[0, 0], torch.tensor([2.0, 3, 10, 9]) * 0.8)
    g = torch.Generator().manual_seed(0)
    _, targets = search_det.batch_scale_flip(test, torch.tensor([0, 15, 1]), 64, (1.0, 1.0), g)
    assert [target["labels"].tolist() for target in targets] == [[2], [1], []], "crowds are no targets"
    assert targets[2]["masks"].shape == (0, 64, 64)
    assert task.train("ce+l1") >= 0


def sources_of(root, change=lambda content: None, change_val=None, names=None):
    """A COCO folder of 16 pictures with an object each, its files changed; the task that reads it."""
    pictures = dict.fromkeys(range(16), (20, 30))
    write_coco(root, pictures, [entry(k, k, 3 + 4 * (k % 2), box=(1, 1, 8 + k, 9)) for k in range(16)])
    for split, act in (("train", change), ("val", change_val or change)):
        path = root / f"annotations/instances_{split}2017.json"
        content = json.loads(path.read_text())
        act(content)
        path.write_text(json.dumps(content))
    return search_det.DetTask(arguments(root, "--data", "coco", "--size", "64", "--model", "small"))


def test_categories_that_val_counts_anew_are_refused(tmp_path):
    def exchange(content):
        content["categories"] = [{"id": 3, "name": "7"}, {"id": 7, "name": "3"}]

    with pytest.raises(DataError, match="category 3 is '7', in the training split '3'; give both the same"):
        sources_of(tmp_path, change_val=exchange).load()


def test_polygons_tell_corners_from_sizes(tmp_path):
    def change(box, content):
        for annotation in content["annotations"]:
            annotation |= {"bbox": box, "area": None, "segmentation": [[2, 3, 10, 3, 10, 9, 2, 9]]}

    with pytest.raises(DataError, match="boxes seem to be x1 y1 x2 y2"):
        sources_of(tmp_path / "a", functools.partial(change, [2, 3, 10, 9])).load()
    sources_of(tmp_path / "b", functools.partial(change, [2, 3, 8, 6])).load()


@pytest.mark.parametrize("polygons", [[[]], [[[]]], [[10**400, 0, 1, 1]], [], None, [[2, 3, 4, 3, 4, 5]]])
def test_a_box_tells_the_area_that_is_missing(tmp_path, polygons):
    """Whatever the polygons, which boxes do not need; to an evaluator, too."""

    def change(content):
        for annotation in content["annotations"]:
            annotation |= {"area": None, "segmentation": polygons}

    sources_of(tmp_path, change).load()
    entry = {"bbox": [0, 0, 100, 100], "segmentation": polygons}
    for scoring in (False, True):
        assert check_annotation(entry, (200, 200), scoring)["area"] == 10_000


def test_an_object_of_id_0_counts(tmp_path):
    task = sources_of(tmp_path)
    task.load()
    truth = task.data["test"].truth
    found = truth.objects._replace(score=torch.ones(len(truth.objects.box)))
    assert search_det.coco_metrics(truth, found, "cpu")["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "box, area, words",
    [
        ((0.1, 0.1, 0.3, 0.3), None, "most boxes are within 0..1"),
        ((18, 12, 28, 19), None, "boxes seem to be x1 y1 x2 y2"),
        ((2, 3, 10, 9), 48, "boxes seem to be x1 y1 x2 y2"),
    ],
)
def test_boxes_in_other_units(tmp_path, box, area, words):
    def change(content):
        for annotation in content["annotations"]:
            annotation |= {"bbox": list(box), "area": area}

    with pytest.raises(DataError, match=words):
        sources_of(tmp_path, change).load()


@pytest.mark.parametrize(
    "mask",
    [
        [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.1, 0.9]],  # shares of the picture
        [[0, 0, 8, 0, 8, 6, 0, 6]],  # pixels from the corner of the box
        {"size": [20, 30], "counts": [0, 60, 540]},  # an object of another picture
    ],
)
def test_masks_elsewhere_than_their_boxes(tmp_path, mask):
    """Most of them; a few such are left to their makers."""
    content = write_coco(tmp_path, {1: (20, 30)}, [entry(k, 1, box=(15, 8, 8, 6)) for k in range(9)])
    source = search_det.Source(tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017")
    for annotation in content["annotations"][:5]:
        search_det.check_source(source, True, False)
        annotation["segmentation"] = mask
        source.annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"most masks are elsewhere than their boxes \(first: annotation 0: [\[{]"):
        search_det.check_source(source, True, False)
    assert search_det.check_source(source, False, False)


def test_names_of_pictures_as_systems_write_them(tmp_path, capsys):
    """A narrow space before PM, accents composed in the file and not on disk; and what train and val share is told."""
    evolve.warn_once.cache_clear()
    for name in ("10\u202fPM.jpg", "e\u0301.jpg"):
        root, written = tmp_path / name, unicodedata.normalize("NFC", name)

        def change(content, written=written):
            content["images"][0] |= {"file_name": written, "height": None}  # the picture tells its size

        task = sources_of(root, change)
        for split in ("train2017", "val2017"):
            (root / split / "0.jpg").rename(root / split / name)
        shutil.rmtree(root / "val2017")
        (root / "val2017").symlink_to(root / "train2017")
        task.load()
        assert len(task.data["test"].images) == 16
    assert capsys.readouterr().err.count("16 test pictures") == 2


BROKEN = {
    "no picture": ("2017/7.jpg", "not found"),
    "torn picture": ("2017/7.jpg", "not a readable image"),
    "other size": ("2017/7.jpg", "16x20 pixels, listed as 30x20"),
    "no json": ("instances_train2017.json", "not found"),
    "torn json": ("instances_train2017.json", "not a json file"),
    "other json": ("instances_train2017.json", "no list of 'categories'"),
    "empty box": ("instances_train2017.json: annotation 31", "empty box [4, 4, 0, 6]"),
    "mask of another size": ("instances_train2017.json: annotation 31", "mask of 30x21 pixels, its image has 30x20"),
    "no objects": ("instances_train2017.json", "no annotations"),
    "no objects held out": ("instances_train2017.json", "no object in the 2 of its 9 pictures"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_data_is_named(tmp_path, monkeypatch, capsys, broken):
    wrong = {
        "empty box": entry(31, 7, box=(4, 4, 0, 6)),
        "mask of another size": entry(31, 7, segmentation={"size": [21, 30], "counts": [30, 100, 500]}),
    }.get(broken, entry(31, 7))
    write_coco(tmp_path, dict.fromkeys(range(9), (20, 30)), [] if broken == "no objects" else [entry(30, 1), wrong])
    picture, listing = tmp_path / "train2017/7.jpg", tmp_path / "annotations/instances_train2017.json"
    if broken == "other size":
        Image.new("RGB", (16, 20)).save(picture)
    target = picture if "picture" in broken else listing
    {"no": target.unlink, "torn": lambda: target.write_text("{"), "other": lambda: target.write_text("[]")}.get(
        broken.split()[0] if broken.split()[-1] in ("picture", "json") else "", lambda: None
    )()
    flags = ["--data", "coco", "--data-root", tmp_path, "--size", "64", "--workers", "1", "--runs", tmp_path / "runs"]
    error = bad(monkeypatch, capsys, *flags, "--metric", "segm")
    assert all(word in error for word in BROKEN[broken]), error


def test_crowds_teach_nothing_and_are_told(tmp_path, capsys):
    evolve.warn_once.cache_clear()
    source = search_det.Source(tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017")
    write_coco(tmp_path, {1: (20, 30)}, [entry(k, 1, iscrowd=("1", 1, True, "0")[k]) for k in range(4)])
    assert read_split(source, False, True).crowd.sum() == 3
    assert "3 of 4 objects are crowds ('iscrowd' 1), which teach nothing" in capsys.readouterr().err
    content = json.loads(source.annotations.read_text())
    content["annotations"] = [entry(k, 1, iscrowd=1) for k in range(4)]
    source.annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match="all objects in .* are crowds .*; set it to 0"):
        read_split(source, False, True)


def test_names_as_they_were_elsewhere(tmp_path, capsys):
    """Folders of the machine on which the file was written, and capitals that another system does not know."""
    content = write_coco(tmp_path, {k: (20, 30) for k in range(5)}, [entry(k, k) for k in range(1, 5)])
    names = ["images/0.jpg", "C:\\data\\1.JPG", "/data/upload/4/2.jpg", "../3.jpg", "4.Jpg"]
    for image, name in zip(content["images"], names):
        image["file_name"] = name
    listing, folder = tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017"
    listing.write_text(json.dumps(content))
    split = read_split(search_det.Source(listing, folder), False, True)
    assert len(split.images) == 5
    assert "4 pictures (first: images/0.jpg) are not where the annotations say" in capsys.readouterr().err
    links = ["0.jpg?X-Amz=1", "%31.jpg", "/data/local-files/?d=2.jpg", "up/3.jpg?a=b", "4.jpg"]
    for image, name in zip(content["images"], links):
        image["file_name"] = name
    listing.write_text(json.dumps(content))
    assert len(read_split(search_det.Source(listing, folder), False, True).images) == 5
    for image, name in zip(content["images"], names):
        image["file_name"] = name
    content["images"][1]["file_name"] = "train/0.jpg"  # two pictures that this folder cannot tell apart
    listing.write_text(json.dumps(content))
    with pytest.raises(DataError, match="0.jpg: the annotations mean it by 'images/0.jpg' and by 'train/0.jpg'"):
        read_split(search_det.Source(listing, folder), False, True)
    content["images"][1]["file_name"] = "data:image/png;base64," + 5000 * "A"
    listing.write_text(json.dumps(content))
    with pytest.raises(DataError, match="AAA: not found; the annotations name it"):
        read_split(search_det.Source(listing, folder), False, True)


def test_empty_boxes_can_be_left_out(tmp_path):
    write_coco(tmp_path, {1: (20, 30)}, [entry(30, 1), entry(31, 1, box=(4, 4, 0, 6))])
    source = search_det.Source(tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017")
    assert len(read_split(source, False, True).truth.objects.box) == 1
    with pytest.raises(DataError, match="annotation 31: empty box .* --skip-empty"):
        read_split(source, False, False)


def test_coco_files_of_all_tools_load(tmp_path, capsys):
    """What may be missing or written otherwise is no reason to refuse; what is left out is counted in one line."""
    content = write_coco(tmp_path, {k: (20, 30) for k in range(4)}, [], (3, "7"))
    source = search_det.Source(tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017")
    content["images"][1] = {"id": "1", "file_name": "1.jpg"}  # the picture tells its size
    content["images"][2] |= {"height": None, "width": 0, "file_name": ".\\2.jpg"}
    content["images"] += [content["images"][0], {"id": 9, "file_name": "._0.jpg"}]
    bare = {key: entry(1, 1)[key] for key in ("image_id", "category_id", "bbox")}
    code = rle.encode(np.asfortranarray(np.eye(20, 30, dtype=np.uint8)))
    content["annotations"] = [
        entry(0, 0.0, "3", iscrowd=None, area=None),
        bare | {"segmentation": entry(1, 1)["segmentation"][0]},  # a polygon that is in no list
        entry(2, "2", 7, segmentation=[[9, 9], [1, 1, 4, 4], *entry(1, 1)["segmentation"]]),
        entry("x", 3, 7.0, segmentation={"size": [20, 30], "counts": code["counts"].decode()}),
        entry(4, 3, segmentation={"size": [20.0, 30.0], "counts": [25.0, 5, 570]}, box=(-1, 0, 4, 99)),
        entry(5, 77), entry(6, 3, 5), entry(7, 3, box=(40, 2, 5, 5)), entry(8, 3, segmentation=[]), entry(9, 9),
    ]  # fmt: skip
    content["annotations"] += [content["annotations"][0], entry(11, 3, segmentation=[[50, 50, 60, 50, 60, 60]])]
    source.annotations.write_text(json.dumps(content), "utf-8-sig")
    split = read_split(source, True, True)
    assert split.sizes.tolist() == 4 * [[20, 30]] and split.truth.categories == [3, 7]
    assert split.labels.tolist() == [[1, 0], [1, 0], [2, 0], [2, 1]] and not split.crowd.any()
    objects = split.truth.objects
    assert objects.area.tolist() == [48, 48, 48, 48, 396] and objects.counts.tolist() == 5 * [True]
    assert [int(rle.area(mask)) for mask in objects.masks] == [48, 48, 48, 20, 5]
    said = capsys.readouterr().err
    assert f"warning: {source.annotations}: left out " in said and said.count("\n") == 2
    assert "1 boxes reach out of their pictures (first: annotation 4)" in said
    for words in (
        "2 annotations of unlisted images (first: annotation 5 of image 77)",
        "1 annotations of unlisted categories (first: annotation 6 of category 5)",
        "3 empty annotations (first: annotation 7: box [40, 2, 5, 5] outside, in a picture of 30x20 pixels)",
        "1 annotations listed twice (first: annotation 0)",
        "1 images listed twice (first: id 0)",
        "1 of macOS' hidden files (first: ._0.jpg)",
    ):
        assert words in said, said
    for encoding in ("utf-16", "utf-32", "utf-8"):
        source.annotations.write_text(json.dumps(content | {"info": "行人"}, ensure_ascii=False), encoding)
        assert torch.equal(read_split(source, True, True).boxes, split.boxes)
    assert not capsys.readouterr().err, "said once"


REFUSED = {
    "the same id, another picture": lambda c: c["images"][1].update(id=0),
    "the same picture, another id": lambda c: c["images"][1].update(file_name="0.jpg"),
    "the same id, another category": lambda c: c["categories"][1].update(id=3),
    "no integers": lambda c: c["images"][0].update(height=20.5),
    "a far box": lambda c: c["annotations"][0].update(bbox=[1, 1, 1e4, 5]),
    "a far polygon": lambda c: c["annotations"][0].update(segmentation=[[0, 0, 1e9, 0, 5, 5]]),
    "half a point": lambda c: c["annotations"][0]["segmentation"][0].pop(),
    "too many runs": lambda c: c["annotations"][0].update(segmentation={"size": [20, 30], "counts": [500, 101]}),
    "too few runs": lambda c: c["annotations"][0].update(segmentation={"size": [20, 30], "counts": "1234"}),
    "no runs": lambda c: c["annotations"][0].update(segmentation={"size": [20, 30], "counts": ""}),
    "a crowd of two": lambda c: c["annotations"][0].update(iscrowd=2),
    "an area below zero": lambda c: c["annotations"][0].update(area=-1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_right_is_refused(tmp_path, what):
    content = write_coco(tmp_path, {k: (20, 30) for k in range(2)}, [entry(1, 0), entry(2, 1)])
    REFUSED[what](content)
    source = search_det.Source(tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017")
    source.annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{source.annotations.name}: ([^\n]*[;,] [^\n]*|.*twice.*)$"):
        read_split(source, True, True)


@pytest.mark.parametrize("task", ["masks", "boxes", "score"])
def test_no_damage_to_a_file_ends_in_a_traceback(tmp_path, capsys, task):
    """One line that names the file, or a split of sane numbers; and never fewer objects without a word."""
    code = rle.encode(np.asfortranarray(np.eye(20, 30, dtype=np.uint8)))
    entries = [entry(1, 0), entry(2, 1, 7, segmentation={"size": [20, 30], "counts": [40, 100, 460]}),
               entry(3, 1, segmentation={"size": [20, 30], "counts": code["counts"].decode()})]  # fmt: skip
    content = write_coco(tmp_path, {k: (20, 30) for k in range(2)}, entries)
    source = search_det.Source(tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017")
    refused = loaded = 0
    for what, text in damaged(content):
        source.annotations.write_bytes(text)
        evolve.warn_once.cache_clear()
        try:
            if task == "score":
                numbers = coco_eval(source.annotations, [], "segm", "cpu").values()
                assert all(-1 <= number <= 1 for number in numbers), what
            else:
                assert_sane(read_split(source, task == "masks", False), capsys, what)
            loaded += 1
        except DataError as error:
            assert str(source.annotations) in str(error) or "2017/x: not found" in str(error), (what, error)
            assert "\n" not in str(error) and len(str(error)) < 300, (what, error)
            refused += 1
    assert refused > 200 and loaded > 50


def assert_sane(split, capsys, what):
    real, objects = split.labels > 0, split.truth.objects
    assert split.boxes.isfinite().all() and objects.box.isfinite().all() and objects.area.isfinite().all(), what
    corners, sizes = split.boxes[real], split.sizes[torch.where(real)[0]].flip(1)
    assert (corners[:, 2:] > corners[:, :2]).all() and (corners.abs() < 1000).all(), what
    assert (corners[:, 2:] > 0).all() and (corners[:, :2] < sizes).all(), what
    assert (objects.area >= 0).all() and (split.labels <= 2).all() and (split.sizes == torch.tensor([20, 30])).all(), (
        what
    )
    assert objects.masks is None or all(0 < rle.area(mask) <= 600 for mask in objects.masks), what
    said = capsys.readouterr().err
    assert len(objects.box) == 3 and len(split.images) == 2 or said.startswith("warning: ") or "removed" in what, what
    assert said.count("\n") <= 1, said


@pytest.mark.skipif(not (SHARED / "coco_mini").is_dir(), reason="no photographs here")
def test_photographs():
    """The published network on a few photographs: one step, and their scores."""
    folder = SHARED / "coco_mini"
    source = search_det.Source(folder / "annotations/instances_val2017.json", folder / "val2017", lambda k: k < 4)
    split = read_split(source, True, False)
    plan = search_det.PROXY["coco"]._replace(steps=1, batch=2, size=64)
    net = search_det.build_model("r50-fpn", 81, True)
    losses = {branch: next(iter(known.values())) for branch, (_, known) in search_det.BRANCHES.items()}
    data = search_det.Batches(split, plan, 0)
    ((_, loss),) = search_det.train_network(net, losses, data, plan)
    assert 4 < loss < 8, "81 classes at random, and little from the rest"
    assert all(0 <= value < 0.05 for value in search_det.test_network(net, split, 64).values())


def test_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="something other"):
        search_det.list_data(arguments(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    write_coco(tmp_path / "coco", {1: (8, 8)}, [])
    with pytest.raises(DataError, match="something other"):
        search_det.list_data(arguments(tmp_path / "coco"))


# Networks, training, gates


def test_each_process_draws_its_share_of_a_batch(task, monkeypatch, capsys):
    monkeypatch.setattr(evolve, "rank_and_world", lambda: (1, task.proxy.batch))
    plan = task.proxy
    assert len(next(iter(task.batches(plan, 0)))[0]) == plan.batch // task.proxy.batch
    monkeypatch.setattr(evolve, "rank_and_world", lambda: (0, 3))
    with pytest.raises(SystemExit):
        task.batches(plan, 0)
    assert f"--batch {plan.batch}: not to be shared by 3 processes" in capsys.readouterr().err


def test_scoring_twice_gives_the_same_number(task):
    assert task.train("ce+l1") == task.train("ce+l1")
    assert len(task.curve) == 2


def test_scores_of_a_perfect_detector(mask_task, monkeypatch):
    """The way from a network's answer to the score, with the truth as the answer."""
    split = mask_task.data["test"]

    def detect(net, split, part, size):
        found = []
        for k in range(len(split.images))[part]:
            boxes, labels = split.boxes[k, split.labels[k] > 0], split.labels[k, split.labels[k] > 0]
            _, _, instances = shapes.draw_scene(0, 50 + k, shapes.SIZE)
            masks = []
            for instance, (x, y, x2, y2) in zip(instances, boxes.int().tolist()):
                inside = torch.from_numpy(instance["mask"][y:y2, x:x2]).float()
                masks.append(F.interpolate(inside[None, None], (112, 112))[0])
            found.append(
                {"boxes": boxes, "labels": labels, "scores": torch.ones(len(boxes)), "masks": torch.stack(masks)}
            )
        return found

    monkeypatch.setattr(search_det, "detect", detect)
    net = mask_task.network(mask_task.proxy, 0)
    scores = search_det.test_network(net, split, 64)
    assert scores["bbox"] == pytest.approx(1) and scores["segm50"] > 0.8
    assert set(scores) == set(search_det.METRICS["segm"])


def test_masks_are_pasted_as_by_torchvision():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(200, 1, 14, 14, generator=generator)
    corners = torch.rand(200, 2, generator=generator) * torch.tensor([64.0, 48.0]) - 3
    boxes = torch.cat([corners, corners + 4 + 60 * torch.rand(200, 2, generator=generator) ** 3], 1)
    want = roi_heads.paste_masks_in_image(masks, boxes, (48, 64))[:, 0]
    got = search_det.paste_masks(masks, boxes, 48, 64)
    assert got.shape == (200, 64, 48)
    torch.testing.assert_close(got.mT, want, rtol=0, atol=1e-5)
    assert search_det.paste_masks(masks[:0], boxes[:0], 48, 64).shape == (0, 64, 48)


def test_training_learns(root):
    task = ready(search_det.DetTask(arguments(root)))
    plan = task.proxy._replace(steps=40, batch=8)
    net = task.network(plan, 0)
    curve = search_det.train_network(net, task.losses("giou"), task.batches(plan, 0), plan)
    assert curve[-1][1] < curve[0][1] - 0.5


def test_a_detection_depends_on_its_picture_alone(task):
    net, split = task.network(task.proxy, 0), task.data["test"]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    alone, together = (search_det.detect(net, split, slice(0, n), 64)[0] for n in (1, 5))
    assert len(alone["boxes"]) and all(torch.allclose(alone[key], together[key], atol=1e-4) for key in alone)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_detection_depends_neither_on_the_sizes_of_others_nor_on_memory(tmp_path):
    """Pictures of unlike sizes, of which no side is a multiple of the strides."""
    sizes = {1: (64, 50), 2: (40, 64), 3: (128, 90), 4: (30, 30)}
    write_coco(tmp_path, sizes, [entry(k, k) for k in sizes])
    found = []
    for memory in ("0", "1"):
        flags = ["--data", "coco", "--model", "small", "--size", "64", "--memory", memory]
        task = search_det.DetTask(arguments(tmp_path, *flags))
        task.load()
        net, split = task.network(task.proxy, 0), task.data["test"]
        found.append(search_det.detect(net, split, slice(0, 4), 64))
        found.append([search_det.detect(net, split, slice(k, k + 1), 64)[0] for k in range(4)])
    for others in found[1:]:
        for one, other in zip(found[0], others):
            assert len(one["boxes"]) and all(torch.allclose(one[key], other[key], atol=1e-3) for key in one)
    for (height, width), one in zip(sizes.values(), found[0]):
        assert (one["boxes"].amax(0)[2:] <= torch.tensor([width, height]) + 0.5 * max(height, width) / 64).all()


def test_anchors_lie_at_the_strides_of_training(tmp_path, monkeypatch):
    write_coco(tmp_path, {1: (50, 64), 2: (64, 33)}, [entry(1, 1), entry(2, 2)])
    task = search_det.DetTask(arguments(tmp_path, "--data", "coco", "--model", "small", "--size", "64"))
    task.load()
    net, seen = task.network(task.proxy, 0), []
    make = net.rpn.anchor_generator.forward
    monkeypatch.setattr(net.rpn.anchor_generator, "forward", lambda *what: seen.append(make(*what)[0]) or seen[-1:] * 2)
    search_det.detect(net, task.data["test"], slice(0, 2), 64)
    centres = (seen[0][:, :2] + seen[0][:, 2:]) / 2
    grids = [torch.cartesian_prod(*[torch.arange(0, 64, stride)] * 2) for stride in (4, 8, 16)]
    assert torch.equal(centres.flip(1)[::3], torch.cat(grids).float())


def test_levels_of_pools_are_not_guessed():
    """torchvision takes them from the first pictures that a network sees."""
    net = search_det.build_model("r50-fpn", 3, True)
    for pool in (net.roi_heads.box_roi_pool, net.roi_heads.mask_roi_pool):
        guessed = search_det.MultiScaleRoIAlign(pool.featmap_names, pool.output_size, pool.sampling_ratio)
        features = [torch.rand(1, 2, 256 // stride, 256 // stride) for stride in (4, 8, 16, 32)]
        named = dict(zip(pool.featmap_names, features))
        boxes = [torch.tensor([[3.0, 4, 60, 200], [0, 0, 255, 255], [9, 9, 30, 20]])]
        first = pool(named, boxes, [(90, 250)])  # of a window of 256 pixels that the picture does not fill
        assert torch.equal(first, guessed(named, boxes, [(256, 256)]))
        assert pool.scales == guessed.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_gates_look_at_objects_that_are_targets(tmp_path):
    """The picture with most objects has but such as vanish at the size of training."""
    sizes, many = dict.fromkeys((1, 2, 3), (100, 160)), [entry(10 + k, 2, box=(8 * k, 8, 3, 3)) for k in range(9)]
    write_coco(tmp_path, sizes, [*many, entry(1, 1), entry(3, 3, box=(20, 20, 60, 50))])  # the first is held out
    flags = ["--data", "coco", "--model", "small", "--size", "64", "--proxy-steps", "2"]
    task = ready(search_det.DetTask(arguments(tmp_path, *flags)))
    assert set(task.few.tolist()) == {1} and task.branches["rcnn_reg"].target.isfinite().all()
    write_coco(tmp_path / "tiny", sizes, [*many, entry(1, 1)])
    with pytest.raises(search_det.DataError, match="less than 2 pixels wide at --size 64; give a larger one"):
        ready(search_det.DetTask(arguments(tmp_path / "tiny", *flags)))


def test_boxes_end_where_their_pictures_do(tmp_path):
    """What reaches out is cut off, also where a window is wider than the picture; a pixel of it is no target."""
    reaching = [entry(2, 2, box=(-30, 10, 31, 20)), *(entry(k, k, box=(-20, 20, 60, 40)) for k in range(3, 9))]
    write_coco(tmp_path, dict.fromkeys(range(1, 9), (64, 34)), [entry(1, 1), *reaching])  # the first is held out
    task = search_det.DetTask(arguments(tmp_path, "--data", "coco", "--model", "small", "--proxy-steps", "2"))
    task.load()
    train, still = task.data["train"], torch.Generator().manual_seed(0)
    _, targets = search_det.batch_scale_flip(train, torch.arange(1, 7), 64, (1.0, 1.0), still)
    sides = [(target["boxes"][0, 0].item(), target["boxes"][0, 2].item()) for target in targets]
    assert set(sides) == {(15, 49)}, "the picture lies in columns 15 to 49"
    assert train.truth.objects.box[1].tolist() == [-20, 20, 60, 40], "the evaluator sees what was given"
    assert 0 not in ready(task).few.tolist()


def test_masks_share_the_memory_of_their_pictures(root):
    """What holds the pictures or the bits, not both, holds the pictures."""
    source = search_det.list_data(arguments(root, "--metric", "segm"))["train"]
    whole = read_split(source, True, False)
    pictures, bits = whole.images.nbytes, whole.bits.nbytes
    for memory in (pictures + bits, pictures + bits - 1):
        split = read_split(source, True, False, memory)
        assert (split.images.nbytes, split.bits.nbytes > 0) == (pictures, memory == pictures + bits)


def test_minutes_by_default_are_those_of_the_metric(root):
    runs = ["--runs", "runs/segm"]
    kinds = {("--metric", "segm"): 6, ("--metric=segm",): 6, ("--metric", "bbox"): 11, (): 11}
    assert [arguments(root, *flags, *runs).minutes for flags in kinds] == [*kinds.values()]
    assert arguments(root, "--branches", "rcnn_cls, rcnn_reg").branches == ["rcnn_cls", "rcnn_reg"]


def test_gates_see_an_object_in_every_picture(root, monkeypatch):
    """Though a few proposals at even distances be background alone, as most are of hundreds."""
    monkeypatch.setitem(search_det.GATE_SIZE, "cls", 4)
    branch = ready(search_det.DetTask(arguments(root, "--metric", "bbox"))).branches["rcnn_cls"]
    assert (branch.target[:, :, 1:].sum((1, 2, 3, 4)) > 0).all()
    assert evolve.gradients(branch, parse(search_det.KNOWN["cls"][0])) is not None


def test_a_small_detector_is_trained_as_on_shapes(tmp_path):
    write_coco(tmp_path, dict.fromkeys((1, 2), (60, 64)), [entry(1, 1), entry(2, 2)])
    for flags, name in ((["--model", "small"], "shapes"), ([], "coco")):
        task = search_det.DetTask(arguments(tmp_path, "--data", "coco", *flags))
        for plan, want in ((task.proxy, search_det.PROXY[name]), (task.retraining, search_det.RETRAIN[name])):
            shared = {"steps": 0, "batch": 0, "base": (), "base_of": 1}
            assert plan._replace(**shared) == want._replace(**shared)


def test_masks_are_cut_in_portions(mask_task, monkeypatch):
    def draw():
        generator = torch.Generator().manual_seed(0)
        return search_det.batch_scale_flip(split, torch.arange(8), 64, (0.8, 1.25), generator)[1]

    split, cut, sizes = mask_task.data["train"], search_det.cut_masks, []
    whole = draw()
    monkeypatch.setattr(search_det, "PORTION_OF_MASKS", 1)
    monkeypatch.setattr(
        search_det, "cut_masks", lambda bits, frames, *rest: sizes.append(len(frames)) or cut(bits, frames, *rest)
    )
    assert all(torch.equal(a["masks"], b["masks"]) for a, b in zip(whole, draw())) and set(sizes) == {1}


def test_masks_of_a_large_picture_are_pasted_one_by_one(mask_task, monkeypatch):
    net, split, pasted = mask_task.network(mask_task.proxy, 0), mask_task.data["test"], []
    paste = search_det.paste_masks
    monkeypatch.setattr(search_det, "paste_masks", lambda m, *more: pasted.append(len(m)) or paste(m, *more))
    want = search_det.test_network(net, split, 64)
    assert max(pasted) > 1
    pasted.clear()
    monkeypatch.setattr(search_det, "PORTION_OF_MASKS", 1)
    assert search_det.test_network(net, split, 64) == want and set(pasted) <= {0, 1}


@pytest.mark.parametrize("name", search_det.LOSSES)
def test_every_loss_trains(task, name):
    assert 0 <= task.train(name) < 1


def test_each_loss_goes_to_its_branch(task):
    got = task.losses({"rpn_reg": "iou", "rcnn_cls": "cse-a"})
    assert (
        got["rpn_cls"] is search_det.ce and got["rcnn_cls"] is search_det.cse_cls and got["mask"] is search_det.mask_ce
    )
    assert got["rcnn_reg"] is search_det.l1
    boxes = sample()[2]
    assert got["rpn_reg"](boxes) == search_det.tree_loss("rpn_reg", search_det.REGRESSION["iou"])(boxes)


def test_a_long_gradient_ends_no_training(task):
    """Once in many steps a box barely touches what it shall find, and the logarithm of that has a gradient to match."""

    def spike(boxes):
        return boxes.deltas.square().sum() * (1e12 if len(steps) == 3 else 1.0)

    steps, norms = [], []
    plan = task.proxy._replace(steps=6)
    net = task.network(plan, 0)
    before = torch.cat([w.detach().flatten() for w in net.parameters()])
    net.register_forward_hook(lambda *args: steps.append(0))
    optimizer_step = torch.optim.AdamW.step

    def step(optimizer, *args):
        norms.append(torch.nn.utils.get_total_norm([w.grad for w in net.parameters() if w.grad is not None]).item())
        return optimizer_step(optimizer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        search_det.train_network(net, task.losses("ce+l1") | {"rpn_reg": spike}, task.batches(plan, 0), plan)
    after = torch.cat([w.detach().flatten() for w in net.parameters()])
    assert max(norms) == pytest.approx(plan.clip, rel=1e-3) and norms[3] == max(norms)
    assert 0 < (after - before).abs().max() < 0.1


@pytest.mark.parametrize("text", ["rcnn_cls=Mul(y, Exp(Inv(Add(p, Neg(p)))))", "rpn_reg=Exp(Exp(Exp(Exp(u))))"])
def test_invalid_values_stop_the_training(task, text):
    with pytest.raises(InvalidLoss):
        task.train(search_det.read_loss(text, "--loss"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("branch", search_det.BRANCHES)
def test_known_losses_pass_the_gates(mask_task, branch, seed):
    """Whichever the random network: some put their boxes so near the right ones that there is little left to gain."""
    seeded = copy.copy(mask_task)
    seeded.args = copy.copy(mask_task.args)
    seeded.args.seed = seed
    own = seeded.make_branches()[branch]
    assert (own.score(own.ideal, own.target) > 0.95).all(), "the ideal prediction is right"
    for text in own.known:
        expr = parse(text)
        assert evolve.gradients(own, expr) is not None
        assert evolve.rejection_gain(own, expr) > 1.2 * own.eta, text
    wrong = parse(f"Neg({own.known[0]})")
    assert evolve.rejection_gain(own, wrong) < own.eta


def test_gates_decode_as_torchvision(task):
    g = torch.Generator().manual_seed(0)
    deltas, start = 5 * torch.randn(2, 3, 6, 4, 1, 1, generator=g), 20 * torch.rand(3, 6, 4, generator=g)
    start[..., 2:] += start[..., :2] + 1
    got = search_det.decode_boxes(deltas, start)
    for k in range(2):
        for b in range(3):
            torch.testing.assert_close(got[k, b], search_det.CODER.decode_single(deltas[k, b, ..., 0, 0], start[b]))


def test_simulation_of_cse(task):
    good = task.simulate({"rcnn_cls": parse("Neg(Mul(y, Log(p)))")})
    assert good >= 0 and task.simulate({"rcnn_cls": parse("Mul(y, Exp(Inv(Add(p, Neg(p)))))")}) == 0


# The real command


def command(root, runs, *argv):
    return [sys.executable, "search_det.py", "--data-root", str(root), "--runs", str(runs), *SMALL, *argv]


FLAGS = ("--evals", "3", "--seed", "3", "--workers", "1", "--seeds", "1", "--branches", "rpn_cls,rcnn_cls")


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """One finished run: its directory and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    done = subprocess.run(command(root, runs, *FLAGS), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (directory,) = runs.iterdir()
    return directory, done.stdout


def test_run_writes_what_it_promises(finished):
    directory, printed = finished
    assert re.match(r"det_bbox_shapes_3_\d{8}-\d{6}$", directory.name)
    assert len(re.findall(r"^eval +\d+/3  bbox ", printed, re.M)) == 3
    result = json.loads((directory / "result.json").read_text())
    searched, found = {"rpn_cls", "rcnn_cls"}, set(result["losses"])
    assert found and found <= searched and result["task"] == "det"
    for branch in searched - found:
        assert f"{branch}: as in ce+l1" in printed
    for side in ("found", "baseline"):
        assert set(result["test"][side]) == set(search_det.METRICS["bbox"])
        assert all(len(values) == 1 for values in result["test"][side].values())
    drawn = {evolve.predictions_of(directory, losses) for losses in (result["losses"], "ce+l1")}
    assert len(drawn) == 2 and drawn == {*directory.glob("predictions-*.png")}


def test_same_seed_same_journal_across_a_kill(root, finished, tmp_path):
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command(root, tmp_path / "runs", *FLAGS), cwd=REPOSITORY, stdout=out)
        while "eval   1/3" not in (tmp_path / "out").read_text():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (directory,) = (tmp_path / "runs").iterdir()
    assert 1 <= len(journal(directory)) < 3
    resume = [sys.executable, "search_det.py", "--resume", str(directory)]  # all else is known to the run
    done = subprocess.run(resume, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert journal(directory) == journal(finished[0])
    results = [json.loads((path / "result.json").read_text()) for path in (directory, finished[0])]
    assert results[0]["test"] == results[1]["test"]


def test_found_losses_stand_alone(finished, tmp_path):
    shutil.copy(finished[0] / "best_loss.py", tmp_path)
    code = (
        "import torch, best_loss;"
        "x, o = torch.randn(5, 7, requires_grad=True), torch.randn(4, requires_grad=True);"
        "all_of_them = {'rcnn_cls': (x, torch.tensor([0, 0, 3, 6, 1])), 'rpn_cls': (o, torch.tensor([0, 1, 1, 0]))};"
        "found = [name for name in all_of_them if hasattr(best_loss, name)]; assert found;"
        "[getattr(best_loss, name)(*all_of_them[name]).backward() for name in found];"
        "assert all(all_of_them[name][0].grad.isfinite().all() for name in found);"
        "assert all(all_of_them[name][0].grad.any() for name in found)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1"})


TREES = {
    "rpn_cls": "Square(Add(Mul(p, 1), Neg(MeanNHW(y))))",
    "rpn_reg": "Mul(Exp(e), Add(1, Neg(Mul(i, Inv(u)))))",
    "rcnn_cls": "Neg(Mul(y, Log(Tanh(p))))",
    "rcnn_reg": "Add(Neg(i), MeanNHW(Square(u)))",
    "mask": "Abs(Add(MaxPool3(p), Neg(y)))",
}


def test_exported_losses_are_those_of_the_training():
    scope = {}
    exec(
        compile(search_det.export({branch: parse(text) for branch, text in TREES.items()}), "best_loss.py", "exec"),
        scope,
    )
    logits, label, boxes = sample(2)
    objectness, maps, target = logits[:, 0], torch.randn(3, 6, 6), torch.rand(3, 6, 6)
    pairs = torch.stack([torch.zeros_like(objectness), objectness], 1), (label > 0).long(), None
    calls = {
        "rpn_cls": (pairs, (objectness, (label > 0).long())),
        "rcnn_cls": ((logits, label, boxes), (logits, label)),
        "rpn_reg": ((boxes,), boxes.decode()),
        "rcnn_reg": ((boxes,), boxes.decode()),
        "mask": ((maps, target), (maps, target)),
    }
    for branch, (inside, outside) in calls.items():
        want = search_det.tree_loss(branch, parse(TREES[branch]))(*inside)
        torch.testing.assert_close(scope[branch](*outside), want, msg=branch)


def exported():
    """The functions of TREES in one file, and what each is called with: predictions in float64, then targets."""
    scope: dict = {}
    source = search_det.export({branch: parse(text) for branch, text in TREES.items()}, title="Five.")
    exec(compile(source, "best_loss.py", "exec"), scope)
    assert scope["__doc__"].startswith("Five.\n")
    g = torch.Generator().manual_seed(3)
    boxes = torch.rand(8, 4, generator=g, dtype=torch.float64) * 300
    boxes[:, 2:] += boxes[:, :2] + 100  # areas that overflow in float16
    moved = (boxes + 20 * torch.rand(8, 4, generator=g)).float()
    logits, maps = (8 * torch.randn(8, *rest, generator=g, dtype=torch.float64) for rest in ((4,), (28, 28)))
    return scope, {
        "rpn_cls": (logits[:, 0], torch.arange(8) % 2),
        "rcnn_cls": (logits, torch.arange(8) % 4),
        "rpn_reg": (boxes, moved),
        "rcnn_reg": (boxes, moved),
        "mask": (maps, (torch.rand(8, 28, 28, generator=g) > 0.5).float()),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("branch", search_det.BRANCHES)
def test_exported_losses_in_half_precision(branch, dtype):
    scope, calls = exported()
    prediction, target = calls[branch]
    prediction = prediction.to(dtype).requires_grad_()
    value, want = scope[branch](prediction, target), scope[branch](prediction.double(), target)
    assert value.dtype == torch.float32 and want.dtype == torch.float64
    assert value.item() == pytest.approx(want.item(), rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert scope[branch](prediction, target) == value
    (gradient,) = torch.autograd.grad(value, prediction)
    assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("branch", search_det.BRANCHES)
def test_exported_losses_without_any_sample(branch):
    scope, calls = exported()
    prediction, target = (x[:0] for x in calls[branch])
    value = scope[branch](prediction.half().requires_grad_(), target)
    assert value == 0 and value.requires_grad and value.dtype == torch.float32


def test_exported_losses_take_any_kind_of_target():
    scope, calls = exported()
    for branch, dtypes in (
        ("rpn_cls", (torch.uint8, torch.int32, torch.bool)),
        ("rcnn_cls", (torch.uint8, torch.int32)),
        ("mask", (torch.uint8, torch.bool, torch.float16, torch.float64)),
    ):
        prediction, target = calls[branch]
        for dtype in dtypes:
            assert scope[branch](prediction, target.to(dtype)) == scope[branch](prediction, target), (branch, dtype)
    for branch in ("rpn_cls", "rcnn_cls"):
        prediction, target = calls[branch]
        for number in (-1, 255):
            ignored = torch.cat([target, torch.tensor([number, number])])
            more = torch.cat([prediction, prediction[:2] + 1])
            value = scope[branch](more, ignored, number) if number > 0 else scope[branch](more, ignored)
            torch.testing.assert_close(value, scope[branch](prediction, target))


@pytest.mark.parametrize(
    "branch, prediction, target",
    [("rpn_cls", (8, 1), (8,)), ("rpn_cls", (8,), (8, 1)), ("rcnn_cls", (8, 4), (8, 4)), ("rcnn_cls", (8, 1), (8,)),
     ("rcnn_cls", (4,), ()), ("rcnn_reg", (8, 4), (7, 4)), ("rpn_reg", (8, 5), (8, 5)), ("rpn_reg", (4,), (4,)),
     ("mask", (8, 28, 28), (8, 1, 28, 28)), ("mask", (8, 1, 28, 28), (8, 1, 28, 28)), ("mask", (8, 9, 8), (8, 8, 9))],
)  # fmt: skip
def test_exported_losses_name_wrong_shapes(branch, prediction, target):
    with pytest.raises(ValueError, match="expected"):
        exported()[0][branch](torch.rand(prediction), torch.zeros(target, dtype=torch.long))


@pytest.mark.parametrize("number", [254, 255, 256])
def test_class_255_is_a_class(number):
    """A detector of 365 categories: no label is ignored."""
    logits = torch.randn(4, 366, generator=torch.Generator().manual_seed(number), dtype=torch.float64).requires_grad_()
    label = torch.tensor([number, 0, 255, 365])
    want = F.cross_entropy(logits, label)
    ce = parse("Neg(Mul(y, Log(p)))")
    scope: dict = {}
    exec(search_det.export({"rcnn_cls": ce}), scope)
    for value in (search_det.tree_loss("rcnn_cls", ce)(logits, label, None), scope["rcnn_cls"](logits, label)):
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(*(torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (value, want)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_in_half_precision(dtype):
    """Hand-made ones and trees: the number that they give in float64 for the same predictions, in float32."""
    logits, label, boxes = sample(4, N=40)
    half = boxes._replace(deltas=boxes.deltas.to(dtype), targets=boxes.targets.to(dtype), start=boxes.start.float())
    full = boxes._replace(deltas=half.deltas.double(), targets=half.targets.double())
    rounded, maps = logits.to(dtype), (9 * torch.randn(3, 90, 90, dtype=torch.float64)).to(dtype)
    inside = torch.rand(3, 90, 90) > 0.5
    calls = {
        "rcnn_cls": ((rounded, label, half), (rounded.double(), label, full)),
        "rcnn_reg": ((half,), (full,)),
        "mask": ((maps, inside), (maps.double(), inside)),
    }
    for branch, (given, wide) in calls.items():
        for term in (*search_det.BRANCHES[branch][1].values(), parse(TREES[branch])):
            loss = search_det.tree_loss(branch, term) if not callable(term) else term
            value = loss(*given)
            assert value.dtype == torch.float32 and value.item() == pytest.approx(loss(*wide).item(), rel=1e-4), branch


@pytest.mark.parametrize("loss", ["rcnn_reg=giou, rpn_cls=Neg(Mul(y, Log(p)))", "cse-a", "RUN_DIR"])
def test_one_loss_instead_of_a_search(root, finished, tmp_path, capsys, monkeypatch, loss):
    loss = str(finished[0]) if loss == "RUN_DIR" else loss
    monkeypatch.setattr(sys, "argv", command(root, tmp_path, "--loss", loss, "--seeds", "1")[1:])
    search_det.main()
    printed = capsys.readouterr().out
    assert ">>>>  bbox" in printed and printed.count("+-") == 3


def test_several_processes_share_one_training(root, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    flags = command(root, tmp_path, "--metric", "segm", "--loss", "rpn_reg=giou", "--seeds", "1")[1:]
    done = subprocess.run([*launcher, *flags], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rpn_reg=giou, seed 0: segm") == 1 == done.stdout.count(">>>>"), "one of them speaks"
    state = torch.load(next(tmp_path.glob("*/training_0_0.pt")), weights_only=True)
    (order, *_), (other, *_) = state["generators"]
    assert state["steps"] == 2 and not torch.equal(order, other), "each draws pictures of its own"


def test_several_losses_side_by_side(root, tmp_path, capsys, monkeypatch):
    listed = "ce+l1,rcnn_reg=iou; rpn_reg=Neg(Mul(i, Inv(u))),cse-a"
    flags = command(root, tmp_path, "--compare", listed, "--seeds", "1", "--metric", "segm")[1:]
    monkeypatch.setattr(sys, "argv", flags)
    search_det.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in table[1:]] == [
        "ce+l1",
        "rcnn_reg=iou; rpn_reg=Neg(Mul(i, Inv(u)))",
        "cse-a",
    ]
    assert all(row.count("+-") == 6 for row in table[1:])


def test_torn_masks_of_results_are_refused():
    """Pycocotools would loop for ever over run lengths that do not fill the picture."""
    size = [20, 30]
    truth = {
        "images": [{"id": 1, "height": 20, "width": 30}],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 0, 5, 20], "area": 100, "iscrowd": 0}
            | {"segmentation": {"size": size, "counts": [40, 100, 460]}}
        ],
    }
    result = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [2, 0, 5, 20]}
    for wrong in (
        {"size": size, "counts": "X1T3"},
        {"size": [21, 30], "counts": "X1T3\\>"},
        {"size": [2**31, 2**31], "counts": "X1T3\\>"},
        {"size": [-1, 30], "counts": ""},
        {"size": size, "counts": "é"},
        np.eye(20, 30),  # its pixels: in a message of one line
    ):
        with pytest.raises(ValueError, match="result 0: its mask .* is damaged"):
            search_det.coco_eval(truth, [result | {"segmentation": wrong}], "segm")


@pytest.mark.parametrize("rows", [torch.zeros(2, 6), torch.zeros(14), np.zeros((1, 8)), np.full((1, 7), "a")])
def test_arrays_of_results_have_seven_columns(rows):
    truth = {"images": [{"id": 1, "height": 9, "width": 9}], "categories": [{"id": 1}], "annotations": []}
    with pytest.raises(ValueError, match="it must be .M, 7. numbers"):
        search_det.coco_eval(truth, rows, "bbox")


bad = functools.partial(refused, search_det)


LONG = "rcnn_cls=Neg(Mul(y, Log(" + "Add(p, " * 8 + "p" + ")" * 11


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--metric", "map"], ["--metric", "map", "bbox segm"]),
        (["--branches", "rcnn"], ["--branches", "rcnn", "rpn_cls rpn_reg rcnn_cls rcnn_reg mask"]),
        (["--branches", "mask"], ["--branches mask", "--metric segm"]),
        (["--loss", "mask=ce"], ["--loss mask=ce:", "--metric segm"]),
        (["--compare", "ce+l1,mask=ce"], ["--compare mask=ce:", "--metric segm"]),
        (["--compare", f"{LONG};mask=ce,{LONG};rcnn_reg=iou"], [f"--compare {LONG}"[:80], "no masks to train"]),
        (["--loss", "focal"], ["--loss focal", "ce+l1 iou giou cse-a", "BRANCH=LOSS"]),
        (["--loss", "Neg(Mul(y, Log(p)))"], ["--loss", "BRANCH=LOSS", "rcnn_cls"]),
        (["--loss", "rcnn=iou"], ["--loss rcnn=iou", "rcnn_reg"]),
        (["--loss", "rcnn_reg=ciou"], ["--loss rcnn_reg=ciou", "l1 iou giou cse-a"]),
        (["--loss", "rpn_cls=cse-a"], ["--loss rpn_cls=cse-a", "ce"]),
        (["--loss", "rcnn_reg=Neg(Mul(i, Inf(u)))"], ["--loss", "position 11", "Inv"]),
        (["--loss", "rcnn_reg=Neg(Mul(y, Log(p)))"], ["--loss", "'p'", "i, u, e and 1"]),
        (["--loss", "rcnn_cls=Add(p, y)"], ["--loss", "cannot teach"]),
        (["--compare", "iou,focal"], ["--compare focal"]),
        (["--loss", "iou", "--compare", "iou"], ["--compare iou", "--loss"]),
        (["--size", "8"], ["--size", "at least 64"]),
        (["--size", "100"], ["--size 100", "multiple of 16", "small"]),
        (["--size", "80", "--model", "r50-fpn"], ["--size 80", "multiple of 64", "r50-fpn"]),
        (["--data", "voc"], ["--data", "shapes coco"]),
        (["--data", "coco"], ["--data coco", "--data-root"]),
        (["--model", "r101"], ["--model", "small r50-fpn"]),
    ],
)
def test_bad_flags(monkeypatch, capsys, argv, words):
    error = bad(monkeypatch, capsys, *argv)
    assert all(word in error for word in words), error


@pytest.mark.parametrize("data, proxy, retraining", [("shapes", 10, 20), ("coco", 500, 500)])
def test_learning_rates_rise_and_fall(data, proxy, retraining):
    for plan, steps in ((search_det.PROXY[data], proxy), (search_det.RETRAIN[data], retraining)):
        optimizer, schedule = search_det.make_optimizer(torch.nn.Linear(2, 1), plan)
        rates = [schedule.lr_lambdas[0](step) for step in range(plan.steps)]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(plan.lr * rates[0])
        assert rates[0] == pytest.approx(1 / (steps + 1)) and rates.index(max(rates)) == steps
        assert rates[-1] == pytest.approx(1 / plan.steps**0.9), "poly"
