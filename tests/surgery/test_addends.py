"""What a sum tells of its addends: norms that are added, and rows that one program reads apart from the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from tests.surgery.test_norms import SPELLINGS, Norm, images, spread, stirred
from tests.surgery.test_norms import graft as grafted
from tests.surgery.test_spellings import D, H, graft, refused, tokens

C, SIDE = 6, 3


# -- two norms by stored statistics, added ----------------------------------------------------------------------------
class Bottleneck(nn.Module):
    """A way through and a way round, each with a norm at its end. `order`: which of them is written first."""

    def __init__(self, order: str, how: str = "library") -> None:
        super().__init__()
        self.order = order
        self.enter, self.widen, self.round = nn.Conv2d(3, C, 3), nn.Conv2d(C, C, 1), nn.Conv2d(3, C, 3)
        self.n1, self.n2, self.n3 = Norm(how), Norm(how), Norm(how)

    def forward(self, x: Tensor) -> Tensor:
        through = self.n2(self.widen(F.relu(self.n1(self.enter(x)))))
        around = self.n3(self.round(x))
        return F.relu(through + around if self.order == "through first" else around + through)


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("orders", [("through first", "around first"), ("around first", "through first")])
def test_the_addends_of_a_sum_in_any_order(orders: tuple[str, str], how: str) -> None:
    source, target = stirred(Bottleneck(orders[0]), 1), stirred(Bottleneck(orders[1], how), 2)
    assert grafted(source, target).verdict == "proven"
    state = source.state_dict()
    for name, t in target.state_dict().items():
        assert torch.equal(t, state[name]), name


class Joined(Bottleneck):
    """It looks like the other, but both ways share one mean."""

    def forward(self, x: Tensor) -> Tensor:
        through, around = self.widen(F.relu(self.n1(self.enter(x)))), self.round(x)
        (g2, b2, m2, v2), (g3, b3, v3) = (
            (self.n2.gain, self.n2.shift, self.n2.mean, self.n2.var),
            (self.n3.gain, self.n3.shift, self.n3.var),
        )
        s2, s3 = g2 * (v2 + 1e-5).rsqrt(), g3 * (v3 + 1e-5).rsqrt()
        y = through * spread(s2) + spread(b2 - m2 * s2)
        return F.relu(y + around * spread(s3) + spread(b3 - m2 * s3))


def test_a_mean_that_two_norms_share_is_not_taken_for_two() -> None:
    source, target = stirred(Bottleneck("through first"), 1), stirred(Joined("around first"), 2)
    with pytest.raises(surgery.GraftError):
        grafted(source, target)


# -- attention over a mean and a map ----------------------------------------------------------------------------------
class Pool(nn.Module):
    """Attention in place of a mean (the pool of CLIP's ResNets): a token that is the mean, and positions on all.

    how: "all ask" computes a query for every token and takes the first; "one asks" for the first only, tokens second
    ("token first" has them first). "one, elsewhere" adds the position of the last token to the mean: another function.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, D, 3, 3)
        self.place = nn.Parameter(torch.zeros(SIDE**2 + 1, D))
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).flatten(2).transpose(1, 2)
        place = self.place.roll(1, 0) if self.how == "one, elsewhere" else self.place
        if self.how == "all ask":
            x = x.transpose(0, 1)
            x = torch.cat([x.mean(0, keepdim=True), x]) + place[:, None]
            x = x.transpose(0, 1)
            q, k, v = self.query(x), self.key(x), self.value(x)
        else:
            x = torch.cat([x.mean(1, keepdim=True), x], 1) + place
            q, k, v = self.query(x[:, :1]), self.key(x), self.value(x)
        q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(x[:, 0])


@pytest.mark.parametrize("ways", [("all ask", "one asks"), ("one asks", "all ask"), ("one asks", "one asks")])
def test_positions_on_a_mean_and_a_map(ways: tuple[str, str]) -> None:
    report = graft(Pool(ways[0]), Pool(ways[1]), images)
    assert all(row.sources == (row.name,) for row in report.rows if row.status == "filled")


def test_positions_stay_with_their_tokens() -> None:
    report = graft(Pool("all ask"), Pool("one, elsewhere"), images)
    (row,) = (r for r in report.rows if r.name == "place")
    assert row.op != "copy"


# -- one norm, called twice -------------------------------------------------------------------------------------------
class TwoTokens(nn.Module):
    """Two tokens, normalised and averaged: "together", or in two calls of the norm that are "added" or "stacked". In
    "unlike", the second token is normalised by another norm."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.enter, self.mix, self.norm, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3)
        self.other = nn.LayerNorm(D) if how == "unlike" else self.norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + F.gelu(self.mix(x)).mean(1, keepdim=True)
        if self.how == "together":
            return self.head(self.norm(x)[:, :2].mean(1))
        if self.how == "stacked":
            return self.head(torch.stack([self.norm(x[:, 0]), self.norm(x[:, 1])], 1).mean(1))
        return self.head((self.norm(x[:, 0]) + self.other(x[:, 1])) / 2)


@pytest.mark.parametrize("theirs", ["together", "added"])
@pytest.mark.parametrize("mine", ["added", "stacked"])
def test_two_tokens_in_two_calls_of_one_norm(theirs: str, mine: str) -> None:
    report = graft(TwoTokens(theirs), TwoTokens(mine), tokens)
    assert all(row.sources == (row.name,) for row in report.rows if row.status == "filled")


def test_two_norms_are_not_one() -> None:
    refused(TwoTokens("unlike"), TwoTokens("added"), tokens)
