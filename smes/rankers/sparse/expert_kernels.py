"""The compiled loops behind :mod:`smes.rankers.sparse.host_experts`, without torch as the routing's.

Each is a function of one address, that of its arguments (int64, listed at each), so that several threads can run it at
the same time (:mod:`smes.team`). They take parts of the work from a common counter, the first argument. A part is a
share of the experts, the same whoever takes it, and adds to sums of its own: results depend on the number of parts, not
on the threads.

Letters as in :mod:`smes.rankers.sparse.experts`; D and H are the width of a layer's input and output.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from smes.vector_code import (
    FUSED,
    SUMS,
    floats,
    integers,
    product,
    product_kernel,
    short_integers,
    sigmoid,
    take_number,
    transpose,
)

BLOCK = 32
"""Rows of an expert that are multiplied before the next are read: they stay in the nearest cache."""

LINEAR, PLAIN, LAYER, RMS = range(4)
"""What follows the product: nothing, SiLU, or SiLU of a norm."""

_ZERO, _ONE, _EPSILON = np.float32(0), np.float32(1), np.float32(1e-5)


@njit(fastmath=SUMS, error_model="numpy")
def _moments(y_H, kind):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """Mean and inverse deviation that a norm takes; 0 and 1 without."""
    mean, scale, width = _ZERO, _ONE, np.float32(len(y_H))
    if kind == LAYER:
        for h in range(len(y_H)):
            mean += y_H[h]
        mean /= width
    if kind in (LAYER, RMS):
        square = _ZERO
        for h in range(len(y_H)):
            square += (y_H[h] - mean) * (y_H[h] - mean)
        scale = _ONE / np.sqrt(square / width + _EPSILON)
    return mean, scale


@njit(fastmath=FUSED, error_model="numpy")
def _activate(y, out, count, H, kind):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    if kind == PLAIN:  # one long row
        count, H = 1, count * H
    for n in range(count):
        y_H, out_H = carray(floats(y + 4 * n * H), H), carray(floats(out + 4 * n * H), H)
        mean, scale = _moments(y_H, kind)
        for h in range(H):
            z = (y_H[h] - mean) * scale
            out_H[h] = z * sigmoid(z)


@njit(fastmath=SUMS, error_model="numpy")
def _of_norm(y_H, of_z_H, kind, mean, scale):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Turn the gradient of a normalised row, in place, into that of the row."""
    width = np.float32(len(y_H))
    of_mean, of_scale = _ZERO, _ZERO
    for h in range(len(y_H)):
        of_mean += of_z_H[h]
        of_scale += of_z_H[h] * (y_H[h] - mean)
    of_mean = of_mean / width if kind == LAYER else _ZERO
    of_scale *= scale * scale / width
    for h in range(len(y_H)):
        of_z_H[h] = (of_z_H[h] - of_mean - (y_H[h] - mean) * of_scale) * scale


@njit
def _gather(x, step, D, instance_P, first, count, to):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Copy the rows of some instances, which are ``step`` apart."""
    for n in range(count):
        of_instance = carray(floats(x + 4 * instance_P[first + n] * step), D)
        row = carray(floats(to + 4 * n * D), D)
        for i in range(D):
            row[i] = of_instance[i]


@njit(fastmath=FUSED, error_model="numpy")
def _slopes(y, active, slope, count, H, kind):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Rows activated, and the derivative of SiLU there."""
    if kind == PLAIN:  # one long row
        count, H = 1, count * H
    for n in range(count):
        y_H, active_H = carray(floats(y + 4 * n * H), H), carray(floats(active + 4 * n * H), H)
        slope_H = carray(floats(slope + 4 * n * H), H)
        mean, scale = _moments(y_H, kind)
        for h in range(H):
            z = (y_H[h] - mean) * scale
            s = sigmoid(z)
            active_H[h] = z * s
            slope_H[h] = s * (_ONE + z * (_ONE - s))


@njit(fastmath=SUMS)
def _dot(a, b, H):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    a_H, b_H, total = carray(floats(a), H), carray(floats(b), H), _ZERO
    for h in range(H):
        total += a_H[h] * b_H[h]
    return total


@njit
def _fill(a, count):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    all_of_it = carray(floats(a), count)
    for i in range(count):
        all_of_it[i] = _ZERO


@njit(fastmath=FUSED)
def _add_scaled(weight, a, to, H):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    a_H, to_H = carray(floats(a), H), carray(floats(to), H)
    for h in range(H):
        to_H[h] += weight * a_H[h]


@njit(fastmath=FUSED)
def _scale(weight, a, b, to, H):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    a_H, b_H, to_H = carray(floats(a), H), carray(floats(b), H), carray(floats(to), H)
    for h in range(H):
        to_H[h] = weight * a_H[h] * b_H[h]


@njit(fastmath=FUSED)
def _multiply(by, to, H):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    by_H, to_H = carray(floats(by), H), carray(floats(to), H)
    for h in range(H):
        to_H[h] *= by_H[h]


@njit
def _starts(ends_E, e):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """The first row of an expert."""
    return int(ends_E[e - 1]) if e > 0 else 0


@njit
def _in_part(first, rows, part, parts):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Whether an expert whose rows start at ``first`` belongs to a part; every expert with rows belongs to one."""
    return part * rows <= first * parts < (part + 1) * rows


@njit
def _add_shared(  # type: ignore[no-untyped-def]  # numba infers the types
    row, b, u, slot_BRK, weight_BRK, sums, H
):  # pragma: no cover - compiled
    """Add a row to each sum that reads it."""
    _, R, K = weight_BRK.shape
    for r in range(R):
        for k in range(K):
            if slot_BRK[b, r, k] == u:
                _add_scaled(weight_BRK[b, r, k], row, sums + 4 * (b * R + r) * H, H)


def _layer(address):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """One layer of all experts: ``out[p] = SiLU(Norm(y[p]))``, ``y[p] = base[instance] + x[p or instance] W_e``.

    Or the weighted sums of its rows for each router instead of them, ``Σ_k w[b, r, k] out[row]``; each part, some
    experts, adds its rows to sums of its own.

    Arguments: counter; E; D; H; P; what follows the product; 1 if x is packed, else 0; numbers between rows of x; ends
    of segments (int32 [E]); instance of a row (int64 [P]); x; W [E, D, H]; y [P, H] (or none: it is not kept); out
    [P, H] (rows that no segment covers become 0), or the sums [parts, B, R, H];
    :func:`smes.vector_code.product_kernel`; base (or none); numbers between its rows; parts. For sums: place of a row
    among those of all instances, b·U + u (int64 [P]; none: no sums); B; R; K; U; the place u of each of a router's
    (int64 [B, R, K]; none: r·K + k); w.
    """
    number = carray(integers(address), 25)
    E, D, H, P, kind, gathers = number[1], number[2], number[3], number[4], number[5], number[6] == 0
    ends_E, instance_P = carray(short_integers(number[8]), E), carray(integers(number[9]), P)
    x, base, parts, sums = number[10], number[15], number[17], number[18] != 0
    place_P, shape = carray(integers(number[18]), P), (number[19], number[20], number[21])
    B, R, K, U = number[19], number[20], number[21], number[22]
    slot_BRK, weight_BRK = carray(integers(number[23]), shape), carray(floats(number[24]), shape)
    weight_P = carray(floats(number[24]), P)
    # numba's addresses of arrays are unsigned; without a cast it would make such a number and an int64 a float64.
    rows_D = np.empty((BLOCK, D), np.float32)
    block_H, active_H = np.empty((BLOCK, H), np.float32), np.empty((BLOCK, H), np.float32)
    rows = int(ends_E[E - 1])
    while True:
        part = take_number(address)
        if part >= parts:
            break
        out = number[13]
        if sums:
            out += 4 * part * B * R * H
            _fill(out, B * R * H)
        elif part == 0:
            _fill(out + 4 * rows * H, (P - rows) * H)
        for e in range(E):
            first, end = _starts(ends_E, e), int(ends_E[e])
            if first == end or not _in_part(first, rows, part, parts):
                continue
            while first < end:
                count = min(BLOCK, end - first)
                to = number[12] + 4 * first * H if number[12] != 0 else np.int64(block_H.ctypes.data)
                if kind == LINEAR:
                    to = out + 4 * first * H
                a = x + 4 * first * D
                if gathers:
                    a = np.int64(rows_D.ctypes.data)
                    _gather(x, number[7], D, instance_P, first, count, a)
                if base != 0:
                    _gather(base, number[16], H, instance_P, first, count, to)
                w = number[11] + 4 * e * D * H
                product(number[14], to, H, a, D, 1, w, H, count, H, D, 1 if base != 0 else 0)
                active = np.int64(active_H.ctypes.data) if sums else out + 4 * first * H
                if kind != LINEAR:
                    _activate(to, active, count, H, kind)
                if sums:
                    for n in range(count):
                        b, place, row = instance_P[first + n], place_P[first + n], active + 4 * n * H
                        if number[23] != 0:
                            _add_shared(row, b, place - b * U, slot_BRK, weight_BRK, out, H)
                        else:
                            r = np.uint32(place - b * U) // np.uint32(K)
                            _add_scaled(weight_P[place], row, out + 4 * (b * R + r) * H, H)
                first += count


@njit
def _of_shared(  # type: ignore[no-untyped-def]  # numba infers the types
    of_sums, b, u, slot_BRK, weight_BRK, of_weight_BRK, active, slope, H, to
):  # pragma: no cover - compiled
    """Gradient of a row that several sums may read; and of its weights there."""
    _, R, K = weight_BRK.shape
    _fill(to, H)
    for r in range(R):
        of_sum = of_sums + 4 * (b * R + r) * H
        for k in range(K):
            if slot_BRK[b, r, k] == u:
                of_weight_BRK[b, r, k] = _dot(of_sum, active, H)
                _add_scaled(weight_BRK[b, r, k], of_sum, to, H)
    _multiply(slope, to, H)


def _of_layer(address):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """Gradients of one layer, or of the last one and the sums of its outputs.

    Arguments: counter; E; D; H; P; what follows the product; 1 if x is packed, else 0; numbers between rows of x; ends
    of segments; instance of a row; x; gradient of out [P, H], or of the sums [B, R, H]; W; y; gradients of x, [P, D] if
    it is packed, else [parts, B, D], and of W (either may be none); :func:`smes.vector_code.product_kernel`; gradient
    of base [parts, B, H] (or none); parts; B. For sums: places, R, K, U and w as of :func:`_layer`; gradient of w.
    """
    number = carray(integers(address), 27)
    E, D, H, P, kind, gathers = number[1], number[2], number[3], number[4], number[5], number[6] == 0
    ends_E, instance_P = carray(short_integers(number[8]), E), carray(integers(number[9]), P)
    x, of_w, parts, B = number[10], number[15], number[18], number[19]
    place_P, shape = carray(integers(number[20]), P), (B, number[21], number[22])
    R, K, U = number[21], number[22], number[23]
    slot_BRK = carray(integers(number[24]), shape)
    weight_BRK, of_weight_BRK = carray(floats(number[25]), shape), carray(floats(number[26]), shape)
    weight_P, of_weight_P = carray(floats(number[25]), P), carray(floats(number[26]), P)
    rows_D, block_H = np.empty((BLOCK, D), np.float32), np.empty((BLOCK, H), np.float32)
    active_H, slope_H = np.empty((BLOCK, H), np.float32), np.empty((BLOCK, H), np.float32)
    turned_HD = np.empty((H, D), np.float32)
    rows = int(ends_E[E - 1])
    while True:
        part = take_number(address)
        if part >= parts:
            break
        of_x, of_base = number[14], number[17]
        if of_x != 0 and gathers:
            of_x += 4 * part * B * D
            _fill(of_x, B * D)
        if of_base != 0:
            of_base += 4 * part * B * H
            _fill(of_base, B * H)
        for e in range(E):
            first, end = _starts(ends_E, e), int(ends_E[e])
            if first == end:
                if of_w != 0 and part == 0:
                    _fill(of_w + 4 * e * D * H, D * H)
                continue
            if not _in_part(first, rows, part, parts):
                continue
            if of_x != 0:
                transpose(np.int64(turned_HD.ctypes.data), number[12] + 4 * e * D * H, D, H)
            begun = 0
            while first < end:
                count = min(BLOCK, end - first)
                y, of_y = number[13] + 4 * first * H, number[11] + 4 * first * H
                if kind != LINEAR:
                    of_y, active = np.int64(block_H.ctypes.data), np.int64(active_H.ctypes.data)
                    slope = np.int64(slope_H.ctypes.data)
                    _slopes(y, active, slope, count, H, kind)
                    if number[20] == 0:
                        _scale(_ONE, number[11] + 4 * first * H, slope, of_y, count * H)
                    else:
                        for n in range(count):
                            b, place, to = instance_P[first + n], place_P[first + n], of_y + 4 * n * H
                            if number[24] != 0:
                                _of_shared(
                                    number[11], b, place - b * U, slot_BRK, weight_BRK, of_weight_BRK, active, slope, H,
                                    to,
                                )  # fmt: skip
                            else:
                                of_sum = number[11] + 4 * (b * R + np.uint32(place - b * U) // np.uint32(K)) * H
                                of_weight_P[place] = _dot(of_sum, active, H)
                                _scale(weight_P[place], of_sum, slope, to, H)
                            active += 4 * H
                            slope += 4 * H
                    if kind != PLAIN:
                        for n in range(count):
                            y_H = carray(floats(y + 4 * n * H), H)
                            mean, scale = _moments(y_H, kind)
                            _of_norm(y_H, carray(floats(of_y + 4 * n * H), H), kind, mean, scale)
                if of_base != 0:
                    for n in range(count):
                        _add_scaled(_ONE, of_y + 4 * n * H, of_base + 4 * instance_P[first + n] * H, H)
                a = x + 4 * first * D
                if gathers:
                    a = np.int64(rows_D.ctypes.data)
                if of_w != 0:
                    if gathers:
                        _gather(x, number[7], D, instance_P, first, count, a)
                    product(number[16], of_w + 4 * e * D * H, H, a, 1, D, of_y, H, D, H, count, begun)
                    begun = 1
                if of_x != 0:
                    if gathers:
                        product(number[16], a, D, of_y, H, 1, np.int64(turned_HD.ctypes.data), D, count, D, H, 0)
                        for n in range(count):
                            _add_scaled(_ONE, a + 4 * n * D, of_x + 4 * instance_P[first + n] * D, D)
                    else:
                        to = of_x + 4 * first * D
                        product(number[16], to, D, of_y, H, 1, np.int64(turned_HD.ctypes.data), D, count, D, H, 0)
                first += count


@cache
def layer() -> Any:
    """The compiled :func:`_layer`."""
    return cfunc("void(int64)", cache=True, fastmath=FUSED, error_model="numpy")(_layer)


@cache
def of_layer() -> Any:
    """The compiled :func:`_of_layer`."""
    return cfunc("void(int64)", cache=True, fastmath=FUSED, error_model="numpy")(_of_layer)


def compile_expert_kernels() -> None:
    """Compile each loop, or load it from numba's cache, so that no batch waits for it."""
    for kernel in (product_kernel, layer, of_layer):
        kernel()
