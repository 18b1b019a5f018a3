"""Feature maps: several in one output, in another order of axes, and resampled to the size that they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.mapper.record import record
from surgery.twin import twin
from tests.surgery.test_norms import images, stirred

C = 6


def call(module: nn.Module, x: Any) -> Any:
    return module(x)


def proven(source: nn.Module, target: nn.Module) -> bool:
    source, target = stirred(source, 1), stirred(target, 2)
    report = surgery.graft(source.state_dict(), target, probe=surgery.Probe(source, call, call, images))
    with torch.no_grad():
        torch.testing.assert_close(target(images(7)), source(images(7)), rtol=1e-4, atol=1e-4)
    return report.verdict == "proven"


class Pyramid(nn.Module):
    """The last map is read by nothing but the output, and is a sum that ends in a scale."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.stem = nn.Conv2d(3, C, 3)
        kind = nn.Linear if linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.mix = nn.ModuleList(kind(C, C) for _ in range(3))
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(C)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, maps = self.stem(x), []
        for mix, scale in zip(self.mix, self.scales, strict=True):
            y = F.gelu(x)
            y = mix(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.linear else mix(y)
            x = x + y * scale[:, None, None]
            maps.append(x.flatten(1))
        return torch.cat(maps, 1)


def test_several_maps_in_one_output() -> None:
    assert proven(Pyramid(linear=True), Pyramid(linear=False))


class Places(nn.Module):
    """Positions added to a map that is zero in many places."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.stem = nn.Conv2d(3, C, 3, 2)
        self.places = nn.Parameter(torch.zeros(17, C) if first else torch.zeros(1, C, 17))
        self.out = nn.Linear(C, 2 * C)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).flatten(2)
        if self.first:  # places, images, channels: and the product reads them as one list of rows
            x = x.permute(2, 0, 1)
            x = torch.cat([x.mean(0, keepdim=True), x]) + self.places[:, None]
            return self.out(x).sigmoid().transpose(0, 1)
        return self.out((torch.cat([x.mean(2, keepdim=True), x], 2) + self.places).mT).sigmoid()


def test_places_along_another_axis_of_a_map_with_zeros() -> None:
    assert proven(Places(first=True), Places(first=False))


class Table(nn.Module):
    """A grid of positions that a program resamples to the size of the map, here the size that it has."""

    def __init__(self, mode: str = "") -> None:
        super().__init__()
        self.mode = mode
        self.stem = nn.Conv2d(3, C, 3, 2)
        self.places = nn.Parameter(torch.zeros(1, C, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x, places = self.stem(x), self.places
        if self.mode:
            places = F.interpolate(places, size=x.shape[2:], mode=self.mode, align_corners=False)
        return F.gelu(x + places)


def test_resampling_to_the_same_size_changes_nothing() -> None:
    assert proven(Table(), Table("bicubic"))
    assert proven(Table("bilinear"), Table())


def test_resampling_by_a_factor_is_no_identity_even_where_the_size_stays() -> None:
    class Zoomed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(x, scale_factor=1.05, mode="bicubic")

    x = torch.randn(1, 2, 7, 9, dtype=torch.float64)
    tape = record(call, twin(Zoomed()), x)
    value = tape.values[tape.outputs()[0]].tensor
    assert value is not None
    assert value.shape == x.shape
    assert not torch.allclose(value, x)
