"""Pose: is the proxy's ranking worth something, where its seconds go, and OKS AP against pycocotools.

    python tests/bench_pose.py [--proxies 0+100 100/1200+100]

Ranking: losses of all qualities, trained by proxies (so many steps of the base network, then of the loss) and by a
re-training (other weights, other batches), both scored on the search-validation split of the embedded data.
Metric: random people in as many pictures as COCO's val2017 has with people in them. Ratios within one run; one thread.
"""

import argparse
import contextlib
import io
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench_proxy import own_proxies, show_ranking  # noqa: E402

import search_pose  # noqa: E402
from loss_ops import parse  # noqa: E402

TREES = (
    "Neg(Mul(y, Log(p)))",
    "Square(Add(p, Neg(y)))",
    "Neg(Mul(y, Sqrt(p)))",
    "Neg(Mul(y, p))",
    "Mul(Neg(Square(y)), Log(Log(p)))",
    "Exp(Neg(Mul(p, y)))",
    "Sqrt(Neg(Mul(y, p)))",
    "Neg(Log(MeanNHW(Mul(p, y))))",
    "Mul(Square(MaxPool3(p)), Neg(y))",
    "Neg(Mul(MaxPool3(y), Log(p)))",
    "Abs(Add(p, Neg(y)))",
    "MinPool3(Mul(Inv(p), y))",
    "Add(Mul(Log(p), Neg(y)), Square(p))",
    "Square(Add(MaxPool3(p), Neg(MaxPool3(y))))",
)
FOUND = (  # by searches, all of them ahead of squared error by the proxy of 100 steps that these had
    "Mul(Abs(Sqrt(p)), Neg(Mul(y, y)))",
    "Mul(Exp(p), Tanh(Inv(y)))",
    "Mul(Inv(Add(p, 1)), Square(Abs(y)))",
    "Exp(Add(Neg(Add(p, MeanC(Add(1, p)))), MeanC(Mul(Mul(Mul(MeanC(y), Abs(y)), Sqrt(y)), Mul(Sqrt(y), Abs(y))))))",
    "Exp(Add(Neg(p), Add(Mul(Square(y), Abs(Tanh(y))), MeanNHW(Tanh(y)))))",
    "Tanh(MaxPool3(Add(MinPool3(Add(y, p)), Mul(Tanh(Add(Square(y), Sqrt(y))), Sqrt(Add(p, "
    "Mul(Square(Mul(Square(Square(y)), y)), Inv(p))))))))",
    "Mul(Mul(p, Add(Neg(Square(y)), Add(MaxPool3(Neg(p)), Add(MinPool3(y), Mul(Sqrt(Mul(p, y)), "
    "Tanh(Inv(Sqrt(p)))))))), MaxPool3(Sqrt(Add(p, y))))",
    "Mul(Add(Add(p, Mul(Add(Sqrt(p), MinPool3(MinPool3(p))), Add(Square(y), y))), MinPool3(y)), Add(Neg(Mul(y, y)), "
    "Tanh(Sqrt(p))))",
    "Mul(Mul(Add(Square(Exp(y)), MaxPool3(Sqrt(Add(p, Neg(y))))), p), Add(Log(p), Neg(p)))",
    "Exp(MaxPool3(Add(MaxPool3(Add(Log(y), Square(Mul(Add(Neg(Sqrt(p)), Inv(Tanh(1))), y)))), "
    "MaxPool3(Sqrt(Mul(Mul(Add(p, p), y), Abs(Log(y))))))))",
    "Mul(Exp(Sqrt(p)), Mul(Neg(y), Add(1, y)))",
    "Square(Add(Neg(p), Square(y)))",
    "Square(Add(Mul(p, y), Neg(y)))",
    "Inv(Add(Inv(y), Mul(y, p)))",
    "Exp(Add(Neg(p), Abs(y)))",
    "Mul(Neg(Add(p, y)), Sqrt(Add(p, p)))",
    "MaxPool3(Add(Neg(p), Square(y)))",
    "Exp(Add(Neg(p), MeanC(Mul(Abs(y), Abs(Square(y))))))",
    "Abs(Add(MaxPool3(Abs(Add(y, Exp(Add(Neg(p), Neg(y)))))), Add(Square(y), MaxPool3(Inv(Abs(y))))))",
    "Exp(Exp(Add(Neg(p), Mul(Square(y), Abs(MaxPool3(y))))))",
    "MaxPool3(Tanh(Add(Neg(p), Mul(Square(y), Abs(y)))))",
    "Abs(Square(Add(Mul(Neg(p), Abs(y)), Square(y))))",
    "Add(MeanNHW(Square(p)), Square(MeanC(Abs(Exp(Add(Neg(p), y))))))",
)


def people(pictures: int, rng: np.random.Generator) -> tuple[dict, list[dict]]:
    """One to fifteen people in each picture, and for each of them and for one nobody a detection."""
    truth, detections = [], []
    for picture in range(1, pictures + 1):
        for _ in range(rng.integers(1, 16)):
            height, corner = rng.uniform(30, 300), rng.uniform(0, 400, 2)
            joints = np.column_stack([corner + rng.uniform(0, height, (17, 2)), rng.choice([0, 2], 17, p=[0.2, 0.8])])
            about = {"image_id": picture, "category_id": 1}
            truth.append(
                {
                    **about, "id": len(truth) + 1, "bbox": [*corner, height, height], "area": height**2 / 2,
                    "iscrowd": 0, "num_keypoints": int((joints[:, 2] > 0).sum()),
                    "keypoints": joints.flatten().tolist(),
                }
            )  # fmt: skip
            joints[:, :2] += rng.normal(0, 0.05 * height, (17, 2))
            detections.append({**about, "keypoints": joints.flatten().tolist(), "score": rng.random()})
        detections.append({**detections[-1], "score": rng.random()})
    pictures = [{"id": k} for k in range(1, pictures + 1)]
    return {"images": pictures, "annotations": truth, "categories": [{"id": 1, "name": "person"}]}, detections


def show_metric(pictures: int = 2693) -> None:
    truth, detections = people(pictures, np.random.default_rng(0))
    start = time.perf_counter()
    ours = search_pose.oks_eval(truth, detections)
    middle = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = truth
        known.createIndex()
        oracle = COCOeval(known, known.loadRes(detections), "keypoints")
        oracle.evaluate()
        oracle.accumulate()
        oracle.summarize()
    end = time.perf_counter()
    differ = max(abs(a - b) for a, b in zip(ours.values(), oracle.stats))
    print(
        f"\nOKS AP of {len(detections):,} poses, {len(truth['annotations']):,} people: {middle - start:.2f} s;", end=" "
    )
    print(f"pycocotools {end - middle:.2f} s, {(end - middle) / (middle - start):.1f} times; differ by {differ:.1e}")


def show_seconds(task: search_pose.PoseTask) -> None:
    start = time.perf_counter()
    data = list(itertools.islice(task.batches(task.proxy, 0), task.proxy.steps))
    drawn = time.perf_counter() - start
    print(f"\nloader: {len(data) * len(data[0][0]) / drawn:,.0f} persons/s")
    print(f"{'one proxy training, s':<40}{'loader':>8}{'training':>10}{'metric':>8}")
    for name in ("mse", "Neg(Mul(y, Log(p)))", "Square(Add(MaxPool3(p), Neg(MaxPool3(y))))"):
        loss, net = (
            task.loss(name if name in search_pose.LOSSES else {"loss": parse(name)}),
            task.network(task.proxy, 0),
        )
        start = time.perf_counter()
        search_pose.train_network(net, loss, data, task.proxy)
        middle = time.perf_counter()
        task.test(net, task.data["val"])
        print(f"{name:<40}{'once':>8}{middle - start:>10.2f}{time.perf_counter() - middle:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    own = search_pose.PROXY["small"]
    parser.add_argument("--proxies", nargs="+", default=own_proxies(own), metavar="BASE/OF+STEPS")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = search_pose.PoseTask(search_pose.parse_arguments(["--device", "cpu"]))
    task.load()
    show_ranking(
        task,
        {name: name for name in search_pose.LOSSES} | {text: {"loss": parse(text)} for text in (*TREES, *FOUND)},
        args.proxies,
    )
    show_seconds(task)
    show_metric()
    print(f"\ntorch {torch.__version__}, CPU")


if __name__ == "__main__":
    main()
