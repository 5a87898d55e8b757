"""Drawing primitives of the shapes data set: dice, outlines, stencils and textures, all in integer arithmetic."""

import math
from collections.abc import Sequence

import numpy as np

TEXTURES = ("solid", "solid", "stripes", "checker", "dots", "noise", "gradient")
ONE = 4096  # fixed point of the unit circle
SUBPIXELS = 16  # steps a pixel in which the corners of outlines are placed
SINE = tuple(round(ONE * math.sin(math.radians(degree))) for degree in range(360))
Loops = list[list[tuple[int, int]]]  # closed outlines of (x, y) corners within the unit circle, in fixed point


class Dice:
    """Random integers from the raw stream of PCG64: NumPy keeps that fixed, but not what Generator makes of it."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(list(key))

    def between(self, low: int, high: int) -> int:
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def chance(self, percent: int) -> bool:
        return self.between(0, 99) < percent

    def pick(self, options: Sequence):
        return options[self.between(0, len(options) - 1)]

    def octets(self, *shape: int) -> np.ndarray:
        count = math.prod(shape)
        raw = self._bits.random_raw(-(-count // 8)).astype("<u8")
        return raw.view(np.uint8)[:count].reshape(shape)


# ---- outlines ----


def _polar(radius: int, degree: int) -> tuple[int, int]:
    return radius * SINE[(degree + 90) % 360] // ONE, radius * SINE[degree % 360] // ONE


def _regular(corners: int, radius: int = ONE) -> list[tuple[int, int]]:
    return [_polar(radius, 360 * i // corners) for i in range(corners)]


def outline(name: str) -> Loops:
    """The outline of a class; the ring has two loops."""
    arm, tip = ONE * 3 // 10, ONE * 19 // 20
    if name == "circle":
        return [_regular(60)]
    if name == "ring":
        return [_regular(60), _regular(60, ONE * 11 // 20)]
    if name == "star":
        return [[_polar(ONE if i % 2 == 0 else ONE * 2 // 5, 36 * i) for i in range(10)]]
    if name == "cross":
        corner = [(tip, -arm), (tip, arm), (arm, arm)]  # one arm; the others are this one turned by 90 degrees
        turns = [lambda x, y: (x, y), lambda x, y: (-y, x), lambda x, y: (-x, -y), lambda x, y: (y, -x)]
        return [[turn(x, y) for turn in turns for x, y in corner]]
    return [_regular({"square": 4, "triangle": 3}[name])]


def blob(dice: Dice) -> Loops:
    corners = dice.between(7, 11)
    return [[_polar(dice.between(ONE * 2 // 5, ONE), 360 * i // corners) for i in range(corners)]]


def distractor(dice: Dice) -> Loops:
    """The outline of something that is no class, often close to one."""
    kind = dice.pick(("blob", "half disc", "ellipse", "L", "wedge"))
    if kind == "blob":
        return blob(dice)
    if kind == "half disc":
        return [[_polar(ONE, 10 * i) for i in range(19)]]
    if kind == "ellipse":
        return [[(x, y * 2 // 5) for x, y in _regular(48)]]
    if kind == "L":
        end = ONE * 7 // 10
        bend = dice.between(3, 8) * end // 10 - end
        return [[(-end, -end), (bend, -end), (bend, -bend), (end, -bend), (end, end), (-end, end)]]
    return [[(ONE, 0), (-ONE, ONE // 5), (-ONE, -ONE // 5)]]


def bar(length: int, thickness: int) -> Loops:
    """A bar of `thickness` px once it is drawn with the radius `length` / 2."""
    half = ONE * thickness // length
    return [[(ONE, half), (-ONE, half), (-ONE, -half), (ONE, -half)]]


def stencil(loops: Loops, radius: int, stretch: int = 100, degree: int = 0) -> np.ndarray:
    """The loops, stretched across (percent), turned and scaled: a centred (2 * radius + 3, 2 * radius + 3) bool array.

    A pixel belongs to the shape if its centre does, by the even-odd rule. Not cv2.fillPoly: its pixels differ between
    OpenCV 4.5, 4.8 and 4.12.
    """
    side = 2 * radius + 3
    centre = (radius + 1) * SUBPIXELS
    sine, cosine = SINE[degree % 360], SINE[(degree + 90) % 360]
    toggles = np.zeros((side, side + 1), bool)  # where a scan line enters or leaves the shape
    for loop in loops:
        points = [(x, y * stretch // 100) for x, y in loop]
        turned = [(x * cosine - y * sine, x * sine + y * cosine) for x, y in points]
        corners = [tuple(v * radius * SUBPIXELS // ONE**2 + centre for v in point) for point in turned]
        for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
            (ax, ay), (bx, by) = (start, end) if start[1] <= end[1] else (end, start)
            rows = np.arange(-(-ay // SUBPIXELS), -(-by // SUBPIXELS))
            numerator = ax * (by - ay) + (rows * SUBPIXELS - ay) * (bx - ax)
            toggles[rows, -(-numerator // (max(1, by - ay) * SUBPIXELS))] ^= True
    return np.logical_xor.accumulate(toggles, axis=1)[:, :side]


# ---- colours and textures ----


def near(dice: Dice, colour: np.ndarray, low: int, high: int) -> np.ndarray:
    """The colour with each channel moved up or down by `low` to `high` grey levels."""
    steps = np.array([dice.between(low, high) * dice.pick((-1, 1)) for _ in range(3)], np.int64)
    return np.clip(colour + steps, 0, 255)


def far(dice: Dice, colour: np.ndarray) -> np.ndarray:
    """A random colour at an L1 distance of 150 grey levels or more."""
    while True:
        other = dice.octets(3).astype(np.int64)
        if np.abs(other - colour).sum() >= 150:
            return other


def texture_weights(dice: Dice, height: int, width: int) -> np.ndarray:
    """A texture as a (height, width) int64 array: the share of the second colour, 0 to 256."""
    kind = dice.pick(TEXTURES)
    period = dice.between(3, 9)
    y, x = np.ogrid[:height, :width]
    if kind == "stripes":
        across, down = dice.pick(((1, 0), (0, 1), (1, 1), (1, -1), (2, 1), (1, 2)))
        weights = ((across * x + down * y) // period & 1) * 256
    elif kind == "checker":
        weights = ((x // period + y // period) & 1) * 256
    elif kind == "dots":
        half = period // 2
        weights = ((x % period - half) ** 2 + (y % period - half) ** 2 <= (period // 3) ** 2) * 256
    elif kind == "noise":
        block = dice.between(1, 3)
        coarse = dice.octets(-(-height // block), -(-width // block)).astype(np.int64)
        weights = coarse.repeat(block, 0).repeat(block, 1)[:height, :width]
    elif kind == "gradient":
        across, down = dice.pick(((1, 0), (0, 1), (1, 1)))
        weights = (across * x + down * y) * 256 // (across * width + down * height)
    else:
        weights = np.zeros((1, 1), np.int64)
    return np.broadcast_to(weights, (height, width))


def mix(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Colours (..., 3) between the two, for weights (...) from 0 to 256."""
    return (first * (256 - weights[..., None]) + second * weights[..., None]) >> 8
