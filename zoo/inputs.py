"""Inputs for both sides: what each argument of the target's forward means to the reference, and values for it.

The target is called as its person calls it (`example()`, or forward's own names); every input is made from the entry's
sample inputs, and can be turned back into them, so that both sides see the same values. What an argument means is told
by its name, by the table below; by its values where an example shows them; and which spelling of a mask forward can
take is found by trying.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from zoo.errors import ZooError
from zoo.target import FAULTS, one_line

if TYPE_CHECKING:
    from zoo.entry import PartProbe

# What people call an input, by its standard name.
NAMES: Mapping[str, tuple[str, ...]] = {
    "input_ids": (
        "input_ids",
        "ids",
        "tokens",
        "token_ids",
        "input_tokens",
        "src",
        "src_ids",
        "text",
        "input",
        "inputs",
        "idx",
        "x",
    ),
    "attention_mask": (
        "attention_mask",
        "mask",
        "attn_mask",
        "att_mask",
        "input_mask",
        "src_mask",
        "text_mask",
        "masks",
    ),
    "token_type_ids": (
        "token_type_ids",
        "token_types",
        "type_ids",
        "types",
        "segments",
        "segment_ids",
        "segment",
        "seg",
        "segs",
        "token_type",
        "kinds",
    ),
    "hidden_states": ("hidden_states", "hidden", "states", "h", "x", "features", "inputs", "last_hidden_state"),
    "pixel_values": ("pixel_values", "images", "image", "pixels", "img", "x"),
    "input_values": (
        "input_values",
        "audio",
        "waveform",
        "waveforms",
        "wave",
        "wav",
        "speech",
        "samples",
        "signal",
        "x",
    ),
    "input_features": (
        "input_features",
        "mel",
        "mels",
        "log_mel",
        "fbank",
        "spectrogram",
        "spectrograms",
        "audio",
        "features",
        "x",
    ),
    "decoder_input_ids": (
        "decoder_input_ids",
        "decoder_ids",
        "tokens",
        "token_ids",
        "text",
        "tgt",
        "target",
        "targets",
        "ids",
        "input_ids",
        "y",
        "decoder_tokens",
        "target_ids",
        "tgt_ids",
    ),
    "encoder_hidden_states": (
        "encoder_hidden_states",
        "encoder_outputs",
        "encoder_output",
        "encoder_out",
        "encoded",
        "memory",
        "context",
        "audio",
        "audio_features",
        "hidden_states",
        "xa",
        "enc_out",
        "cross",
    ),
    "past_values": ("past_values", "x", "series", "history", "past", "values", "x_enc", "window", "insample_y", "y"),
    "past_time_features": ("past_time_features", "x_mark_enc", "past_features", "past_marks", "past_times"),
    "past_observed_mask": ("past_observed_mask", "observed", "observed_mask", "past_observed"),
    "future_values": ("future_values", "x_dec", "future", "targets", "target"),
    "future_time_features": ("future_time_features", "x_mark_dec", "future_features", "future_marks", "future_times"),
    "static_categorical_features": ("static_categorical_features", "static_cat", "categories", "statics"),
    "static_real_features": ("static_real_features", "static_real", "static_reals"),
    "inputs_embeds": ("inputs_embeds", "x", "features", "inputs", "series", "x_enc", "x_dec", "embeds"),
    "trend": ("trend", "trend_init", "trend_part"),
    "patch_input": ("patch_input", "patches", "x"),
}
# True, or 1, where there is only padding: the inverse of an attention mask, as in torch's own modules.
PADDING = ("key_padding_mask", "src_key_padding_mask", "padding_mask", "pad_mask", "padding", "pad", "is_pad")
POSITIONS = ("position_ids", "positions", "pos_ids", "pos", "position")
_MASK = "attention_mask"


# ---------------------------------------------------------------------------------------------------- spellings


@dataclass(frozen=True)
class Mask:
    """A spelling of an attention mask: which type, 1 for tokens or for padding, [B, T] or one that broadcasts."""

    dtype: torch.dtype = torch.long
    padding: bool = False  # 1 where there is padding
    added: bool = False  # 0 where there are tokens, and a very negative number elsewhere
    dims: int = 2  # 4: [B, 1, 1, T]

    def spell(self, mask: Tensor) -> Tensor:
        seen = mask.bool()
        if self.added:
            most = torch.finfo(self.dtype).min
            spelled = torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, most)
        else:
            spelled = (~seen if self.padding else seen).to(self.dtype)
        return spelled[:, None, None, :] if self.dims == 4 else spelled

    def read(self, spelled: Tensor) -> Tensor:
        flat = spelled[:, 0, 0, :] if self.dims == 4 else spelled
        seen = flat == 0 if self.added or self.padding else flat != 0
        return seen.long()


# The spellings a forward may take that says nothing of its mask but the name, the likeliest first.
_MASKS = (Mask(), Mask(torch.bool), Mask(torch.float32))
_PADDINGS = (Mask(torch.bool, padding=True), Mask(torch.long, padding=True), Mask(torch.float32, padding=True))


@dataclass(frozen=True)
class Slot:
    """One argument of forward: the standard input that it is, or a value of the target's own that never changes."""

    name: str
    kind: str = ""  # a standard name; "positions"; "" for a constant
    dtype: torch.dtype | None = None
    mask: Mask | None = None
    value: Any = None  # what the example has there

    def spell(self, standard: Mapping[str, Tensor]) -> Any:
        if self.kind == "positions":
            first = next(iter(standard.values()))
            positions = torch.arange(first.shape[1], dtype=self.dtype or torch.long)
            flat = isinstance(self.value, Tensor) and self.value.dim() == 1
            return positions if flat else positions.expand(first.shape[0], -1).contiguous()
        if not self.kind:
            return self.value
        value = standard[self.kind]
        if self.mask is not None:
            return self.mask.spell(value)
        return value if self.dtype is None else value.to(self.dtype)

    def read(self, spelled: Any) -> Tensor | None:
        """The standard input back; None for what the reference does not see."""
        if self.kind in ("", "positions"):
            return None
        if self.mask is not None:
            return self.mask.read(spelled)
        return spelled.long() if self.kind.endswith("_ids") else spelled


@dataclass(frozen=True)
class Call:
    """How forward is called: a tensor, a tuple or a dict as in the example, with a slot in place of each value."""

    slots: Any
    notes: tuple[str, ...] = ()

    def flat(self) -> list[Slot]:
        return list(tree_flatten(self.slots)[0])

    def spell(self, standard: Mapping[str, Tensor]) -> Any:
        return tree_map(lambda slot: slot.spell(standard), self.slots)

    def read(self, x: Any) -> dict[str, Tensor]:
        """What the reference gets: the values of the very same x."""
        values = tree_flatten(x)[0]
        found = {slot.kind: slot.read(value) for slot, value in zip(self.flat(), values, strict=True)}
        return {kind: value for kind, value in found.items() if value is not None}

    @property
    def kinds(self) -> set[str]:
        return {slot.kind for slot in self.flat()} - {"", "positions"}


# ---------------------------------------------------------------------------------------------------- who is who


def kind_of(name: str, standard: Mapping[str, Tensor]) -> str:
    """The standard input that an argument of this name is; "positions", or "" where the name does not say."""
    word = name.lower()
    if word in standard:
        return word
    if word in POSITIONS:
        return "positions"
    if _MASK in standard and word in PADDING:
        return _MASK
    for kind in standard:  # in the entry's order: "x" is its main input
        if word in NAMES.get(kind, ()):
            return kind
    if _MASK in standard and word.endswith("mask"):
        return _MASK
    return ""


def _padding(name: str) -> bool:
    word = name.lower()
    return word in PADDING or ("pad" in word and word.endswith("mask"))


def calls(model: nn.Module, standard: Mapping[str, Tensor], example: Any, where: str) -> list[Call]:
    """The ways in which forward may be called, the likeliest first. What stays open is asked for."""
    if example is not None:
        return [_by_example(model, standard, example, where)]
    return _by_name(model, standard, where)


def _by_name(model: nn.Module, standard: Mapping[str, Tensor], where: str) -> list[Call]:
    parameters = [
        parameter
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    required = [p.name for p in parameters if p.default is p.empty]
    kinds: dict[str, str] = {}
    main = next(iter(standard))
    for parameter in parameters:
        kind = kind_of(parameter.name, standard)
        if kind and kind not in kinds.values():
            kinds[parameter.name] = kind
    if main not in kinds.values():
        left = [name for name in required if name not in kinds]
        if len(required) == 1:
            kinds = {name: kind for name, kind in kinds.items() if name != required[0]} | {required[0]: main}
        elif len(left) == 1:
            kinds[left[0]] = main
    unknown = [name for name in required if name not in kinds]
    if unknown or main not in kinds.values():
        raise _open(model, unknown or [main], required, kinds, standard, where)
    named = all(p.kind is not p.POSITIONAL_ONLY for p in parameters)
    used = [p.name for p in parameters if p.name in kinds]
    mask = next((name for name in used if kinds[name] == _MASK), None)
    spellings: Sequence[Mask | None] = (None,) if mask is None else _PADDINGS if _padding(mask) else _MASKS
    found = []
    for spelling in spellings:
        slots = {n: Slot(n, kinds[n], mask=spelling if n == mask else None) for n in used}
        found.append(Call(slots if named else tuple(slots.values())))
    return found


def _by_example(model: nn.Module, standard: Mapping[str, Tensor], example: Any, where: str) -> Call:
    names = list(inspect.signature(model.forward).parameters)
    if isinstance(example, dict) and not set(example) <= set(names) and len(names) == 1:
        example = (example,)  # a forward of one argument that is a dict
    slots = _named(example, names)
    flat: list[Slot] = tree_flatten(slots)[0]
    taken: dict[str, str] = {}  # kind: name
    for slot in flat:
        kind = kind_of(slot.name, standard) if isinstance(slot.value, Tensor) else ""
        if kind and kind not in taken and (kind != next(iter(standard)) or _alike(slot.value, standard[kind])):
            taken[kind] = slot.name
    main = next(iter(standard))
    if main not in taken:
        left = [slot for slot in flat if slot.name not in taken.values() and isinstance(slot.value, Tensor)]
        left = [slot for slot in left if _alike(slot.value, standard[main])]
        if not left:
            shown = ", ".join(f"{slot.name} {_shown(slot.value)}" for slot in flat)
            raise ZooError(
                f"{where}: none of the inputs of its example is {main} {_shown(standard[main])}: {shown}",
                kind="file",
                hint=f"name forward's argument {main}, or give an example that has it",
            )
        taken[main] = left[0].name
    kinds = {name: kind for kind, name in taken.items()}
    notes: list[str] = []
    settled = {slot.name: _settled(slot, kinds.get(slot.name, ""), notes) for slot in flat}
    for name, slot in settled.items():
        if not slot.kind and isinstance(slot.value, Tensor):
            notes.append(f"{name} is nothing the reference knows of: it stays as the example has it")
    return Call(tree_map(lambda slot: settled[slot.name], slots), tuple(notes))


def _named(example: Any, names: Sequence[str]) -> Any:
    """The example with a slot for each value, named by forward's argument or by the key it stands under."""

    def inside(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: inside(each, str(key)) for key, each in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(inside(each, f"{name}.{i}") for i, each in enumerate(value))
        return Slot(name, value=value)

    if isinstance(example, dict):
        return inside(example, "")
    if isinstance(example, tuple):
        spelled = [*names, *(f"argument {i + 1}" for i in range(len(names), len(example)))]
        return tuple(inside(value, name) for name, value in zip(spelled[: len(example)], example, strict=True))
    return inside(example, names[0] if names else "x")


def _alike(value: Tensor, standard: Tensor) -> bool:
    return value.dim() == standard.dim() and value.is_floating_point() == standard.is_floating_point()


def _settled(slot: Slot, kind: str, notes: list[str]) -> Slot:
    """The slot with its meaning, in the spelling that its example shows."""
    value = slot.value
    if not kind:
        return slot
    if kind != _MASK:
        return replace(slot, kind=kind, dtype=value.dtype)
    if value.dim() not in (2, 4) or (value.dim() == 4 and value.shape[1:3] != (1, 1)):
        notes.append(f"{slot.name} {_shown(value)} is no mask of one row per sequence: it stays as the example has it")
        return slot
    flat = value[:, 0, 0, :] if value.dim() == 4 else value
    if value.is_floating_point() and bool((flat < 0).any()):
        return replace(slot, kind=kind, mask=Mask(value.dtype, added=True, dims=value.dim()))
    padding = _padding(slot.name)
    first = flat[:, 0] != 0
    if bool((flat != 0).any()) and bool((flat == 0).any()) and bool(first.all()) == bool(first.any()):
        # Sequences begin with a token, so an example with padding in it shows which value stands for which.
        shown = not bool(first.all())
        if shown != padding:
            notes.append(f"{slot.name}: {int(not shown)} stands for a token, as the example has it")
        padding = shown
    return replace(slot, kind=kind, mask=Mask(value.dtype, padding=padding, dims=value.dim()))


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)[:40]
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _open(
    model: nn.Module,
    unknown: Sequence[str],
    required: Sequence[str],
    kinds: Mapping[str, str],
    standard: Mapping[str, Tensor],
    where: str,
) -> ZooError:
    signature = inspect.signature(model.forward)
    names = list(required) or list(unknown)
    told = f"what {' and '.join(unknown)} should be" if required else "which inputs it takes"
    return ZooError(
        f"{where}: forward{signature} does not say {told}",
        kind="file",
        hint=f"add this to the file, with inputs that forward takes:\n\n{snippet(names, kinds, standard)}",
    )


def snippet(names: Sequence[str], kinds: Mapping[str, str], standard: Mapping[str, Tensor]) -> str:
    """An example() to paste."""
    lines = ["def example():"]
    for name in names:
        lines.append(f"    {name} = {_made(standard[kinds[name]]) if kinds.get(name) in standard else '...'}")
    return "\n".join([*lines, f"    return {', '.join(names)}{',' if len(names) == 1 else ''}"])


def _made(value: Tensor) -> str:
    shape = tuple(value.shape)
    if value.is_floating_point():
        return f"torch.randn{shape}"
    high = int(value.max()) + 1
    return f"torch.ones({shape}, dtype=torch.long)" if bool((value == 1).all()) else f"torch.randint({high}, {shape})"


# ---------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class Inputs:
    """Inputs that the target takes: the first searches, the others prove."""

    call: Call
    xs: tuple[Any, ...]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


def gather(
    model: nn.Module,
    part: PartProbe,
    *,
    example: Any = None,
    where: str = "the target",
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> Inputs:
    """Inputs for the target, one for each variant of the entry's that it takes; tried, not assumed.

    The entry's own shapes come first, because they are small and reach both ends of every table; where forward cannot
    take them, those of the example do.
    """
    standard = part.inputs(0, "plain")
    call, plain = _first_that_runs(model, calls(model, standard, example, where), part, where, run)
    own = _own(call)
    xs, labels, notes = [plain], ["search"], list(call.notes)
    for seed, variant in enumerate(part.variants, 1):
        if variant == "padded" and _MASK not in call.kinds:
            continue
        refused: BaseException | None = None
        values = part.inputs(seed, variant)
        for tried in [values, *([_shaped(values, own, seed, variant)] if own else [])]:
            x = call.spell(tried)
            refused = _refused(model, x, run)
            if refused is None:
                xs.append(x)
                labels.append(variant)
                break
        if refused is not None:
            shape = " x ".join(map(str, next(iter(values.values())).shape))
            notes.append(f"not run on {variant} ({shape}): forward raised {one_line(refused)}")
    if _MASK in standard and _MASK not in call.kinds:
        notes.append("no mask: forward takes none, so padding is not part of the proof")
    return Inputs(call, tuple(xs), tuple(labels), tuple(notes))


def shown(model: nn.Module, part: PartProbe, example: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the standard inputs that an example has, by standard name; none where it does not say."""
    try:
        (call,) = calls(model, part.inputs(0, "plain"), example, "the target")
    except ZooError:
        return {}
    return {kind: tuple(value.shape) for kind, value in _own(call).items()}


def _own(call: Call) -> dict[str, Tensor]:
    """The standard inputs that the example has; none where there is no example."""
    found = {slot.kind: slot.read(slot.value) for slot in call.flat() if isinstance(slot.value, Tensor)}
    return {kind: value for kind, value in found.items() if value is not None}


def _first_that_runs(
    model: nn.Module,
    ways: Sequence[Call],
    part: PartProbe,
    where: str,
    run: Callable[[nn.Module, Any], Any] | None,
) -> tuple[Call, Any]:
    first: BaseException | None = None
    standard = part.inputs(0, "plain")
    for call in ways:
        own = _own(call)
        for each in [standard, *([_shaped(standard, own, 0, "plain")] if own else [])]:
            x = call.spell(each)
            refused = _refused(model, x, run)
            if refused is None:
                return call, x
            first = first or refused
    assert first is not None
    x = ways[0].spell(standard)
    slots = ways[0].flat()
    shown_inputs = ", ".join(f"{s.name} {_shown(v)}" for s, v in zip(slots, tree_flatten(x)[0], strict=True))
    kinds = {slot.name: slot.kind for slot in slots}
    raise ZooError(
        f"{where}: forward raised on {shown_inputs}: {one_line(first)}",
        kind="file",
        hint=f"give inputs that it takes, in the file:\n\n{snippet(list(kinds), kinds, standard)}",
    ) from first


def _shaped(values: Mapping[str, Tensor], own: Mapping[str, Tensor], seed: int, variant: str) -> dict[str, Tensor]:
    """The entry's values in the shapes of the example: cut, or repeated from the start."""
    found = {}
    for kind, value in values.items():
        if kind not in own or own[kind].shape == value.shape:
            found[kind] = value
        elif kind == _MASK:
            mask = torch.ones(own[kind].shape, dtype=value.dtype)
            if variant == "padded":
                mask[-1, (mask.shape[1] + 1) // 2 :] = 0
            found[kind] = mask
        elif value.is_floating_point():
            found[kind] = torch.randn(own[kind].shape, generator=torch.Generator().manual_seed(seed), dtype=value.dtype)
        else:
            wanted = own[kind].numel()
            flat = value.reshape(-1)
            found[kind] = flat.repeat(-(-wanted // flat.numel()))[:wanted].reshape(own[kind].shape)
    return found


def _refused(model: nn.Module, x: Any, run: Callable[[nn.Module, Any], Any] | None) -> BaseException | None:
    """What forward raises on x. A module without values yet is not run, and refuses nothing."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return None
    if tensors and tensors[0].device.type != "cpu":
        device = tensors[0].device
        x = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, x)
    with _untouched(model), torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        try:
            (run or _called)(model, x)
        except FAULTS as error:
            return error
    return None


def _called(model: nn.Module, x: Any) -> Any:
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Run it as in use, and leave it, and the random numbers, as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
