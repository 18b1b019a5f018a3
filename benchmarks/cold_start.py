"""How long do the commands take that load no weights? Each is timed in turn with `python -c "import click, pluggy"`.

The rounds are interleaved, so that a machine that slows down slows everything down. The first round warms the caches
and is not counted.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

BASELINE = "python -c 'import click, pluggy'"


def checkpoint(path: Path, layers: int = 12) -> None:
    """As many tensors as an encoder of `layers` blocks has; to a command that reads headers their size is nothing."""
    tensors = {"embeddings.word.weight": np.zeros((8, 4), np.float32)}
    for i in range(layers):
        for name in ("query", "key", "value", "out", "norm1", "up", "down", "norm2"):
            tensors[f"layer.{i}.{name}.weight"] = np.zeros((4, 4), np.float32)
            tensors[f"layer.{i}.{name}.bias"] = np.zeros(4, np.float32)
    save_file(tensors, path)


def seconds(command: list[str]) -> float:
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environ)
    taken = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    zoo = str(Path(sys.executable).with_name("zoo"))

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "encoder.safetensors"
        checkpoint(weights)
        commands = {
            BASELINE: [sys.executable, "-c", "import click, pluggy"],
            "zoo --help": [zoo, "--help"],
            "zoo list": [zoo, "list"],
            "zoo show file:encoder.safetensors": [zoo, "show", f"file:{weights}"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(rounds + 1):
            for name, command in commands.items():
                taken = seconds(command)
                if turn:
                    times[name].append(taken)

    median = {name: statistics.median(taken) for name, taken in times.items()}
    print(f"{rounds} rounds, Python {sys.version.split()[0]}, {os.cpu_count()} CPUs\n")
    print(f"{'':36}{'median':>10}{'fastest':>10}{'ratio':>8}")
    for name, taken in times.items():
        print(f"{name:36}{median[name] * 1e3:7.0f} ms{min(taken) * 1e3:7.0f} ms{median[name] / median[BASELINE]:8.2f}")


if __name__ == "__main__":
    main()
