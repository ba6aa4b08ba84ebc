"""Fitting the learned rule: how exits answer together, and when that is enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lgvit_fast.evaluation.recording import Recording
from lgvit_fast.evidence import INPUTS, log_softmax
from lgvit_fast.ops.exit_step import ExitStep, apply_rule
from lgvit_fast.policies import Learned

__all__ = ["fit_learned"]

_MIXTURE_IMAGES = 2000  # a few weights need no more
_RIDGE = 1e-3
_MOST_LOG = 10.0  # of a weight or scale


def fit_learned(recording: Recording) -> Learned:
    """The learned rule, fitted to a recording in seconds; its threshold (0) is still to be chosen.

    The mixture is fitted to answer as the full model does (cross-entropy with its classes, all exits
    alike). The logistic models are fitted to "the full model would not do better": the answer is right
    or the full model's is wrong; without targets, to "the full model would answer the same".
    """
    final = recording.logits[-1].argmax(-1)
    mixture, sharpness = _fit_mixture(recording.logits[:-1, :_MIXTURE_IMAGES], final)
    classes, exits = recording.num_classes, recording.num_exits
    blank = [[0.0] * (1 + len(INPUTS))] * exits
    policy = Learned(0.0, blank, mixture.tolist(), sharpness.tolist(), classes)
    state = policy.start(len(recording), torch.device("cpu"))
    inputs, enough = [], []
    for index in range(exits):
        logits = recording.logits[index]
        step = ExitStep(logits, *apply_rule(policy.rule(index), logits, state[:, :2]))
        found, together = policy.inputs(step, state, index)
        answer = together.argmax(-1)
        inputs.append(torch.stack(found, -1))
        worse = answer != final
        if recording.targets is not None:
            worse = (answer != recording.targets) & (final == recording.targets)
        enough.append(~worse)
    coefficients = _fit_logistic(torch.stack(inputs).double(), torch.stack(enough).double())
    return Learned(0.0, coefficients.tolist(), policy.mixture, policy.sharpness, classes)


def _fit_mixture(logits: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `[E]` and scales `[E]`, both positive, for logits `[E, n, K]`."""
    exits, count = logits.shape[:2]
    log_p = log_softmax(logits).clamp_min(-100.0).double()
    final = final[:count]
    depth = torch.arange(1.0, exits + 1)
    parameters = torch.zeros(2, exits, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        weight, scale = _bounded(parameters).unbind()
        total = (weight.exp()[:, None, None] * log_p).cumsum(0)
        together = (scale.exp() / depth)[:, None, None] * total
        entropy = F.cross_entropy(together.flatten(0, 1), final.repeat(exits), reduction="sum")
        return entropy / count + _RIDGE * (weight**2).sum()

    _minimise(loss, parameters)
    weight, scale = _bounded(parameters).detach().unbind()
    return weight.exp(), scale.exp() / depth


def _bounded(parameters: Tensor) -> Tensor:
    """Logarithms kept where their exponentials are finite: exits that are always right ask for more."""
    return parameters.clamp(-_MOST_LOG, _MOST_LOG)


def _fit_logistic(inputs: Tensor, enough: Tensor) -> Tensor:
    """Constants and coefficients `[E, 1 + F]` for inputs `[E, n, F]` and outcomes `[E, n]`, ridged."""
    mean, spread = inputs.mean(1, keepdim=True), inputs.std(1, keepdim=True)
    varies = spread > 1e-6
    scaled = torch.where(varies, (inputs - mean) / spread.clamp_min(1e-6), 0.0)
    count = inputs.shape[1]
    target = (enough * count + 0.5) / (count + 1)  # finite odds, even where all are alike
    parameters = inputs.new_zeros(inputs.shape[0], 1 + inputs.shape[2], requires_grad=True)

    def loss() -> Tensor:
        odds = parameters[:, :1] + (scaled @ parameters[:, 1:, None])[..., 0]
        entropy = F.binary_cross_entropy_with_logits(odds, target, reduction="sum")
        return entropy / count + _RIDGE * (parameters[:, 1:] ** 2).sum()

    _minimise(loss, parameters)
    fitted = parameters.detach()
    slopes = torch.where(varies[:, 0], fitted[:, 1:] / spread[:, 0].clamp_min(1e-6), 0.0)
    constants = fitted[:, :1] - (slopes * mean[:, 0]).sum(1, keepdim=True)
    return torch.cat((constants, slopes), 1)


def _minimise(loss: Callable[[], Tensor], parameters: Tensor) -> None:
    """L-BFGS from where the parameters stand."""
    optimiser = torch.optim.LBFGS([parameters], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(closure)
