"""Names as evidence: words that people use for the same thing, as data. A prior only: running decides.

Nothing here maps one library's names to another's; the lexicon is of words, not of paths.
"""

from __future__ import annotations

import functools
import re

# Each line is one meaning. Sources: the papers' own terms and the spelling of the large model libraries.
LEXICON = """
query q wq to_q q_proj query_proj q_lin
key k wk to_k k_proj key_proj k_lin
value v wv to_v v_proj value_proj v_lin
output out o wo to_out o_proj out_proj c_proj out_lin proj
weight w kernel gamma scale g
bias b beta
norm ln layernorm layer_norm batchnorm bn groupnorm rmsnorm
attention attn att self_attn self_attention sa mha
cross cross_attn crossattention encoder_attn xattn
feedforward ffn ff mlp feed_forward
up fc1 w1 lin1 linear1 intermediate c_fc wi ffn_in up_proj
down fc2 w2 lin2 linear2 ffn_out down_proj
embedding embed embeddings emb table
token word tok wte piece tokens words vocab
position pos positional wpe positions posemb where
type segment seg token_type types
class cls class_token cls_token class_embedding
patch patches patchify stem conv_stem
layer block layers blocks resblocks h stages encoder_layer
head classifier lm_head fc heads decoder_head
encoder enc
decoder dec
projection proj
mean running_mean
var running_var variance
reduce squeeze
expand excite
pooler pool
"""
_WORDS: dict[str, frozenset[int]] = {}
for _i, _line in enumerate(LEXICON.strip().splitlines()):
    for _w in _line.split():
        _WORDS[_w] = _WORDS.get(_w, frozenset()) | {_i}


@functools.lru_cache(maxsize=1 << 16)
def words(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(words, numbers) of a tensor name: split at dots, underscores and capitals; joined forms of the lexicon kept."""
    out: list[str] = []
    numbers: list[int] = []
    for part in name.split("."):
        if part.isdigit():
            numbers.append(int(part))
            continue
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part).lower()
        if snake in _WORDS:
            out.append(snake)
            continue
        for w in re.split(r"[_\-]+", snake):
            m = re.fullmatch(r"([a-z]+)(\d+)", w)
            if w in _WORDS or not m:
                if w.isdigit():
                    numbers.append(int(w))
                elif w:
                    out.append(w)
            else:
                out.append(m[1])
                numbers.append(int(m[2]))
    return tuple(out), tuple(numbers)


@functools.lru_cache(maxsize=1 << 18)
def likeness(a: str, b: str) -> float:
    """0 .. about 2: how much two tensor names speak of the same thing."""
    wa, na = words(a)
    wb, nb = words(b)
    if not wa or not wb:
        return 0.0
    score = 0.0
    for i, x in enumerate(reversed(wa)):
        best = 0.0
        for j, y in enumerate(reversed(wb)):
            same = x == y or bool(_WORDS.get(x, frozenset()) & _WORDS.get(y, frozenset()))
            if same:
                best = max(best, (1.0 if x == y else 0.9) / (1 + 0.15 * abs(i - j)))
        score += best * 0.8**i
    total = sum(0.8**i for i in range(max(len(wa), len(wb))))
    numbers = 0.2 if na and nb and na[-1] == nb[-1] else 0.0
    return score / total + numbers
