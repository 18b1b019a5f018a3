"""Every op on the command line: a row that uses it, over a real library's tensors, applied by `zoo graft --plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery import ops
from surgery.expr import evaluate, infer, names, parse
from surgery.plan import Dropped, Plan, Row, Stamp, Status
from zoo.cli import main

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=4)


def deit() -> nn.Module:
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=4
    )


def swin() -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1,), "num_heads": (2,)}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes)


def resnet() -> nn.Module:
    return timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 12, 16, 20))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, num_labels=5
    )
    return transformers.BertForSequenceClassification(config)


def whisper() -> nn.Module:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 12}
    config = transformers.WhisperConfig(**sizes, **heads, num_mel_bins=8, pad_token_id=0)
    return transformers.WhisperModel(config)


def wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        num_conv_pos_embedding_groups=4,
    )
    return transformers.Wav2Vec2Model(config)


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    each.__name__: each for each in (vit, deit, swin, resnet, bert, whisper, wav2vec2)
}
Q, K, V = (f"bert.encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key", "value"))
UP = "bert.encoder.layer.0.intermediate.dense.weight"
PLACES = "bert.embeddings.position_embeddings.weight"
QKV, FC = "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"
WORDS = "bert.embeddings.word_embeddings.weight"
BN = "bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var"
POS = "encoder.pos_conv_embed.conv.parametrizations.weight.original"

# op -> (the model, the row). Every op that is registered has one: a test says so.
ROWS: Mapping[str, tuple[str, str]] = {
    "adapt_input_channels": ("resnet", "adapt_input_channels(conv1.weight, to=1)"),
    "add": (
        "bert",
        f"add({PLACES}, slice(bert.embeddings.token_type_embeddings.weight, axis=0, start=0, stop=1))",
    ),
    "bn_fold": ("resnet", "bn_fold(conv1.weight, bn1.weight, bn1.running_var)"),
    "bn_fold_bias": ("resnet", f"bn_fold_bias(zeros(shape=(64,)), {BN})"),
    "cast": ("vit", f'cast({FC}, dtype="BF16")'),
    "cat": ("bert", f"cat({Q}, {K}, {V}, axis=0)"),
    "clone_width": ("vit", f"clone_width({FC}, times=(2, 2))"),
    "deinterleave": ("vit", f"deinterleave({QKV}, index=1, of=3, groups=4)"),
    "dirac": ("resnet", "dirac(shape=(8, 8, 3, 3))"),
    "div": ("bert", f"div({Q}, add({K}, ones(shape=(16, 16))))"),
    "exp": ("vit", "exp(norm.weight)"),
    "extend_pos_embed_tile": ("bert", "extend_pos_embed_tile(bert.embeddings.position_embeddings.weight, to=600)"),
    "flip": ("resnet", "flip(conv1.weight, axis=1)"),
    "full": ("vit", "full(shape=(3,), value=2.5)"),
    "inflate_2d_to_3d": ("vit", "inflate_2d_to_3d(patch_embed.proj.weight, frames=2)"),
    "interleave": ("bert", f"interleave({Q}, {K}, {V}, groups=4)"),
    "label_remap": ("bert", "label_remap(classifier.weight, index=(3, -1, 0))"),
    "log": ("vit", "log(norm.weight)"),
    "lora_merge": ("bert", f"lora_merge({Q}, slice({UP}, axis=0, start=0, stop=16), {K}, scale=0.5)"),
    "lora_unmerge": ("bert", f"lora_unmerge({Q}, slice({UP}, axis=0, start=0, stop=16), {K}, scale=0.5)"),
    "low_rank": ("vit", f"low_rank({FC}, rank=3)"),
    "mha_to_gqa": ("bert", f"mha_to_gqa({K}, heads=4, groups=2)"),
    "mul": ("bert", f"mul({Q}, {K})"),
    "neg": ("vit", "neg(norm.bias)"),
    "norm_except": ("wav2vec2", f"norm_except({POS}1, dim=2)"),
    "normal": ("vit", "normal(shape=(4, 16), std=0.02, seed=3)"),
    "ones": ("vit", "ones(shape=(16,))"),
    "permute": ("resnet", "permute(conv1.weight, dims=(2, 3, 1, 0))"),
    "prune_heads": ("vit", f"prune_heads({QKV}, heads=4, drop=(1,), parts=3)"),
    "prune_units": ("vit", f"prune_units({FC}, keep=(0, 5, 9))"),
    "reciprocal": ("vit", "reciprocal(norm.weight)"),
    "repeat": ("vit", "repeat(norm.bias, times=(2,))"),
    "reshape": ("vit", "reshape(patch_embed.proj.weight, shape=(16, -1))"),
    "resize_patch_embed": ("vit", "resize_patch_embed(patch_embed.proj.weight, to=(4, 4))"),
    "resize_patch_embed_1d": ("whisper", "resize_patch_embed_1d(encoder.conv1.weight, to=5)"),
    "resize_pos_embed_1d": ("bert", "resize_pos_embed_1d(bert.embeddings.position_embeddings.weight, to=128)"),
    "resize_pos_embed_2d": ("deit", "resize_pos_embed_2d(pos_embed, grid=(4, 4), to=(2, 8), prefix=2)"),
    "resize_rel_pos_bias": (
        "swin",
        "resize_rel_pos_bias(layers.0.blocks.0.attn.relative_position_bias_table, to=(3, 3))",
    ),
    "resize_sinusoids": ("whisper", "resize_sinusoids(encoder.embed_positions.weight, to=20)"),
    "rope_permute": ("bert", f"rope_permute({Q}, heads=4)"),
    "rope_unpermute": ("bert", f"rope_unpermute({Q}, heads=4)"),
    "rsqrt": ("resnet", "rsqrt(bn1.running_var)"),
    "scale": ("bert", f"scale({Q}, by=0.5)"),
    "shift": ("vit", "shift(norm.weight, by=-1.0)"),
    "shrink_width": ("vit", f"shrink_width({FC}, to=16)"),
    "slice": ("vit", f"slice({QKV}, axis=0, start=16, stop=32)"),
    "spectrogram_patch": ("deit", "spectrogram_patch(patch_embed.proj.weight)"),
    "spectrogram_pos_embed": ("deit", "spectrogram_pos_embed(pos_embed, grid=(4, 4), to=(2, 9))"),
    "sqrt": ("resnet", "sqrt(bn1.running_var)"),
    "square": ("vit", "square(norm.weight)"),
    "sub": ("bert", f"sub({Q}, {K})"),
    "take": ("bert", "take(classifier.weight, index=(4, 0))"),
    "transpose": ("vit", f"transpose({FC})"),
    "vocab_map": ("bert", f'vocab_map({WORDS}, rows="2 0:2 +1 39")'),
    "vocab_resize": ("bert", f"vocab_resize({WORDS}, to=48, seed=0)"),
    "vocab_transplant_omp": (
        "bert",
        f'vocab_transplant_omp({WORDS}, slice({WORDS}, axis=0, start=0, stop=20), rows="0:10 +10", k=4)',
    ),
    "weight_norm": ("wav2vec2", f"weight_norm({POS}0, {POS}1, dim=2)"),
    "widen": ("vit", f"widen({FC}, to=80, axis=0, seed=1)"),
    "zeros": ("vit", "zeros(shape=(16,))"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def file(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            tensors = {
                key: value.detach().clone().contiguous() + (0.0 if "running" in key else 0.01)
                for key, value in MODELS[name]().state_dict().items()
                if value.is_floating_point()
            }
            if name == "whisper":  # its table is a formula, to the last digit
                tensors["encoder.embed_positions.weight"] -= 0.01
            save_file(tensors, path)
        return path

    return file


def test_every_op_has_a_row() -> None:
    assert set(ROWS) == {op.name for op in ops.registered()}


@pytest.mark.parametrize("op", sorted(ROWS))
def test_a_row_with_the_op_is_applied(
    op: str, saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = ROWS[op]
    source = surgery.open(saved(model))
    expr = parse(text)
    shape = infer(expr, lambda name: source[name].shape)
    dtype = "BF16" if op == "cast" else "F32"
    kind = "torch.bfloat16" if op == "cast" else "torch.float32"
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Mine(nn.Module):\n    def __init__(self):\n"
        f"        super().__init__()\n        self.w = nn.Parameter(torch.full({shape}, 7, dtype={kind}))\n\n"
        "    def forward(self, x):\n        return x * self.w\n"
    )
    status = Status.FILLED if names(expr) else Status.SYNTHESISED
    rows = (Row("w", status, expr, shape, dtype),)
    dropped = tuple(Dropped(name, "not asked for") for name in source if name not in rows[0].sources)
    from zoo.target import load

    plan = Plan(rows, dropped, Stamp.of(source), Stamp.of(_infos(load(str(tmp_path / "mine.py")).model)))
    plan.save(tmp_path / "p.graft.toml")
    out = tmp_path / "out.safetensors"
    args = ["graft", f"file:{saved(model)}", str(tmp_path / "mine.py"), "--plan", str(tmp_path / "p.graft.toml")]
    assert main([*args, "--static", "-o", str(out), "--why"]) == 0, capsys.readouterr()
    shown = capsys.readouterr().out
    assert op in shown
    written: Tensor = load_file(out)["w"]
    wanted = evaluate(expr, source.read).to(written.dtype)
    torch.testing.assert_close(written, wanted, rtol=1e-6, atol=1e-7)
    assert surgery.Plan.load(tmp_path / "out.graft.toml").rows[0].expr == expr


def _infos(module: nn.Module) -> Any:
    from surgery.graft import infos

    return infos(module)
