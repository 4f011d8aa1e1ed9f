"""torch's FP8 products with many scales: the layouts it asks for, held against its own shape checks on tensors without
memory, and what the layouts hold. No device is needed, and no number is computed by a device here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from msamp_like.formats import E4M3, E5M2, ROW, Block, grid_shape
from msamp_like.kernels import reference, torch_products
from msamp_like.kernels.reference import Operand

SHAPES = [(256, 384, 512), (100, 200, 300), (256, 384, 640), (48, 40, 130), (1, 1, 1), (300, 17, 33)]
BLOCKS: dict[str, tuple[tuple[Block, Block], ...]] = {
    "rows": ((ROW, ROW),),
    "tiles": (((1, 128), (1, 128)), ((1, 128), (128, 128))),
    "mx": (((1, 32), (1, 32)),),
}


def without_memory(shape: tuple[int, int], block: Block, dtype: torch.dtype = E4M3.dtype) -> Operand:
    scales = torch.empty(grid_shape(shape, block), device="meta")
    return Operand(torch.empty(shape, dtype=dtype, device="meta"), scales, block)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_torch_accepts_the_layouts(name, sizes):
    m, n, k = sizes
    for left, right in BLOCKS[name]:
        operands = without_memory((m, k), left, E5M2.dtype), without_memory((n, k), right)
        for dtype in (torch.bfloat16,) if name == "rows" else torch_products.PRODUCT_DTYPES:
            product = torch_products.MULTIPLY[name](*operands, dtype)
            assert (product.shape, product.dtype) == ((m, n), dtype)


def test_torchs_checks_see_a_wrong_layout():
    """The control: scales that lie the other way round are refused, for a run of 128 and for a square."""
    a, b = (torch.empty(256, 512, dtype=E4M3.dtype, device="meta") for _ in range(2))
    run, square = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    right = torch.empty(4, 256, device="meta").t()
    wrong = torch.empty(256, 4, device="meta")
    F.scaled_mm(a, b.t(), right, run, right, run)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        F.scaled_mm(a, b.t(), wrong, run, right, run)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        F.scaled_mm(a, b.t(), right, run, torch.empty(3, 2, device="meta"), square)


def test_scales_lie_where_the_units_look():
    """Blackwell's order by its formula: exponent (r, c) of a tile of 128 x 4 is byte 16 (r mod 32) + 4 (r / 32) + c,
    and tiles follow each other along K first."""
    exponents = torch.randint(1, 254, (300, 10), dtype=torch.uint8)
    flat = torch_products.swizzled(exponents).view(torch.uint8)
    assert flat.numel() == 384 * 12
    for row, column in ((0, 0), (31, 3), (32, 0), (127, 9), (128, 4), (299, 9), (200, 7)):
        tile = (row // 128) * 3 + column // 4
        place = 512 * tile + 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4
        assert flat[place] == exponents[row, column]


def test_e8m0_holds_every_scale_of_ours():
    scale_inv = torch.exp2(torch.arange(-126, 127).float())
    exponents = torch_products.e8m0(scale_inv)
    assert torch.equal(exponents.view(torch.float8_e8m0fnu).float(), scale_inv)
    flag = torch_products.e8m0(torch.tensor([torch.inf]))
    assert flag.view(torch.float8_e8m0fnu).float().isnan().all()


def test_padding_multiplies_to_the_same_product():
    """Zeros and the scales beside them, in plain torch: the product of what is padded is the product."""
    left, right = (
        Operand(*reference.quantize_current(torch.randn(rows, 150), E4M3, block)[:2], block)
        for rows, block in ((20, (1, 128)), (140, (128, 128)))
    )
    a = torch_products.aligned(left.payload, pad_rows=False, columns=128)
    b = torch_products.aligned(right.payload, pad_rows=True, columns=128, rows=128)
    assert (a.shape, b.shape) == ((20, 256), (256, 256))
    padded = left._replace(payload=a), right._replace(payload=b)
    expected = reference.scaled_matmul(left, right, "nt", torch.float32)
    got = reference.scaled_matmul(*padded, "nt", torch.float32)[:20, :140]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "name"),
    [((-1, -1), "tensor"), (ROW, "row"), ((1, 128), "1x128"), ((128, 128), "128x128"), ((2, 3), "2x3")],
)
def test_granularity_is_seen_with_the_contracted_dim_last(block, name):
    operand = without_memory((256, 512), block)
    assert torch_products.granularity(operand) == name
    crossed = Operand(operand.payload.t(), operand.scale_inv.t(), (block[1], block[0]))
    assert torch_products.granularity(torch_products.contracted_last(crossed, True)) == name
