"""Compiled loops over tasks, for the CPU: heads, loss, base rates and what tasks borrow.

A module of its own because it imports no torch, as :mod:`smes.rankers.sparse.routing_kernels`.

Letters: B instances, T tasks, S streams of a ranker's output, H their width.
"""

import math

import numpy as np
from numba import njit

_FAST = {"contract", "reassoc", "nsz"}


@njit(cache=True, nogil=True, error_model="numpy")
def rates_of_tasks(  # type: ignore[no-untyped-def]  # numba infers the types
    count_T, mean_T, is_binary_T, power, limit, prior, base_T, factor_T, trust_T
):  # pragma: no cover - compiled
    """As ``base_logits``, ``gradient_factors`` and ``trust`` of :class:`smes.model.task_outputs.TaskOutputs`."""
    for t in range(len(count_T)):
        count, mean = count_T[t], mean_T[t]
        base_T[t], factor_T[t], trust_T[t] = mean, 1.0, 1.0
        if is_binary_T[t]:
            rate = min(max((mean * count + 0.5) / (count + 1.0), 1e-9), 1.0 - 1e-9)
            base_T[t] = math.log(rate / (1.0 - rate))
            rate = (mean * count + 1.0) / (count + 4.0)
            factor_T[t] = min((0.25 / max(rate * (1.0 - rate), 1e-9)) ** power, limit)
            rarer = count * min(mean, 1.0 - mean) + 1.0
            trust_T[t] = rarer / (rarer + prior)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def logits_of_streams(  # type: ignore[no-untyped-def]  # numba infers the types
    streams_BSH, common_BH, out_TH, bias_T, share_TS, wide_BT, trust_T, base_T, logits_BT
):  # pragma: no cover - compiled
    """``Σ_s share_ts (stream_s + common) · out_t + bias_t + trust_t wide_t + base_t``; common and wide may be empty.

    A task's logit of an instance depends, bit for bit, on no other task or instance.
    """
    B, S, H = streams_BSH.shape
    T = len(out_TH)
    z_SH = np.empty((S, H), np.float32)
    for b in range(B):
        for s in range(S):
            for h in range(H):
                z_SH[s, h] = streams_BSH[b, s, h]
            if len(common_BH):
                for h in range(H):
                    z_SH[s, h] += common_BH[b, h]
        for t in range(T):
            logit = bias_T[t] + base_T[t]
            if len(wide_BT):
                logit += trust_T[t] * wide_BT[b, t]
            for s in range(S):
                share = share_TS[t, s]
                if share != 0:
                    dot = np.float32(0)
                    for h in range(H):
                        dot += z_SH[s, h] * out_TH[t, h]
                    logit += share * dot
            logits_BT[b, t] = logit


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def gradients_of_streams(  # type: ignore[no-untyped-def]  # numba infers the types
    streams_BSH, common_BH, out_TH, share_TS, factor_T, trust_T, of_logits_BT,
    of_streams_BSH, of_common_BH, of_out_TH, of_bias_T, of_wide_BT,
):  # fmt: skip  # pragma: no cover - compiled
    """Gradients of :func:`logits_of_streams`; those of the streams and of what they have in common times ``factor_T``.

    The weights' are added to what is there.
    """
    B, S, H = streams_BSH.shape
    T = len(out_TH)
    z_SH = np.empty((S, H), np.float32)
    of_z_SH = np.empty((S, H), np.float32)
    for b in range(B):
        for s in range(S):
            for h in range(H):
                z_SH[s, h] = streams_BSH[b, s, h]
                of_z_SH[s, h] = 0
            if len(common_BH):
                for h in range(H):
                    z_SH[s, h] += common_BH[b, h]
        for t in range(T):
            of_logit = of_logits_BT[b, t]
            of_bias_T[t] += of_logit
            if len(of_wide_BT):
                of_wide_BT[b, t] = trust_T[t] * of_logit
            for s in range(S):
                share = share_TS[t, s]
                if share != 0:
                    to_weight = share * of_logit
                    to_stream = to_weight * factor_T[t]
                    for h in range(H):
                        of_out_TH[t, h] += to_weight * z_SH[s, h]
                        of_z_SH[s, h] += to_stream * out_TH[t, h]
        for s in range(S):
            for h in range(H):
                of_streams_BSH[b, s, h] = of_z_SH[s, h]
        if len(common_BH):
            for h in range(H):
                of_common_BH[b, h] = of_z_SH[0, h]
            for s in range(1, S):
                for h in range(H):
                    of_common_BH[b, h] += of_z_SH[s, h]


@njit(cache=True, nogil=True, error_model="numpy")
def loss_and_gradient(  # type: ignore[no-untyped-def]  # numba infers the types
    logits_BT, chance_BT, softplus_BT, labels_BT, mask_BT, weight_B, delayed_BT, is_binary_T, loss_weight_T,
    divisor, of_logits_BT,
):  # fmt: skip  # pragma: no cover - compiled
    """The loss of :meth:`smes.model.task_outputs.TaskOutputs.loss`, and its gradient by the logits.

    ``chance_BT`` and ``softplus_BT`` are ``sigmoid`` and ``softplus`` of the logits; ``delayed_BT`` may be empty. A
    negative ``divisor`` stands for the sum of the weights.
    """
    B, T = logits_BT.shape
    total = divisor
    if divisor < 0:
        total = 0.0
        for b in range(B):
            total += weight_B[b]
    total = max(total, 1e-12)
    loss = 0.0
    for b in range(B):
        for t in range(T):
            weight = loss_weight_T[t] * (weight_B[b] if mask_BT[b, t] else np.float32(0))
            if len(delayed_BT):
                weight *= delayed_BT[b, t]
            logit = logits_BT[b, t]
            target = labels_BT[b, t] if mask_BT[b, t] else np.float32(0)
            if is_binary_T[t]:
                loss += weight * (softplus_BT[b, t] - logit * target)
                slope = chance_BT[b, t] - target
            else:
                slope = logit - np.float32(math.log1p(max(target, np.float32(0))))
                size = abs(slope)
                if size > 1:
                    loss += weight * (size - np.float32(0.5))
                    slope = np.float32(1) if slope > 0 else np.float32(-1)
                else:  # also what is not a number
                    loss += weight * np.float32(0.5) * slope * slope
            of_logits_BT[b, t] = slope * weight / total
    return loss / total


@njit(cache=True, nogil=True, error_model="numpy")
def cells_of_labels(  # type: ignore[no-untyped-def]  # numba infers the types
    labels_BT, mask_BT, weight_B, delayed_BT, is_binary_T, target_BT, weight_BT
):  # pragma: no cover - compiled
    """What base rates count: targets and weights, in float64; ``delayed_BT`` may be empty."""
    B, T = labels_BT.shape
    for b in range(B):
        for t in range(T):
            target_BT[b, t], weight_BT[b, t] = 0.0, 0.0
            if mask_BT[b, t]:
                label, weight = labels_BT[b, t], weight_B[b]
                if len(delayed_BT) and weight > 0:
                    weight = weight * delayed_BT[b, t]
                target_BT[b, t] = label if is_binary_T[t] else np.float32(math.log1p(max(label, np.float32(0))))
                weight_BT[b, t] = weight


def compile_task_kernels() -> None:
    """Run each loop once, as it is called, so that no batch waits for it."""
    one_T, two_BT, moments_T = np.ones(1, np.float32), np.ones((1, 1), np.float32), np.ones(1)
    streams_BSH, yes_T, yes_BT = np.ones((1, 1, 1), np.float32), np.ones(1, np.bool_), np.ones((1, 1), np.bool_)
    rates_of_tasks(moments_T, moments_T, yes_T, 0.5, 1.0, 1.0, *(one_T.copy() for _ in range(3)))
    logits_of_streams(streams_BSH, two_BT, two_BT, one_T, two_BT, two_BT, one_T, one_T, two_BT.copy())
    gradients_of_streams(
        streams_BSH, two_BT, two_BT, two_BT, one_T, one_T, two_BT,
        streams_BSH.copy(), two_BT.copy(), two_BT.copy(), one_T.copy(), two_BT.copy(),
    )  # fmt: skip
    loss_and_gradient(two_BT, two_BT, two_BT, two_BT, yes_BT, one_T, two_BT, yes_T, one_T, -1.0, two_BT.copy())
    cells_of_labels(two_BT, yes_BT, one_T, two_BT, yes_T, np.ones((1, 1)), np.ones((1, 1)))
