"""Segmentation, piece by piece: metrics and losses against slow, obvious versions; loader; networks; training."""

import functools
import itertools
import json
import math
import random
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ready, through_onnx
from PIL import Image

import evolve
import search_seg
from data import shapes
from loss_ops import parse
from search_seg import DataError, InvalidLoss, SegMetrics, Split, seg_metrics

# Metrics, from their definitions


def slow_boundary(mask):
    """Pixels of a boolean mask whose 3x3 neighbourhood inside the image is not wholly in it."""
    H, W = mask.shape
    out = np.zeros_like(mask)
    for h in range(H):
        for w in range(W):
            if mask[h, w]:
                out[h, w] = not mask[max(0, h - 1) : h + 2, max(0, w - 1) : w + 2].all()
    return out


def slow_metrics(pred, label, C, tolerance=5):
    pred, label = pred.numpy(), label.numpy()
    valid = label != 255
    kernel = np.ones((2 * tolerance + 1,) * 2, np.uint8)

    def within(mask):
        return cv2.dilate(mask.astype(np.uint8), kernel) > 0

    def ious(where):
        out = {}
        for c in range(C):
            union = (((pred == c) | (label == c)) & where).sum()
            if union:
                out[c] = ((pred == c) & (label == c) & where).sum() / union
        return out

    iou = ious(valid)
    frequency = {c: ((label == c) & valid).sum() / valid.sum() for c in range(C)}
    accuracy = [((pred == c) & (label == c)).sum() / (label == c).sum() for c in range(C) if (label == c).any()]
    near = np.zeros_like(valid)
    f1 = []
    for c in range(C):
        hit_pred = all_pred = hit_label = all_label = 0
        for k in range(len(label)):
            bp, bl = slow_boundary(pred[k] == c) & within(valid[k]), slow_boundary(label[k] == c)
            hit_pred, all_pred = hit_pred + (bp & within(bl)).sum(), all_pred + bp.sum()
            hit_label, all_label = hit_label + (bl & within(bp)).sum(), all_label + bl.sum()
            if c:
                near[k] |= within(bl)
        if all_label:
            precision, recall = hit_pred / max(1, all_pred), hit_label / all_label
            f1.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return {
        "miou": np.mean(list(iou.values())),
        "fwiou": sum(frequency[c] * iou[c] for c in iou),
        "macc": np.mean(accuracy),
        "gacc": ((pred == label) & valid).sum() / valid.sum(),
        "biou": np.mean(list(ious(valid & near).values())),
        "bf1": np.mean(f1),
    }


def blobs(rng, N, C, H, W, ignored=True):
    """Random label maps with regions of some size, so that boundaries mean something."""
    small = rng.integers(0, C, (N, H // 6 + 1, W // 6 + 1)).astype(np.uint8)
    maps = np.stack([cv2.resize(m, (W, H), interpolation=cv2.INTER_NEAREST) for m in small])
    maps = np.where(rng.random(maps.shape) < 0.02, rng.integers(0, C, maps.shape), maps)
    if ignored:
        maps[:, : H // 8] = 255
        maps[rng.random(maps.shape) < 0.05] = 255
    return torch.from_numpy(maps.astype(np.int64))


@pytest.mark.parametrize("seed", range(6))
def test_metrics_equal_their_definitions(seed):
    rng = np.random.default_rng(seed)
    C, H, W = int(rng.integers(2, 8)), int(rng.integers(20, 45)), int(rng.integers(20, 45))
    label = blobs(rng, 3, C, H, W, ignored=seed % 2 == 0)
    pred = torch.where(torch.rand(label.shape) < 0.6, label, blobs(rng, 3, C, H, W, False)) % 255
    if seed >= 3:  # class 1 is absent from the target, class 0 from both
        label = torch.where(label <= 1, C, label)
        label = torch.where((label == C), C - 1, label)
        pred = pred.clamp(min=1)
    want = slow_metrics(pred, label, C)
    got = seg_metrics(pred, label, C)
    assert {"miou", "fwiou", "macc", "gacc", "biou", "bf1"} == set(want) <= set(got)
    for name in want:
        assert got[name] == pytest.approx(want[name], abs=1e-9), name


def test_metrics_accumulate_and_group():
    rng = np.random.default_rng(9)
    label, pred = blobs(rng, 6, 5, 30, 30), blobs(rng, 6, 5, 30, 30, False)
    whole, parts = seg_metrics(pred, label, 5), SegMetrics(5)
    for k in range(0, 6, 2):
        parts.update(pred[k : k + 2], label[k : k + 2])
    assert {k: v.item() for k, v in parts.compute().items()} == pytest.approx(whole)
    groups = SegMetrics(5, groups=3)
    groups.update(pred, label)
    for g in range(3):
        one = seg_metrics(pred[2 * g : 2 * g + 2], label[2 * g : 2 * g + 2], 5)
        assert {k: v[g].item() for k, v in groups.compute().items()} == pytest.approx(one)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_borders_that_are_ignored_do_not_spoil_boundaries(width):
    """As those of VOC: whatever is predicted there, the boundaries of what is found lie within them."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = ((y - 30) ** 2 + (x - 33) ** 2).sqrt() - 20
    label, pred = (disc < 0).long(), (disc < 0.5).long()
    label[disc.abs() <= width] = 255
    scores = seg_metrics(pred[None], label[None], 2)
    assert scores["bf1"] == scores["miou"] == 1
    theta = search_seg.ASL_THETA["bf1"]
    logits = 40.0 * F.one_hot(pred, 2).movedim(-1, 0)[None]
    good, bad = (search_seg.asl_loss(sign * logits, label[None], theta, "bf1") for sign in (1, -1))
    assert good < 1e-3 and bad < 1, "its boundaries are in place, too"
    shifted = search_seg.asl_loss(logits.roll(12, 3), label[None], theta, "bf1")
    assert shifted > 0.2


def test_what_is_predicted_far_from_anything_that_counts_does_not(tmp_path):
    """In the padding of a window, or in a large area that is ignored."""
    label = torch.zeros(1, 40, 60, dtype=torch.long)
    label[0, 10:30, 5:20], label[:, :, 30:] = 1, 255
    pred, other = label % 255, label % 255
    other = other.clone()
    other[0, 10:30, 40:55] = 1
    assert seg_metrics(pred, label, 2) == seg_metrics(other, label, 2)
    logits = [(8.0 * F.one_hot(x, 2).movedim(-1, 1)).requires_grad_() for x in (pred, other)]
    losses = [search_seg.asl_loss(x, label, search_seg.ASL_THETA["bf1"], "bf1") for x in logits]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    assert not torch.autograd.grad(losses[1], logits[1])[0][..., 37:].any()


def test_perfect_prediction_scores_one():
    label = blobs(np.random.default_rng(1), 2, 4, 24, 24)
    pred = torch.where(label == 255, 0, label)
    assert seg_metrics(torch.where(label == 255, label.roll(1, 0) % 4, pred), label, 4)["miou"] == 1
    clean = blobs(np.random.default_rng(1), 2, 4, 24, 24, False)
    assert all(value == pytest.approx(1) for value in seg_metrics(clean, clean, 4).values())


@pytest.mark.parametrize("C", [63, 64, 150, 255])
def test_more_classes_than_an_integer_has_bits(C):
    rng = np.random.default_rng(C)
    label, pred = blobs(rng, 2, C, 40, 50), blobs(rng, 2, C, 40, 50, False)
    pred = torch.where((torch.rand(label.shape) < 0.6) & (label != 255), label, pred)
    assert seg_metrics(pred, label, C) == pytest.approx(slow_metrics(pred, label, C), abs=1e-9)


# Losses


def sample(seed=0, N=2, C=4, H=6, W=7):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, C, H, W, generator=g, dtype=torch.float64)
    label = torch.randint(0, C, (N, H, W), generator=g)
    label[torch.rand(label.shape, generator=g) < 0.2] = 255
    return logits, label


def flat(logits, label):
    """Probabilities (M, C) and classes (M,) of the pixels that count."""
    valid = label != 255
    return logits.softmax(1).movedim(1, -1)[valid], label[valid]


def slow_ce(logits, label):
    p, c = flat(logits, label)
    return -p[torch.arange(len(c)), c].log().mean()


def weights(label):
    return 0.5 + torch.arange(label.numel()).view(label.shape).double() % 5


def slow_weighted_ce(logits, label):
    p, c = flat(logits, label)
    return -(weights(label)[label != 255] * p[torch.arange(len(c)), c].log()).mean()


def slow_dice(logits, label):
    p, c = flat(logits, label)
    terms = []
    for k in c.unique():
        y = (c == k).double()
        terms.append(1 - 2 * (y * p[:, k]).sum() / (y.sum() + p[:, k].sum()))
    return torch.stack(terms).mean()


def slow_lovasz(logits, label):
    """The Lovasz extension of the Jaccard loss, summed set by set along the sorted errors (Berman 2018, Def. 2)."""
    p, c = flat(logits, label)
    terms = []
    for k in c.unique():
        y = c == k
        error = torch.where(y, 1 - p[:, k], p[:, k])
        order = error.argsort(descending=True)

        def jaccard_loss(wrong, y=y):
            missed = torch.zeros_like(y)
            missed[wrong] = True
            return 1 - (y & ~missed).sum() / (y | missed).sum()

        terms.append(
            sum(error[order[n]] * (jaccard_loss(order[: n + 1]) - jaccard_loss(order[:n])) for n in range(len(order)))
        )
    return torch.stack(terms).mean()


def slow_ssim(logits, label):
    """Window by window, with the weights of the Gaussian written out."""
    N, C, H, W = logits.shape
    valid = (label != 255).unsqueeze(1)
    onehot = F.one_hot(label % 255, C).movedim(-1, 1) * valid
    pairs = F.pad(torch.stack([onehot.double(), logits.softmax(1) * valid]), (5, 5, 5, 5))
    g = torch.tensor([math.exp(-(k**2) / 4.5) for k in range(-5, 6)], dtype=torch.float64)
    g = torch.outer(g, g) / g.sum() ** 2
    terms = []
    for n, h, w in valid.squeeze(1).nonzero().tolist():
        for c in range(C):
            a, b = pairs[:, n, c, h : h + 11, w : w + 11]
            ma, mb = (g * a).sum(), (g * b).sum()
            va, vb, cov = (g * a * a).sum() - ma**2, (g * b * b).sum() - mb**2, (g * a * b).sum() - ma * mb
            terms.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / (ma**2 + mb**2 + 1e-4) / (va + vb + 9e-4))
    return 1 - torch.stack(terms).mean()


def slow_curve(x, points):
    """A chain of Bezier pieces, by bisection for the parameter in float64."""
    points = [(0, 0), *zip(points[::2], points[1::2]), (1, 1)]
    for (x0, y0), (x1, y1), (x2, y2) in zip(points[::2], points[1::2], points[2::2]):
        if x <= x2:
            low, high = 0.0, 1.0
            for _ in range(80):
                t = (low + high) / 2
                low, high = (t, high) if (1 - t) ** 2 * x0 + 2 * t * (1 - t) * x1 + t * t * x2 < x else (low, t)
            return (1 - t) ** 2 * y0 + 2 * t * (1 - t) * y1 + t * t * y2
    return 1.0


def slow_asl(logits, label, metric):
    """The surrogates of Auto Seg-Loss, class by class; values only."""
    theta = list(search_seg.ASL_THETA[metric])
    n = {"macc": 1, "gacc": 1, "bf1": 4}.get(metric, 2)
    curves = [theta[k * len(theta) // n : (k + 1) * len(theta) // n] for k in range(n)]

    def g(k, x):
        return torch.tensor([slow_curve(v, curves[k]) for v in x.flatten().tolist()], dtype=torch.float64).view(x.shape)

    valid = label != 255
    prob = logits.detach().softmax(1)
    C = prob.shape[1]
    if metric == "biou":
        near = torch.zeros_like(valid)
        for m, i, j in valid.nonzero().tolist():
            around = label[m, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            if label[m, i, j] > 0 and (around != label[m, i, j]).any():
                near[m, max(0, i - 5) : i + 6, max(0, j - 5) : j + 6] = True
        valid = valid & near
    ratios, sizes, hits = [], [], []
    for c in range(C):
        p, y = prob[:, c], (label == c).double() * valid
        sizes.append(y.sum())
        if metric == "bf1":
            y_eroded, p_eroded = (-F.max_pool2d(F.pad(-x, (1, 1, 1, 1), value=-1.0), 3, 1) for x in (y, p))
            a, b, both = g(2, p), g(3, p_eroded), g(0, p) * g(1, p_eroded)
            near = F.max_pool2d(valid.double(), 11, 1, 5)  # what is predicted there counts, though it be ignored
            edge_p, edge_y = (a + b - a * b - both) * near, (y_eroded != y).double()
            far_p, far_y = (F.max_pool2d(x, 11, 1, 5) for x in (edge_p, edge_y))
            P, R = (edge_p * far_y).sum() / edge_p.sum(), (far_p * edge_y).sum() / edge_y.sum()
            if edge_y.any():
                ratios.append(2 * P * R / (P + R))
        elif metric in ("macc", "gacc"):
            hits.append((g(0, p) * y).sum())
            ratios.append(hits[-1] / (sizes[-1] + 1e-8))
        else:
            union = ((g(1, p) + y - g(1, p) * y) * valid).sum()
            ratios.append((g(0, p) * y).sum() / union)
    if metric == "gacc":
        return 1 - sum(hits) / sum(sizes)
    if metric == "fwiou":
        return 1 - sum(r * s for r, s in zip(ratios, sizes)) / sum(sizes)
    return 1 - sum(ratios) / len(ratios)


SLOW = {
    "ce": slow_ce,
    "wce": slow_weighted_ce,
    "dice": slow_dice,
    "lovasz": slow_lovasz,
    "dpce": slow_weighted_ce,
    "ssim": slow_ssim,
}


def call(name, logits, label):
    if name == "asl":
        return search_seg.asl_loss(logits, label, search_seg.ASL_THETA["miou"], "miou")
    extra = [weights(label).to(logits)] if name in search_seg.WEIGHTS else []
    return search_seg.LOSSES[name](logits, label, *extra)


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_slow_versions(name, seed):
    logits, label = sample(seed)
    if seed == 2:
        label[label == 1] = 0  # an absent class
    logits.requires_grad_()
    got, want = call(name, logits, label), SLOW[name](logits, label)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (got, want)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", search_seg.LOSSES)
def test_losses_without_any_valid_pixel(name):
    logits, label = sample()
    logits.requires_grad_()
    value = call(name, logits, torch.full_like(label, 255))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("metric", search_seg.METRICS)
def test_asl_equals_its_slow_version(metric):
    logits, label = sample(4, H=14, W=15)
    if metric in ("biou", "bf1"):  # regions large enough to have pixels far from any boundary
        label[:, :, :11], label[:, :6, 11:], label[:, 6:, 11:], label[0, 3, 13] = 0, 2, 3, 255
    got = search_seg.asl_loss(logits, label, search_seg.ASL_THETA[metric], metric)
    assert got.item() == pytest.approx(slow_asl(logits, label, metric).item(), abs=2e-5)
    logits.requires_grad_()
    for scale in (1, 1e4):  # 1e4: probabilities of exactly 0 and 1
        value = search_seg.asl_loss(scale * logits, label, search_seg.ASL_THETA[metric], metric)
        (gradient,) = torch.autograd.grad(value, logits)
        assert gradient.isfinite().all() and (gradient.any() or scale > 1)


@pytest.mark.parametrize("metric", search_seg.METRICS)
def test_asl_of_a_perfect_prediction(metric):
    _, label = sample(5, H=14, W=15)
    logits = 1e4 * F.one_hot(label % 255, 4).movedim(-1, 1).double().requires_grad_()
    perfect = search_seg.asl_loss(logits, label, search_seg.ASL_THETA[metric], metric)
    wrong = search_seg.asl_loss(-logits, label, search_seg.ASL_THETA[metric], metric)
    assert perfect < 0.1 < wrong, "ignored pixels next to a boundary keep bf1 from an exact 0"
    value = search_seg.asl_loss(logits, torch.full_like(label, 255), search_seg.ASL_THETA[metric], metric)
    assert value == 0 and value.requires_grad


def test_asl_looks_for_no_boundary_of_ignored_pixels():
    logits = torch.randn(1, 4, 30, 30, generator=torch.Generator().manual_seed(7)).requires_grad_()
    label = torch.zeros(1, 30, 30, dtype=torch.long)
    label[:, :, 25:], label[0, 5, 5] = 1, 255
    loss = search_seg.asl_loss(logits, label, search_seg.ASL_THETA["biou"], "biou")
    near = torch.autograd.grad(loss, logits)[0].any(1)[0]
    assert near[:, 20:].all() and not near[:, :19].any(), "within 5 pixels of class 1 and nowhere else"


def exported_asl(metric):
    scope: dict = {}
    exec(search_seg.export({"loss": search_seg.Asl.read(f"asl({metric})")}, title='From "here".'), scope)
    assert scope["__doc__"].startswith(f'From "here".\n\nAuto Seg-Loss (arXiv 2010.07930) for {metric}.')
    return scope["loss"]


@pytest.mark.parametrize("theta", ["0.9 0.1 0.5 0.9 0.95 1", "0.1 0.9 0.5 0.2 0.95 1"])
def test_curves_that_fall_are_refused(theta):
    with pytest.raises(ValueError, match="fall"):
        search_seg.Asl.read(f"asl(macc: {theta})")
    assert search_seg.Asl.read(f"asl(bf1: {theta} 0.2 0.1)"), "which has a curve for each point"


@pytest.mark.parametrize("metric", search_seg.METRICS)
def test_exported_asl(metric):
    logits, label = sample(8, H=14, W=15)
    loss, want = exported_asl(metric), search_seg.asl_loss(logits, label, search_seg.ASL_THETA[metric], metric)
    assert loss(logits, label) == want
    other = torch.where(label == 255, -100, label.long())
    assert loss(logits, other, ignore_index=-100) == want
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert loss(logits, label.to(dtype)) == want
    with pytest.raises(ValueError, match="expected"):
        loss(logits, label[:1])


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("metric", search_seg.METRICS)
def test_onnx_takes_exported_asl(tmp_path, metric, dynamo):
    class Module(torch.nn.Module):
        def forward(self, logits, label):
            return loss(logits, label)

    loss, (logits, label) = exported_asl(metric), sample(8, H=14, W=15)
    inputs = logits.float(), label
    torch.testing.assert_close(through_onnx(tmp_path, Module(), inputs, dynamo), loss(*inputs))


@pytest.mark.parametrize("metric", search_seg.METRICS)
def test_asl_of_many_classes(metric):
    """As many as a label can tell apart, class 255 among them; the boundary of each of them counts."""
    logits, label = sample(9, H=12, W=13)
    label = label.long() % 255
    renamed = torch.tensor([0, 70, 255, 299])
    spread = torch.full((len(logits), 300, 12, 13), -1e4, dtype=torch.float64).index_copy(1, renamed, logits)
    loss = exported_asl(metric)
    few, many = loss(logits, label, ignore_index=-100), loss(spread, renamed[label], ignore_index=-100)
    if metric in ("miou", "macc", "biou"):  # means over all classes
        few, many = (1 - few) * 4, (1 - many) * 300
    torch.testing.assert_close(few, many, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("space", [(), (9,), (3, 5, 6)])
@pytest.mark.parametrize("metric", search_seg.METRICS)
def test_asl_of_any_number_of_dimensions(metric, space):
    g = torch.Generator().manual_seed(10)
    logits, label = torch.randn(4, 4, *space, generator=g), torch.randint(0, 4, (4, *space), generator=g)
    loss = exported_asl(metric)
    if len(space) > 2 and metric in ("biou", "bf1"):
        with pytest.raises(ValueError, match="no volume"):
            loss(logits, label)
    elif metric in ("biou", "bf1"):
        assert loss(logits, label).dim() == 0
    else:  # counts, wherever the pixels are
        flat = logits.movedim(1, 0).reshape(1, 4, 1, -1), label.reshape(1, 1, -1)
        torch.testing.assert_close(loss(logits, label), loss(*flat))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*search_seg.LOSSES, *(f"asl({metric})" for metric in search_seg.ASL_THETA)])
def test_losses_in_half_precision(name, dtype):
    """The number that they give in float64 for the same logits, in float32, also where autocast is on."""
    logits, label = sample(11, N=1, H=260, W=260)  # more pixels than float16 has room for
    logits = (8 * logits).to(dtype).requires_grad_()
    asl = name.startswith("asl(")
    loss = exported_asl(name[4:-1]) if asl else functools.partial(call, name)
    value, want = loss(logits, label), loss(logits.double(), label)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(want.item(), rel=1e-3, abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(logits, label), value)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_curves_rise_from_zero_to_one(pieces):
    g = torch.Generator().manual_seed(pieces)
    x = torch.linspace(0, 1, 1001, dtype=torch.float64, requires_grad=True)
    for trial in range(30):
        theta = torch.rand(2 * pieces - 1, 2, generator=g, dtype=torch.float64)
        theta = theta.round() if trial % 3 == 0 else theta  # vertical and level pieces
        points, last = [], torch.zeros(2, dtype=torch.float64)
        for step in theta:
            last = last + step * (1 - last)
            points.append(last)
        height = search_seg.bezier(x, torch.stack(points))
        assert height[0] == 0 and height[-1] == 1
        assert (height.diff() > -1e-6).all()
        assert torch.autograd.grad(height.sum(), x)[0].isfinite().all()
    identity = torch.linspace(0, 1, 2 * pieces + 1, dtype=torch.float64)[1:-1, None].expand(-1, 2)
    torch.testing.assert_close(search_seg.bezier(x, identity), x, atol=1e-9, rtol=0)


def test_unet_weights():
    label = torch.zeros(1, 20, 20, dtype=torch.uint8)
    label[0, :, :4], label[0, :, 10:], label[0, 0, 0] = 1, 2, 255
    weight = search_seg.unet_weights(label, 4)[0].float()
    assert weight[0, 0] == 0
    balance = torch.tensor([label[label != 255].numel() / 3 / (label == c).sum() for c in (0, 1, 2)])
    assert weight[5, 2].item() == pytest.approx(balance[1].item(), rel=1e-3)
    assert weight[5, 15].item() == pytest.approx(balance[2].item(), rel=1e-3)
    gap = balance[0] + 10 * math.exp(-((2 + 5) ** 2) / 50)  # column 5: 2 px from the left object, 5 from the right one
    assert weight[5, 5].item() == pytest.approx(gap.item(), rel=1e-2)


def test_unet_weights_of_a_large_picture():
    """As by Eq. 2, written down: distances of all objects everywhere, though far ones are never looked at."""
    label = torch.zeros(1, 150, 200, dtype=torch.uint8)
    for k, (top, left) in enumerate(itertools.product((3, 60, 139), (0, 21, 100, 188))):
        label[0, top : top + 9, left : left + 14] = 1 + k % 3
    distances = []
    for c in range(1, 4):
        number, regions = cv2.connectedComponents((label[0] == c).byte().numpy())
        for k in range(1, number):
            distances.append(cv2.distanceTransform((regions != k).astype(np.uint8), cv2.DIST_L2, 5))
    nearest = np.sort(np.stack(distances), axis=0)[:2].sum(0)
    border = torch.from_numpy(10 * np.exp(-(nearest**2) / 50)) * (label[0] == 0)
    share = torch.bincount(label.flatten().long()).float()
    balance = (share.sum() / (len(share) * share))[label[0].long()]
    assert len(distances) == 12 and torch.equal(search_seg.unet_weights(label, 4)[0], (balance + border).half())


def test_nothing_to_measure_is_no_number():
    nothing = torch.full((1, 4, 4), 255)
    assert all(math.isnan(value) for value in seg_metrics(nothing, nothing, 3).values())


def test_weights_of_rare_classes_are_finite():
    """A few stray pixels, and a class that no counted label map has."""
    label = torch.zeros(1, 600, 600, dtype=torch.long)
    label[0, 0, 0], label[0, 9, 9] = 1, 2
    alone = search_seg.unet_weights(label, 3)[0].float()
    counted = search_seg.unet_weights(label, 3, torch.tensor([360_000.0, 0.0, 1.0]))[0].float()
    assert alone[0, 0] == counted[9, 9] == search_seg.LARGEST_WEIGHT and counted[0, 0] == 1
    assert alone.isfinite().all() and counted.isfinite().all()


def test_distance_weights():
    label = torch.zeros(2, 9, 9, dtype=torch.uint8)
    label[0, :, 4:] = 1
    weight = search_seg.distance_weights(label, 4).float()
    assert (weight[0, :, 3:5] == 2).all() and (weight[0].diff(dim=1)[:, :3] > 0).all()
    assert weight[0, 4, 8] == 1 and (weight[1] == 1).all()


# Data


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("data") / "shapes", splits={"train": 40, "val": 12, "test": 12})


def arguments(root, *argv):
    return search_seg.parse_arguments(["--data-root", str(root), "--device", "cpu", "--workers", "1", *argv])


def test_splits_are_what_was_drawn(root):
    data = search_seg.read_data(arguments(root))
    assert {name: len(split.images) for name, split in data.items()} == {"train": 40, "val": 12, "test": 12}
    image, label, _ = shapes.draw_scene(0, 40, shapes.SIZE)  # the first of val
    assert torch.equal(data["val"].labels[0], torch.from_numpy(label))
    difference = data["val"].images[0].float() - torch.from_numpy(image[:, :, ::-1].copy()).movedim(-1, 0)
    assert difference.abs().mean() < 8, "only JPEG stands between the drawing and the split, and channels are RGB"


def test_crop_is_an_affine_cut():
    """Without scaling, a window is a plain cut (mirrored or not) of image and label alike."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 20, 24), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 7, (4, 20, 24), generator=g, dtype=torch.uint8)
    split = Split(images, labels, torch.tensor([[20.0, 24.0]] * 4))
    index = torch.arange(4).repeat(8)
    got, got_label = search_seg.batch_scale_crop_flip(split, index, 24, (1.0, 1.0), g)
    # A window as wide as the picture leaves no room sideways; it is 4 pixels higher than the picture: 2 rows above.
    mirrored = 0
    for k, source in enumerate(index):
        want, want_label = images[source].float(), labels[source]
        flipped = not torch.allclose(got[k, :, 2:22], want, atol=1e-2)
        mirrored += flipped
        if flipped:
            want, want_label = want.flip(-1), want_label.flip(-1)
        torch.testing.assert_close(got[k, :, 2:22], want, atol=1e-2, rtol=0)
        assert torch.equal(got_label[k, 2:22], want_label)
        assert (got_label[k, :2] == 255).all() and (got_label[k, 22:] == 255).all() and not got[k, :, :2].any()
    assert 6 <= mirrored <= 26


def test_crops_stay_inside_and_scale():
    label = torch.arange(40).repeat(1, 40, 1).to(torch.uint8)  # the label of a pixel is its column
    split = Split(torch.zeros(1, 3, 40, 40, dtype=torch.uint8), label, torch.tensor([[40.0, 40.0]]))
    g = torch.Generator().manual_seed(1)
    _, labels = search_seg.batch_scale_crop_flip(split, torch.zeros(200, dtype=torch.long), 16, (0.5, 2.0), g)
    assert (labels != 255).all(), "no window reaches beyond the picture"
    width = (labels[:, 0, -1].float() - labels[:, 0, 0].float()).abs()
    assert 6 <= width.min() <= 9 and 27 <= width.max() <= 32, "16 pixels show 8 to 32 columns"
    assert labels.min() <= 1 and labels.max() >= 38, "every part of the picture is drawn"


def test_smaller_pictures_are_padded_with_ignore(tmp_path):
    write_voc(tmp_path, {"a": (20, 30), "b": (26, 18)}, {"train": ["a", "b"] * 8, "val": ["a"]})
    data = search_seg.read_data(arguments(tmp_path, "--data", "voc"))
    train = data["train"]
    images, labels = train.images[torch.tensor([0, 1])], train.labels[torch.tensor([0, 1])]
    assert images.shape[-2:] == (26, 30) and train.sizes[0].tolist() == [26, 18]
    assert (labels[0, :, 18:] == 255).all() and (labels[0, :, :18] != 255).all()
    assert data["val"].sizes.shape == (2, 2) and len(data["train"].images) == 14 and len(data["val"].images) == 2


def save(pixels, path):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def write_voc(root, sizes, splits, aug=False):
    """A VOC folder with random pictures of the given (height, width)."""
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, (h, w) in sizes.items():
        save(np.random.default_rng(0).integers(0, 256, (h, w, 3)), root / f"JPEGImages/{name}.jpg")
        save(np.full((h, w), 3), root / f"SegmentationClass/{name}.png")
        save(np.full((h, w), 5), root / f"SegmentationClassAug/{name}.png")
    for split, names in splits.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))


def test_sbd_aug_lists_are_used_when_present(tmp_path):
    write_voc(tmp_path, {"a": (8, 8)}, {"train": ["a"], "trainaug": ["a"] * 16, "val": ["a"]})
    data = search_seg.read_data(arguments(tmp_path, "--data", "voc"))
    assert len(data["train"].images) == 14
    assert (data["train"].labels == 5).all() and (data["test"].labels == 3).all()


@pytest.mark.parametrize(
    "pred, label, message",
    [
        (torch.zeros(1, 4, 4).long(), torch.zeros(2, 4, 4).long(), "integers of one shape"),
        (torch.zeros(4, 4).long(), torch.zeros(4, 4).long(), "integers of one shape"),
        (torch.full((1, 4, 4), 0.9), torch.zeros(1, 4, 4).long(), "integers of one shape"),
        (torch.full((1, 4, 4), 3), torch.zeros(1, 4, 4).long(), "pred has 3; expected 0..2"),
        (torch.full((1, 4, 4), 255), torch.zeros(1, 4, 4).long(), "pred has 255; expected 0..2"),
        (torch.zeros(1, 4, 4).long(), torch.full((1, 4, 4), -1), "label has -1; expected 0..2, or 255"),
        (torch.zeros(1, 4, 4).long(), torch.full((1, 4, 4), -1, dtype=torch.int8), "label has -1"),
        (torch.zeros(1, 4, 4).cfloat(), torch.zeros(1, 4, 4).long(), "integers of one shape"),
    ],
)
def test_what_are_no_label_maps_is_refused(pred, label, message):
    with pytest.raises(ValueError, match=message):
        seg_metrics(pred, label, 3)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint16, np.int32, np.uint64, list])
def test_label_maps_of_other_kinds(kind):
    label = np.arange(48).reshape(1, 6, 8) % 3
    pred = np.where(label == 2, 0, label)
    want = seg_metrics(torch.from_numpy(pred), torch.from_numpy(label), 3)
    other = pred.tolist() if kind is list else pred.astype(kind)
    assert want["gacc"] == pytest.approx(2 / 3) and seg_metrics(other, label, 3) == want
    label[0, 0], masked = 255, pred.copy()
    pred[0, 0], masked[0, 0] = 0, 255  # as where nothing counts
    assert seg_metrics(masked, label, 3) == seg_metrics(pred, label, 3)


def test_cityscapes_layout(tmp_path):
    for split, number in (("train", 8), ("val", 1)):
        for k in range(number):
            for folder in ("leftImg8bit", "gtFine"):
                (tmp_path / folder / split / "ulm").mkdir(parents=True, exist_ok=True)
            save(np.zeros((8, 8, 3)), tmp_path / f"leftImg8bit/{split}/ulm/{k}_leftImg8bit.png")
            ids = np.tile([0, 7, 8, 26, 33, 4, 11, 5], (8, 1))
            save(ids, tmp_path / f"gtFine/{split}/ulm/{k}_gtFine_labelIds.png")
    data = search_seg.read_data(arguments(tmp_path, "--data", "cityscapes"))
    assert data["test"].labels[0, 0].tolist() == [255, 0, 1, 13, 18, 255, 2, 255]
    save(np.full((8, 8), 255), tmp_path / "gtFine/train/ulm/5_gtFine_labelIds.png")
    assert search_seg.read_data(arguments(tmp_path, "--data", "cityscapes")), "others are label ids"
    for path in (tmp_path / "gtFine").glob("*/ulm/*"):  # classes of the trainings, by mistake
        save(np.tile([0, 7, 18, 255], (8, 2)), path)
    with pytest.raises(DataError, match="_gtFine_labelIds.png: no label ids of Cityscapes"):
        search_seg.read_data(arguments(tmp_path, "--data", "cityscapes"))


@pytest.mark.parametrize("broken", ["no list", "empty list", "no image", "torn image", "other size", "unknown class"])
def test_broken_data_is_named(tmp_path, broken):
    write_voc(tmp_path, {"a": (8, 9)}, {"train": ["a"] * 8, "val": ["a"]})
    listing = tmp_path / "ImageSets/Segmentation/train.txt"
    image, mask = tmp_path / "JPEGImages/a.jpg", tmp_path / "SegmentationClass/a.png"
    if broken == "no list":
        listing.unlink()
    elif broken == "empty list":
        listing.write_text("")
    elif broken == "no image":
        image.unlink()
    elif broken == "torn image":
        image.write_bytes(b"not a picture")
    elif broken == "other size":
        save(np.zeros((9, 8)), mask)
    else:
        save(np.full((8, 9), 99), mask)
    with pytest.raises(DataError) as error:
        search_seg.read_data(arguments(tmp_path, "--data", "voc"))
    culprit = {"no list": listing, "empty list": listing, "no image": image, "torn image": image}.get(broken, mask)
    assert str(culprit) in str(error.value) and "\n" not in str(error.value)


def test_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="something other"):
        search_seg.read_data(arguments(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# Networks and training


STRIDED = [(network, stride) for network in (search_seg.DeepLabV3Plus, search_seg.PSPNet) for stride in (8, 16)]


@pytest.mark.parametrize("network, stride", [*((name, None) for name in search_seg.WIDTHS), *STRIDED])
def test_networks_forward_and_backward(network, stride):
    net = network(5, 50, stride) if stride else search_seg.build_model(network, 5)
    images = torch.randn(2, 3, 65, 48)
    logits = net(images)
    assert logits.shape == (2, 5, 65, 48)
    logits.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in net.parameters())
    optimizer, _ = search_seg.make_optimizer(net, search_seg.PROXY["voc"])
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert sum(sizes) == len(list(net.parameters())) and [size > 0 for size in sizes] == [stride is not None, True]
    if stride:
        assert net.backbone(images)[1].shape[-1] == 48 // stride


def test_sides_that_are_no_multiple_of_the_stride_move_nothing():
    """What a network sees of a picture is where it was when more of the picture could be seen."""
    torch.manual_seed(0)
    net = search_seg.build_model("small", 4).eval()
    images = torch.randn(2, 3, 64, 64)
    images[..., 49:] = images[..., 50:, :] = 0
    whole = net(images)
    for height, width in ((50, 49), (64, 49), (50, 64)):
        cut = net(images[..., :height, :width])
        assert cut.shape[-2:] == (height, width)
        torch.testing.assert_close(cut, whole[..., :height, :width], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["r101-dlv3p", "r101-psp"])
def test_deep_networks(name):
    net = search_seg.build_model(name, 3)
    assert sum(1 for m in net.modules() if isinstance(m, torch.nn.Conv2d)) > 100
    with torch.no_grad():
        assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)


@pytest.fixture(scope="module")
def task(root):
    return ready(search_seg.SegTask(arguments(root, "--proxy-steps", "8", "--retrain-steps", "8", "--batch", "8")))


def test_scoring_twice_gives_the_same_number(task):
    assert task.train("ce") == task.train("ce")
    assert task.train({"loss": parse("Neg(Mul(y, Log(p)))")}) == pytest.approx(task.train("ce"), abs=2e-3)
    assert len(task.curve) == 8


@pytest.mark.parametrize("text", ["Mul(y, Exp(Inv(Add(p, Neg(p)))))", "Mul(Exp(Exp(Exp(Inv(p)))), y)"])
def test_invalid_values_stop_the_training(task, text):
    with pytest.raises(InvalidLoss):
        task.train({"loss": parse(text)})


def test_hand_made_losses_pass_the_gates(task):
    branch = task.branches["loss"]
    for text in (
        "Neg(Mul(y, Log(p)))",
        "Neg(Mul(MeanNHW(Mul(y, p)), Inv(MeanNHW(Add(y, p)))))",
        "Square(Add(p, Neg(y)))",
    ):
        expr = parse(text)
        assert evolve.gradients(branch, expr).shape == (3, 5, branch.prediction[0, 0].numel())
        assert evolve.rejection_gain(branch, expr, early=()) > 1.2 * branch.eta, text


def test_gate_scores_are_the_metric(task):
    branch = task.branches["loss"]
    scores = branch.score(branch.prediction, branch.target)
    assert scores.shape == (3, 5), "states and samples"
    assert scores[-1].mean() > scores[0].mean(), "the base network has learned"
    assert (branch.score(branch.target.float(), branch.target) == 1).all()
    want = seg_metrics(branch.prediction[0, 2].argmax(1), branch.target[2].argmax(1), 7)["miou"]
    assert scores[0, 2].item() == pytest.approx(want)


@pytest.mark.parametrize("metric", ["miou", "biou", "bf1"])
@pytest.mark.parametrize("side", [12, 1])
def test_gates_see_small_objects(tmp_path, metric, side):
    """Squares, and lines, of which nothing is left where the whole picture is made small; some pictures are empty."""
    for split, number in (("train", 8), ("val", 3)):
        for k in range(number):
            mask = np.zeros((200, 256), np.uint8)
            mask[40 + k : 40 + k + side, 20 + 9 * k : 20 + 9 * k + 12] = k not in (1, 2, 3, 4) or split == "val"
            for folder, pixels in (("images", np.stack([mask * 200] * 3, -1)), ("masks", mask)):
                (tmp_path / folder / split).mkdir(parents=True, exist_ok=True)
                save(pixels, tmp_path / f"{folder}/{split}/{k}.png")
    flags = ["--data", "folder", "--model", "small", "--crop", "32", "--proxy-steps", "2", "--metric", metric]
    branch = ready(search_seg.SegTask(arguments(tmp_path, *flags))).branches["loss"]
    seen = [len(target.argmax(-3).unique()) for target in branch.target]
    assert sorted(seen) == [1, 1, 2, 2, 2], "three pictures with an object, two empty ones"
    gain = evolve.rejection_gain(branch, parse(search_seg.KNOWN[0]))
    assert gain > branch.eta


def test_gates_scale_large_pictures_down(monkeypatch):
    images = torch.zeros(2, 3, 40, 100, dtype=torch.uint8)
    labels = torch.full((2, 40, 100), 255, dtype=torch.uint8)
    images[..., :50], labels[0], labels[1, :20, :50] = 200, 1, 2
    split = Split(images, labels, torch.tensor([[40.0, 100.0], [20.0, 50.0]]))
    assert search_seg.no_larger(split, 100) is split
    small = search_seg.no_larger(split, 50)
    assert small.images.shape == (2, 3, 20, 50) and small.sizes.tolist() == [[20, 50], [10, 25]]
    assert (small.images[..., :24] == 200).all() and not small.images[..., 26:].any()
    assert (
        (small.labels[0] == 1).all() and (small.labels[1, :10, :25] == 2).all() and (small.labels == 255).sum() == 750
    )


def test_a_single_training_picture_is_enough_for_the_gates(tmp_path):
    for split, number in (("train", 2), ("val", 2)):  # one is held out
        for k in range(number):
            mask = np.zeros((32, 32), np.uint8)
            mask[8:20, 4 + k : 20] = 1
            for folder, pixels in (("images", np.stack([mask * 200] * 3, -1)), ("masks", mask)):
                (tmp_path / folder / split).mkdir(parents=True, exist_ok=True)
                save(pixels, tmp_path / f"{folder}/{split}/{k}.png")
    flags = ["--data", "folder", "--model", "r50-psp", "--crop", "32", "--proxy-steps", "1", "--batch", "2"]
    branch = ready(search_seg.SegTask(arguments(tmp_path, *flags))).branches["loss"]
    assert evolve.gradients(branch, parse(search_seg.KNOWN[0])) is not None


def test_gate_windows():
    label = torch.zeros(40, 100, dtype=torch.uint8)
    assert search_seg.gate_window(label, 40, 80) == (0, 0, 40, 80), "nothing to look for"
    label[8:32, 10:70] = 1
    assert search_seg.gate_window(label, 40, 80) == (0, 0, 40, 80), "all of it shows enough"
    label[:] = 0
    label[39, 99] = 1
    top, left, height, width = search_seg.gate_window(label, 40, 100)
    assert (top + height, left + width) == (40, 100) and 16 <= min(height, width) and label[top:, left:].any()


def test_training_learns(root):
    task = ready(search_seg.SegTask(arguments(root, "--proxy-steps", "40", "--metric", "gacc")))
    start = search_seg.test_network(task.network(task.proxy, 0), task.data["val"], 7)["gacc"]
    assert task.train("ce") > max(start, 0.65)


@pytest.mark.parametrize("name", search_seg.LOSSES)
def test_every_loss_trains(task, name):
    assert 0 < task.train(name) < 1
    if name in search_seg.WEIGHTS:
        weights = search_seg.WEIGHTS[name](task.data["train"].labels, 7)
        assert torch.equal(task.weighted[name].weights, weights)


def test_each_loss_is_the_one_of_its_name(root):
    assert search_seg.WEIGHTS == {"wce": search_seg.unet_weights, "dpce": search_seg.distance_weights}
    task = ready(search_seg.SegTask(arguments(root, "--metric", "macc")))
    logits, label = sample()
    for metric in ("macc", "bf1"):
        task.args.metric = metric
        want = search_seg.asl_loss(logits, label, search_seg.ASL_THETA[metric], metric)
        assert task.loss("asl")(logits, label) == want
        published = search_seg.read_loss(f"asl({metric})", "--loss")
        assert task.loss(published)(logits, label) == want
        assert search_seg.read_loss(str(published["loss"]), "--loss") == published
    assert task.loss("dice")(logits, label) == search_seg.dice(logits, label)


def test_a_temporary_folder_without_room_is_told(root, monkeypatch, capsys):
    monkeypatch.setattr(search_seg, "SMALL", 0)
    monkeypatch.setattr(search_seg, "shared_bytes", lambda *_: None)
    search_seg.note.cache_clear()
    assert search_seg.read_data(arguments(root))["train"].images.nbytes == 0
    assert "train: 40 pictures, more than --memory" in capsys.readouterr().out


def test_each_process_draws_its_share_of_a_batch(task, monkeypatch, capsys):
    monkeypatch.setattr(evolve, "rank_and_world", lambda: (1, 4))
    plan = task.proxy
    assert len(next(iter(task.batches("ce", plan, 0)))[0]) == plan.batch // 4
    monkeypatch.setattr(evolve, "rank_and_world", lambda: (0, 3))
    with pytest.raises(SystemExit):
        task.batches("ce", plan, 0)
    assert f"--batch {plan.batch}: not to be shared by 3 processes" in capsys.readouterr().err


def test_weights_are_cut_like_their_labels(root):
    task = ready(search_seg.SegTask(arguments(root)))
    train = task.data["train"]
    split = train._replace(weights=train.labels.half())
    plan = task.proxy._replace(steps=1, scale=(1.0, 1.0))
    _, labels, weights = next(iter(search_seg.Batches(split, plan, 0)))
    inside = (labels == labels.roll(1, 1)) & (labels == labels.roll(1, 2)) & (labels == labels.roll((1, 1), (1, 2)))
    inside = inside & inside.roll(-1, 1) & inside.roll(-1, 2) & inside.roll((-1, -1), (1, 2)) & (labels != 255)
    assert inside.float().mean() > 0.5
    assert ((weights - labels).abs() < 1e-3)[inside].float().mean() > 0.999, "bilinear and nearest part at boundaries"


def test_a_prediction_depends_on_its_picture_alone(task):
    net, images = task.network(task.proxy, 0), task.data["test"].images
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert torch.equal(search_seg.predict(net, images)[:1], search_seg.predict(net, images[:1]))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_picture_changes_nothing(task, tmp_path):
    drawn = task.retrain("ce", 0, picture=tmp_path / "p.png")
    assert drawn == task.retrain("ce", 0) and (tmp_path / "p.png").exists()


def test_predictions_are_drawn(task, tmp_path):
    search_seg.draw_predictions(task.network(task.proxy, 0), task.data["test"], tmp_path / "p.png", number=3)
    height, width = cv2.imread(str(tmp_path / "p.png")).shape[:2]
    assert height > 3 * shapes.SIZE and width > 3 * shapes.SIZE


# The search of Auto Seg-Loss


@pytest.mark.parametrize("metric", search_seg.METRICS)
def test_asl_search_starts_on_the_identity_and_draws_rising_curves(metric):
    search = search_seg.AslSearch(metric)
    curves = search_seg.ASL_CURVES[metric]
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    for points in search.control_points(search.mu).view(curves, -1, 2):
        torch.testing.assert_close(search_seg.bezier(x, points), x, atol=1e-4, rtol=0)
    rng = random.Random(0)
    for _ in range(50):
        child = search.propose(rng)
        losses, about = child.losses, child.more
        assert losses["loss"].metric == metric and about["mu"] == search.mu.tolist()
        assert all(0 <= value <= 1 for value in about["sample"])
        for points in torch.tensor(losses["loss"].theta, dtype=torch.float64).view(curves, -1, 2):
            y = search_seg.bezier(x, points)
            assert y[0] == 0 and y[-1] == 1 and (y.diff() >= -1e-9).all()
    spread = torch.tensor([search.propose(rng).more["sample"] for _ in range(400)]).std(0)
    assert ((spread > 0.15) & (spread < 0.21)).all(), "a normal of 0.2, cut off at 0 and 1"


def test_control_points_are_shares_of_the_way_that_is_left():
    points = search_seg.AslSearch("macc").control_points(torch.tensor([0.5, 0.2, 0.5, 0.5, 0.0, 1.0]))
    torch.testing.assert_close(points, torch.tensor([0.5, 0.2, 0.75, 0.6, 0.75, 1.0]))


def test_asl_density_is_that_of_a_truncated_normal():
    search = search_seg.AslSearch("macc")
    x = torch.linspace(0, 1, 20001, dtype=torch.float64).unsqueeze(-1)
    areas = []
    for mu in (0.02, 0.5, 0.9):
        density = search.log_density(x, torch.tensor([mu], dtype=torch.float64)).exp()
        areas.append(torch.trapezoid(density.squeeze(), x.squeeze()).item())
    # what is left out is the factor sigma sqrt(2 pi) of the normal density
    assert areas == pytest.approx([0.2 * math.sqrt(2 * math.pi)] * 3, rel=1e-6)
    both = search.log_density(x[:9].expand(9, 2), torch.tensor([0.5, 0.9], dtype=torch.float64))
    assert both.shape == (9, 2), "each coordinate's ratio is clipped by itself"


def test_asl_search_moves_towards_what_scores():
    want = torch.tensor([0.9, 0.1, 0.6, 0.8, 0.2, 0.4], dtype=torch.float64)
    search, rng = search_seg.AslSearch("macc"), random.Random(0)
    distances = [(search.mu - want).norm().item()]
    for number in range(12 * search.ROUND):
        about = search.propose(rng).more
        score = 1 - (torch.tensor(about["sample"], dtype=torch.float64) - want).norm().item()
        search.learn({**about, "score": None if number % 10 == 9 else score})
        if not search.round:
            distances.append((search.mu - want).norm().item())
    assert search.rounds == 12 and distances[0] > 0.7 and distances[-1] < 0.35, distances
    assert all(0 < value < 1 for value in search.mu.tolist())


@pytest.mark.parametrize("damage", [{"sample": [0.5]}, {"mu": None}, {"sample": None}])
def test_a_damaged_sample_is_a_broken_line(tmp_path, damage, capsys):
    task = search_seg.SegTask(arguments(tmp_path / "data", "--search", "asl", "--metric", "macc"))
    state = evolve.make_state(task.args, task)
    child = state.sampler.propose(random.Random(0))
    record = {
        "worker": 0,
        "turn": 0,
        "elapsed": 1.0,
        "losses": evolve.texts(child.losses),
        "parent": None,
        "score": 0.5,
    }
    record |= {"gain": {}, "identity": list(child.identity), "predicted": None, "tried": child.tried, "curve": []}
    record |= {"seconds": 1.0, **child.more}
    lines = (record | damage, record | {"turn": 1})
    (tmp_path / "journal-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evolve.Journal(tmp_path).hear(state)
    assert state.evaluated == 1 == len(state.sampler.round) and "1 broken lines were skipped" in capsys.readouterr().err


def test_a_witness_begins_as_a_retraining_does(task, monkeypatch):
    """As long as the base network's training, and no longer."""
    short = task.retraining._replace(steps=task.proxy.base_of)
    monkeypatch.setattr(task, "retraining", short)
    assert short.steps == task.proxy.base[-1] > task.proxy.steps
    again = task.retrain("ce", 50)["val"][task.args.metric]
    assert task.witness("ce", 50) == pytest.approx(again, abs=1e-6)
    assert task.witness("ce", 51) != pytest.approx(again, abs=1e-6)
    with pytest.raises(InvalidLoss):
        task.witness({"loss": parse("Square(y)")}, 50)
    monkeypatch.setattr(task, "proxy", task.proxy._replace(base=()))
    assert math.isnan(task.witness("ce", 50)), "where no base network is trained nothing can be compared"


def test_simulation_prefers_what_teaches(task):
    baseline = task.simulate("ce")
    assert task.simulate({"loss": parse("Neg(Mul(y, Log(p)))")}) == pytest.approx(baseline, rel=0.3)
    assert task.simulate({"loss": parse("Mul(y, Log(p))")}) < 0.75 * baseline
    assert task.simulate({"loss": parse("Square(y)")}) == 0, "no gradient: invalid"


@pytest.mark.parametrize("data", search_seg.CLASSES)
def test_flags_change_a_schedule(root, data):
    def plan(*flags):
        task = SimpleNamespace(args=arguments(root, "--data", data, *flags))
        return search_seg.SegTask.plan(task, search_seg.RETRAIN[data], task.args.retrain_steps)

    def schedules(*flags):
        task = search_seg.SegTask(arguments(root, *flags))
        return task.proxy, task.retraining, task.whole

    assert plan() == search_seg.RETRAIN[data]
    changed = plan("--retrain-steps", "7", "--crop", "32", "--batch", "3", "--lr", "0.5")
    assert changed == plan()._replace(steps=7, crop=32, batch=3, lr=0.5)
    own = search_seg.PROXY["shapes"], search_seg.RETRAIN["shapes"], True
    if data != "cityscapes":  # shapes lie in the layout of the others
        assert schedules("--data", data, "--model", "small") == own
        assert schedules("--data", data, "--model", "wide")[1] == own[1]._replace(model="wide")
    assert plan("--model", "r50-psp") == plan()._replace(model="r50-psp")


@pytest.mark.parametrize("data, first, highest", [("shapes", 1 / 721, 720), ("voc", 1, 0)])
def test_learning_rates_rise_and_fall(data, first, highest):
    plan = search_seg.RETRAIN[data]
    optimizer, schedule = search_seg.make_optimizer(search_seg.build_model("small", 7), plan)
    rates = []
    for _ in range(plan.steps):
        rates.append(optimizer.param_groups[0]["lr"] / plan.lr)
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(first) and rates.index(max(rates)) == highest
    assert rates[-1] == pytest.approx(1 / plan.steps**0.9), "poly"
    assert optimizer.param_groups[1]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"] * plan.head_lr)
