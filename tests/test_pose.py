"""Pose: AP against COCO's API, losses against slow versions, loader, training, and the real command."""

import contextlib
import copy
import functools
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import damaged, journal, ready, refused
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evolve
import search_pose
from data import shapes
from loss_ops import evaluate, parse
from search_pose import DataError, InvalidLoss, oks_eval

REPOSITORY = Path(__file__).parents[1]
REAL = REPOSITORY.parent / "shared/data"
NUMBERS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")

# OKS AP, against pycocotools


def oracle(truth, detections, sigmas=None):
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = copy.deepcopy(truth)
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(copy.deepcopy(detections)), "keypoints")
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NUMBERS, evaluation.stats))


def same(truth, detections, sigmas=None):
    want = oracle(truth, detections, sigmas)
    assert oks_eval(truth, detections, sigmas) == pytest.approx(want, rel=0, abs=1e-12)
    return want


def person(number, joints, picture=1, **more):
    """An annotation; joints (J, 3)."""
    joints = np.asarray(joints, float)
    seen = joints[joints[:, 2] > 0] if (joints[:, 2] > 0).any() else joints
    corner, size = seen[:, :2].min(0), np.ptp(seen[:, :2], 0)
    entry = {"id": number, "image_id": picture, "category_id": 1, "iscrowd": 0, "area": float(size.prod() / 2)}
    entry |= {"num_keypoints": int((joints[:, 2] > 0).sum()), "bbox": [*corner, *size]}
    return entry | {"keypoints": joints.flatten().tolist()} | more


def pose(joints, score, picture=1, **more):
    return {"image_id": picture, "category_id": 1, "score": score, "keypoints": np.ravel(joints).tolist()} | more


def content(annotations, pictures=(1,), categories=(1,), joints=17):
    names = [f"joint{k}" for k in range(joints)]
    return {
        "images": [{"id": k, "file_name": f"{k}.jpg"} for k in pictures],
        "annotations": annotations,
        "categories": [{"id": k, "name": str(k), "keypoints": names, "skeleton": []} for k in categories],
    }


def random_joints(rng, size, joints=17, labelled=0.8):
    """Somebody about `size` pixels high; (J, 3)."""
    xy = rng.uniform(0, 400, 2) + rng.uniform(0, size, (joints, 2)) * [0.6, 1]
    return np.column_stack([xy.round(rng.integers(0, 3)), 2.0 * (rng.random(joints) < labelled)])


def random_case(seed):
    """People and detections with everything that has a rule of its own."""
    rng = np.random.default_rng(seed)
    joints = 17 if seed % 3 else int(rng.integers(1, 22))
    pictures, categories = rng.permutation(50)[: rng.integers(1, 7)].tolist(), range(1, 2 + seed % 2)
    truth, detections = [], []
    for picture in pictures:
        for _ in range(rng.integers(0, rng.choice([2, 8]))):
            labelled = rng.choice([0, 0.8, 1], p=[0.15, 0.7, 0.15])
            entry = person(
                len(truth) + seed % 2, random_joints(rng, rng.choice([25, 80, 300]), joints, labelled), picture
            )
            entry |= {"iscrowd": int(rng.random() < 0.1), "category_id": int(rng.choice(categories))}
            truth.append(entry | {"area": float(rng.choice([entry["area"], 32**2, 96**2], p=[0.8, 0.1, 0.1]))})
            if rng.random() < 0.2:  # a twin: equal similarities
                truth.append(truth[-1] | {"id": len(truth) + seed % 2})
        here = [entry for entry in truth if entry["image_id"] == picture]
        for _ in range(rng.integers(0, rng.choice([3, 45]))):
            xyv = random_joints(rng, 100, joints)
            category = int(rng.choice(categories))
            if here and rng.random() < 0.8:
                entry = here[rng.integers(len(here))]
                xyv = np.reshape(entry["keypoints"], (-1, 3)).copy()
                xyv[:, :2] += rng.normal(0, rng.choice([0, 0.03, 0.1, 0.3]) * entry["area"] ** 0.5, (joints, 2))
                category = entry["category_id"]
            score = float(rng.integers(4) if seed % 2 else rng.random())
            score = math.nan if seed % 4 == 1 and rng.random() < 0.2 else score
            box = {"bbox": [0.0, 0.0, *rng.uniform(1, 200, 2)]} if seed % 4 == 3 else {}
            detections.append(pose(xyv, score, picture, category_id=category, **box))
    sigmas = None if joints == 17 else rng.uniform(0.02, 0.12, joints).tolist()
    return content([truth[k] for k in rng.permutation(len(truth))], pictures, categories, joints), detections, sigmas


@pytest.mark.parametrize("block", range(6))
def test_oks_eval_equals_pycocotools(block):
    seen = []
    for seed in range(10 * block, 10 * block + 10):
        truth, detections, sigmas = random_case(seed)
        if detections:
            before = copy.deepcopy((truth, detections))
            seen.append(same(truth, detections, sigmas)["AP"])
            assert (truth, detections) == before, "what was given is left as it was"
    assert len(seen) >= 7 and 0.05 < max(seen) < 1


def test_oks_of_one_pair():
    """exp(-d^2 / (2 area (2 sigma)^2)), by hand: one joint is off by the distance that makes it one half."""
    joints = np.column_stack([np.arange(17) * 10.0, np.arange(17) * 20.0, np.full(17, 2.0)])
    truth = content([person(1, joints, area=5000.0)])
    off = math.sqrt(2 * 5000 * (2 * search_pose.COCO_SIGMAS[9]) ** 2 * math.log(2))
    moved = joints.copy()
    moved[9, 0] += off
    persons, poses = search_pose.read_persons(truth)[0], search_pose.read_poses([pose(moved, 1.0)], truth)
    assert search_pose.oks(persons, poses, search_pose.default_sigmas(17)).item() == pytest.approx(16.5 / 17)
    moved[:, 0] = joints[:, 0] + off * np.array(search_pose.COCO_SIGMAS) / search_pose.COCO_SIGMAS[9]  # one half each
    assert oks_eval(truth, [pose(moved + [0.01, 0, 0], 1.0)])["AP"] == 0
    assert oks_eval(truth, [pose(moved - [0.01, 0, 0], 1.0)])["AP"] == pytest.approx(0.1), "one threshold in ten: .50"


def test_evaluator_takes_tuples_and_tensors_and_names_what_is_damaged():
    truth, detections, sigmas = random_case(4)
    want = oracle(truth, detections, sigmas)
    tensors = [{key: torch.tensor(value, dtype=torch.float64) for key, value in d.items()} for d in detections]
    for given in (tuple(detections), tensors, [d | {"image_id": str(d["image_id"])} for d in detections]):
        assert oks_eval(truth, given, sigmas) == pytest.approx(want, rel=0, abs=1e-12)
    for wrong in ({"image_id": 5000}, {"keypoints": [math.nan] * 51}, {"keypoints": [1, 2]}, {"score": "high"}):
        with pytest.raises(ValueError, match=f"^detections: result 2: .*{next(iter(wrong)).split('_')[0]}"):
            oks_eval(truth, [*detections[:2], detections[2] | wrong], sigmas)


def test_evaluator_takes_joints_as_triples():
    truth, found, sigmas = random_case(3)
    want = search_pose.oks_eval(truth, found, sigmas)
    for kind in (list, np.array, torch.tensor):
        theirs = {**truth, "annotations": [e | {"keypoints": triples(e, kind)} for e in truth["annotations"]]}
        assert search_pose.oks_eval(theirs, [r | {"keypoints": triples(r, kind)} for r in found], sigmas) == want
    mixed = [r | {"keypoints": triples(r, list)} if k % 2 else r for k, r in enumerate(found)]
    assert search_pose.oks_eval(truth, mixed, sigmas) == want
    short = [found[0] | {"keypoints": found[0]["keypoints"][:34]}]
    for given in (truth, truth | {"annotations": []}):
        with pytest.raises(ValueError, match="result 0: 34 numbers in 'keypoints'; give x y score of each joint"):
            search_pose.oks_eval(given, short)
    with pytest.raises(ValueError, match="result 0: 'category_id' is None"):
        search_pose.oks_eval(truth, [found[0] | {"category_id": None}])


def triples(entry, kind):
    return kind(np.reshape(entry["keypoints"], (-1, 3)).tolist())


@pytest.mark.skipif(not (REAL / "coco_eval").is_dir(), reason="COCO API's examples are not at hand")
def test_published_example():
    numbers = oks_eval(REAL / "coco_eval/keypoints_toy_gt.json", str(REAL / "coco_eval/keypoints_toy_dt.json"))
    assert {k: round(numbers[k], 3) for k in ("AP", "AP50", "AP75")} == {"AP": 0.505, "AP50": 0.723, "AP75": 0.634}


def test_nobody_and_nothing():
    rng = np.random.default_rng(0)
    joints = random_joints(rng, 50)
    assert set(oks_eval(content([]), []).values()) == {-1.0}
    assert set(same(content([]), [pose(joints, 1.0)]).values()) == {-1.0}
    numbers = oks_eval(content([person(1, joints, area=2000.0)]), [])
    assert numbers["AP"] == numbers["ARm"] == 0 and numbers["APl"] == numbers["ARl"] == -1


def test_rules_one_by_one():
    rng = np.random.default_rng(1)
    a, b = random_joints(rng, 200, labelled=1), random_joints(rng, 200, labelled=1) + [500, 0, 0]
    truth = content([person(1, a), person(2, b)])
    assert same(truth, [pose(a, 0.5), pose(b, 0.4)])["AP"] == pytest.approx(1)
    assert same(truth, [pose(a, 0.5), pose(a, 0.4)])["AR"] == 0.5, "nobody is found twice"
    crowd = content([person(1, a), person(2, b, iscrowd=1)])
    assert same(crowd, [pose(b, 0.9), pose(b, 0.8), pose(a, 0.5)])["AP"] == pytest.approx(1), (
        "crowds may be found often"
    )
    blank = content([person(1, a), person(2, b * [1, 1, 0])])
    assert same(blank, [pose(b, 0.9), pose(a, 0.5)])["AP"] == pytest.approx(1), "near an unlabelled box: not counted"
    assert same(blank, [pose(b, 0.9), pose(b, 0.8), pose(a, 0.5)])["AP"] < 0.6, "but only once"
    far = [pose(a + [3000, 0, 0], 1.0)] * 20
    assert same(truth, [*far, pose(a, 0.5)])["AR"] == 0 and same(truth, [*far[1:], pose(a, 0.5)])["AR"] == 0.5
    assert same(content([person(0, a)]), [pose(a, 1.0)])["AP"] == 0, "the id 0 is never found, as in COCO's API"
    small = content([person(1, a, area=100.0)])
    assert same(small, [pose(a, 1.0)])["APm"] == -1 and oks_eval(small, [pose(a, 1.0)])["AP"] == pytest.approx(1)


def test_tied_scores_go_by_picture_then_by_order():
    rng = np.random.default_rng(2)
    a, b = random_joints(rng, 200, labelled=1), random_joints(rng, 200, labelled=1)
    truth = content([person(1, a, 7), person(2, b, 3)], (7, 3))
    wrong = a + [900, 0, 0]
    first = same(truth, [pose(wrong, 0.5, 7), pose(b, 0.5, 3), pose(a, 0.5, 7)])["AP"]
    last = same(truth, [pose(wrong, 0.5, 3), pose(b, 0.5, 3), pose(a, 0.5, 7)])["AP"]
    assert first > last


def test_other_skeletons():
    rng = np.random.default_rng(3)
    joints = random_joints(rng, 200, 20, 1)
    truth, moved = content([person(1, joints)], joints=20), [pose(joints + [4, 3, 0], 1.0)]
    default = same(truth, moved, [search_pose.OTHER_SIGMA] * 20)["AP"]
    assert default == pytest.approx(oks_eval(truth, moved)["AP"]) and default > same(truth, moved, [0.02] * 20)["AP"]
    with pytest.raises(ValueError, match="20 joints"):
        oks_eval(truth, moved, [0.1] * 17)
    with pytest.raises(ValueError, match="17"):
        oks_eval(truth, [pose(joints[:17], 1.0)])


# Losses


def sample(seed=0, N=3, J=4, H=6, W=5):
    g = torch.Generator().manual_seed(seed)
    prediction = torch.randn(N, J, H, W, generator=g, dtype=torch.float64) / 3
    joints = torch.rand(N, J, 2, generator=g, dtype=torch.float64) * torch.tensor([W, H])
    weight = (torch.rand(N, J, generator=g) < 0.7).double()
    weight[0, 0] = 1
    return prediction, search_pose.batch_heatmaps(joints, (H, W), 1.0), weight


def labelled_pairs(prediction, target, weight):
    return [(prediction[n, j], target[n, j]) for n, j in weight.nonzero().tolist()]


def slow_mse(*batch):
    return torch.stack([((p - y) ** 2).mean() for p, y in labelled_pairs(*batch)]).mean()


def slow_l1(*batch):
    return torch.stack([(p - y).abs().mean() for p, y in labelled_pairs(*batch)]).mean()


def slow_ohkm(prediction, target, weight):
    terms = []
    for n in range(len(prediction)):
        errors = [((prediction[n, j] - target[n, j]) ** 2).mean() * weight[n, j] for j in range(prediction.shape[1])]
        terms += sorted(errors, key=lambda error: error.item(), reverse=True)[:8]
    return torch.stack(terms).mean()


def slow_awing(*batch):
    terms = []
    for prediction, target in labelled_pairs(*batch):
        for p, y in zip(prediction.flatten(), target.flatten()):
            e, power = (y - p).abs(), 2.1 - y
            a = 14 * (1 / (1 + 0.5**power)) * power * 0.5 ** (power - 1)
            c = 0.5 * a - 14 * torch.log(1 + 0.5**power)
            terms.append(14 * torch.log(1 + e**power) if e < 0.5 else a * e - c)
    return torch.stack(terms).mean()


def slow_ce(*batch):
    terms = []
    for prediction, target in labelled_pairs(*batch):
        share = (10 * prediction).exp() / (10 * prediction).exp().sum()
        terms.append(-(target * share.log()).mean())
    return torch.stack(terms).mean()


SLOW = {"mse": slow_mse, "l1": slow_l1, "ohkm": slow_ohkm, "awing": slow_awing, "ce": slow_ce}


@pytest.mark.parametrize("name", search_pose.LOSSES)
@pytest.mark.parametrize("shape", [{}, {"J": 12}])
def test_losses_equal_slow_versions(name, shape):
    prediction, target, weight = sample(1, **shape)
    prediction.requires_grad_()
    values = [losses[name](prediction, target, weight) for losses in (search_pose.LOSSES, SLOW)]
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(v, prediction)[0] for v in values), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", [*search_pose.LOSSES, "Neg(Mul(MaxPool3(y), Log(p)))"])
def test_joints_without_label_do_not_count(name):
    loss = search_pose.LOSSES.get(name) or search_pose.tree_loss(parse(name))
    prediction, target, weight = sample(2)
    prediction.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(prediction, target, weight), prediction)
    assert (gradient.flatten(2).any(-1) == (weight > 0)).all()
    other = torch.where((weight > 0)[..., None, None], target, torch.rand_like(target))
    assert loss(prediction, other, weight) == loss(prediction, target, weight)
    (gradient,) = torch.autograd.grad(nothing := loss(prediction, target, 0 * weight), prediction)
    assert nothing == 0 and not gradient.any()


def test_awing_of_a_perfect_prediction():
    _, target, weight = sample(3)
    target = target.float().requires_grad_()
    (gradient,) = torch.autograd.grad(search_pose.awing(target, target.detach(), weight.float()), target)
    assert gradient.isfinite().all()


def test_trees_see_each_joint_as_a_distribution():
    prediction, target, weight = sample(4)
    leaves, mask = search_pose.heatmap_leaves(prediction, target, weight)
    torch.testing.assert_close(leaves["p"].sum((1, 2, 3)), torch.ones(12, dtype=torch.float64))
    assert torch.equal(leaves["y"][5, 0], target[1, 1]) and torch.equal(mask[:, 0, 0, 0], weight.flatten() > 0)
    value = search_pose.tree_loss(parse("Neg(Mul(y, Log(p)))"))(prediction, target, weight)
    torch.testing.assert_close(value, slow_ce(prediction, target, weight))
    assert value == evaluate(parse("Neg(Mul(y, Log(p)))"), leaves, mask)


@pytest.mark.parametrize("text", ["Square(Add(p, Neg(y)))", "Add(1, Mul(MaxPool3(p), MeanNHW(Neg(y))))"])
def test_exported_loss_is_the_same(tmp_path, text):
    source = search_pose.export({"loss": parse(text)})
    (tmp_path / "found.py").write_text(source)
    scope = {}
    exec(compile(source, str(tmp_path / "found.py"), "exec"), scope)
    prediction, target, weight = sample(5)
    loss = search_pose.tree_loss(parse(text))
    assert scope["loss"](prediction, target, weight) == loss(prediction, target, weight)
    assert scope["loss"](prediction, target, weight.unsqueeze(-1)) == loss(prediction, target, weight), "as mmpose's"
    assert scope["loss"](prediction, target).item() == pytest.approx(
        loss(prediction, target, torch.ones_like(weight)).item()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*search_pose.LOSSES, "Neg(Mul(MaxPool3(y), Log(p)))"])
def test_losses_in_half_precision(name, dtype):
    """The number that they give in float64 for the same heatmaps, in float32; trees also in their own file."""
    prediction, target, weight = sample(6, H=64, W=48)
    prediction, target, weight = prediction.to(dtype).requires_grad_(), target.to(dtype), weight.float()
    losses = [search_pose.LOSSES.get(name) or search_pose.tree_loss(parse(name))]
    if name not in search_pose.LOSSES:
        scope: dict = {}
        exec(search_pose.export({"loss": parse(name)}, title="Found."), scope)
        assert scope["__doc__"].startswith("Found.\n")
        losses.append(scope["loss"])
    for loss in losses:
        value, want = loss(prediction, target, weight), loss(prediction.double(), target.double(), weight)
        assert value.dtype == torch.float32 and value.item() == pytest.approx(want.item(), rel=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert loss(prediction, target, weight) == value
        (gradient,) = torch.autograd.grad(value, prediction)
        assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize(
    "prediction, target, weight",
    [((2, 5, 8, 6), (1, 5, 8, 6), None), ((5, 8, 6), (5, 8, 6), None), ((2, 5, 8, 6), (2, 5, 6, 8), None),
     ((2, 5, 8, 6), (2, 5, 8, 6), (5, 2)), ((2, 5, 8, 6), (2, 5, 8, 6), (10,)),
     ((2, 5, 8, 6), (2, 5, 8, 6), (2, 5, 8, 6))],
)  # fmt: skip
def test_wrong_shapes_are_named(prediction, target, weight):
    scope: dict = {}
    exec(search_pose.export({"loss": parse("Neg(Mul(y, p))")}), scope)
    given = (torch.rand(prediction), torch.rand(target), None if weight is None else torch.ones(weight))
    for loss in (scope["loss"], search_pose.tree_loss(parse("Neg(Mul(y, p))"))):
        with pytest.raises(ValueError) as error:
            loss(*given)
        assert f"prediction {prediction}, target {target} and weight {weight}: expected" in str(error.value)


# Data


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("data") / "shapes", splits={"train": 40, "val": 20, "test": 20})


def arguments(root, *argv):
    return search_pose.parse_arguments(["--data-root", str(root), "--device", "cpu", "--workers", "1", *argv])


def test_splits_are_what_was_drawn(root):
    data, skeleton = search_pose.read_data(arguments(root))
    for split, first, number in (("train", 0, 40), ("val", 40, 20), ("test", 60, 20)):
        drawn = [entry for k in range(number) for entry in shapes.draw_scene(0, first + k, 64)[2]]
        drawn = torch.from_numpy(np.stack([entry["joints"] for entry in drawn if entry["joints"] is not None]))
        got = data[split]
        joints = got.frames[:, None, :2] + got.joints * got.frames[:, None, 2:]
        assert torch.equal(got.labelled, drawn[..., 2] > 0)
        torch.testing.assert_close(joints[got.labelled], drawn[..., :2][got.labelled], atol=0.006, rtol=0)
        assert len(got.persons.group) == len(drawn) and torch.equal(got.persons.group, got.group)
    names = skeleton.names
    assert names[skeleton.swap[5]] == "right_shoulder" and names[skeleton.swap[16]] == "left_ankle"
    assert skeleton.swap[0] == 0 and torch.equal(skeleton.swap[skeleton.swap], torch.arange(17))


def test_a_cut_keeps_places():
    """Red rises to the right and green downwards: a cut shows the coordinates of its pixels, and black outside."""
    pixels = np.zeros((100, 120, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 2 * np.arange(120), 2 * np.arange(100)[:, None]
    for left, top, pixel in ((10.3, 20.6, 0.7), (-12.0, 5.0, 1.0), (8.2, 4.4, 2.3)):
        got = search_pose.cut(Image.fromarray(pixels), left, top, pixel, 40, 30).float()
        x, y = left + pixel * (torch.arange(30) + 0.5), top + pixel * (torch.arange(40) + 0.5)
        inside = (x > 2) & (x < 118)
        assert (got[0, 10] / 2 + 0.5 - x)[inside].abs().max() < 0.5
        assert (got[1, :, 20] / 2 + 0.5 - y)[(y > 2) & (y < 98)].abs().max() < 0.5
        assert not got[:, :, x < -pixel].any()


def test_a_cut_of_a_large_photograph_costs_little(monkeypatch):
    """A person across 30 megapixels: the window is larger still, and mostly black."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    rise = np.arange(6000, dtype=np.float32) / 6000 * 250
    picture = Image.fromarray(np.broadcast_to(rise.astype(np.uint8)[None, :, None], (5000, 6000, 3)).copy())
    pixel, left = 40.3, -900.0
    got = search_pose.cut(picture, left, -1500.0, pixel, 200, 190).float()
    x, y = left + pixel * (torch.arange(190) + 0.5), -1500 + pixel * (torch.arange(200) + 0.5)
    inside = (x > 2 * pixel) & (x < 6000 - 2 * pixel)
    assert (got[0, 100] - x / 6000 * 250)[inside].abs().max() < 1.5
    assert not got[:, y < -pixel].any() and not got[:, :, x < -pixel].any() and not got[:, y > 5000 + pixel].any()


def dotted_split(number=1):
    """Cuts with a bright dot on each of three joints, each in a colour of its own."""
    joints = torch.tensor([[30.5, 20.5], [14.5, 40.5], [40.5, 50.5]])
    image = torch.zeros(3, 80, 60)
    for channel, (x, y) in enumerate(joints.tolist()):
        yy, xx = torch.meshgrid(torch.arange(80) + 0.5, torch.arange(60) + 0.5, indexing="ij")
        image[channel] = 255 * (-((xx - x) ** 2 + (yy - y) ** 2) / 8).exp()
    images, labelled = image.round().to(torch.uint8).expand(number, -1, -1, -1), torch.tensor([[True, True, False]])
    frames = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    persons = search_pose.read_persons(content([]))[0]
    rest = frames.expand(number, -1), torch.full((number,), 50.0), *[torch.zeros(number, dtype=torch.long)] * 2
    return search_pose.Split(images, joints.expand(number, -1, -1), labelled.expand(number, -1), *rest, persons)


def test_joints_move_with_the_picture():
    split, swap = dotted_split(), torch.tensor([0, 2, 1])
    plan = search_pose.PROXY["small"]._replace(scale=(0.7, 1.4), rotation=30.0)
    generator = torch.Generator().manual_seed(0)
    images, joints, labelled = search_pose.batch_scale_rotate_flip(
        split, swap, torch.zeros(64, dtype=torch.long), (64, 48), plan, generator
    )
    mirrored = ~labelled[:, 1]  # the label went to the other side
    assert 20 <= mirrored.sum() <= 44
    index = images.flatten(2).argmax(-1)
    bright = torch.stack([index % 48, index // 48], -1) + 0.5  # (64, 3, 2), by colour
    bright = torch.where(mirrored[:, None, None], bright[:, swap], bright)
    inside = ((joints > 1) & (joints < torch.tensor([47, 63]))).all(-1)
    assert inside.float().mean() > 0.8
    assert (bright - joints).abs().amax(-1)[inside].max() < 1
    distance = (joints[:, 1] - joints[:, 2]).norm(dim=-1) / 27.86
    assert 0.69 < distance.min() < 0.8 and 1.25 < distance.max() < 1.41
    assert ((joints >= 0) & (joints < torch.tensor([48, 64]))).all(-1)[labelled].all()


def test_without_augmentation_the_middle_is_cut():
    split, swap = dotted_split(), torch.tensor([0, 2, 1])
    plan = search_pose.PROXY["small"]._replace(scale=(1.0, 1.0), rotation=0.0)
    draw = search_pose.batch_scale_rotate_flip
    images, joints, _ = draw(split, swap, torch.zeros(8, dtype=torch.long), (64, 48), plan, torch.Generator())
    want = search_pose.middle(split.images, (64, 48))[0][0].float()
    for image, xy in zip(images, joints):
        mirrored = xy[0, 0] != 24.5
        torch.testing.assert_close(image, want.flip(-1) if mirrored else want, atol=1e-2, rtol=0)
        torch.testing.assert_close(xy[0], torch.tensor([48 - 24.5 if mirrored else 24.5, 12.5]))


def test_heatmaps_and_their_peaks():
    joints = torch.tensor([[[3.5, 2.5], [4.2, 6.9], [0.3, 0.4], [11.9, 15.8]]])
    heatmaps = search_pose.batch_heatmaps(joints, (16, 12), 1.5)
    assert heatmaps.shape == (1, 4, 16, 12) and heatmaps[0, 0, 2, 3] == 1
    assert heatmaps[0, 1, 5, 8].item() == pytest.approx(math.exp(-((8.5 - 4.2) ** 2 + (5.5 - 6.9) ** 2) / 4.5))
    found, height = search_pose.locate(heatmaps)
    torch.testing.assert_close(found[0], torch.tensor([[3.5, 2.5], [4.25, 6.75], [0.5, 0.5], [11.5, 15.5]]))
    torch.testing.assert_close(height, heatmaps.amax((2, 3)))


def write_coco(root, animals=False):
    """24 training and 3 further pictures with two people in each, or with one animal of five joints."""
    names = ["nose", "left_paw", "right_paw", "left_back_paw", "right_back_paw"] if animals else list(shapes.JOINTS)
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, number in (("train", 24), ("val", 3)):
        folder, annotations = root / f"{split}2017", []
        folder.mkdir()
        for k in range(number):
            Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / f"{k}.jpg")
            for _ in range(1 if animals else 2):
                joints = random_joints(rng, 50, len(names), 1) * [0.1, 0.1, 1]
                annotations.append(person(len(annotations) + 1, joints, k))
        truth = content(annotations, range(number), joints=len(names))
        truth["categories"][0]["keypoints"] = names
        (root / f"annotations/person_keypoints_{split}2017.json").write_text(json.dumps(truth))
    return root


def test_coco_layout_holds_every_eighth_picture_out(tmp_path):
    root = write_coco(tmp_path / "coco")
    path = root / "annotations/person_keypoints_val2017.json"
    truth = json.loads(path.read_text())
    truth["annotations"][0] |= {"iscrowd": 1}
    truth["annotations"][1] |= {"num_keypoints": 0, "keypoints": [0] * 51}
    path.write_text(json.dumps(truth))
    data, _ = search_pose.read_data(arguments(root, "--data", "coco", "--model", "small"))
    assert {name: len(split.images) for name, split in data.items()} == {"train": 42, "val": 6, "test": 4}
    assert data["test"].persons.ignored.tolist() == [True, True, False, False, False, False]
    assert data["val"].group.tolist() == [0, 0, 1, 1, 2, 2]
    longest = data["train"].persons.boxes[:, 2:] / torch.tensor([48.0, 64.0])
    torch.testing.assert_close(data["train"].frames[:, 2], 1.25 * longest.amax(1).clamp(min=1 / 64))
    middle = data["train"].frames[:, :2] + data["train"].frames[:, 2:] * torch.tensor([30.0, 40.0])
    torch.testing.assert_close(middle, data["train"].persons.boxes[:, :2] + data["train"].persons.boxes[:, 2:] / 2)


def test_other_skeletons_by_their_names(tmp_path):
    root = write_coco(tmp_path / "animals", animals=True)
    args = arguments(root, "--data", "coco", "--model", "small", "--aspect", "1", "--sigmas", "0.1", "--batch", "4")
    task = ready(search_pose.PoseTask(args))
    task.load()
    assert task.skeleton.swap.tolist() == [0, 2, 1, 4, 3] and task.skeleton.sigmas.tolist() == [0.1] * 5
    assert task.data["train"].images.shape[1:] == (3, 80, 80)
    default = search_pose.read_data(arguments(root, "--data", "coco", "--model", "small"))[1]
    assert default.sigmas.tolist() == [search_pose.OTHER_SIGMA] * 5
    task.proxy = task.proxy._replace(steps=2)
    assert 0 <= task.train("mse") <= 1


def test_a_single_person_is_enough_for_the_gates(tmp_path):
    root = shapes.write_shapes(tmp_path / "shapes", splits={"train": 30, "val": 12, "test": 12})
    path = root / "annotations/person_keypoints_train2017.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"annotations": content["annotations"][:1]}))
    task = search_pose.PoseTask(arguments(root, "--crop", "8", "--aspect", "1", "--proxy-steps", "1"))
    assert len(ready(task).branches["loss"].target) == 2


@pytest.mark.parametrize("animals", [False, True, None])
def test_tolerances_are_those_of_coco_where_its_joints_are(animals, capsys):
    """17 joints in the order of AP-10K: shoulders and hips are not where COCO has them; and such without sides."""
    limbs = ("Shoulder", "Elbow", "F_Paw"), ("Hip", "Knee", "B_Paw")
    names = ["L_Eye", "R_Eye", "Nose", "Neck", "Root of tail"]
    names += [f"{side}_{joint}" for part in limbs for side in "LR" for joint in part]
    names = [*shapes.JOINTS] if animals is False else names if animals else [f"j{k}" for k in range(17)]
    category, other = {"keypoints": names, "skeleton": []}, animals is not False
    search_pose.warn_once.cache_clear()
    sigmas = search_pose.read_skeleton({"categories": [category]}, None).sigmas.tolist()
    assert sigmas == ([search_pose.OTHER_SIGMA] * 17 if other else [*search_pose.COCO_SIGMAS])
    assert ("but not COCO's" in capsys.readouterr().err) == other
    given = search_pose.read_skeleton({"categories": [category]}, [*search_pose.COCO_SIGMAS]).sigmas.tolist()
    assert given == [*search_pose.COCO_SIGMAS]


SIDES = [
    "left_eye right_eye", "l_eye r_eye", "LEye REye", "eye_left eye_right", "eye.L eye.R", "Left Eye|Right Eye",
    "leftEye rightEye", "L eye|R eye", "eyeL eyeR", "lefteye righteye", "leye reye", "EyeLeft EyeRight", "eye_l eye_r",
    "LEFT_EYE RIGHT_EYE", "Leye Reye", "eye (L)|eye (R)", "eye-left-1 eye-right-1", "Left eye|right eye", "l1 r1",
    "L_Eye R_Eye", "lEye rEye", "left.eye right.eye", "eyeLOuter eyeROuter", "LT_eye RT_eye",
    "left_eye_left_corner right_eye_right_corner", "left_eye right-eye", "Auge_links Auge_rechts", "左目 右目",
    "oreille_gauche oreille_droite", "ojo izquierda|ojo derecha", "oeil_gauche oeil_droit", "ojo_izquierdo ojo_derecho",
    "linkes_Auge rechtes_Auge", "linker Arm|rechter Arm", "olho_esquerdo olho_direito", "occhio_sinistro occhio_destro",
    "глаз_левый глаз_правый", "occhio_sx occhio_dx", "ojo_izdo ojo_dcho", "olho_esq olho_dir",
]  # fmt: skip


@pytest.mark.parametrize("pair", SIDES)
def test_left_and_right_in_all_spellings(pair):
    left, right = pair.split("|" if "|" in pair else " ")
    others = ["nose", "tail", "lower_lip", "upper_lip", "reel", "ear_left_of_nose"]
    assert search_pose.mirror((left, *others, right)) == [7, 1, 2, 3, 4, 5, 6, 0]


def test_mirror_of_whole_skeletons():
    corners = [f"{a}_eye_{b}_corner" for a in ("left", "right") for b in ("left", "right")]
    assert search_pose.mirror(tuple(corners)) == [3, 2, 1, 0], "both sides change"
    assert search_pose.mirror(tuple(shapes.JOINTS)) == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    assert search_pose.mirror(("Eye", "eye_left")) == [0, 1], "the other side is not there"
    assert search_pose.mirror(("1_nose", "2_left_eye", "3_right_eye")) == [0, 2, 1], "numbered"
    assert search_pose.mirror(("1L", "1R", "2L", "2R")) == [1, 0, 3, 2], "numbers that tell joints apart"
    assert search_pose.mirror(("l_ear", "r_ear", "rear")) == [1, 0, 2], "what is between the words counts"


def test_skeletons_without_sides_are_told(tmp_path, capsys):
    root = write_coco(tmp_path / "coco", animals=True)
    args = arguments(root, "--data", "coco", "--model", "small", "--aspect", "1")
    search_pose.read_data(args)
    assert not capsys.readouterr().err
    for split in ("train", "val"):
        path = root / f"annotations/person_keypoints_{split}2017.json"
        truth = json.loads(path.read_text())
        truth["categories"][0]["keypoints"] = list("abcde")
        path.write_text(json.dumps(truth))
    search_pose.read_data(args)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "person_keypoints_train2017.json: no joint is left or right" in said


@pytest.mark.parametrize(
    "given, limbs",
    [
        ([[1, 2], [2, 4]], [[1, 2], [2, 4]]),
        ([[0, 1], [1, 3]], [[1, 2], [2, 4]]),  # from 0, as labelling tools count
        ([["a", "b"], ["b", "d"]], [[1, 2], [2, 4]]),
        ([[1.0, 2.0]], [[1, 2]]),
        (None, []),
        ([], []),
        ([[1, 5]], None),
        ([[0, 4]], None),
        ([[-1, 2]], None),
        ([[1, 2, 3]], None),
        ([1, 2], None),
        ([["a", "z"]], None),
        ([[1, None]], None),
        ([[1.5, 2]], None),
        ("1-2", None),
        (7, None),
    ],
)
def test_limbs(tmp_path, given, limbs):
    truth = content([person(1, np.full((4, 3), 2.0) + np.eye(4, 3))], joints=4)
    truth["categories"][0] |= {"keypoints": list("abcd"), "skeleton": given}
    (tmp_path / "a.json").write_text(json.dumps(truth))
    if limbs is None:
        with pytest.raises(DataError, match="a.json: category 1: 'skeleton' must be pairs of joints 1..4"):
            search_pose.read_annotations(tmp_path / "a.json")
    else:
        assert search_pose.read_annotations(tmp_path / "a.json")["categories"][0]["skeleton"] == limbs


def one_picture(folder, joints=((5, 6, 2), (30, 25, 1), (0, 0, 0)), number=2):
    """Pictures of 40 x 60 pixels with somebody of three joints in each."""
    for k in range(number):
        Image.fromarray(np.full((40, 60, 3), 9 * k, np.uint8)).save(folder / f"{k}.jpg")
    truth = content([person(k + 1, joints, k, bbox=[2, 3, 40, 30]) for k in range(number)], range(number), joints=3)
    for image in truth["images"]:
        image |= {"height": 40, "width": 60}
    return truth


def test_coco_files_of_all_tools_load(tmp_path, capsys):
    """What may be missing or written otherwise is no reason to refuse; what is left out is counted in one line."""
    truth, path, nan = one_picture(tmp_path, number=4), tmp_path / "a.json", math.nan
    for entry in truth["annotations"]:
        for key in ("area", "iscrowd", "num_keypoints", "id"):
            del entry[key]
    (tmp_path / "0.jpg").rename(tmp_path / "e\u0301.jpg")  # composed in the file, and not on disk
    truth["images"][0] = {"id": "0", "file_name": "\u00e9.jpg"}
    truth["annotations"][0]["keypoints"] = [[5, 6, 2], [30, 25, 1], [None, None, None]]
    truth["annotations"][1]["keypoints"] = [5.0, 6, 2, nan, None, 0, 1e300, 0, 0]
    truth["annotations"][2] |= {"keypoints": None, "num_keypoints": 3}
    truth["annotations"][3] |= {"bbox": [4, 4, 0, 5], "id": "a"}
    truth["annotations"].append(person(7, np.ones((3, 3)), 99))
    truth["categories"].insert(0, {"id": 0, "name": "group"})  # as exporters add, without joints
    path.write_text(json.dumps(truth), "utf-16")
    read = search_pose.read_annotations(path, tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"warning: {path}: left out 1 empty annotations (first: annotation 'a': " in said
    assert "1 annotations of unlisted images (first: annotation 7 of image 99)" in said
    split = search_pose.read_split(read, tmp_path, 64, 48)
    assert split.labelled.tolist() == [[True, True, False], [True, False, False]] and split.joints.isfinite().all()
    assert split.persons.area.tolist() == [1200] * 3 and split.persons.ignored.tolist() == [False, False, True]
    assert [image["height"] for image in read["images"]] == [40] * 4, "the picture tells where the file does not"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, y: (x / 60, y / 40), "most joints are within 0..1 .first: .*; give x and y in pixels"),
        (lambda x, y: (x - 30, y - 15), "most joints are far from their boxes .first: annotation 1: .*; give both in"),
    ],
)
def test_joints_in_other_units(tmp_path, change, words):
    truth, path = one_picture(tmp_path, ((35, 16, 2), (40, 30, 1), (50, 22, 2))), tmp_path / "a.json"
    for entry in truth["annotations"]:
        entry["bbox"] = [34, 15, 18, 16]
    path.write_text(json.dumps(truth))
    search_pose.read_annotations(path)
    for entry in truth["annotations"]:
        places = np.reshape(entry["keypoints"], (-1, 3)).tolist()
        entry["keypoints"] = [value for x, y, v in places for value in (*change(x, y), v)]
    path.write_text(json.dumps(truth))
    with pytest.raises(DataError, match=f"a.json: {words}"):
        search_pose.read_annotations(path)


def test_areas_that_are_none(tmp_path):
    """As converters write them that do not know the area; similarity is measured by it."""
    truth, path = one_picture(tmp_path), tmp_path / "a.json"
    for area, want in ((0, 1200), (700, 700)):
        for entry in truth["annotations"]:
            entry["area"] = area
        path.write_text(json.dumps(truth))
        assert {entry["area"] for entry in search_pose.read_annotations(path)["annotations"]} == {want}
    for entry in truth["annotations"]:
        entry["area"] = 1.0
    path.write_text(json.dumps(truth))
    with pytest.raises(DataError, match="a.json: most areas are no hundredth of their boxes .* or leave 'area' out"):
        search_pose.read_annotations(path)


def test_a_file_without_joints_is_named(tmp_path):
    truth, path = one_picture(tmp_path), tmp_path / "a.json"
    del truth["categories"][0]["keypoints"]
    path.write_text(json.dumps(truth))
    with pytest.raises(DataError, match="a.json: no category has 'keypoints', the names of its joints"):
        search_pose.read_annotations(path)


def test_a_joint_far_away_is_told(tmp_path, capsys):
    truth, path = one_picture(tmp_path), tmp_path / "a.json"
    truth["annotations"][1]["keypoints"][:2] = [-90, 6]
    path.write_text(json.dumps(truth))
    search_pose.read_annotations(path)
    assert "1 of 4 joints are far from their boxes (first: annotation 2: [-90.0, 6.0], box" in capsys.readouterr().err


@pytest.mark.parametrize("scoring", [False, True])
def test_no_damage_to_a_file_ends_in_a_traceback(tmp_path, capsys, scoring):
    """One line that names the file, or a split of sane numbers; and never fewer people without a word."""
    truth, path = one_picture(tmp_path), tmp_path / "a.json"
    truth["categories"][0] |= {"keypoints": ["nose", "left_ear", "right_ear"], "skeleton": [[1, 2], [1, 3]]}
    refused = loaded = 0
    for what, text in damaged(truth):
        path.write_bytes(text)
        search_pose.warn_once.cache_clear()
        try:
            if scoring:
                assert all(-1 <= number <= 1 for number in oks_eval(path, [], [0.1] * 3).values()), what
            else:
                content = search_pose.read_annotations(path, tmp_path)
                skeleton = search_pose.read_skeleton(content, None)
                assert all(1 <= joint <= 3 for limb in skeleton.limbs for joint in limb), what
                split = search_pose.read_split(content, tmp_path, 16, 16)
                said = capsys.readouterr().err
                whole = len(split.images) == len(split.persons.group) == 2
                own = ("removed", ".keypoints", ".iscrowd true")  # what changes what a person is
                assert whole or said.startswith("warning: ") or any(word in what for word in own), what
                assert all(t.isfinite().all() for t in (split.joints, split.frames, *split.persons[2:6])), what
                assert (split.joints[split.labelled].abs() < 1000).all() and (split.persons.area >= 0).all(), what
                assert (split.persons.boxes.abs() < 1000).all() and (split.labelled.any(1)).all(), what
            loaded += 1
        except DataError as error:
            assert str(path) in str(error) or f"{tmp_path}/x: not found" in str(error), (what, error)
            assert "\n" not in str(error) and len(str(error)) < 300, (what, error)
            refused += 1
        except ValueError as error:
            assert scoring and "sigmas for" in str(error), (what, error)
    assert refused > 100 and loaded > 100


BROKEN = ("no file", "no json", "no joints", "no key", "short", "no picture", "torn picture", "nobody", "other joints")


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_data_is_named(tmp_path, broken):
    root = write_coco(tmp_path / "coco")
    path, picture = root / "annotations/person_keypoints_train2017.json", root / "train2017/5.jpg"
    truth = json.loads(path.read_text())
    if broken == "no joints":
        del truth["categories"][0]["keypoints"]
    elif broken == "no key":
        del truth["annotations"][3]["bbox"]
    elif broken == "short":
        truth["annotations"][3]["keypoints"].pop()
    elif broken == "nobody":
        truth["annotations"] = []
    elif broken == "other joints":
        truth["categories"][0]["keypoints"][0] = "snout"
    path.write_text(json.dumps(truth))
    if broken == "no file":
        path.unlink()
    elif broken == "no json":
        path.write_text("{")
    elif broken == "no picture":
        picture.unlink()
    elif broken == "torn picture":
        picture.write_bytes(b"not a picture")
    with pytest.raises(DataError) as error:
        search_pose.read_data(arguments(root, "--data", "coco", "--model", "small"))
    culprit = {"no picture": picture, "torn picture": picture}.get(broken, path)
    culprit = root / "annotations/person_keypoints_val2017.json" if broken == "other joints" else culprit
    assert str(culprit) in str(error.value) and "\n" not in str(error.value)


# Networks and training


@pytest.mark.parametrize("name", search_pose.MODELS)
def test_networks(name):
    net = search_pose.build_model(name, 5)
    heatmaps = net(torch.randn(2, 3, 64, 96))
    assert heatmaps.shape == (2, 5, 16, 24)
    assert heatmaps.abs().max() < 0.1, "squared error needs to start near zero"
    heatmaps.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in net.parameters())


@pytest.fixture(scope="module")
def task(root):
    return ready(search_pose.PoseTask(arguments(root, "--proxy-steps", "4", "--retrain-steps", "4", "--batch", "4")))


class Oracle(torch.nn.Module):
    """Knows where the joints of a split are; mirrored pictures get mirrored heatmaps."""

    def __init__(self, split, swap):
        super().__init__()
        corner = torch.tensor([6.0, 8.0])
        heatmaps = search_pose.batch_heatmaps((split.joints - corner) / 4, (16, 12), 1.0)
        self.known = {}
        for image, heatmap in zip(
            search_pose.normalise(search_pose.middle(split.images, (64, 48))[0].float()), heatmaps
        ):
            self.known[image.numpy().tobytes()] = heatmap
            self.known[image.flip(-1).contiguous().numpy().tobytes()] = heatmap[swap].flip(-1)

    def forward(self, images):
        return torch.stack([self.known[image.contiguous().numpy().tobytes()] for image in images])


@pytest.mark.parametrize("flip", [False, True])
def test_right_heatmaps_score_high(task, flip):
    split, skeleton = task.data["train"], task.skeleton
    oracle_net = Oracle(split, skeleton.swap)
    scores = search_pose.test_network(oracle_net, split, skeleton, (64, 48), flip)
    assert set(scores) == set(search_pose.METRICS)
    assert scores["pck"] > 0.98 and scores["ap50"] == 1 and scores["ar"] > 0.9
    wrong = Oracle(split, skeleton.swap)
    wrong.known = {key: heatmap.flip(-2) for key, heatmap in wrong.known.items()}
    assert search_pose.test_network(wrong, split, skeleton, (64, 48), flip)["ap"] < 0.1


def test_metrics_of_a_network_are_those_of_its_json(task):
    """The tensor path of the search and a file of COCO results give the same numbers."""
    split, root = task.data["val"], task.args.data_root
    truth = json.loads((root / "annotations/person_keypoints_val2017.json").read_text())
    g = torch.Generator().manual_seed(0)
    joints = split.joints.double() + 2 * torch.randn(split.joints.shape, generator=g)
    height = torch.rand(joints.shape[:2], generator=g)
    places = split.frames[:, None, :2] + joints * split.frames[:, None, 2:]
    people = [entry for entry in truth["annotations"] if entry["num_keypoints"]]
    results = [
        pose(F.pad(xy, (0, 1)).numpy(), h.double().mean().item(), entry["image_id"], category_id=entry["category_id"])
        for xy, h, entry in zip(places, height, people)
    ]
    got, want = search_pose.pose_metrics(joints, height, split, task.skeleton.sigmas), oracle(truth, results)
    assert 0 < got["ap"] < 1
    assert [got[k] for k in ("ap", "ap50", "ap75", "ar")] == pytest.approx(
        [want[k] for k in ("AP", "AP50", "AP75", "AR")]
    )
    shown = {entry["id"]: max(entry["bbox"][2:]) for entry in people}
    off = [
        np.hypot(*(np.reshape(entry["keypoints"], (-1, 3))[:, :2] - xy.numpy()).T)[split.labelled[k].numpy()]
        < 0.1 * shown[entry["id"]]
        for k, (entry, xy) in enumerate(zip(people, places))
    ]
    assert got["pck"] == pytest.approx(np.concatenate(off).mean(), abs=1e-3)


def test_each_process_draws_its_share_of_a_batch(task, monkeypatch, capsys):
    monkeypatch.setattr(evolve, "rank_and_world", lambda: (1, 2))
    plan = task.proxy
    assert len(next(iter(task.batches(plan, 0)))[0]) == plan.batch // 2
    monkeypatch.setattr(evolve, "rank_and_world", lambda: (0, 3))
    with pytest.raises(SystemExit):
        task.batches(plan, 0)
    assert f"--batch {plan.batch}: not to be shared by 3 processes" in capsys.readouterr().err


def test_scoring_twice_gives_the_same_number(task):
    assert task.train("mse") == task.train("mse")
    curve = task.curve
    assert task.train({"loss": parse("Neg(Mul(y, Log(p)))")}) == pytest.approx(task.train("ce"), abs=2e-3)
    assert len(curve) == 4 and curve[-1][1] < curve[0][1]


@pytest.mark.parametrize("text", ["Mul(y, Exp(Inv(Add(p, Neg(p)))))", "Mul(Exp(Exp(Exp(Inv(p)))), y)"])
def test_invalid_values_stop_the_training(task, text):
    with pytest.raises(InvalidLoss):
        task.train({"loss": parse(text)})


def test_good_losses_pass_the_gates_and_bad_ones_do_not(task):
    branch = task.branches["loss"]
    for text in ("Neg(Mul(y, Log(p)))", "Square(Add(p, Neg(y)))", "Neg(Mul(y, p))"):
        assert evolve.gradients(branch, parse(text)) is not None
        assert evolve.rejection_gain(branch, parse(text), early=()) > 1.4 * branch.eta, text
    for text in ("Mul(y, Log(p))", "Square(Add(p, y))", "Mul(MeanNHW(y), p)"):
        assert evolve.rejection_gain(branch, parse(text), early=()) < 0.5 * branch.eta, text
    assert evolve.gradients(branch, parse("Mul(p, MeanNHW(Add(1, Mul(y, Add(1, Neg(1))))))")) is None


def test_gate_scores_count_joints(task):
    branch = task.branches["loss"]
    assert branch.prediction.shape[1:] == branch.target.shape == (5, 17, 1, 16, 12)
    stacked = torch.stack([branch.prediction[0], branch.target, branch.target.roll(1, -1), branch.target.roll(2, -1)])
    scores = branch.score(stacked, branch.target)
    assert scores.shape == (4, 5) and torch.equal(scores[0], branch.score(branch.prediction, branch.target)[0])
    assert (scores[1] == 1).all() and (scores[2] > 0.9).all() and (scores[3] < 0.2).all() and (scores[0] < 0.2).all()
    partly = branch.target.clone()
    partly[:, :5] = 0
    assert (branch.score(partly, partly) == 1).all(), "joints without a label are left out"


def test_training_learns(root):
    task = ready(search_pose.PoseTask(arguments(root, "--proxy-steps", "60", "--metric", "pck")))
    start = task.test(task.network(task.proxy, 0), task.data["val"])["pck"]
    assert start < 0.2 and task.train("ce") > 0.4


@pytest.mark.parametrize("name", search_pose.LOSSES)
def test_every_loss_trains(task, name):
    assert 0 <= task.train(name) <= 1
    assert task.loss(name) is getattr(search_pose, name)


def test_a_witness_begins_as_a_retraining_does(task, monkeypatch):
    """As long as the base network's training and the proxy's together."""
    assert task.proxy.base[-1] > 0
    short = task.retraining._replace(steps=task.proxy.base[-1] + task.proxy.steps)
    noise = torch.randn(1, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(task, "retraining", short)
    monkeypatch.setattr(task, "test", lambda net, split: {"ap": net(noise).double().mean().item()})
    again = [task.retrain("mse", seed)["val"]["ap"] for seed in (50, 51)]
    assert [task.witness("mse", seed) for seed in (50, 51)] == pytest.approx(again, abs=1e-6) and again[0] != again[1]
    with pytest.raises(InvalidLoss):
        task.witness({"loss": parse("Mul(y, Exp(Inv(Add(p, Neg(p)))))")}, 50)
    monkeypatch.setattr(task, "proxy", task.proxy._replace(base=()))
    assert math.isnan(task.witness("mse", 50)), "where no base network is trained nothing can be compared"


def test_a_prediction_depends_on_its_picture_alone(task):
    net, images = task.network(task.proxy, 0), search_pose.middle(task.data["test"].images, task.size)[0]
    torch.testing.assert_close(search_pose.predict(net, images)[:1], search_pose.predict(net, images[:1]))


def test_a_picture_changes_nothing(task, tmp_path):
    drawn = task.retrain("mse", 0, picture=tmp_path / "p.png")
    assert drawn == task.retrain("mse", 0)
    height, width = cv2.imread(str(tmp_path / "p.png")).shape[:2]
    assert height > 2 * 256 and width > 2 * 192


def test_skeletons_are_drawn():
    picture = np.zeros((40, 40, 3), np.uint8)
    search_pose.draw_skeleton(
        picture, torch.tensor([[5.0, 5], [30, 5], [30, 35]]), [True, True, False], [[1, 2], [2, 3]]
    )
    assert picture[5, 17, 1] > 200 and picture[5, 30, 0] > 200 and not picture[10:].any()


# The real command

SMALL = ("--proxy-steps", "3", "--retrain-steps", "3", "--batch", "4", "--device", "cpu")


def command(root, runs, *argv):
    return [sys.executable, "search_pose.py", "--data-root", str(root), "--runs", str(runs), *SMALL, *argv]


FLAGS = ("--metric", "pck", "--evals", "6", "--seed", "3", "--workers", "1", "--seeds", "2")


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
    assert re.match(r"pose_pck_shapes_3_\d{8}-\d{6}$", directory.name)
    assert len(re.findall(r"^eval +\d+/6  pck ", printed, re.M)) == 6
    assert "baseline mse: pck" in printed and ">>>>" in printed and str(directory) in printed
    result = json.loads((directory / "result.json").read_text())
    assert (result["task"], result["metric"], result["evaluated"]) == ("pose", "pck", 6)
    for side in ("found", "baseline"):
        assert set(result["test"][side]) == set(search_pose.METRICS)
        assert all(len(values) == 2 for values in result["test"][side].values())
    rows = (directory / "hall_of_fame.csv").read_text().splitlines()
    assert rows[0].startswith("rank,proxy_pck") and 2 <= len(rows) <= 7


def test_found_loss_stands_alone(finished, tmp_path):
    directory, _ = finished
    shutil.copy(directory / "best_loss.py", tmp_path)
    code = (
        "import torch; from best_loss import loss;"
        "x = torch.randn(2, 17, 8, 6, requires_grad=True); y = torch.rand(2, 17, 8, 6);"
        "w = torch.ones(2, 17); w[1] = 0;"
        "loss(x, y, w).backward(); assert x.grad.isfinite().all() and x.grad[0].any() and not x.grad[1].any()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1"})


def test_tensorboard_shows_what_the_readme_explains(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0]), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()
    kinds = events.Tags()
    tags = {tag.replace("/text_summary", "") for kind in ("scalars", "images", "tensors") for tag in kinds[kind]}
    general = {re.sub(r"proxy_curve/\d+", "proxy_curve/<n>", tag) for tag in tags}
    glossary = (REPOSITORY / "tests/RESULTS.md").read_text().split("## TensorBoard")[1].split("\n## ")[0]
    explained = set(re.findall(r"^\| `([^`]+)` \|", glossary, re.M))
    later = ("asl/", "retrain/", "surrogate/")  # not in so short a run
    later += ("gates/rising", "gates/simulation", "search/witness")  # of another kind of search, or seldom
    explained = {tag for tag in explained if not tag.startswith(later)}
    assert {tag for tag in general if not tag.startswith("_hparams_")} - {"search/witness"} == explained
    assert {"found/predictions", "found/predictions_baseline"} <= set(kinds["images"])


def test_same_seed_same_journal_across_a_kill(root, finished, tmp_path):
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command(root, tmp_path / "runs", *FLAGS), cwd=REPOSITORY, stdout=out)
        while "eval   3/6" not in (tmp_path / "out").read_text():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (directory,) = (tmp_path / "runs").iterdir()
    assert 3 <= len(journal(directory)) < 6
    resume = [sys.executable, "search_pose.py", "--resume", str(directory)]  # all else is known to the run
    done = subprocess.run(resume, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert journal(directory) == journal(finished[0])
    results = [json.loads((path / "result.json").read_text()) for path in (directory, finished[0])]
    assert results[0]["test"] == results[1]["test"]


@pytest.mark.parametrize("search", ["naive", "cse"])
def test_other_searches(root, tmp_path, monkeypatch, search):
    flags = ["--search", search, "--evals", "3", "--seeds", "1", "--workers", "1", "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["search_pose.py", "--data-root", str(root), *SMALL, *flags])
    search_pose.main()
    (directory,) = tmp_path.iterdir()
    assert len(journal(directory)) == 3


@pytest.mark.parametrize("loss", ["awing", "Neg(Mul(y, Log(p)))", "RUN_DIR"])
def test_one_loss_instead_of_a_search(root, finished, tmp_path, capsys, monkeypatch, loss):
    loss = str(finished[0]) if loss == "RUN_DIR" else loss
    flags = ["--data-root", str(root), "--runs", str(tmp_path), *SMALL]
    flags += ["--loss", loss, "--seeds", "2", "--metric", "ar"]
    monkeypatch.setattr(sys, "argv", ["search_pose.py", *flags])
    search_pose.main()
    printed = capsys.readouterr().out
    assert ">>>>  ar" in printed and printed.count("+-") == 5
    (directory,) = tmp_path.iterdir()
    state = torch.load(directory / "training_0_1.pt", weights_only=True)
    search_pose.build_model("small", 17).load_state_dict(state["parts"][0])


def test_one_training_goes_on_where_it_was_stopped(root, tmp_path, monkeypatch, capsys):
    common = ["search_pose.py", "--data-root", str(root), *SMALL, "--retrain-steps", "5", "--checkpoint-steps", "2"]

    def start(*flags):
        monkeypatch.setattr(sys, "argv", [*common, *flags])
        search_pose.main()

    def results(runs):
        (log,) = runs.glob("*/retrain.jsonl")
        return [{**json.loads(line), "seconds": 0} for line in log.read_text().splitlines()]

    flags = ["--loss", "mse", "--seeds", "1", "--metric", "pck", "--runs"]
    start(*flags, str(tmp_path / "whole"))
    save = evolve.Checkpoint.save

    def save_and_stop(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evolve.Checkpoint, "save", save_and_stop)
        with pytest.raises(SystemExit) as stop:
            start(*flags, str(tmp_path / "part"))
    (directory,) = (tmp_path / "part").iterdir()
    assert stop.value.code == 130 and f"--resume {directory}" in capsys.readouterr().out
    assert torch.load(directory / "training_0_0.pt", weights_only=True)["steps"] == 2
    start("--resume", str(directory))
    assert results(tmp_path / "part") == results(tmp_path / "whole")


def test_several_losses_side_by_side(root, finished, capsys, monkeypatch, tmp_path):
    listed = f"mse,l1,Mul(y, Exp(Neg(p))),{finished[0]}"
    flags = ["--data-root", str(root), "--runs", str(tmp_path), *SMALL, "--compare", listed, "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["search_pose.py", *flags, "--flip-test"])
    search_pose.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = ["| loss", "| mse", "| l1", "| Mul(y, Exp(Neg(p)))", f"| {finished[0]}"]
    assert [row.split(" | ")[0] for row in table] == names


# Bad input: one line, the flag, the value, the cure; exit code 2; nothing written


def test_sigmas_are_positive():
    truth = {
        "images": [{"id": 1, "height": 20, "width": 30}],
        "categories": [{"id": 1, "keypoints": ["a", "b"]}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 0, 9, 20], "area": 100, "iscrowd": 0}
            | {"keypoints": (3, 4, 2, 8, 9, 2), "num_keypoints": 2}
        ],
    }
    result = {"image_id": 1, "category_id": 1, "score": 0.5, "keypoints": [3, 4, 1, 8, 9, 1]}
    assert (
        search_pose.oks_eval(truth, [result], 0.1)["AP"] == search_pose.oks_eval(truth, [result], [0.1] * 2)["AP"] == 1
    )
    for sigmas, words in (
        (0.0, "positive"),
        ([0.1, -1], "positive"),
        ([0.1, math.nan], "positive"),
        ([1] * 3, "3 sigmas"),
    ):
        with pytest.raises(ValueError, match=words):
            search_pose.oks_eval(truth, [result], sigmas)
    assert search_pose.oks_eval(truth | {"annotations": []}, [], [0.1] * 3)["AP"] == -1


def test_joints_of_one_side_alone_are_named():
    def sides(*names):
        return search_pose.one_sided(names, search_pose.mirror(names))

    assert sides("nose", "left_eye ", "right_eye") == []
    assert sides("nose", "Left_Hip", "right-knee", "neck") == ["Left_Hip", "right-knee"]
    assert sides("oeil_gauche", "nez") == ["oeil_gauche"]
    assert sides("ojo_izquierdo", "linker Arm", "nariz") == ["ojo_izquierdo", "linker Arm"]


bad = functools.partial(refused, search_pose)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--metric", "AP"], ["--metric", "AP", "ap ap50 ap75 ar pck"]),
        (["--loss", "Neg(Mul(y, Lg(p)))"], ["--loss", "position 11", "Log"]),
        (["--loss", "dice"], ["--loss dice", "mse l1 ohkm awing ce"]),
        (["--compare", "mse,focal"], ["--compare focal", "mse l1"]),
        (["--loss", "mse", "--compare", "l1"], ["--compare l1", "--loss"]),
        (["--loss", "Add(i, u)"], ["--loss", "'i'", "y, p and 1"]),
        (["--loss", "Add(p, y)"], ["--loss", "cannot teach"]),
        (["--data", "voc"], ["--data", "voc", "shapes coco"]),
        (["--data", "coco"], ["--data coco", "--data-root"]),
        (["--model", "hrnet"], ["--model", "hrnet", "small r50"]),
        (["--crop", "50"], ["--crop 50", "multiples of 8"]),
        (["--crop", "64", "--aspect", "0.7"], ["--crop 64 --aspect 0.7", "45", "multiples of 8", "--aspect 0.75"]),
        (["--aspect", "0.8"], ["--crop 64 --aspect 0.8: 64x51", "--crop 64 --aspect 0.75"]),
        (["--sigmas", "0.1,x"], ["--sigmas", "'x'", "not a number"]),
        (["--sigmas", "0"], ["--sigmas", "0", "at least"]),
        (["--metrc", "ap"], ["--metrc"]),
    ],
)
def test_bad_flags(monkeypatch, capsys, argv, words):
    error = bad(monkeypatch, capsys, *argv)
    assert all(word in error for word in words), error


CROPS = ["--crop 50", "--crop 64 --aspect .7", "--crop 1000 --aspect .1", "--crop 10 --aspect 10"]


@pytest.mark.parametrize("argv", CROPS)
def test_the_cure_of_a_crop_is_one(root, monkeypatch, capsys, argv):
    cure = bad(monkeypatch, capsys, *argv.split()).partition("give ")[2].split()
    assert [*cure[::2]] == ["--crop", "--aspect"]
    args = arguments(root, *cure)
    assert abs(args.crop / int(argv.split()[1]) - 1) < 0.25 and args.crop % 8 == round(args.crop * args.aspect) % 8 == 0


def test_bad_data(monkeypatch, capsys, tmp_path, root):
    missing = tmp_path / "nowhere"
    assert str(missing) in bad(monkeypatch, capsys, "--data", "coco", "--data-root", missing)
    runs = ["--runs", tmp_path / "runs", "--workers", 1]
    assert "17, one per joint" in bad(monkeypatch, capsys, "--data-root", root, "--sigmas", ".1,.2", *runs)
    (tmp_path / "thesis.txt").write_text("precious")
    assert "something other than shapes" in bad(monkeypatch, capsys, "--data-root", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_bad_resume(monkeypatch, capsys, finished, tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"task": "seg", "arguments": {}}))
    assert "search_seg.py" in bad(monkeypatch, capsys, "--resume", tmp_path)
    error = bad(monkeypatch, capsys, "--resume", finished[0], "--metric", "ap")
    assert "--metric ap" in error and "pck" in error
    error = bad(monkeypatch, capsys, "--resume", finished[0], "--sigmas", "0.1")
    assert "--sigmas" in error


@pytest.mark.skipif(not (REAL / "coco_mini").is_dir(), reason="the sample of COCO is not at hand")
def test_a_sample_of_coco_is_read():
    data, skeleton = search_pose.read_data(arguments(REAL / "coco_mini", "--data", "coco", "--model", "small"))
    assert skeleton.names == tuple(shapes.JOINTS) and len(data["test"].persons.group) == 243
    assert data["test"].persons.ignored.sum() + len(data["test"].images) == 243
