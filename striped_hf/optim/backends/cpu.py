"""The CPU backend: hands the entries of a param group to the C code in ``csrc``.

It agrees with ``reference.py`` up to the last places of float32 (``csrc/cpu.c`` says where). Its
threads are torch's (``torch.set_num_threads``), and its bits do not depend on their number.

Its import raises ImportError if the C code was not built.
"""

import ctypes
import importlib.util
from array import array
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor

from striped_hf.optim.backends import reference
from striped_hf.optim.interface import LOW_BITS, Blocks, Entry, Folded, Known, Roots, Settings, Sums

DEVICE_TYPES = ("cpu",)
CAPTURABLE = False

# the C code's enum, by the Python names of dtypes and momentum formats
_FORMATS: dict[torch.dtype | str, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMATS |= {"float32": 0, "bfloat16": 1, "int8": 3, "int4": 4}


class _Settings(ctypes.Structure):
    """The C code's struct of this name: the fields of ``interface.Settings``, 64 bits each."""

    _fields_ = tuple(
        (field.name, ctypes.c_int64 if field.type is bool else ctypes.c_double)
        for field in fields(Settings)
    )


class _Fold(ctypes.Structure):
    """The C code's struct of this name."""

    _fields_ = (("is_first", ctypes.c_int64), ("coefficient", ctypes.c_double))


def _find() -> str:
    spec = importlib.util.find_spec("striped_hf.optim.backends._cpu")
    if spec is None or spec.origin is None:
        raise ImportError("it was not built: install striped_hf where a C compiler has OpenMP")
    return spec.origin


def _load(path: str) -> ctypes.CDLL:
    try:
        # torch's own OpenMP is loaded already, so the library uses it and its threads
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(f"its library does not load: {error}") from error
    arguments = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
    for name in ("statistics", "update", "step", "step_folded"):
        getattr(library, f"striped_{name}").argtypes = arguments
    library.striped_fold.argtypes = (*arguments, ctypes.c_void_p)
    return library


_library = _load(_find())


def statistics(entries: list[Entry]) -> list[Sums | None]:
    """Sums the squares of every gradient by row and by column; as ``reference.statistics``."""
    sums: list[Sums | None] = [None] * len(entries)
    supported, fallback = _split(entries)
    matrices = [i for i in supported if entries[i].param.dim() >= 2]
    for i in matrices:
        *leading, rows, columns = entries[i].param.shape
        row_blocks, column_blocks = entries[i].blocks
        sums[i] = (
            torch.empty((*leading, rows, column_blocks), dtype=torch.float32, device="cpu"),
            torch.empty((*leading, row_blocks, columns), dtype=torch.float32, device="cpu"),
        )
    _call(_library.striped_statistics, [(entries[i], sums[i], None) for i in matrices], None)
    found = reference.statistics([entries[i] for i in fallback])
    for i, of_entry in zip(fallback, found, strict=True):
        sums[i] = of_entry
    return sums


def update(entries: list[Entry], roots: list[Roots | None], settings: Settings) -> None:
    """Updates momentum and parameters, and vectors' second moments; as ``reference.update``."""
    supported, fallback = _split(entries)
    _call(_library.striped_update, [(entries[i], None, roots[i]) for i in supported], settings)
    reference.update([entries[i] for i in fallback], [roots[i] for i in fallback], settings)


def step(entries: list[Entry], settings: Settings, known: Known | None = None) -> None:
    """Performs ``reference.step``, and reads most gradients from memory only once."""
    supported, fallback = _split(entries)
    _call(_library.striped_step, [(entries[i], None, None) for i in supported], settings)
    reference.step([entries[i] for i in fallback], settings)


def step_known(known: Known, steps: list[int], settings: Settings) -> bool:
    """Does nothing; this backend needs the entries."""
    return False


def fold(
    entry: Entry, folded: Folded, settings: Settings, is_first: bool, coefficient: Tensor | None
) -> None:
    """Adds a gradient to the momentum, sums and sketch; as ``reference.fold``."""
    grad = entry.gradient.contiguous()
    entry = entry._replace(param=grad, grad=grad)  # only the parameter's shape counts
    supported, _ = _split([entry])
    if not supported or not (folded.sketch is None or folded.sketch.is_contiguous()):
        reference.fold(entry, folded, settings, is_first, coefficient)
        return
    sums = (torch.empty_like(folded.row_sums), torch.empty_like(folded.col_sums))
    c_fold = _Fold(is_first, 1.0 if coefficient is None else coefficient.item())
    _call(_library.striped_fold, [(entry, sums, None)], settings, c_fold, folded.sketch)
    square = c_fold.coefficient**2
    folded.row_sums.add_(sums[0], alpha=square)
    folded.col_sums.add_(sums[1], alpha=square)


def step_folded(entries: list[Entry], sums: list[Sums], settings: Settings) -> None:
    """Updates whole matrices whose gradients were folded; as ``reference.step_folded``."""
    supported, fallback = _split(entries)
    arguments: list[tuple[Entry, Sums | None, Roots | None]] = []
    for i in supported:
        row, col = (part.clone(memory_format=torch.contiguous_format) for part in sums[i])
        arguments.append((entries[i], (row, col), (row, col)))  # the roots replace the sums
    _call(_library.striped_step_folded, arguments, settings)
    reference.step_folded([entries[i] for i in fallback], [sums[i] for i in fallback], settings)


def _split(entries: list[Entry]) -> tuple[list[int], list[int]]:
    """Returns the positions of the entries that the C code steps, and of the other entries.

    The other entries, such as transposed parameters and strided views, fall back to the reference.
    So do entries at addresses that are no multiple of an element's size, because a processor may
    refuse such an address.
    """
    supported: list[int] = []
    fallback: list[int] = []
    for i, entry in enumerate(entries):
        tensors = (entry.param, *entry.state.values())
        is_walked = all(map(Tensor.is_contiguous, tensors)) and _are_aligned(tensors)
        (supported if is_walked else fallback).append(i)
    return supported, fallback


def _are_aligned(tensors: Iterable[Tensor]) -> bool:
    # most addresses are multiples of 4, so that most calls need not compute the sizes
    if not any(address & 3 for address in map(Tensor.data_ptr, tensors)):
        return True
    return not any(tensor.data_ptr() % tensor.itemsize for tensor in tensors)


def _call(
    function: Callable[..., int],
    entries: list[tuple[Entry, Sums | None, Roots | None]],
    settings: Settings | None,
    c_fold: "_Fold | None" = None,
    sketch: Tensor | None = None,
) -> None:
    """Calls a C function with these entries, each with its sums or its roots.

    Args:
        function: The C function.
        entries: Entries, sums and roots.
        settings: The param group's settings.
        c_fold: The last argument of ``striped_fold``.
        sketch: The sketch of the only entry.

    Raises:
        MemoryError: There is no memory for the partial sums. Parameters and state are unchanged
            then, except that the step is counted.
    """
    if not entries:
        return
    # copies must live until the call returns
    grads = [None if e.grad is None else e.grad.contiguous() for e, *_ in entries]
    given = [grad for grad in grads if grad is not None]
    if not _are_aligned(given):
        grads = [g if g is None or _are_aligned([g]) else g.clone() for g in grads]
    values: list[int] = []
    for (entry, sums, roots), grad in zip(entries, grads, strict=True):
        values += _c_entry(entry, grad, sums, roots, sketch)
    packed = array("q", values)
    address, _ = packed.buffer_info()
    c_settings = settings and ctypes.byref(
        _Settings(*(getattr(settings, field[0]) for field in _Settings._fields_))
    )
    last = () if c_fold is None else (ctypes.byref(c_fold),)
    if function(address, len(entries), c_settings, torch.get_num_threads(), *last):
        raise MemoryError("the CPU backend found no memory for its partial sums")


def _c_entry(
    entry: Entry,
    grad: Tensor | None,
    sums: Sums | None,
    roots: Roots | None,
    sketch: Tensor | None,
) -> tuple[int, ...]:
    """Returns the C code's Entry, field by field."""
    param, _, state, momentum_dtype, blocks, step, whole_start, whole_stride = entry
    find = state.get
    scale, col, low = find("exp_avg_scale"), find("exp_avg_sq_col"), find(LOW_BITS)
    row = find("exp_avg_sq_row") if param.dim() >= 2 else find("exp_avg_sq")
    grad_dtype = param.dtype if grad is None else grad.dtype
    geometry, kinds = _constants(param.shape, blocks, param.dtype, grad_dtype, momentum_dtype)
    return (
        param.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        state["exp_avg"].data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if row is None else row.data_ptr(),  # a part of a sharded matrix has no stripes
        0 if col is None else col.data_ptr(),
        0 if low is None else low.data_ptr(),
        *((0, 0) if sums is None else (sums[0].data_ptr(), sums[1].data_ptr())),
        *((0, 0) if roots is None else (roots[0].data_ptr(), roots[1].data_ptr())),
        0 if sketch is None else sketch.data_ptr(),
        *geometry,
        whole_start,
        whole_stride or geometry[2],
        *kinds,
        step,
    )


@cache
def _constants(
    shape: torch.Size,
    blocks: Blocks,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    momentum_dtype: str,
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Returns the C code's bands, band_rows, columns, column_blocks; is_matrix and the formats."""
    kinds = _FORMATS[param_dtype], _FORMATS[grad_dtype], _FORMATS[momentum_dtype]
    if len(shape) < 2:
        return (1, 1, shape.numel(), 1), (0, *kinds)
    *matrices, rows, columns = shape
    row_blocks, column_blocks = blocks
    bands = torch.Size(matrices).numel() * row_blocks
    return (bands, rows // row_blocks, columns, column_blocks), (1, *kinds)
