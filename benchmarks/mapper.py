"""Real sizes: how long does finding and proving a mapping take, and how much memory, next to running the model once?

    python benchmarks/mapper.py [NAME ...] [--layers N] [--profile FILE]

Each model has random weights and is grafted into another implementation of its architecture. The unit of time is one
reference forward in float64 (the twin that the proof uses) plus loading both models from a file. Planning is
`surgery.plan`, in a process that has planned something tiny before (imports are no part of it); the proof is
`surgery.verify` on four inputs, divided by four. Memory is the peak of the whole process beyond what it held before
either model was built, in units of the larger model in float32; the two models, and the pages of the checkpoint's file
that were touched, are part of it. Each model runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
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


PROOFS = 4
# On a machine that does other things at the same time, processor time with one thread says more: CLOCK=cpu.
clock = time.process_time if os.environ.get("CLOCK") == "cpu" else time.perf_counter


@dataclass
class Pair:
    """Two implementations and how both run; `layers` None is the real depth."""

    reference: Callable[[int | None], Any]
    target: Callable[[int | None], Any]
    inputs: Callable[[int], Any]
    run_reference: Callable[[Any, Any], Any]
    run_target: Callable[[Any, Any], Any]
    into: str


def bert() -> Pair:
    import torch
    from curated_transformers.layers import AttentionMask
    from curated_transformers.models import BERTConfig as CuratedConfig
    from curated_transformers.models import BERTEncoder
    from transformers import BertConfig, BertModel

    def theirs(n: int | None) -> Any:
        return BertModel(BertConfig(num_hidden_layers=n or 12), add_pooling_layer=False)

    def ours(n: int | None) -> Any:
        return BERTEncoder(CuratedConfig(n_hidden_layers=n or 12, n_pieces=30522, model_max_length=512))

    def inputs(seed: int) -> Any:
        g = torch.Generator().manual_seed(seed)
        mask = torch.ones(2, 32, dtype=torch.int64)
        mask[1, 20:] = 0
        ids = torch.randint(0, 30522, (2, 32), generator=g)
        return {"ids": ids, "mask": mask, "types": (torch.arange(32) > 12).long().expand(2, 32)}

    def run_theirs(m: Any, x: Any) -> Any:
        out = m(input_ids=x["ids"], attention_mask=x["mask"], token_type_ids=x["types"]).last_hidden_state
        return out * x["mask"].unsqueeze(-1)

    def run_ours(m: Any, x: Any) -> Any:
        out = m(x["ids"], AttentionMask(x["mask"].bool()), type_ids=x["types"]).last_hidden_layer_state
        return out * x["mask"].unsqueeze(-1)

    return Pair(theirs, ours, inputs, run_theirs, run_ours, "transformers -> curated-transformers")


def vit() -> Pair:
    import timm
    import torch
    from torchvision.models.vision_transformer import VisionTransformer

    return Pair(
        lambda n: timm.create_model("vit_base_patch16_224", depth=n or 12),
        lambda n: VisionTransformer(224, 16, n or 12, 12, 768, 3072),
        lambda seed: torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed)),
        lambda m, x: m(x),
        lambda m, x: m(x),
        "timm -> torchvision",
    )


def whisper() -> Pair:
    import torch
    import whisper as openai
    from transformers import WhisperConfig, WhisperModel

    frames = 200  # the shortest that both run: 2 s; the position table is as long

    def theirs(n: int | None) -> Any:
        config = WhisperConfig(
            d_model=768, encoder_layers=n or 12, decoder_layers=n or 12, encoder_attention_heads=12,
            decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072, max_source_positions=frames // 2,
        )  # fmt: skip
        return WhisperModel(config)

    def ours(n: int | None) -> Any:
        return openai.model.Whisper(
            openai.model.ModelDimensions(80, frames // 2, 768, 12, n or 12, 51865, 448, 768, 12, n or 12)
        )

    def inputs(seed: int) -> Any:
        g = torch.Generator().manual_seed(seed)
        mel = torch.randn(1, 80, frames, generator=g)
        return {"mel": mel, "tokens": torch.randint(0, 51864, (1, 8), generator=g)}

    def run_theirs(m: Any, x: Any) -> Any:
        out = m(input_features=x["mel"], decoder_input_ids=x["tokens"]).last_hidden_state
        return out @ m.decoder.embed_tokens.weight.T

    return Pair(
        theirs, ours, inputs, run_theirs, lambda m, x: m(x["mel"], x["tokens"]), "transformers -> openai-whisper"
    )


def gpt2() -> Pair:
    import torch
    from pytorch_pretrained_bert.modeling_gpt2 import GPT2Config as OldConfig
    from pytorch_pretrained_bert.modeling_gpt2 import GPT2Model as OldModel
    from transformers import GPT2Config, GPT2Model

    def theirs(n: int | None) -> Any:
        return GPT2Model(GPT2Config(n_embd=1024, n_layer=n or 24, n_head=16))

    def ours(n: int | None) -> Any:
        return OldModel(OldConfig(50257, n_embd=1024, n_layer=n or 24, n_head=16))

    return Pair(
        theirs,
        ours,
        lambda seed: torch.randint(0, 50257, (2, 32), generator=torch.Generator().manual_seed(seed)),
        lambda m, x: m(input_ids=x).last_hidden_state,
        lambda m, x: m(x)[0],
        "transformers -> pytorch-pretrained-bert",
    )


def t5() -> Pair:
    import torch
    from own_t5 import T5
    from transformers import T5Config, T5Model

    def theirs(n: int | None) -> Any:
        config = T5Config(d_model=768, d_ff=3072, d_kv=64, num_layers=n or 12, num_decoder_layers=n or 12, num_heads=12)
        return T5Model(config)

    def inputs(seed: int) -> Any:
        g = torch.Generator().manual_seed(seed)
        mask = torch.ones(2, 32, dtype=torch.int64)
        mask[1, 20:] = 0
        return {
            "ids": torch.randint(0, 32128, (2, 32), generator=g),
            "mask": mask,
            "decoder": torch.randint(0, 32128, (2, 8), generator=g),
        }

    def run_theirs(m: Any, x: Any) -> Any:
        return m(input_ids=x["ids"], attention_mask=x["mask"], decoder_input_ids=x["decoder"]).last_hidden_state

    return Pair(
        theirs,
        lambda n: T5(32128, 768, 3072, 12, n or 12),
        inputs,
        run_theirs,
        lambda m, x: m(x["ids"], x["decoder"], x["mask"].bool()),
        "transformers -> a module as a person writes it (fused kv, no library has another one)",
    )


PAIRS = {"bert-base": bert, "vit-b-16": vit, "whisper-small": whisper, "gpt2-medium": gpt2, "t5-base": t5}


def peak() -> float:
    """Bytes, since the process began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def shaken(model: Any, seed: int) -> Any:
    """Random weights, no two tensors alike (a fresh model has biases of zero and norms of one)."""
    import torch

    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.02)
    return model.eval()


def measure(name: str, layers: int | None, profile: str | None) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_model, save_model

    import surgery
    from surgery import twin

    pair = PAIRS[name]()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
        if os.fork() == 0:  # what making the files takes is no part of the peak
            save_model(shaken(pair.reference(layers), 1), str(first))
            save_model(shaken(pair.target(layers), 2), str(second))
            os._exit(0)
        os.wait()
        before = peak()
        reference, target = pair.reference(layers).eval(), pair.target(layers).eval()
        loads = []
        for _ in range(2):
            start = clock()
            for model, file in ((reference, first), (target, second)):
                load_model(model, str(file))
            loads.append(clock() - start)
        load = min(loads)
        size = max(_bytes(reference), _bytes(target))
        forwards = []
        for _ in range(2):
            start = clock()
            twin.run(pair.run_reference, twin.twin(reference), pair.inputs(0))
            forwards.append(clock() - start)
        unit = min(forwards) + load

        def probe(n: int) -> Any:
            inputs = [pair.inputs(k) for k in range(n + 1)]
            return surgery.Probe(reference, pair.run_reference, pair.run_target, inputs)

        source = surgery.open(first)
        warm_up(Path(folder))
        start = clock()
        if profile:
            import cProfile

            with cProfile.Profile() as prof:
                plan = surgery.plan(source, target, probe=probe(PROOFS))
            prof.dump_stats(profile)
        else:
            plan = surgery.plan(source, target, probe=probe(PROOFS))
        planning = clock() - start
        high_plan = peak()
        start = clock()
        proof = surgery.verify(source, target, plan, probe=probe(PROOFS))
        proving = (clock() - start) / PROOFS
        high = peak()
    return {
        "verdict": str(proof.verdict), "message": proof.message, "size": size, "load": load, "forward": min(forwards),
        "planning": planning, "planning_x": planning / unit, "proof_x": proving / unit,
        "memory_x": (high - before) / size, "memory_plan_x": (high_plan - before) / size,
    }  # fmt: skip


def warm_up(folder: Path) -> None:
    """What the first plan of a process takes for imports is no part of a plan."""
    import torch
    from safetensors.torch import save_model

    import surgery

    one, file = torch.nn.Linear(3, 3), folder / "one.safetensors"
    save_model(one, str(file))
    inputs = [torch.randn(2, 3, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    probe = surgery.Probe(one, lambda m, x: m(x), lambda m, x: m(x), inputs)
    surgery.plan(surgery.open(file), torch.nn.Linear(3, 3), probe=probe)


def _bytes(model: Any) -> int:
    return sum(p.numel() * 4 for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PAIRS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--profile", help="write cProfile's statistics of the planning to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.layers, args.profile)))
        return
    print(
        f"{'model':14} {'layers':>6} {'verdict':8} {'size':>7} {'load':>6} {'forward':>8} {'plan':>7} "
        f"{'plan x':>7} {'proof x':>8} {'memory: plan, all':>19}"
    )
    for name in args.names or PAIRS:
        more = ["--layers", str(args.layers)] if args.layers else []
        more += ["--profile", args.profile] if args.profile else []
        done = subprocess.run(
            [sys.executable, __file__, "--one", name, *more], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            print(f"{name:14} failed")
            continue
        r = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:14} {args.layers or '':>6} {r['verdict']:8} {r['size'] / 2**30:5.2f} G {r['load']:5.2f}s "
            f"{r['forward']:7.2f}s {r['planning']:6.2f}s {r['planning_x']:6.1f}x {r['proof_x']:7.1f}x "
            f"{r['memory_plan_x']:6.1f}x {r['memory_x']:6.1f}x   {r['message'][:120]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
