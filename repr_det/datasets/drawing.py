"""Drawing primitives of the shapes data set: dice, outlines, stencils and textures, all in integer arithmetic."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

TEXTURES = ("solid", "solid", "stripes", "checker", "dots", "noise", "gradient")
ONE = 4096  # fixed point of the unit circle
SUBPIXELS = 16  # steps a pixel in which the corners of outlines are placed
SINE = np.rint(ONE * np.sin(np.radians(np.arange(360)))).astype(np.int64)
QUARTER = np.array([[0, 1], [-1, 0]])  # a turn by 90 degrees
Loops = list[np.ndarray]  # closed outlines of corners (N, 2) = (x, y) within the unit circle, in fixed point


class Dice:
    """Random integers from the raw stream of PCG64: NumPy keeps that fixed, but not what Generator makes of it."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(list(key))

    def between(self, low: int, high: int) -> int:
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def chance(self, percent: int) -> bool:
        return self.between(0, 99) < percent

    def pick(self, options: Sequence) -> Any:
        return options[self.between(0, len(options) - 1)]

    def octets(self, *shape: int) -> np.ndarray:
        count = math.prod(shape)
        raw = self._bits.random_raw(-(-count // 8)).astype("<u8")
        return raw.view(np.uint8)[:count].reshape(shape).astype(np.int64)


def _polar(radius: int | np.ndarray, degrees: np.ndarray) -> np.ndarray:
    cosine, sine = SINE[(degrees + 90) % 360], SINE[degrees % 360]
    return np.stack([radius * cosine // ONE, radius * sine // ONE], 1)


def _regular(corners: int, radius: int | np.ndarray = ONE) -> np.ndarray:
    return _polar(radius, 360 * np.arange(corners) // corners)


def _cross() -> np.ndarray:
    half, tip = ONE * 3 // 10, ONE * 19 // 20
    arm = np.array([(tip, -half), (tip, half), (half, half)])
    return np.concatenate([arm @ np.linalg.matrix_power(QUARTER, turns) for turns in range(4)])


OUTLINES: dict[str, Loops] = {  # of the classes
    "circle": [_regular(60)],
    "square": [_regular(4)],
    "triangle": [_regular(3)],
    "star": [_regular(10, np.array([ONE, ONE * 2 // 5] * 5))],
    "cross": [_cross()],
    "ring": [_regular(60), _regular(60, ONE * 11 // 20)],
}


def blob(dice: Dice) -> Loops:
    corners = dice.between(7, 11)
    return [_regular(corners, np.array([dice.between(ONE * 2 // 5, ONE) for _ in range(corners)]))]


def distractor(dice: Dice) -> Loops:
    """The outline of something that is no class, often close to one."""
    kind = dice.pick(("blob", "half disc", "ellipse", "L", "wedge"))
    if kind == "blob":
        return blob(dice)
    if kind == "half disc":
        return [_polar(ONE, 10 * np.arange(19))]
    if kind == "ellipse":
        return [_regular(48) * (5, 2) // 5]
    if kind == "wedge":
        return [np.array([(ONE, 0), (-ONE, ONE // 5), (-ONE, -ONE // 5)])]
    end = ONE * 7 // 10
    bend = dice.between(3, 8) * end // 10 - end
    return [np.array([(-end, -end), (bend, -end), (bend, -bend), (end, -bend), (end, end), (-end, end)])]


def stencil(loops: Loops, radius: int, stretch: int = 100, degree: int = 0) -> np.ndarray:
    """The loops, stretched across (percent), turned and scaled: a centred (2 * radius + 3, 2 * radius + 3) bool array.

    A pixel belongs to the shape if its centre does, by the even-odd rule. Not cv2.fillPoly: its pixels differ between
    OpenCV 4.5, 4.8 and 4.12.
    """
    side = 2 * radius + 3
    sine, cosine = SINE[degree % 360], SINE[(degree + 90) % 360]
    toggles = np.zeros((side, side + 1), bool)  # where a scan line enters or leaves the shape
    for loop in loops:
        turned = loop * (100, stretch) // 100 @ np.array([[cosine, sine], [-sine, cosine]])
        corners = (turned * radius * SUBPIXELS // ONE**2 + (radius + 1) * SUBPIXELS).tolist()
        for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
            (ax, ay), (bx, by) = (start, end) if start[1] <= end[1] else (end, start)
            rows = np.arange(-(-ay // SUBPIXELS), -(-by // SUBPIXELS))
            numerator = ax * (by - ay) + (rows * SUBPIXELS - ay) * (bx - ax)
            toggles[rows, -(-numerator // (max(1, by - ay) * SUBPIXELS))] ^= True
    return np.logical_xor.accumulate(toggles, axis=1)[:, :side]


def near(dice: Dice, colour: np.ndarray, low: int, high: int) -> np.ndarray:
    """The colour with each channel moved up or down by `low` to `high` grey levels."""
    steps = [dice.between(low, high) * dice.pick((-1, 1)) for _ in range(3)]
    return np.clip(colour + np.array(steps), 0, 255)


def far(dice: Dice, colour: np.ndarray) -> np.ndarray:
    """A random colour at an L1 distance of 150 grey levels or more."""
    other = dice.octets(3)
    while np.abs(other - colour).sum() < 150:
        other = dice.octets(3)
    return other


def texture(dice: Dice, height: int, width: int) -> np.ndarray:
    """A texture as a (height, width) int64 array: the share of the second colour, 0 to 256."""
    kind = dice.pick(TEXTURES)
    period = dice.between(3, 9)
    y, x = np.ogrid[:height, :width]
    share = np.zeros((height, width), np.int64)
    if kind == "stripes":
        across, down = dice.pick(((1, 0), (0, 1), (1, 1), (1, -1), (2, 1), (1, 2)))
        share += ((across * x + down * y) // period & 1) * 256
    elif kind == "checker":
        share += ((x // period + y // period) & 1) * 256
    elif kind == "dots":
        half = period // 2
        share += ((x % period - half) ** 2 + (y % period - half) ** 2 <= (period // 3) ** 2) * 256
    elif kind == "noise":
        block = dice.between(1, 3)
        coarse = dice.octets(-(-height // block), -(-width // block))
        share += np.kron(coarse, np.ones((block, block), np.int64))[:height, :width]
    elif kind == "gradient":
        across, down = dice.pick(((1, 0), (0, 1), (1, 1)))
        share += (across * x + down * y) * 256 // (across * width + down * height)
    return share


def mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours (..., 3) between the two, for shares (...) of the second from 0 to 256."""
    return (first * (256 - share[..., None]) + second * share[..., None]) >> 8
