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
def _gather(x, width, instance_P, first, count, to):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Copy the rows of some instances."""
    for n in range(count):
        of_instance = carray(floats(x + 4 * instance_P[first + n] * width), width)
        row = carray(floats(to + 4 * n * width), width)
        for i in range(width):
            row[i] = of_instance[i]


def _layer(address):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """One layer of all experts: ``out[p] = SiLU(Norm(y[p]))``, ``y[p] = base[instance] + x[p or instance] W_e``.

    Arguments: counter; E; D; H; P; what follows the product; 1 if x is packed, else 0; ends of segments (int32 [E]);
    instance of a row (int64 [P]); x; base (or none); W [E, D, H]; y [P, H] (or none: it is not kept); out [P, H];
    :func:`smes.vector_code.product_kernel`. Rows of ``out`` that no segment covers become 0.
    """
    number = carray(integers(address), 15)
    E, D, H, P, kind = number[1], number[2], number[3], number[4], number[5]
    ends_E = carray(short_integers(number[7]), E)
    instance_P = carray(integers(number[8]), P)
    x, base, out = number[9], number[10], number[13]
    gathers, adds = number[6] == 0, np.int64(base != 0)
    rows_D = np.empty((BLOCK, D), np.float32)
    block_H = np.empty((BLOCK, H), np.float32)
    while True:
        e = take_number(address)
        if e >= E:
            if e == E:
                rest = carray(floats(out), (P, H))
                for p in range(ends_E[E - 1], P):
                    for h in range(H):
                        rest[p, h] = _ZERO
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
                _gather(x, D, instance_P, first, count, a)
            if adds != 0:
                _gather(base, H, instance_P, first, count, to)
            product(number[14], to, H, a, D, 1, w, H, count, H, D, adds)
            if kind != LINEAR:
                _activate(to, out + 4 * first * H, count, H, kind)
            first += count


def _of_layer(address):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """Gradients of one layer.

    Arguments: counter; E; D; H; P; what follows the product; 1 if x is packed, else 0; ends of segments; instance
    of a row; x; gradient of out [P, H]; W; y; gradients of y [P, H] (or none: not wanted), of x's rows [P, D] (or none)
    and of W (or none); :func:`smes.vector_code.product_kernel`.
    """
    number = carray(integers(address), 17)
    E, D, H, P, kind = number[1], number[2], number[3], number[4], number[5]
    ends_E = carray(short_integers(number[7]), E)
    instance_P = carray(integers(number[8]), P)
    x, of_out, w, of_w = number[9], number[10], number[11], number[15]
    gathers, of_x = number[6] == 0, number[14]
    rows_D = np.empty((BLOCK, D), np.float32)
    block_H = np.empty((BLOCK, H), np.float32)
    turned_HD = np.empty((H, D), np.float32)
    while True:
        e = take_number(address)
        if e >= E:
            break
        end = int(ends_E[e])
        first = int(ends_E[e - 1]) if e > 0 else 0
        if of_w != 0 and first == end:
            unused = carray(floats(of_w + 4 * e * D * H), D * H)
            for i in range(D * H):
                unused[i] = _ZERO
        if of_x != 0 and first < end:
            transpose(turned_HD.ctypes.data, w + 4 * e * D * H, D, H)
        begun = 0
        while first < end:
            count = min(BLOCK, end - first)
            of_y = of_out + 4 * first * H
            if kind != LINEAR:
                of_y = number[13] + 4 * first * H if number[13] != 0 else block_H.ctypes.data
                _of_activation(number[12] + 4 * first * H, of_out + 4 * first * H, of_y, count, H, kind)
            if of_w != 0:
                a = x + 4 * first * D
                if gathers:
                    a = rows_D.ctypes.data
                    _gather(x, D, instance_P, first, count, a)
                product(number[16], of_w + 4 * e * D * H, H, a, 1, D, of_y, H, D, H, count, begun)
                begun = 1
            if of_x != 0:
                product(number[16], of_x + 4 * first * D, D, of_y, H, 1, turned_HD.ctypes.data, D, count, D, H, 0)
            first += count


def _sum_rows(address):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """``out[n] = Σ_k w[n, k] y[row[n, k]]``.

    Arguments: counter; N; K; H; rows (int64 [N, K]); how many of the K count (int64 [N]; none: all); w (or none: 1);
    y [P, H]; out [N, H].
    """
    number = carray(integers(address), 9)
    N, K, H = number[1], number[2], number[3]
    row_NK, used_N = carray(integers(number[4]), (N, K)), carray(integers(number[5]), N)
    weight_NK, y_PH = carray(floats(number[6]), (N, K)), carray(floats(number[7]), (N, H))
    out_NH = carray(floats(number[8]), (N, H))
    while True:
        first = take_number(address) * FEW
        if first >= N:
            break
        for n in range(first, min(first + FEW, N)):
            used = used_N[n] if number[5] != 0 else K
            sum_H = out_NH[n]
            for h in range(H):
                sum_H[h] = _ZERO
            for k in range(used):
                weight = weight_NK[n, k] if number[6] != 0 else _ONE
                y_H = y_PH[row_NK[n, k]]
                for h in range(H):
                    sum_H[h] += weight * y_H[h]


@njit(fastmath=SUMS)
def _dot(a_H, b_H):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    total = _ZERO
    for h in range(len(a_H)):
        total += a_H[h] * b_H[h]
    return total


def _of_sums(address):  # type: ignore[no-untyped-def]  # numba infers the types  # pragma: no cover - compiled
    """Gradients of a weighted sum of rows, those of an instance by one thread: its sums may share rows.

    Arguments: counter; B; R; K; H; rows (int64 [B, R, K]); w [B, R, K]; y [P, H]; gradient of the sums [B, R, H];
    gradients of y, of w; 1 if rows are shared, and their gradient so added to 0, else 0.
    """
    number = carray(integers(address), 12)
    B, R, K, H = number[1], number[2], number[3], number[4]
    row_BRK, weight_BRK = carray(integers(number[5]), (B, R, K)), carray(floats(number[6]), (B, R, K))
    y_PH, of_sum_BRH = carray(floats(number[7]), (B, H)), carray(floats(number[8]), (B, R, H))
    of_y_PH, of_weight_BRK = carray(floats(number[9]), (B, H)), carray(floats(number[10]), (B, R, K))
    while True:
        first = take_number(address) * FEW
        if first >= B:
            break
        for b in range(first, min(first + FEW, B)):
            for r in range(R):
                of_sum_H = of_sum_BRH[b, r]
                for k in range(K):
                    row, weight = row_BRK[b, r, k], weight_BRK[b, r, k]
                    of_weight_BRK[b, r, k] = _dot(of_sum_H, y_PH[row])
                    of_y_H = of_y_PH[row]
                    if number[11] != 0:
                        for h in range(H):
                            of_y_H[h] += weight * of_sum_H[h]
                    else:
                        for h in range(H):
                            of_y_H[h] = weight * of_sum_H[h]


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


@cache
def of_sums() -> Any:
    """The compiled :func:`_of_sums`."""
    return cfunc("void(int64)", cache=True, fastmath=FUSED)(_of_sums)


def compile_expert_kernels() -> None:
    """Compile each loop, or load it from numba's cache, so that no batch waits for it."""
    for kernel in (product_kernel, layer, of_layer, sum_rows, of_sums):
        kernel()
