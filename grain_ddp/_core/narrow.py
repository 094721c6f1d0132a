"""Numbers in a narrower dtype, for the wire: blocks that share a power of two.

fp16 ends at 65,504 and has few digits below 6e-5, and gradients do not keep to that. So a message
holds its values times a power of two that brings the largest near the top of the range, and that
power's exponent, in one number more.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXTRA = 1
"""How many numbers a message has beside its values; of no values there is an empty one."""

_TOP = {torch.float16: 15, torch.bfloat16: 126}  # the largest value is below 2 to that power
_FURTHEST = 1000  # 2 to that power is a float64, and its inverse too


def message_for(values: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty place for values [c] on their way."""
    return values.new_empty(len(values) + EXTRA if len(values) else 0, dtype=dtype)


def encoded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The message of values [c]."""
    message = message_for(values, dtype)
    encode(values, message)
    return message


def encode(values: Tensor, message: Tensor) -> None:
    """Fill a message [c + 1] of a narrow dtype with values [c] of a wider one."""
    if not len(values):
        message.zero_()
        return
    body, exponent = message[:-EXTRA], message[-EXTRA:].view(torch.int16)
    if values.dtype == torch.float32 and message.dtype == torch.bfloat16:  # of the same range
        body.copy_(values)
        exponent.zero_()
        return
    largest = torch.linalg.vector_norm(values.detach(), torch.inf)
    power = _TOP[message.dtype] - torch.frexp(largest)[1]
    power = torch.where(torch.isfinite(largest) & (largest > 0), power, 0)
    power = power.clamp(-_FURTHEST, _FURTHEST)
    body.copy_(times_power_(values.clone(), power))
    exponent.copy_(power)


def times_power_(values: Tensor, power: Tensor) -> Tensor:
    """Values times 2 to that power, in place. Exact, but where they leave the range."""
    half = power // 2  # at the ends of the range their dtype does not hold the power itself
    return values.mul_(_two_to(half)).mul_(_two_to(power - half))


def _two_to(power: Tensor) -> Tensor:
    """2 to that power, float64, made of its bits: exact. (torch.ldexp goes by float32.)"""
    return ((power.long() + 1023) << 52).view(torch.float64)


def exponents(messages: Tensor) -> Tensor:
    """The powers that the values of messages [..., c + 1] still have to be multiplied with."""
    return -messages[..., -EXTRA:].contiguous().view(torch.int16).squeeze(-1).int()


def scale(messages: Tensor) -> Tensor:
    """What to multiply the values of messages [..., c + 1] with, float64 [...]."""
    return _two_to(exponents(messages))


def decode(message: Tensor, out: Tensor) -> None:
    """The values of a message [c + 1], in the wider dtype of out [c]."""
    if not len(out):
        return
    out.copy_(message[:-EXTRA])
    if message.dtype != torch.bfloat16 or out.dtype != torch.float32:
        times_power_(out, exponents(message))
