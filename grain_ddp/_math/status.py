"""How a step's weights came about."""

from enum import Enum


class Status(str, Enum):
    """How the weights were found, and how well; the text is the explanation."""

    OPTIMAL = "optimal: no other weights give a shorter aggregate"
    CAPPED = "optimal under the cap: the gap is what the cap costs; a larger cap lowers it"
    ZERO = (
        "zero gradient: a convex combination of the gradients vanishes to rounding, so the"
        " aggregate is zero: a stationary point, or groups too noisy to agree on a direction;"
        " average more samples per group, or set a cap"
    )
    ROUNDED = (
        "optimal to rounding: the gap is below 1e-12 of the mean squared norm, but the Gramian is"
        " too inexact for a strict certificate; accumulate it in float64"
    )
    STALLED = (
        "stalled: these weights are the best found, and the gap says how far from optimal they"
        " are; the Gramian is too inexact (negative eigenvalues), accumulate it in float64"
    )
    MEAN = "mean"
    INVERSE_NORM = "inverse_norm"
    UPGRAD = "upgrad"
    KRUM = "krum"
    MULTI_KRUM = "multi_krum"
    CUSTOM = "custom"
    ABSENT = "zero: every gradient is zero"
    NOT_FINITE = "not finite: a gradient has NaN or inf, which was propagated"

    __hash__ = str.__hash__  # equal to its text, and found by it in a set

    def __str__(self) -> str:
        return self.value
