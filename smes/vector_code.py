"""Products of small matrices for compiled loops, written as vector instructions. Imports no torch.

A loop that LLVM vectorises by itself keeps the sums of a product in memory. These keep a tile of them in registers,
:data:`ROWS` rows by up to four vectors, and so reach the machine's rate with a few rows, where a library's call does
not pay (docs/adr/0053-experts-as-compiled-loops.md). Everything is float32. Addresses are integers, in bytes; steps
between rows and columns are in elements. Every width is a multiple of 8 (:data:`smes.ranges.Width`).

Letters: M rows, N columns and K terms of a product.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16 if get_host_cpu_features().get("avx512f") else 8
"""float32 numbers of a vector; 8 are two registers on a machine whose vectors have four."""

ROWS = 4
"""Rows of a tile."""

_MOST_VECTORS = 4 if LANES == 16 else 2  # of a row of a tile: machines with shorter vectors have half as many registers
_FLOAT, _INT, _BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_SIZE = 4

# Terms may be added in any order, and multiplied and added in one instruction; NaN and infinity stay what they are.
SUMS = {"contract", "reassoc", "nsz"}
FUSED = {"contract"}


@intrinsic
def floats(typing_context: Any, address: Any) -> Any:
    """A pointer to the float32 at an address."""
    return _pointer(types.float32, address)


@intrinsic
def integers(typing_context: Any, address: Any) -> Any:
    """A pointer to the int64 at an address."""
    return _pointer(types.int64, address)


@intrinsic
def short_integers(typing_context: Any, address: Any) -> Any:
    """A pointer to the int32 at an address."""
    return _pointer(types.int32, address)


def _pointer(kind: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind)(types.int64), generate


@intrinsic
def take_number(typing_context: Any, address: Any) -> Any:
    """The int64 at an address, which is one more afterwards: no two threads take the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _INT.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_INT, 1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def power_of_two(typing_context: Any, exponent: Any) -> Any:
    """2 to a whole float32 between −126 and 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = builder.fptosi(arguments[0], _BYTE)
        biased = builder.add(whole, ir.Constant(_BYTE, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_BYTE, 23)), _FLOAT)

    return types.float32(types.float32), generate


def _tile(rows: int, vectors: int, lanes: int) -> Any:
    """An intrinsic that multiplies one tile: ``rows`` × (``vectors`` · ``lanes``) of the result.

    Its arguments are those of :func:`product` without M and N.
    """
    vector = ir.VectorType(_FLOAT, lanes)
    undefined, zero = ir.Constant(vector, ir.Undefined), ir.Constant(vector, [0.0] * lanes)
    first = ir.Constant(ir.VectorType(_BYTE, lanes), [0] * lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        c, c_step, a, a_row, a_term, b, b_step, terms, add = arguments
        fused = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{lanes}f32"
        )

        def bytes_of(elements: Any) -> Any:
            return builder.mul(elements, ir.Constant(_INT, _SIZE))

        def vector_at(address: Any, number: int) -> Any:
            place = builder.add(address, ir.Constant(_INT, _SIZE * lanes * number))
            return builder.inttoptr(place, vector.as_pointer())

        def everywhere(address: Any) -> Any:
            value = builder.load(builder.inttoptr(address, _FLOAT.as_pointer()), align=_SIZE)
            return builder.shuffle_vector(
                builder.insert_element(undefined, value, ir.Constant(_BYTE, 0)), undefined, first
            )

        places = [(r, v) for r in range(rows) for v in range(vectors)]
        c_step, a_row, a_term, b_step = (bytes_of(step) for step in (c_step, a_row, a_term, b_step))
        of_rows = [c]
        for _ in range(rows - 1):
            of_rows.append(builder.add(of_rows[-1], c_step))
        with builder.if_else(builder.icmp_signed("!=", add, ir.Constant(_INT, 0))) as (then, otherwise):
            with then:
                before = [builder.load(vector_at(of_rows[r], v), align=_SIZE) for r, v in places]
                loaded = builder.block
            with otherwise:
                empty = builder.block
        starts = []
        for value in before:
            start = builder.phi(vector)
            start.add_incoming(value, loaded)
            start.add_incoming(zero, empty)
            starts.append(start)
        entry = builder.block
        head, body, done = (builder.append_basic_block(name) for name in ("terms", "term", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        k, a_k, b_k = (builder.phi(_INT) for _ in range(3))
        for phi, value in ((k, ir.Constant(_INT, 0)), (a_k, a), (b_k, b)):
            phi.add_incoming(value, entry)
        sums = [builder.phi(vector) for _ in places]
        for phi, start in zip(sums, starts, strict=True):
            phi.add_incoming(start, entry)
        builder.cbranch(builder.icmp_signed("<", k, terms), body, done)
        builder.position_at_end(body)
        of_b = [builder.load(vector_at(b_k, v), align=_SIZE) for v in range(vectors)]
        a_rk = a_k
        for r in range(rows):
            value = everywhere(a_rk)
            for v in range(vectors):
                phi = sums[r * vectors + v]
                phi.add_incoming(builder.call(fused, [value, of_b[v], phi]), body)
            if r + 1 < rows:
                a_rk = builder.add(a_rk, a_row)
        k.add_incoming(builder.add(k, ir.Constant(_INT, 1)), body)
        a_k.add_incoming(builder.add(a_k, a_term), body)
        b_k.add_incoming(builder.add(b_k, b_step), body)
        builder.branch(head)
        builder.position_at_end(done)
        for (r, v), value in zip(places, sums, strict=True):
            builder.store(value, vector_at(of_rows[r], v), align=_SIZE)
        return context.get_dummy_value()

    def tile(typing_context: Any, c: Any, c_step: Any, a: Any, a_row: Any, a_term: Any, b: Any, b_step: Any,
             terms: Any, add: Any) -> Any:  # fmt: skip
        return types.void(*[types.int64] * 9), generate

    return intrinsic(tile)


def _columns(vectors: int, lanes: int) -> Any:
    """A compiled loop over the tiles of ``vectors`` · ``lanes`` columns; its arguments are those of :func:`product`."""
    tile, row = _tile(ROWS, vectors, lanes), _tile(1, vectors, lanes)
    rows = ROWS

    def columns(c, c_step, a, a_row, a_term, b, b_step, M, K, add):  # type: ignore[no-untyped-def]  # numba infers them
        m = 0
        while m + rows <= M:
            tile(c + 4 * m * c_step, c_step, a + 4 * m * a_row, a_row, a_term, b, b_step, K, add)
            m += rows
        while m < M:
            row(c + 4 * m * c_step, c_step, a + 4 * m * a_row, a_row, a_term, b, b_step, K, add)
            m += 1

    return njit(columns)


_widest, _two, _one, _half = _columns(_MOST_VECTORS, LANES), _columns(2, LANES), _columns(1, LANES), _columns(1, 8)
_WIDEST = _MOST_VECTORS * LANES


def _product(  # type: ignore[no-untyped-def]  # numba infers the types
    c, c_step, a, a_row, a_term, b, b_step, M, N, K, add
):  # pragma: no cover - compiled
    n = 0
    while N - n >= _WIDEST:
        _widest(c + 4 * n, c_step, a, a_row, a_term, b + 4 * n, b_step, M, K, add)
        n += _WIDEST
    while N - n >= 2 * LANES:
        _two(c + 4 * n, c_step, a, a_row, a_term, b + 4 * n, b_step, M, K, add)
        n += 2 * LANES
    while N - n >= LANES:
        _one(c + 4 * n, c_step, a, a_row, a_term, b + 4 * n, b_step, M, K, add)
        n += LANES
    while N - n >= 8:
        _half(c + 4 * n, c_step, a, a_row, a_term, b + 4 * n, b_step, M, K, add)
        n += 8


@cache
def product_kernel() -> Any:
    """What :func:`product` calls, compiled once for all loops: its ``address`` is their first argument of it."""
    return cfunc(types.void(*[types.int64] * 11), cache=True)(_product)


@intrinsic
def product(
    typing_context: Any, kernel: Any, c: Any, c_step: Any, a: Any, a_row: Any, a_term: Any, b: Any, b_step: Any,
    M: Any, N: Any, K: Any, add: Any,
) -> Any:  # fmt: skip
    """``C = A B``, or ``C += A B``, of float32 [M, K] and [K, N].

    Args:
        typing_context: Numba's own.
        kernel: Address of :func:`product_kernel`.
        c: Address of C; its rows are N neighbouring numbers, ``c_step`` apart.
        c_step: As said.
        a: Address of A. Rows are ``a_row`` apart, the terms of a row ``a_term``: either way round.
        a_row: As said.
        a_term: As said.
        b: Address of B; its rows are N neighbouring numbers, ``b_step`` apart.
        b_step: As said.
        M: Rows.
        N: Columns, a multiple of 8.
        K: Terms.
        add: 0 or 1: whether C is added to.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_INT] * 11)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12), generate


@intrinsic
def _transpose_block(typing_context: Any, c: Any, c_step: Any, a: Any, a_step: Any) -> Any:
    """Transpose 8 × 8 numbers."""
    vector = ir.VectorType(_FLOAT, 8)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        c, c_step, a, a_step = arguments

        def row(address: Any, step: Any, number: int) -> Any:
            place = builder.add(address, builder.mul(step, ir.Constant(_INT, _SIZE * number)))
            return builder.inttoptr(place, vector.as_pointer())

        rows = [builder.load(row(a, a_step, r), align=_SIZE) for r in range(8)]
        for distance in (4, 2, 1):  # exchange the upper right with the lower left quarter, within ever smaller blocks
            swapped = list(rows)
            for r in range(8):
                if r & distance:
                    continue
                low = [c if not c & distance else 8 + c - distance for c in range(8)]
                high = [c + distance if not c & distance else 8 + c for c in range(8)]
                for target, places in ((r, low), (r + distance, high)):
                    mask = ir.Constant(ir.VectorType(_BYTE, 8), places)
                    swapped[target] = builder.shuffle_vector(rows[r], rows[r + distance], mask)
            rows = swapped
        for r in range(8):
            builder.store(rows[r], row(c, c_step, r), align=_SIZE)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@njit
def transpose(c, a, M, N):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """Write float32 [M, N] at address ``a`` as [N, M] to address ``c``; M and N are multiples of 8."""
    for m in range(0, M, 8):
        for n in range(0, N, 8):
            _transpose_block(c + 4 * (n * M + m), M, a + 4 * (m * N + n), N)


_LOG2_E = np.float32(1.4426950408889634)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C2, _C3, _C4, _C5, _C6, _C7 = (
    np.float32(c)
    for c in (5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4)
)
_MOST, _HALF_1, _ONE = np.float32(87.0), np.float32(0.5), np.float32(1.0)


@njit(fastmath=FUSED, error_model="numpy")
def exponential(x):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """``exp(x)`` to a few units of the last place, for x from −87 to 87; beyond as there, of NaN any number.

    LLVM vectorises a loop over it. Source of the polynomial: Cephes, expf.c.
    """
    y = x if x < _MOST else _MOST
    y = y if y > -_MOST else -_MOST
    n = np.floor(y * _LOG2_E + _HALF_1)
    f = (y - n * _LN_2_HIGH) - n * _LN_2_LOW
    p = ((((_C7 * f + _C6) * f + _C5) * f + _C4) * f + _C3) * f + _C2
    return (p * f * f + f + _ONE) * power_of_two(n)


@njit(fastmath=FUSED, error_model="numpy")
def sigmoid(x):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """``1 / (1 + exp(−x))`` to a few units of the last place; of NaN any number. LLVM vectorises a loop over it."""
    return _ONE / (_ONE + exponential(-x))
