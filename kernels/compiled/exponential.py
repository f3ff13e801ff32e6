"""exp of float32 in plain arithmetic, which the compiler can put into vector registers."""

import numpy as np

from vlmrt.kernels.compiled.jit import called_strictly

LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, the first with so few bits that its product with an exponent is exact (Cody and Waite 1980).
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
# e**r = 1 + r + r**2 P(r) for |r| <= ln 2 / 2; minimax coefficients of Cephes' expf (Moshier 1989).
P0 = np.float32(5.0000001201e-1)
P1 = np.float32(1.6666665459e-1)
P2 = np.float32(4.1665795894e-2)
P3 = np.float32(8.3334519073e-3)
P4 = np.float32(1.3981999507e-3)
P5 = np.float32(1.9875691500e-4)
LEAST = np.float32(-104.0)  # e**x is 0 from here down
MOST = np.float32(89.0)  # and inf from here up
# Added to a small number, 1.5 * 2**23 leaves its nearest integer in the last bits.
ROUNDER = np.float32(12582912.0)
ROUNDER_BITS = np.int32(ROUNDER.view(np.int32))
ONE = np.float32(1.0)


@called_strictly
def exponential(x: np.float32) -> np.float32:
    """e**x within 2 units in the last place; 0, inf and NaN where exp gives them."""
    x = LEAST if x < LEAST else x  # a NaN passes both
    x = MOST if x > MOST else x
    rounded = np.float32(x * LOG2_E + ROUNDER)
    exponent = np.int32(rounded.view(np.int32) - ROUNDER_BITS)
    whole = rounded - ROUNDER
    rest = x - whole * LN2_HIGH - whole * LN2_LOW
    series = ((((P5 * rest + P4) * rest + P3) * rest + P2) * rest + P1) * rest + P0
    power = series * (rest * rest) + rest + ONE
    # 2**exponent as two factors: one alone ends at 2**-126 and 2**127.
    half = np.int32(exponent >> np.int32(1))
    return power * _two_to_the(half) * _two_to_the(np.int32(exponent - half))


@called_strictly
def _two_to_the(exponent: np.int32) -> np.float32:
    return np.int32((exponent + np.int32(127)) << np.int32(23)).view(np.float32)
