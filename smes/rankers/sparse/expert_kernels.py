"""The compiled loops behind :mod:`smes.rankers.sparse.host_experts`, without torch as the routing's.

Each is a function of one address, that of its arguments (int64, as the class beside it lists them), so that several
threads can run it at the same time (:mod:`smes.team`). They take pieces of the work, an expert or some instances, from
a common counter, the first argument. No piece depends on who does it: results are the same bit for bit with any number
of threads.

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

FEW = 32
"""Instances that a thread takes at once."""

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


@njit(fastmath=FUSED, error_model="numpy")
def _of_activation(y, of_out, of_y, count, H, kind):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    if kind == PLAIN:  # one long row
        count, H = 1, count * H
    for n in range(count):
        y_H, of_out_H = carray(floats(y + 4 * n * H), H), carray(floats(of_out + 4 * n * H), H)
        of_y_H = carray(floats(of_y + 4 * n * H), H)
        mean, scale = _moments(y_H, kind)
        for h in range(H):
            z = (y_H[h] - mean) * scale
            s = sigmoid(z)
            of_y_H[h] = of_out_H[h] * s * (_ONE + z * (_ONE - s))
        if kind != PLAIN:
            _of_norm(y_H, of_y_H, kind, mean, scale)


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


def _layer(address):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """One layer of all experts: ``out[p] = SiLU(Norm(y[p]))``, ``y[p] = base[instance] + x[p or instance] W_e``.

    Arguments: counter; E; D; H; P; what follows the product; 1 if x is packed, else 0; numbers between rows of x; ends
    of segments (int32 [E]); instance of a row (int64 [P]); x; W [E, D, H]; y [P, H] (or none: it is not kept); out
    [P, H]; :func:`smes.vector_code.product_kernel`; base (or none); numbers between its rows. Rows of ``out`` that no
    segment covers become 0.
    """
    number = carray(integers(address), 17)
    E, D, H, P, kind, gathers = number[1], number[2], number[3], number[4], number[5], number[6] == 0
    ends_E, instance_P = carray(short_integers(number[8]), E), carray(integers(number[9]), P)
    x, out, base = number[10], number[13], number[15]
    rows_D = np.empty((BLOCK, D), np.float32)
    block_H = np.empty((BLOCK, H), np.float32)
    while True:
        e = take_number(address)
        if e >= E:
            if e == E:
                _fill(out + 4 * ends_E[E - 1] * H, (P - ends_E[E - 1]) * H)
            break
        end = int(ends_E[e])
        first = int(ends_E[e - 1]) if e > 0 else 0
        w = number[11] + 4 * e * D * H
        while first < end:
            count = min(BLOCK, end - first)
            to = number[12] + 4 * first * H if number[12] != 0 else block_H.ctypes.data
            if kind == LINEAR:
                to = out + 4 * first * H
            a = x + 4 * first * D
            if gathers:
                a = rows_D.ctypes.data
                _gather(x, number[7], D, instance_P, first, count, a)
            if base != 0:
                _gather(base, number[16], H, instance_P, first, count, to)
            product(number[14], to, H, a, D, 1, w, H, count, H, D, 1 if base != 0 else 0)
            if kind != LINEAR:
                _activate(to, out + 4 * first * H, count, H, kind)
            first += count


def _sum_rows(address):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """``out[b, r] = Σ_k w[b, r, k] y[row]``.

    Arguments: counter; B; R; K; U; H; rows of an instance (int64 [B, U]); how many of the K count (int64 [B]; none:
    all); the place among an instance's rows of each of a router's (int64 [B, R, K]; none: r·K + k); w [B, R, K] (none:
    1); y [P, H]; out [B, R, H].
    """
    number = carray(integers(address), 12)
    B, R, K, U, H = number[1], number[2], number[3], number[4], number[5]
    row_BU, used_B = carray(integers(number[6]), (B, U)), carray(integers(number[7]), B)
    slot_BRK, weight_BRK = carray(integers(number[8]), (B, R, K)), carray(floats(number[9]), (B, R, K))
    while True:
        first = take_number(address) * FEW
        if first >= B:
            break
        for b in range(first, min(first + FEW, B)):
            for r in range(R):
                to = number[11] + 4 * (b * R + r) * H
                _fill(to, H)
                for k in range(used_B[b] if number[7] != 0 else K):
                    row = row_BU[b, slot_BRK[b, r, k] if number[8] != 0 else r * K + k]
                    _add_scaled(weight_BRK[b, r, k] if number[9] != 0 else _ONE, number[10] + 4 * row * H, to, H)


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
    of segments; instance of a row; x; gradient of out [P, H], or of the sums [B, R, H]; W; y; gradients of x's rows
    [P, D] and of W (either may be none); :func:`smes.vector_code.product_kernel`; gradient of y [P, H] (none: not
    wanted). For sums: place of a row among those of all instances, b·U + u (int64 [P]; none: no sums); B; R; K; U;
    places as of :func:`_sum_rows`; w; its gradient.
    """
    number = carray(integers(address), 26)
    E, D, H, P, kind, gathers = number[1], number[2], number[3], number[4], number[5], number[6] == 0
    ends_E, instance_P = carray(short_integers(number[8]), E), carray(integers(number[9]), P)
    x, w, of_x, of_w = number[10], number[12], number[14], number[15]
    place_P, shape = carray(integers(number[18]), P), (number[19], number[20], number[21])
    slot_BRK = carray(integers(number[23]), shape)
    weight_BRK, of_weight_BRK = carray(floats(number[24]), shape), carray(floats(number[25]), shape)
    rows_D = np.empty((BLOCK, D), np.float32)
    block_H = np.empty((BLOCK, H), np.float32)
    active_H, slope_H = np.empty((BLOCK, H), np.float32), np.empty((BLOCK, H), np.float32)
    weight_P, of_weight_P = carray(floats(number[24]), P), carray(floats(number[25]), P)
    R, K, U = number[20], number[21], number[22]
    turned_HD = np.empty((H, D), np.float32)
    while True:
        e = take_number(address)
        if e >= E:
            break
        end = int(ends_E[e])
        first = int(ends_E[e - 1]) if e > 0 else 0
        if of_w != 0 and first == end:
            _fill(of_w + 4 * e * D * H, D * H)
        if of_x != 0 and first < end:
            transpose(turned_HD.ctypes.data, w + 4 * e * D * H, D, H)
        begun = 0
        while first < end:
            count = min(BLOCK, end - first)
            y, of_y = number[13] + 4 * first * H, number[11] + 4 * first * H
            if kind != LINEAR:
                of_y = number[17] + 4 * first * H if number[17] != 0 else block_H.ctypes.data
                if number[18] != 0:
                    active, slope = active_H.ctypes.data, slope_H.ctypes.data
                    _slopes(y, active, slope, count, H, kind)
                    for n in range(count):
                        b, place, to = instance_P[first + n], place_P[first + n], of_y + 4 * n * H
                        if number[23] != 0:
                            _of_shared(
                                number[11], b, place - b * U, slot_BRK, weight_BRK, of_weight_BRK, active, slope, H, to
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
                else:
                    _of_activation(y, number[11] + 4 * first * H, of_y, count, H, kind)
            if of_w != 0:
                a = x + 4 * first * D
                if gathers:
                    a = rows_D.ctypes.data
                    _gather(x, number[7], D, instance_P, first, count, a)
                product(number[16], of_w + 4 * e * D * H, H, a, 1, D, of_y, H, D, H, count, begun)
                begun = 1
            if of_x != 0:
                product(number[16], of_x + 4 * first * D, D, of_y, H, 1, turned_HD.ctypes.data, D, count, D, H, 0)
            first += count


@cache
def layer() -> Any:
    """The compiled :func:`_layer`."""
    return cfunc("void(int64)", cache=True, fastmath=FUSED)(_layer)


@cache
def of_layer() -> Any:
    """The compiled :func:`_of_layer`."""
    return cfunc("void(int64)", cache=True, fastmath=FUSED)(_of_layer)


@cache
def sum_rows() -> Any:
    """The compiled :func:`_sum_rows`."""
    return cfunc("void(int64)", cache=True, fastmath=FUSED)(_sum_rows)


def compile_expert_kernels() -> None:
    """Compile each loop, or load it from numba's cache, so that no batch waits for it."""
    for kernel in (product_kernel, layer, of_layer, sum_rows):
        kernel()
