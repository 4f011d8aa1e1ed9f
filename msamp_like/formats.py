"""Number formats and block shapes: how a value is stored, and how many values share one scale.

A :class:`Format` says what a stored element can hold. A :data:`Block` says how many elements share one scale along each
of the two dims of a matrix; -1 stands for the whole dim. A tensor of any rank is seen as a matrix of its last dim:
shape (4, 8, 96) is 32 rows of 96, shape (96,) is one row.

E4M3 and E5M2 follow the OCP 8-bit Floating Point Specification (OFP8), revision 1.0: E4M3 has no infinity. UE5M3 is the
upper eight bits of a half's magnitude: a number without a sign and with E5M2's range, for what is never negative.

E4M3FNUZ and E5M2FNUZ are what AMD's gfx94x multiplies ("finite, NaN, unsigned zero": Noune et al., "8-bit Numerical
Formats for Deep Neural Networks", 2022, https://arxiv.org/abs/2206.02915). Their exponent bias is one more, so the same
byte stands for half the number, and 0x80 is NaN where the others have -0. They are formats of their own; a product of
one kind with the other is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Block = tuple[int, int]

WHOLE: Block = (-1, -1)
ROW: Block = (1, -1)


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a number is stored.

    ``mantissa_bits`` counts the stored bits only. ``scaled`` says whether a scale is worth storing: BF16 and FP32 have
    FP32's range, their scale is always 1. A format that is not ``signed`` stores 0 for a negative number.
    """

    name: str
    dtype: torch.dtype
    largest: float
    smallest_normal: float
    mantissa_bits: int
    scaled: bool
    signed: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def bytes(self) -> int:
        """Bytes of one element, its share of the scale not counted."""
        return self.dtype.itemsize


E4M3 = Format(
    name="e4m3", dtype=torch.float8_e4m3fn, largest=448.0, smallest_normal=2.0**-6, mantissa_bits=3, scaled=True
)
E5M2 = Format(
    name="e5m2", dtype=torch.float8_e5m2, largest=57344.0, smallest_normal=2.0**-14, mantissa_bits=2, scaled=True
)
FP16 = Format(
    name="fp16", dtype=torch.float16, largest=65504.0, smallest_normal=2.0**-14, mantissa_bits=10, scaled=True
)
BF16 = Format(
    name="bf16",
    dtype=torch.bfloat16,
    largest=torch.finfo(torch.bfloat16).max,
    smallest_normal=2.0**-126,
    mantissa_bits=7,
    scaled=False,
)
FP32 = Format(
    name="fp32",
    dtype=torch.float32,
    largest=torch.finfo(torch.float32).max,
    smallest_normal=2.0**-126,
    mantissa_bits=23,
    scaled=False,
)

E4M3FNUZ = Format(
    name="e4m3fnuz",
    dtype=torch.float8_e4m3fnuz,
    largest=240.0,
    smallest_normal=2.0**-7,
    mantissa_bits=3,
    scaled=True,
)
E5M2FNUZ = Format(
    name="e5m2fnuz",
    dtype=torch.float8_e5m2fnuz,
    largest=57344.0,
    smallest_normal=2.0**-15,
    mantissa_bits=2,
    scaled=True,
)
# torch has no such dtype: a uint8 code, shifted up by seven bits, is an FP16 number.
UE5M3 = Format(
    name="ue5m3",
    dtype=torch.uint8,
    largest=61440.0,
    smallest_normal=2.0**-14,
    mantissa_bits=3,
    scaled=True,
    signed=False,
)
# What an E4M3 weight leaves of its master, in steps of 1/256 of the distance between neighbouring E4M3 numbers at the
# weight. It is no number without its weight, whose scale it shares; so it is none of FORMATS.
RESIDUAL = Format(name="residual", dtype=torch.int8, largest=127.0, smallest_normal=1.0, mantissa_bits=7, scaled=True)

FORMATS: dict[str, Format] = {f.name: f for f in (E4M3, E5M2, FP16, BF16, FP32, UE5M3, E4M3FNUZ, E5M2FNUZ)}
FNUZ: dict[Format, Format] = {E4M3: E4M3FNUZ, E5M2: E5M2FNUZ}
"""OCP format -> AMD's fnuz format of the same bits."""
FP8_FORMATS = (E4M3, E5M2, E4M3FNUZ, E5M2FNUZ)
FP8_DTYPES = tuple(f.dtype for f in FP8_FORMATS)
_BY_DTYPE = {f.dtype: f for f in FORMATS.values()}


def format_of(dtype: torch.dtype) -> Format:
    """The format whose elements have ``dtype``; raises TypeError for a dtype that stores none of ours."""
    if dtype not in _BY_DTYPE:
        known = ", ".join(str(d) for d in _BY_DTYPE)
        raise TypeError(f"a payload's dtype must be one of {known}, got {dtype}; cast the tensor first")
    return _BY_DTYPE[dtype]


def check_same_kind(a: torch.dtype, b: torch.dtype) -> None:
    """Raises ValueError where one dtype is an OCP FP8 format and the other a fnuz one: a byte of one is another number
    in the other."""
    fnuz = {format.dtype for format in FNUZ.values()}
    if a in FP8_DTYPES and b in FP8_DTYPES and (a in fnuz) != (b in fnuz):
        raise ValueError(
            f"OCP and fnuz FP8 formats are not mixed, got {a} with {b}; store both as one kind, for example with "
            "policy.fnuz() for a device that multiplies the fnuz formats"
        )


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor seen as a matrix of its last dim."""
    if len(shape) == 0:
        return 1, 1
    return math.prod(shape[:-1]), shape[-1]


def block_extent(shape: torch.Size | tuple[int, ...], block: Block) -> tuple[int, int]:
    """Rows and columns of one full block of a tensor of this shape: ``block`` with -1 filled in, at least (1, 1)."""
    rows, columns = matrix_shape(shape)
    return max(1, rows if block[0] == -1 else block[0]), max(1, columns if block[1] == -1 else block[1])


def grid_shape(shape: torch.Size | tuple[int, ...], block: Block) -> tuple[int, int]:
    """Shape of the tensor of scales: one FP32 scale per block, the last blocks of a dim may be ragged."""
    rows, columns = matrix_shape(shape)
    block_rows, block_columns = block_extent(shape, block)
    return max(1, -(-rows // block_rows)), max(1, -(-columns // block_columns))


def check_block(block: Block) -> None:
    """Raises ValueError unless ``block`` is two sizes, each positive or -1."""
    if len(block) != 2 or any(not isinstance(size, int) or (size < 1 and size != -1) for size in block):
        raise ValueError(
            f"a block is two sizes, each positive or -1 for the whole dim, got {block}; for example (1, 128)"
        )
