"""The CPU backend: hands tables of tensors to ``cpu.c``, which has the arithmetic.

It agrees with ``reference.py`` up to the last places of float32 (``cpu.c`` says where). Its threads
are torch's (``torch.set_num_threads``), and its bits do not depend on their number.

Importing it raises ImportError where it was not built.
"""

import ctypes
import importlib.util
from array import array
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from striped_hf.optim.backends import reference
from striped_hf.optim.backends.reference import Entry, Roots, Settings, Sums

DEVICE_TYPES = ("cpu",)

# cpu.c's enum, by the names that dtypes and momentum formats have here
_FORMATS: dict[torch.dtype | str, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMATS |= {"float32": 0, "bfloat16": 1, "int8": 3, "int4": 4}


_SWITCHES = ("maximize", "nesterov", "stochastic_rounding", "lagged")


class _Settings(ctypes.Structure):
    """cpu.c's struct of this name."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        *((name, ctypes.c_int64) for name in _SWITCHES),
    )


def _find() -> str:
    spec = importlib.util.find_spec("striped_hf.optim.backends._cpu")
    if spec is None or spec.origin is None:
        raise ImportError("it was not built: install striped_hf where a C compiler has OpenMP")
    return spec.origin


def _load(path: str) -> ctypes.CDLL:
    try:
        # torch's own OpenMP is loaded already, so the library takes that one and its threads
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(f"its library does not load: {error}") from error
    for function in (library.striped_statistics, library.striped_update, library.striped_step):
        function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
    return library


_library = _load(_find())


def statistics(table: list[Entry]) -> list[Sums | None]:
    """Sums the squares of every gradient by row and by column; as ``reference.statistics``."""
    sums: list[Sums | None] = [None] * len(table)
    own, others = _split(table)
    own = [i for i in own if table[i].param.dim() >= 2]
    for i in own:
        *matrices, rows, columns = table[i].param.shape
        row_blocks, col_blocks = table[i].blocks
        sums[i] = (
            torch.empty((*matrices, rows, col_blocks), dtype=torch.float32, device="cpu"),
            torch.empty((*matrices, row_blocks, columns), dtype=torch.float32, device="cpu"),
        )
    _call(_library.striped_statistics, [(table[i], sums[i], None) for i in own], None)
    for i, other in zip(others, reference.statistics([table[i] for i in others]), strict=True):
        sums[i] = other
    return sums


def update(table: list[Entry], roots: list[Roots | None], settings: Settings) -> None:
    """Updates momentum and parameters, and vectors' second moments; as ``reference.update``."""
    own, others = _split(table)
    _call(_library.striped_update, [(table[i], None, roots[i]) for i in own], settings)
    reference.update([table[i] for i in others], [roots[i] for i in others], settings)


def step(table: list[Entry], settings: Settings) -> None:
    """As ``reference.step``, and reads most gradients from memory only once."""
    own, others = _split(table)
    _call(_library.striped_step, [(table[i], None, None) for i in own], settings)
    reference.step([table[i] for i in others], settings)


def _split(table: list[Entry]) -> tuple[list[int], list[int]]:
    """Returns the positions of the entries that lie in memory as cpu.c walks it, and the others.

    The others, such as parameters that are transposed or strided views, are the reference's.
    """
    own: list[int] = []
    others: list[int] = []
    for i, entry in enumerate(table):
        plain = entry.param.is_contiguous() and all(map(Tensor.is_contiguous, entry.state.values()))
        (own if plain else others).append(i)
    return own, others


def _call(
    function: Callable[..., int],
    entries: list[tuple[Entry, Sums | None, Roots | None]],
    settings: Settings | None,
) -> None:
    """Calls cpu.c with a table of these entries, each with its sums or its roots.

    Raises:
        MemoryError: There is none for its partial sums. Parameters and state are unchanged then,
            but for the counted step.
    """
    if not entries:
        return
    grads = [entry.grad.contiguous() for entry, *_ in entries]  # copies must live through the call
    fields: list[int] = []
    for (entry, sums, roots), grad in zip(entries, grads, strict=True):
        fields += _fields(entry, grad, sums, roots)
    packed = array("q", fields)
    address, _ = packed.buffer_info()
    c_settings = settings and ctypes.byref(
        _Settings(*(getattr(settings, field[0]) for field in _Settings._fields_))
    )
    if function(address, len(entries), c_settings, torch.get_num_threads()):
        raise MemoryError("the CPU backend found no memory for its partial sums")


def _fields(entry: Entry, grad: Tensor, sums: Sums | None, roots: Roots | None) -> tuple[int, ...]:
    """Returns cpu.c's Tensor, field by field."""
    param, _, state, momentum_dtype, blocks, step, start, pitch = entry
    find = state.get
    scale, col = find("exp_avg_scale"), find("exp_avg_sq_col")
    row = find("exp_avg_sq_row") if param.dim() >= 2 else find("exp_avg_sq")
    layout, kinds = _constants(param.shape, blocks, param.dtype, grad.dtype, momentum_dtype)
    return (
        param.data_ptr(),
        grad.data_ptr(),
        state["exp_avg"].data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if row is None else row.data_ptr(),  # a part of a sharded matrix has no stripes
        0 if col is None else col.data_ptr(),
        *((0, 0) if sums is None else (sums[0].data_ptr(), sums[1].data_ptr())),
        *((0, 0) if roots is None else (roots[0].data_ptr(), roots[1].data_ptr())),
        *layout,
        start,
        pitch or layout[2],
        *kinds,
        step,
    )


@cache
def _constants(
    shape: torch.Size,
    blocks: tuple[int, int],
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    momentum_dtype: str,
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Returns cpu.c's bands, height, columns and col_blocks, is_matrix and the three formats."""
    kinds = _FORMATS[param_dtype], _FORMATS[grad_dtype], _FORMATS[momentum_dtype]
    if len(shape) < 2:
        return (1, 1, shape.numel(), 1), (0, *kinds)
    *matrices, rows, columns = shape
    row_blocks, col_blocks = blocks
    bands = torch.Size(matrices).numel() * row_blocks
    return (bands, rows // row_blocks, columns, col_blocks), (1, *kinds)
