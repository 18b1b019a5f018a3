"""How long does a conversion from file to file take, and in how much memory, next to `cp` and to loading and saving?

    python benchmarks/to_file.py [GIGABYTES [RUNS]]

Writes a checkpoint of that size (1 GB) into a temporary folder and converts it in processes of their own: by three
plans, once in Python and once by `zoo graft --plan --to-file`; by `cp`; and by loading it with safetensors, changing
the tensors in torch, and saving it with safetensors. Each is run three times, the median is printed; the file is in the
system's cache. Peak memory is the process's largest resident set, the pages of mapped files among it. This process
imports no torch, for a child's peak begins with its parent's.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from surgery.expr import infer, parse
from surgery.plan import Plan, Row, Status

WIDTH, FFN = 1024, 4096
_LAYER = 4 * (4 * WIDTH * WIDTH + 2 * WIDTH * FFN)  # bytes

PEER = """
import sys
from safetensors.torch import load_file, save_file
import torch
held, new = load_file("in.safetensors"), {}
for name, t in held.items():
    if sys.argv[1] == "fused" and name.rsplit(".", 1)[1] in "qkv":
        if name.endswith(".q"):
            new[name + "kv"] = torch.cat([t, held[name[:-1] + "k"], held[name[:-1] + "v"]])
    else:
        new["new." + name] = t.t().contiguous() if sys.argv[1] == "turned" else t
save_file(new, "out.safetensors")
"""
OURS = """
import sys, surgery
surgery.write("in.safetensors", surgery.Plan.load(f"{sys.argv[1]}.graft.toml"), "out.safetensors")
"""
FACE = "import sys; from zoo.cli import main; sys.exit(main())"


def layers(gigabytes: float) -> int:
    return max(1, round(gigabytes * 1e9 / _LAYER))


def source(count: int) -> None:
    import torch
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(0)
    shapes = {**dict.fromkeys("qkvo", (WIDTH, WIDTH)), "up": (FFN, WIDTH), "down": (WIDTH, FFN)}
    tensors = {f"layer.{i}.{n}": torch.randn(s, generator=g) for i in range(count) for n, s in shapes.items()}
    save_file(tensors, "in.safetensors", metadata={"format": "pt"})


def plans(count: int) -> None:
    """Every tensor renamed; every tensor turned; three of them fused, the rest renamed."""
    shapes = {**dict.fromkeys("qkvo", (WIDTH, WIDTH)), "up": (FFN, WIDTH), "down": (WIDTH, FFN)}
    whole = {f"layer.{i}.{n}": s for i in range(count) for n, s in shapes.items()}

    def save(name: str, rows: dict[str, str]) -> None:
        made = [
            Row(target, Status.FILLED, parse(expr), infer(parse(expr), whole.__getitem__), "F32")
            for target, expr in rows.items()
        ]
        Plan(tuple(made)).save(f"{name}.graft.toml")

    save("renamed", {f"new.{name}": name for name in whole})
    save("turned", {f"new.{name}": f"transpose({name})" for name in whole})
    fused = {f"layer.{i}.qkv": f"cat(layer.{i}.q, layer.{i}.k, layer.{i}.v)" for i in range(count)}
    save("fused", fused | {f"new.{name}": name for name in whole if name.rsplit(".", 1)[1] not in "qkv"})


def run(arguments: list[str]) -> tuple[float, float, float]:
    """(seconds by the clock, seconds of the processor, peak memory in MB) of a process, the median of its runs."""
    seconds, busy, peaks = [], [], []
    for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 3):
        for path in Path().glob("out.*"):
            path.unlink()
        os.sync()
        start = time.perf_counter()
        quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
        child = os.posix_spawnp(arguments[0], arguments, os.environ, file_actions=quiet)
        _, status, used = os.wait4(child, 0)
        seconds.append(time.perf_counter() - start)
        busy.append(used.ru_utime + used.ru_stime)
        peaks.append(used.ru_maxrss / 1024)
        if status:
            raise SystemExit(f"{arguments} failed")
    return statistics.median(seconds), statistics.median(busy), statistics.median(peaks)


def main() -> None:
    if sys.argv[1:2] == ["--make"]:
        source(int(sys.argv[2]))
        return
    count = layers(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
    here = Path(__file__).resolve().parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here / "plugins")])
    folder = Path(tempfile.mkdtemp(prefix="to_file-"))
    try:
        os.chdir(folder)
        subprocess.run([sys.executable, str(here / "benchmarks/to_file.py"), "--make", str(count)], check=True)
        plans(count)
        print(f"{Path('in.safetensors').stat().st_size / 1e9:.2f} GB, {count} layers")
        took, _, _ = first = run(["cp", "in.safetensors", "out.safetensors"])

        def told(plan: str, name: str, found: tuple[float, float, float]) -> None:
            clock, busy, peak = found
            print(f"{plan:9} {name:22} {clock:6.2f} {clock / took:6.1f} {busy:6.2f} {peak:8.0f}", flush=True)

        print(f"{'':9} {'':22} {'s':>6} {'x cp':>6} {'cpu s':>6} {'peak MB':>8}")
        told("", "cp", first)
        python = sys.executable
        face = ["graft", "file:in.safetensors", "--to-file", "-o", "out.safetensors", "-q", "--plan"]
        told("", "importing torch", run([python, "-c", "import surgery, torch"]))
        for plan in ("renamed", "fused", "turned"):
            for name, arguments in (
                ("surgery.write", [python, "-c", OURS, plan]),
                ("zoo graft --to-file", [python, "-c", FACE, *face, f"{plan}.graft.toml"]),
                ("load, change, save", [python, "-c", PEER, plan]),
            ):
                told(plan, name, run(arguments))
    finally:
        os.chdir("/")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
