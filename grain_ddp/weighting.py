"""From a Gramian to weights, on its own: `weigh`, and the rules by name."""

from grain_ddp._math.weighting import RULES, Weighting, Weights, weigh

__all__ = ["RULES", "Weighting", "Weights", "weigh"]
