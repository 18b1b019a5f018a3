"""How much memory does a proof take, next to the model in float32; and how long, next to one float64 forward?

    python benchmarks/proof_memory.py [NAME ...] [--tokens N] [--whole] [--held]
    python benchmarks/proof_memory.py --commands [graft verify plan refuted ...]

Each model has random weights in a file. The reference is views of that file's memory map, as `zoo` builds it; the
target is another implementation of the same architecture, on the meta device (its values are those of the plan), or
with memory of its own where `--held` asks for it. The plan is given: what is measured is `surgery.verify` on three
inputs (12 tokens of two sequences, one token, and N tokens), block by block, or with `--whole` as it is done where
there is room.

`--commands`: the same of `zoo graft`, `zoo verify` and so on with `--blockwise`, as a person types them: BERT-large in
a folder (`file:`), and an own module, built on the CPU by its constructor. Of "refuted" and "placed" the module has
another epsilon in one norm; the one is grafted, the other verified against weights that are right, which is little
more than finding where the two part. The inputs are the entry's own, of which the longest has 12 tokens where the
module's own example has, and 512 where it has none.

Memory is the highest mark of the process's resident set beyond what it held before either model was built (and after
a first tiny proof, which imports what a proof needs), pages of the mapped file included, in units of the model in
float32. Each measurement runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")


@dataclass
class Pair:
    """Two implementations, how both run, and what becomes what."""

    reference: Callable[[], Any]
    target: Callable[[], Any]
    inputs: Callable[[int, int, int], Any]  # seed, sequences, tokens
    run_reference: Callable[[Any, Any], Any]
    run_target: Callable[[Any, Any], Any]
    rows: dict[str, str]
    block: int  # elements of one block


def stack() -> Pair:
    """Gated feed-forward blocks, of torch alone: gate and up apart, into one."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    layers, width = 24, 1024

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.gate, self.up, self.down = (nn.Linear(width, width) for _ in range(3))

        def forward(self, x: Any) -> Any:
            y = self.norm(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.both, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)

        def forward(self, x: Any) -> Any:
            gate, up = self.both(self.norm(x)).chunk(2, -1)
            return x + self.out(F.silu(gate) * up)

    rows = {}
    for i in range(layers):
        for kind in ("weight", "bias"):
            rows[f"{i}.both.{kind}"] = f"cat({i}.gate.{kind}, {i}.up.{kind}, axis=0)"
            rows[f"{i}.out.{kind}"] = f"{i}.down.{kind}"
            rows[f"{i}.norm.{kind}"] = f"{i}.norm.{kind}"

    def inputs(seed: int, n: int, tokens: int) -> Any:
        return torch.randn(n, tokens, width, generator=torch.Generator().manual_seed(seed))

    return Pair(
        lambda: nn.Sequential(*(Theirs() for _ in range(layers))),
        lambda: nn.Sequential(*(Ours() for _ in range(layers))),
        inputs,
        lambda m, x: m(x),
        lambda m, x: m(x),
        rows,
        3 * width * width,
    )


def bert_large() -> Pair:
    """transformers' BERT, into a module with query, key and value in one."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from transformers import BertConfig, BertModel

    layers, width, heads, inner = 24, 1024, 16, 4096
    config = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner)
    config._attn_implementation = "eager"

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

        def forward(self, x: Any, mask: Any) -> Any:
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
            scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf")).softmax(-1)
            x = self.norm1(x + self.out((scores @ v).transpose(1, 2).flatten(2)))
            return self.norm2(x + self.down(F.gelu(self.up(x))))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.place, self.kind = (nn.Embedding(n, width) for n in (30522, 512, 2))
            self.norm = nn.LayerNorm(width, eps=1e-12)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))

        def forward(self, ids: Any, mask: Any) -> Any:
            x = self.word(ids) + self.place(torch.arange(ids.shape[1])) + self.kind(torch.zeros_like(ids))
            x = self.norm(x)
            for block in self.blocks:
                x = block(x, mask)
            return x

    rows = {
        "word.weight": "embeddings.word_embeddings.weight",
        "place.weight": "embeddings.position_embeddings.weight",
        "kind.weight": "embeddings.token_type_embeddings.weight",
        "norm.weight": "embeddings.LayerNorm.weight",
        "norm.bias": "embeddings.LayerNorm.bias",
    }
    for i in range(layers):
        at = f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            each = ", ".join(f"{at}.attention.self.{name}.{kind}" for name in ("query", "key", "value"))
            rows[f"blocks.{i}.qkv.{kind}"] = f"cat({each}, axis=0)"
            rows[f"blocks.{i}.out.{kind}"] = f"{at}.attention.output.dense.{kind}"
            rows[f"blocks.{i}.norm1.{kind}"] = f"{at}.attention.output.LayerNorm.{kind}"
            rows[f"blocks.{i}.up.{kind}"] = f"{at}.intermediate.dense.{kind}"
            rows[f"blocks.{i}.down.{kind}"] = f"{at}.output.dense.{kind}"
            rows[f"blocks.{i}.norm2.{kind}"] = f"{at}.output.LayerNorm.{kind}"

    def inputs(seed: int, n: int, tokens: int) -> Any:
        mask = torch.ones(n, tokens, dtype=torch.int64)
        mask[-1, max(1, tokens // 2) :] = 0
        return torch.randint(0, 30522, (n, tokens), generator=torch.Generator().manual_seed(seed)), mask

    return Pair(
        lambda: BertModel(config, add_pooling_layer=False),
        Own,
        inputs,
        lambda m, x: m(input_ids=x[0], attention_mask=x[1]).last_hidden_state,
        lambda m, x: m(*x),
        rows,
        4 * width * width + 2 * width * inner,
    )


def gpt2_medium() -> Pair:
    """transformers' GPT-2, into a module with linears: every matrix is turned, and query, key and value are apart."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from transformers import GPT2Config, GPT2Model

    layers, width, heads = 24, 1024, 16
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
    config._attn_implementation = "eager"

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

        def forward(self, x: Any) -> Any:
            y = self.norm1(x)
            q, k, v = (each(y).unflatten(-1, (heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + self.out(y)
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.place = nn.Embedding(50257, width), nn.Embedding(1024, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm = nn.LayerNorm(width)

        def forward(self, ids: Any) -> Any:
            x = self.word(ids) + self.place(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    rows = {"word.weight": "wte.weight", "place.weight": "wpe.weight"}
    rows |= {f"norm.{kind}": f"ln_f.{kind}" for kind in ("weight", "bias")}
    plain = {"out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for i in range(layers):
        for n, name in enumerate("qkv"):
            part = f"axis={{}}, start={n * width}, stop={(n + 1) * width}"
            rows[f"blocks.{i}.{name}.weight"] = f"transpose(slice(h.{i}.attn.c_attn.weight, {part.format(1)}))"
            rows[f"blocks.{i}.{name}.bias"] = f"slice(h.{i}.attn.c_attn.bias, {part.format(0)})"
        for ours, theirs in plain.items():
            rows[f"blocks.{i}.{ours}.weight"] = f"transpose(h.{i}.{theirs}.weight)"
            rows[f"blocks.{i}.{ours}.bias"] = f"h.{i}.{theirs}.bias"
        for n in (1, 2):
            rows |= {f"blocks.{i}.norm{n}.{kind}": f"h.{i}.ln_{n}.{kind}" for kind in ("weight", "bias")}

    return Pair(
        lambda: GPT2Model(config),
        Own,
        lambda seed, n, tokens: torch.randint(0, 50257, (n, tokens), generator=torch.Generator().manual_seed(seed)),
        lambda m, x: m(input_ids=x, use_cache=False).last_hidden_state,
        lambda m, x: m(x),
        rows,
        12 * width * width,
    )


PAIRS = {"bert-large": bert_large, "gpt2-medium": gpt2_medium, "stack": stack}


def resident(field: str) -> int:
    """Bytes; VmRSS is what is held now, VmHWM its highest mark."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say what a process holds")


def mapped(build: Callable[[], Any], source: Any) -> Any:
    """The reference as views of the file: its weights are never drawn, and what no file holds is made."""
    import zoo

    model = zoo.unfilled(build)
    state = {name: source.read(name) for name in model.state_dict() if name in source}
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def warm_up() -> None:
    """What the first proof of a process takes for imports is no part of a proof."""
    import torch

    import surgery

    one = torch.nn.Linear(64, 64)
    inputs = [torch.randn(2, 64, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    probe = surgery.Probe(one, lambda m, x: m(x), lambda m, x: m(x), inputs)
    surgery.graft(one.state_dict(), torch.nn.Linear(64, 64), probe=probe)


MODULE = """
import sys
sys.path.insert(0, {here!r})
import proof_memory
pair = proof_memory.bert_large()
def own():
    return pair.target()
def other():
    made = pair.target()
    made.blocks[20].norm1.eps = 1e-5
    return made
def example():
    return pair.inputs(0, 2, 12)
"""
COMMANDS = {
    "graft": ("graft", "own", "-o", "new.safetensors"),
    "verify": ("verify", "own", "--weights", "own.safetensors", "--on", "cpu/float64"),
    "plan": ("plan", "own"),
    "refuted": ("graft", "other", "-o", "other.safetensors"),
    "placed": ("verify", "other", "--weights", "own.safetensors", "--on", "cpu/float64"),
}


def bert_files(folder: Path) -> None:
    """A checkpoint as the hub has it, the person's file, and the weights that a graft writes of the two."""
    import torch

    import surgery
    from surgery.expr import parse
    from surgery.graft import infos
    from surgery.plan import Plan, Row, Stamp, Status
    from zoo import written

    pair = bert_large()
    model, g = pair.reference(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.02)
    model.save_pretrained(folder / "bert")
    (folder / "mymodel.py").write_text(MODULE.format(here=str(Path(__file__).resolve().parent)))
    source = surgery.open(folder / "bert")
    target = infos(pair.target())
    rows = [Row(t, Status.FILLED, parse(pair.rows[t]), tuple(i.shape), i.dtype) for t, i in target.items()]
    plan = Plan(tuple(rows), (), Stamp.of(source), Stamp.of(target)).with_verdict("proven")
    written.write_to_file(
        source, plan, folder / "own.safetensors", verdict="proven", base=None, like=None, shard_size=None
    )


def command(name: str, folder: str) -> dict[str, Any]:
    """One command in this process. What is imported is imported before."""
    import transformers  # noqa: F401
    from torch import _dynamo  # noqa: F401

    import zoo.cli
    from surgery.judge import Judge

    proofs: list[Any] = []
    prove = Judge.prove

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        proofs.append(prove(self, *args, **kwargs))
        return proofs[-1]

    Judge.prove = noted  # type: ignore[method-assign]
    os.chdir(folder)
    warm_up()
    size = 4 * sum(p.numel() for p in bert_parameters())
    what, made, *rest = COMMANDS[name]
    before, start = resident("VmRSS"), time.perf_counter()
    code = zoo.cli.main([what, "file:bert#encoder", f"mymodel.py:{made}", "--blockwise", "-q", *rest])
    took, peak = time.perf_counter() - start, resident("VmHWM") - before
    proof = proofs[-1]
    message = proof.divergence.why if proof.divergence is not None else f"exit {code}"
    return {
        "verdict": str(proof.verdict), "message": message, "size": size, "peak_x": peak / size,
        "block_float64_x": 8 * bert_large().block / size, "seconds": took, "forward": 0.0, "x_forward": 0.0,
    }  # fmt: skip


def bert_parameters() -> list[Any]:
    import torch

    with torch.device("meta"):
        return list(bert_large().target().parameters())


def measure(name: str, tokens: int, whole: bool, held: bool) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_model

    import surgery
    from surgery import twin
    from surgery.expr import parse
    from surgery.graft import infos
    from surgery.plan import Plan, Row, Stamp, Status

    pair = PAIRS[name]()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.safetensors")
        if os.fork() == 0:  # what making the file takes is no part of the peak
            model, g = pair.reference(), torch.Generator().manual_seed(1)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, generator=g), alpha=0.02)
            save_model(model, str(file))
            os._exit(0)
        os.wait()
        source = surgery.open(file)
        warm_up()
        before = resident("VmRSS")
        reference = mapped(pair.reference, source)
        with torch.device("cpu" if held else "meta"):
            target = pair.target()
        rows = [Row(t, Status.FILLED, parse(pair.rows[t]), tuple(i.shape), i.dtype) for t, i in infos(target).items()]
        plan = Plan(tuple(rows), (), Stamp.of(source), Stamp.of(infos(target)))
        inputs = [pair.inputs(0, 2, 12), pair.inputs(1, 2, 12), pair.inputs(2, 1, 1), pair.inputs(3, 1, tokens)]
        size = 4 * sum(p.numel() for p in reference.parameters())
        probe = surgery.Probe(reference, pair.run_reference, pair.run_target, inputs)
        start = time.perf_counter()
        proof = surgery.verify(source, target, plan, probe=probe, blockwise=not whole)
        took = time.perf_counter() - start
        peak = resident("VmHWM") - before
        start = time.perf_counter()
        twin.run(pair.run_reference, twin.twin(reference), inputs[-1])
        forward = time.perf_counter() - start
    return {
        "verdict": str(proof.verdict), "message": proof.message, "size": size, "peak_x": peak / size,
        "block_float64_x": 8 * pair.block / size, "seconds": took, "forward": forward, "x_forward": took / forward,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PAIRS))
    parser.add_argument("--tokens", type=int, default=32, help="of the longest input (32)")
    parser.add_argument("--whole", action="store_true", help="not block by block")
    parser.add_argument("--held", action="store_true", help="the target has memory of its own")
    parser.add_argument("--commands", action="store_true", help=f"of these commands: {', '.join(COMMANDS)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        if args.one == "files":
            bert_files(Path(args.folder))
        else:
            print("\n" + json.dumps(command(args.one, args.folder)))
        return
    if args.one:
        print(json.dumps(measure(args.one, args.tokens, args.whole, args.held)))
        return
    print(
        f"{'model':12} {'tokens':>6} {'verdict':8} {'float32':>9} {'peak':>6} {'block':>6} {'proof':>8} {'forwards':>8}"
    )
    if args.commands:
        with tempfile.TemporaryDirectory() as folder:
            again([*ONE, "files", "--folder", folder])
            for name in args.names or COMMANDS:
                shown(name, again([*ONE, name, "--folder", folder]), 512)
        return
    for name in args.names or PAIRS:
        more = ["--tokens", str(args.tokens), *["--whole"] * args.whole, *["--held"] * args.held]
        shown(name, again([*ONE, name, *more]), args.tokens)


ONE = [sys.executable, __file__, "--one"]


def again(command: list[str]) -> dict[str, Any]:
    """This file in a process of its own, and what it says."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return {} if done.returncode else json.loads((done.stdout.splitlines() or ["{}"])[-1])


def shown(name: str, r: dict[str, Any], tokens: int) -> None:
    if not r:
        print(f"{name:12} failed")
        return
    print(
        f"{name:12} {tokens:6} {r['verdict']:8} {r['size'] / 2**30:5.2f} GiB {r['peak_x']:5.2f}x "
        f"{r['block_float64_x']:5.2f}x {r['seconds']:6.1f} s {r['x_forward']:7.1f}x  {r['message'][:120]}",
        flush=True,
    )


if __name__ == "__main__":
    main()
