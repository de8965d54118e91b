"""What speaks against a candidate on examples that it and the version in service scored before they were trained on.

Letters: N examples, T tasks.
"""

import numpy as np

from smes.arrays import F32, Bool
from trainer.config import GateConfig
from trainer.gate_findings import AUC, BASE_RATE, CALIBRATION, LOSS, Finding
from trainer.gate_sample import Examples
from trainer.gate_statistics import compare_auc, compare_losses, is_beyond, odds_ratio, signed_deviance
from trainer.gate_stream import StreamHistory

_FEWEST = 32
_FEWEST_OF_A_CLASS = 10


def find_faults(examples: Examples, history: StreamHistory, config: GateConfig, *, z: float) -> list[Finding]:
    """Findings against the weights that gave the ``live`` scores.

    Args:
        examples: Since the last cut that passed.
        history: What is usual.
        config: Margins.
        z: Standard errors that a difference to the version in service has to exceed.
    """
    findings = []
    for t, is_binary in enumerate(history.binary.tolist()):
        rows: Bool = examples.mask[:, t]
        if np.count_nonzero(rows) < _FEWEST:
            continue
        name = history.names[t]
        live, served, labels = (a[rows, t] for a in (examples.live, examples.served, examples.labels))
        if history.knows:
            findings += _calibration(name, live, labels, float(history.base_rate()[t]), config, binary=is_binary)
        loss = compare_losses(live, served, labels, binary=is_binary)
        if loss.z > z and loss.candidate > loss.served * (1 + config.max_loss):
            findings.append(_worse(LOSS, name, f"{loss.candidate:.4f}, served {loss.served:.4f}", loss.z, len(labels)))
        if is_binary:
            auc = compare_auc(live, served, labels)
            if auc.z > z and auc.candidate < auc.served - config.max_auc_loss:
                findings.append(_worse(AUC, name, f"{auc.candidate:.4f}, served {auc.served:.4f}", auc.z, len(labels)))
    return findings


def _worse(code: str, name: str, text: str, z: float, n: int) -> Finding:
    return Finding(code, name, f"{text} ({n} examples, z {z:.1f})", n)


def _calibration(
    name: str, live: F32, labels: F32, base_rate: float, config: GateConfig, *, binary: bool
) -> list[Finding]:
    """Labels against scores, and scores against the base rate."""
    n, observed, expected = float(len(labels)), float(labels.sum(dtype=np.float64)), float(live.sum(dtype=np.float64))
    usual = base_rate * n
    if binary:
        enough = min(max(observed, expected), n - min(observed, expected)) >= _FEWEST_OF_A_CLASS
        z, ratio = _binomial(observed, expected, n)
        far_z, far = _binomial(expected, usual, n)
    else:
        enough = expected > 0 and usual > 0
        spread = float(np.sqrt(np.square(labels.astype(np.float64) - live).sum())) or 1.0
        z, far_z = (observed - expected) / spread, (expected - usual) / spread
        ratio, far = (observed / expected, expected / usual) if enough else (1.0, 1.0)
    findings: list[Finding] = []
    if not enough:
        return findings
    if abs(z) > config.z and is_beyond(ratio, config.max_calibration):
        text = f"labels sum to {observed:.4g}, it expected {expected:.4g} ({n:.0f} examples, z {z:.1f})"
        findings.append(Finding(CALIBRATION, name, text, len(labels)))
    if abs(far_z) > config.z and is_beyond(far, config.max_base_rate_ratio):
        text = f"scores sum to {expected:.4g}, by the base rate {usual:.4g} ({n:.0f} examples, z {far_z:.1f})"
        findings.append(Finding(BASE_RATE, name, text, len(labels)))
    return findings


def _binomial(observed: float, expected: float, n: float) -> tuple[float, float]:
    """The z and the odds ratio of two counts of ``n``."""
    one, other, of = np.array(observed), np.array(expected), np.array(n)
    return float(signed_deviance(one, other, of)), float(odds_ratio(one, other, of))
