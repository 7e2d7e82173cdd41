"""The storage formats of the momentum: float32, bfloat16, and block-wise codes of 8 or 4 bits.

The integer formats divide the last dimension into blocks of ``BLOCK_SIZE`` elements and store one
float32 scale per block, its largest magnitude. The last block of a row may be shorter. No block
crosses a row, so a parameter that is sharded by rows is sharded between blocks. The block-wise
scales come from Dettmers et al., "8-bit Optimizers via Block-wise Quantization"
(https://arxiv.org/abs/2110.02861). A square root replaces their table of codes, and gives small
magnitudes more codes:

    code    = round(sign(x) * sqrt(|x| / scale) * qmax)
    decoded = scale * sign(code) * (code / qmax)^2

Two 4-bit codes share a byte, each plus 8. Byte ``k`` of a block of ``n`` elements holds element
``k`` in its low nibble and element ``k + ceil(n / 2)`` in its high nibble, so that both halves of a
block are read and written as contiguous vectors.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK_SIZE = 128
QMAX = {"int8": 127, "int4": 7}
MOMENTUM_DTYPES = ("float32", "bfloat16", "int8", "int4")


def storage_format(shape: torch.Size, momentum_dtype: str) -> str:
    """Returns the format in which the momentum of one parameter is kept.

    It is float32 for 0-D and 1-D parameters, and for a matrix whose codes and scales would need at
    least as many bytes as float32.

    Args:
        shape: The parameter's shape.
        momentum_dtype: The format that the param group asks for, one of ``MOMENTUM_DTYPES``.
    """
    if len(shape) < 2 or shape.numel() == 0:
        return "float32"
    if momentum_dtype in QMAX and coded_bytes(shape[-1], momentum_dtype) >= 4 * shape[-1]:
        return "float32"
    return momentum_dtype


def coded_bytes(columns: int, momentum_dtype: str) -> int:
    """Returns the bytes of the codes and scales of a row of ``columns`` elements."""
    return code_columns(columns, momentum_dtype) + 4 * scale_columns(columns)


def code_columns(columns: int, momentum_dtype: str) -> int:
    """Returns the number of stored elements for the codes of a row of ``columns`` elements."""
    # whole blocks are even, so packing in pairs rounds up once, in the last block
    return math.ceil(columns / 2) if momentum_dtype == "int4" else columns


def scale_columns(columns: int) -> int:
    """Returns the number of blocks, and so of scales, of a row of ``columns`` elements."""
    return math.ceil(columns / BLOCK_SIZE)


def init(shape: torch.Size, momentum_dtype: str, device: torch.device) -> dict[str, Tensor]:
    """Returns a zero momentum as state entries.

    Args:
        shape: The parameter's shape, [..., R, C] or [n] or [].
        momentum_dtype: The format that ``storage_format`` chose.
        device: Where to allocate.

    Returns:
        ``exp_avg``: [..., R, C] float32, bfloat16 or int8, or [..., R, ceil(C / 2)] uint8 (int4);
        and for the integer formats ``exp_avg_scale``: [..., R, ceil(C / 128)] float32.
    """
    if momentum_dtype not in QMAX:
        return {"exp_avg": torch.zeros(shape, dtype=getattr(torch, momentum_dtype), device=device)}
    *rows, columns = shape
    packed = torch.uint8 if momentum_dtype == "int4" else torch.int8
    codes = torch.zeros(*rows, code_columns(columns, momentum_dtype), dtype=packed, device=device)
    if momentum_dtype == "int4":
        codes.copy_(_pack(torch.zeros(columns, dtype=torch.int8, device=device)))
    scale = torch.zeros(*rows, scale_columns(columns), dtype=torch.float32, device=device)
    return {"exp_avg": codes, "exp_avg_scale": scale}


def encode(values: Tensor, momentum_dtype: str) -> tuple[Tensor, Tensor | None]:
    """Encodes a momentum for storage.

    Args:
        values: [..., C] float32.
        momentum_dtype: One of ``MOMENTUM_DTYPES``.

    Returns:
        The stored momentum and its scales (None for the floating formats), with the shapes of
        ``init``. Inf or NaN in a block makes its scale, and so its decoded values, non-finite.
    """
    if momentum_dtype not in QMAX:
        return values.to(getattr(torch, momentum_dtype)), None
    columns = values.shape[-1]
    blocks = in_blocks(values)
    scale = blocks.abs().amax(-1)
    magnitude = blocks.abs().div_(scale.unsqueeze(-1)).sqrt_().mul_(QMAX[momentum_dtype])
    # a block of zeros gives 0/0, and a block with an Inf gives Inf/Inf; neither has a code
    codes = magnitude.round_().nan_to_num_(0.0).copysign_(blocks).to(torch.int8)
    codes = codes.flatten(-2)[..., :columns]
    return (_pack(codes) if momentum_dtype == "int4" else codes), scale


def decode(codes: Tensor, scale: Tensor | None, momentum_dtype: str, columns: int) -> Tensor:
    """Decodes a stored momentum; the inverse of ``encode`` up to the rounding of the codes.

    Args:
        codes: [..., C], or [..., ceil(C / 2)] for int4.
        scale: [..., ceil(C / 128)] float32, or None where the format has none.
        momentum_dtype: One of ``MOMENTUM_DTYPES``.
        columns: C.

    Returns:
        [..., C] float32; ``codes`` itself if it is float32.
    """
    if scale is None:
        return codes.float()
    values = (_unpack(codes, columns) if momentum_dtype == "int4" else codes).float()
    values = in_blocks(values).div_(QMAX[momentum_dtype])
    values = values.mul_(values.abs()).mul_(scale.unsqueeze(-1))
    return values.flatten(-2)[..., :columns]


def in_blocks(values: Tensor) -> Tensor:
    """Views [..., C] as [..., ceil(C / 128), 128]; pads a last, shorter block with zeros.

    A row shorter than a block becomes [..., 1, C], without padding: padded rows of 2 elements would
    need 64 times the memory.
    """
    if values.shape[-1] <= BLOCK_SIZE:
        return values.unsqueeze(-2)
    missing = -values.shape[-1] % BLOCK_SIZE
    # F.pad copies even if there is nothing to add
    padded = pad(values, (0, missing)) if missing else values
    return padded.unflatten(-1, (-1, BLOCK_SIZE))


def _pack(codes: Tensor) -> Tensor:
    """Packs [..., C] int8 codes in [-7, 7] into [..., ceil(C / 2)] uint8."""
    nibbles = (codes + 8).to(torch.uint8)
    whole = nibbles.shape[-1] // BLOCK_SIZE * BLOCK_SIZE
    blocks = nibbles[..., :whole].unflatten(-1, (-1, 2, BLOCK_SIZE // 2))
    packed = (blocks[..., 0, :] | blocks[..., 1, :] << 4).flatten(-2)
    last = nibbles[..., whole:]
    half = math.ceil(last.shape[-1] / 2)
    low, high = last[..., :half], pad(last[..., half:], (0, last.shape[-1] % 2))
    return torch.cat((packed, low | high << 4), dim=-1)


def _unpack(packed: Tensor, columns: int) -> Tensor:
    """Unpacks [..., ceil(C / 2)] uint8 into [..., C] int8 codes in [-7, 7]."""
    nibbles = torch.stack((packed & 15, packed >> 4)).to(torch.int8) - 8
    whole = columns // BLOCK_SIZE * BLOCK_SIZE // 2
    low, high = nibbles[..., :whole].unflatten(-1, (-1, BLOCK_SIZE // 2))
    blocks = torch.stack((low, high), dim=-2).flatten(-3)
    last = nibbles[..., whole:].movedim(0, -2).flatten(-2)
    return torch.cat((blocks, last[..., : columns % BLOCK_SIZE]), dim=-1)
