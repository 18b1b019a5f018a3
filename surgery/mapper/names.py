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


# -- roles: what a name claims, where it claims anything ---------------------------------------------------------------
# Each line: a question, an answer, and the words that give this answer. Two names that answer one question differently
# speak of different tensors; a name that is silent contradicts nothing. Words that mean one thing in one library and
# another in the next ("post_attention", "output", "w1") answer nothing, and so stand under "none".
ROLES = """
projection query: query q wq w_q to_q q_proj query_proj q_lin query_projection q_linear query_layer linear_q
projection key: key k wk w_k to_k k_proj key_proj k_lin key_projection k_linear key_layer linear_k
projection value: value v wv w_v to_v v_proj value_proj v_lin value_projection v_linear value_layer linear_v
projection fused: qkv kqv kv wqkv to_qkv qkv_proj query_key_value c_attn in_proj to_kv kv_proj xkv attn_qkv w_pack
projection query, sublayer cross: xq
projection key, sublayer cross: xk
projection value, sublayer cross: xv
sublayer self: attn attention att self_attn self_attention sa mha selfattention multi_head_attention
sublayer self: pre_attn pre_attention
sublayer cross: cross cross_attn crossattention cross_attention encoder_attn enc_dec_attention enc_dec_attn xattn
sublayer cross: encoder_decoder_attention encdecattention inter_attention
sublayer feedforward: ff ffn mlp feed_forward feedforward dense_relu_dense pre_mlp pre_ffn pre_ff pre_feedforward
sublayer feedforward: post_mlp post_ffn post_ff post_feedforward
sublayer feedforward: intermediate intermediate_dense ffn_in ff_in linear1 lin1 ffn_out ff_out linear2 lin2
feedforward up: up up_proj
feedforward down: down down_proj
feedforward gate: gate gate_proj
table token: word_embeddings word_embedding token_embedding token_embeddings embed_tokens tok_embeddings wte tok tokens
table token: words piece_embeddings piece vocab_embedding embed_in token_emb tok_emb word_embed token_embed
table position: position positions pos pos_embed pos_embedding position_embedding position_embeddings positional wpe
table position: positional_embedding posemb pos_emb embed_positions w_pos pe
table segment: token_type token_type_embeddings segment seg type_embeddings wse tok_type type_embedding
table segment: segment_embeddings
table class: cls_token class_token class_embedding cls_embedding cls_embed class_embed
table distillation: dist_token distillation_token
table register: reg_token register_tokens reg_tokens register_token
table mask: mask_token masked_spec_embed mask_embedding mask_emb
table patch: patch patches patch_embed patch_embedding patch_embeddings patchify
table relative: rel_pos relative_position relative_attention_bias rel_attn_embed gru_rel_pos
table relative: relative_position_bias_table relative_position_bias rel_pos_bias
table poskernel: pos_conv_embed conv_pos pos_conv
tower vision: vision visual image img vision_model
tower text: text txt language textual text_model
tower audio: audio speech
side encoder: encoder enc
side decoder: decoder dec
part head: head heads classifier lm_head predictions cls_classifier head_norm fc_norm logits vocab_projector qa_outputs
part head: vocab_transform vocab_layer_norm seq_relationship
part head, table distillation: distillation_classifier head_dist
part pooler: pooler pool
part scale: logit_scale temperature
part bias: logit_bias
part layerscale: ls layer_scale layer_scale_parameter layerscale
place embeddings: embeddings emb embed embedder embedding
order pre: pre
order post: post final last f
squeeze reduce: reduce conv_reduce
squeeze expand: conv_expand
depth depthwise: dw dwconv depthwise conv_dw depthwise_conv
depth pointwise: pw pwconv conv_pw pointwise
none: post_attn post_attention after_attn after_attention attn_pool attention_pool cls output_attention
"""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words of form rather than of meaning: that two names share one of these says nothing.
GENERIC = _set(
    """weight bias model module layer block transformer net network body base backbone trunk dense linear lin proj
    projection fc conv convolution norm ln layernorm batchnorm bn layer_norm normalization output out input in emb embed
    embedding table param feature_map h resblock stage main self kernel gamma beta original"""
)
OUT = _set("out output o wo out_proj o_proj to_out out_lin proj c_proj dense final_projection xo w_o")
# Ordinals that people write as words.
ORDINALS = {"before": 1, "after": 2}

Roles = dict[str, str]


def _roles() -> tuple[dict[tuple[str, ...], tuple[tuple[str, str], ...]], int]:
    found: dict[tuple[str, ...], tuple[tuple[str, str], ...]] = {}
    for line in ROLES.strip().splitlines():
        said, _, spelled = line.partition(":")
        answers = tuple((a.split()[0], a.split()[1]) for a in said.split(",") if len(a.split()) == 2)
        for phrase in spelled.split():
            found[tuple(_parts(phrase))] = answers
    return found, max(map(len, found))


def _parts(component: str) -> list[str]:
    """The words of one component of a path: split at underscores, capitals and before trailing digits."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", component).lower()
    snake = re.sub(r"(?<=[a-z])(?=\d+(?:_|$))", "_", snake)
    return [w for w in re.split(r"[^a-z0-9]+", snake) if w]


_ROLES, _LONGEST = _roles()


@functools.lru_cache(maxsize=1 << 16)
def claims(path: tuple[str, ...]) -> tuple[tuple[tuple[str, str], ...], frozenset[str], tuple[int, ...]]:
    """What a path claims: (question, answer) pairs, the inner component's answer before an outer one's; the other words
    that mean something; and the numbers of the last component."""
    answers: Roles = {}
    rest: set[str] = set()
    for component in path:
        parts = _parts(component)
        i = 0
        here: Roles = {}
        while i < len(parts):
            for n in range(min(_LONGEST, len(parts) - i), 0, -1):
                said = _ROLES.get(tuple(parts[i : i + n]))
                if said is not None:
                    here.update(said)
                    break
            else:
                n = 1
                word = parts[i]
                singular = word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
                if not word.isdigit() and singular not in GENERIC and word not in GENERIC:
                    rest.add(singular)
            i += n
        answers.update(here)
    last = _parts(path[-1]) if path else []
    numbers = tuple(int(w) if w.isdigit() else ORDINALS[w] for w in last if w.isdigit() or w in ORDINALS)
    return tuple(sorted(answers.items())), frozenset(rest - set(ORDINALS)), numbers


def says_out(path: tuple[str, ...]) -> bool:
    """Whether the innermost words say "output", which means something only where it is known of what."""
    joined = {"_".join(_parts(c)) for c in path[-2:]}
    return bool(joined & OUT)
