"""Products of a few rows with matrix units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from palate.model.compiling import obstacle
from palate.model.fast import native_products
from palate.model.fast.native import Kind, Library
from palate.model.fast.native_products import packing_of

pytestmark = pytest.mark.skipif(
    obstacle(torch.device("cpu")) is not None, reason=f"{obstacle(torch.device('cpu'))}"
)


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, 100, 257])
@pytest.mark.parametrize("size", [(32, 32), (96, 64), (320, 160), (64, 40), (50, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_of_few_rows(rows: int, size: tuple[int, int], *, with_bias: bool) -> None:
    """Sizes that are and are not whole panels; the matrix units round as little as torch."""
    library = Library(Kind(torch.bfloat16, 2, 1, 32))
    source = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(count, size[1], generator=source).bfloat16() for count in (size[0], rows))
    bias = torch.randn(size[0], generator=source).bfloat16() if with_bias else None
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    ours, theirs = packing_of(library)(weight, bias)(x), linear(x, weight, bias)
    assert ours.shape == exact.shape
    assert (ours.double() - exact).norm() < 1.1 * (theirs.double() - exact).norm() + 1e-3 * exact.norm()


def test_a_row_does_not_depend_on_the_others() -> None:
    library = Library(Kind(torch.bfloat16, 2, 1, 32))
    source = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(count, 96, generator=source).bfloat16() for count in (64, 70))
    if not library.has_tiles():
        pytest.skip("without matrix units, torch computes these products")
    product = packing_of(library)(weight, None)
    whole = product(x)
    for rows in (1, 31, 64):
        assert torch.equal(product(x[:rows]), whole[:rows])


def test_matrix_units_are_used_for_whole_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(Kind(torch.bfloat16, 2, 1, 32))
    if not library.has_tiles():
        pytest.skip("this processor has no matrix units")
    used: list[Any] = []
    monkeypatch.setattr(native_products, "FewRows", lambda *given: used.append(given[1].shape))
    for size in ((64, 32), (40, 32), (32, 40)):
        packing_of(library)(torch.zeros(size, dtype=torch.bfloat16), None)
    assert used == [(64, 32)]
