"""Detection: is the proxy's ranking worth something, where its seconds go, the loader, and AP against pycocotools.

    python tests/bench_det.py [--proxies 0+150 150/1200+100]

Ranking: losses of all qualities, trained by proxies (so many steps of the base network, then of the loss) and by a
re-training (other weights, other batches), both scored on the search-validation split of the embedded data.
Seconds: a training with the baseline, part by part. Loader: batches of 8 augmented 64 x 64 windows with boxes, with and
without masks. Metric: 1,000 images with 100 detections each over 80 classes. One thread; ratios within one run.
"""

import argparse
import contextlib
import copy
import io
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection import roi_heads

sys.path[:0] = [str(Path(__file__).parent.parent)]
from bench_proxy import own_proxies, show_ranking  # noqa: E402

import search_det  # noqa: E402

LOSSES = (
    *search_det.LOSSES,
    "rcnn_cls=Square(Add(p, Neg(y)))",
    "rcnn_cls=Neg(Mul(y, p))",
    "rcnn_cls=Neg(Mul(y, Sqrt(p)))",
    "rcnn_cls=Neg(Mul(MeanNHW(Mul(y, p)), Inv(MeanNHW(Add(y, p)))))",
    "rcnn_cls=Neg(Mul(Mul(y, Inv(MeanNHW(y))), Log(p)))",
    "rcnn_reg=Neg(Mul(i, Inv(u)))",
    "rcnn_reg=Add(e, Neg(i))",
    "rcnn_reg=Square(Add(u, Neg(i)))",
    "rpn_cls=Square(Add(p, Neg(y)))",
    "rpn_cls=Neg(Mul(y, Sqrt(p)))",
    "rpn_reg=giou, rcnn_reg=giou",
    "rpn_reg=Add(u, Neg(i)), rcnn_reg=Log(Add(u, Neg(i)))",
    "rpn_cls=Square(Log(Mul(y, p))), rcnn_cls=Neg(Mul(y, Log(p)))",
    "rpn_cls=Neg(Mul(y, Sqrt(p))), rpn_reg=iou, rcnn_cls=Square(Add(p, Neg(y))), rcnn_reg=Exp(Neg(Mul(i, Inv(u))))",
    "rpn_cls=Mul(Neg(p), Exp(y)), rpn_reg=Mul(Inv(Exp(i)), u), rcnn_cls=Abs(Mul(Log(p), y)), rcnn_reg=Add(e, Neg(i))",
)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def large_case(images: int = 1000, found: int = 100, classes: int = 80) -> tuple[dict, list[dict]]:
    """Seven objects in a picture, as COCO has; half of the detections are near one of them."""
    rng = np.random.default_rng(0)
    entries, results = [], []
    for image in range(images):
        own = []
        for _ in range(rng.poisson(7)):
            x, y, w, h = (*rng.uniform(0, 300, 2), *rng.lognormal(4, 0.8, 2))
            own.append({"id": len(entries) + 1, "image_id": image, "category_id": int(rng.integers(classes))})
            own[-1] |= {"bbox": [x, y, w, h], "area": 0.6 * w * h, "iscrowd": int(rng.random() < 0.01)}
            entries.append(own[-1])
        for _ in range(found):
            box, category = [*rng.uniform(0, 300, 2), *rng.lognormal(4, 0.8, 2)], int(rng.integers(classes))
            if own and rng.random() < 0.5:
                near = own[int(rng.integers(len(own)))]
                box, category = (np.array(near["bbox"]) * rng.normal(1, 0.1, 4)).tolist(), near["category_id"]
            results.append({"image_id": image, "category_id": category, "bbox": box, "score": float(rng.random())})
    truth = {
        "images": [{"id": k, "height": 480, "width": 640} for k in range(images)],
        "categories": [{"id": k, "name": str(k)} for k in range(classes)],
        "annotations": entries,
    }
    return truth, results


def show_evaluator() -> None:
    truth, results = large_case()
    theirs, copies = [], (copy.deepcopy(truth), copy.deepcopy(results))

    def pycocotools():
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = copies[0]
            coco.createIndex()
            evaluation = COCOeval(coco, coco.loadRes(copies[1]), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        theirs.extend(evaluation.stats)

    slow = seconds(pycocotools)
    times = [seconds(lambda: search_det.coco_eval(truth, results, "bbox", "cpu")) for _ in range(3)]
    mine = list(search_det.coco_eval(truth, results, "bbox", "cpu").values())
    print(f"{'1,000 x 100 detections, 80 classes':<36}{'seconds':>10}{'ratio':>8}")
    print(f"{'pycocotools':<36}{slow:>10.2f}{1.0:>8.1f}")
    print(f"{'this project, median of three':<36}{sorted(times)[1]:>10.2f}{slow / sorted(times)[1]:>8.1f}")
    print(f"largest difference: {max(abs(a - b) for a, b in zip(mine, theirs)):.1e}")


def show_loader() -> None:
    print(f"\n{'loader':<36}{'images/s':>10}")
    for metric in ("bbox", "segm"):
        task = search_det.DetTask(search_det.parse_arguments(["--device", "cpu", "--metric", metric]))
        task.load()
        plan = task.proxy._replace(steps=100)
        taken = seconds(lambda: list(itertools.islice(task.batches(plan, 0), plan.steps)))  # noqa: B023
        print(f"{'boxes' if metric == 'bbox' else 'boxes and masks':<36}{plan.steps * plan.batch / taken:>10.0f}")


def show_masks() -> None:
    """Masks of a hundred detections pasted into their picture, in all ways that there are of doing it."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(100, 1, 14, 14, generator=generator)
    corners = torch.rand(100, 2, generator=generator) * 48
    boxes = torch.cat([corners, corners + 4 + 12 * torch.rand(100, 2, generator=generator)], 1)
    ways = {
        "torchvision": lambda: roi_heads.paste_masks_in_image(masks, boxes, (64, 64)),
        "all at once": lambda: search_det.paste_masks(masks, boxes, 64, 64),
    }
    print(f"\n{'100 masks in 64 x 64 pixels':<36}{'ms':>10}")
    for name, work in ways.items():
        work()
        print(f"{name:<36}{1000 * min(seconds(work) for _ in range(20)):>10.2f}")


def show_seconds(task: search_det.DetTask) -> None:
    """Seconds of one proxy training by part, for the baseline."""
    plan, data = task.proxy, task.proxy_batches
    net = task.network(plan, 0)
    backbone = 0.0
    for images, _ in data:
        backbone += seconds(lambda: sum(x.sum() for x in net.backbone(images).values()).backward())  # noqa: B023
    train = seconds(lambda: search_det.train_network(net, task.losses("ce+l1"), data, plan))
    score = seconds(lambda: search_det.test_network(net, task.data["val"], plan.size))
    print(f"\n{'one proxy training':<36}{'seconds':>10}")
    rest = train - backbone
    for name, value in (("backbone and pyramid", backbone), ("two stages and losses", rest), ("detection, AP", score)):
        print(f"{name:<36}{value:>10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    own = search_det.PROXY["shapes"]
    parser.add_argument("--proxies", nargs="+", default=own_proxies(own), metavar="BASE/OF+STEPS")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = search_det.DetTask(search_det.parse_arguments(["--device", "cpu"]))
    task.load()
    show_ranking(task, {name: search_det.read_loss(name, "--loss") for name in LOSSES}, args.proxies)
    show_seconds(task)
    show_loader()
    show_masks()
    show_evaluator()
    print(f"\ntorch {torch.__version__}, CPU")


if __name__ == "__main__":
    main()
