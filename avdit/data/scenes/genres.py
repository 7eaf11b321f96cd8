"""The ten dance genres of AIST++ as they are drawn: poses and how they follow each other, dress and place.

AIST++ films all genres in one white studio and everyday clothes. Here each has the dress and the place that go with it,
so that who sees a clip without its sound can name the genre before the first step: lockers wear white gloves,
breakers tracksuits on a street, ballet jazz has leotards and a studio.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

Pair = tuple[float, float]
Colour = tuple[float, float, float]

CLOTH: dict[str, Colour] = {
    "red": (0.85, 0.2, 0.2),
    "blue": (0.2, 0.4, 0.85),
    "yellow": (0.95, 0.75, 0.2),
    "white": (0.9, 0.9, 0.9),
    "green": (0.2, 0.65, 0.4),
    "purple": (0.6, 0.25, 0.7),
    "black": (0.12, 0.14, 0.2),
    "grey": (0.25, 0.25, 0.28),
    "denim": (0.2, 0.28, 0.45),
    "brown": (0.35, 0.28, 0.2),
}
SKIN: tuple[Colour, ...] = ((0.93, 0.76, 0.64), (0.8, 0.58, 0.43), (0.55, 0.37, 0.26), (0.38, 0.25, 0.18))
HAIR: tuple[Colour, ...] = ((0.08, 0.06, 0.05), (0.3, 0.18, 0.1), (0.6, 0.45, 0.25))
PINK, BLUE, GREEN, AMBER, VIOLET = (1.0, 0.3, 0.5), (0.3, 0.6, 1.0), (0.5, 1.0, 0.5), (1.0, 0.8, 0.4), (0.7, 0.4, 1.0)


@dataclass(frozen=True)
class Pose:
    """Directions of the limbs in degrees from straight down, positive to the right of the picture.

    Pairs are (upper, lower) of a limb. ``turn`` rotates about the upright axis, ``tilt`` in the picture's plane;
    ``lift`` raises the lowest point off the floor by a share of the body's height.
    """

    left_arm: Pair = (-12, -8)
    right_arm: Pair = (12, 8)
    left_leg: Pair = (-6, -4)
    right_leg: Pair = (6, 4)
    lean: float = 0
    turn: float = 0
    tilt: float = 0
    lift: float = 0

    def mirrored(self) -> "Pose":
        def flip(pair: Pair) -> Pair:
            return -pair[0], -pair[1]

        return Pose(
            flip(self.right_arm), flip(self.left_arm), flip(self.right_leg), flip(self.left_leg),
            -self.lean, -self.turn, -self.tilt, self.lift,
        )  # fmt: skip

    def vector(self) -> Tensor:
        """All values (12,)."""
        values = []
        for part in fields(self):
            value = getattr(self, part.name)
            values.extend(value if isinstance(value, tuple) else (value,))
        return torch.tensor(values, dtype=torch.float32)


@dataclass(frozen=True)
class Dress:
    """What the dancers of a genre wear: of each part one colour of several."""

    tops: tuple[str, ...]
    trousers: tuple[str, ...] = ()  # none: as the top
    shoes: tuple[str, ...] = ("white",)
    sleeves: str = "short"  # none, short or long
    legs: str = "long"  # or short
    gloves: bool = False  # white ones
    head: str = "hair"  # hair, cap or bun
    loose: float = 1.0  # width of the clothes


@dataclass(frozen=True)
class Place:
    """Where the dancers of a genre are seen."""

    kind: str  # studio, street, stage (lights that stay) or club (lights that follow the beat)
    tint: Colour  # of the wall; of stage and club of all that no light falls on
    lights: tuple[Colour, ...] = ()  # of the lamps of stage and club
    day: Pair = (1.0, 1.0)  # least and most light of a street


@dataclass(frozen=True)
class Style:
    """How a genre moves, what it wears and where it is danced."""

    poses: tuple[Pose, ...]
    sharpness: float  # share of the time between two poses that is spent still
    dress: Dress
    place: Place
    beats: float = 1.0  # between two poses
    bounce: float = 0.03  # dip on every beat, share of the body's height
    spin: float = 0.0  # turns a beat


STYLES = {
    "break": Style((
        Pose((-75, 40), (65, -60), (-28, 12), (24, -8), lean=10),
        Pose((-30, -20), (20, 40), (-75, -30), (70, 150), tilt=80),
        Pose((-15, -10), (25, 15), (-70, 20), (50, 130), tilt=180),
        Pose((-15, -5), (15, 5), (-85, -85), (85, 85), tilt=180),
        Pose((-60, 30), (40, -70), (10, -30), (-35, 5), lean=-8),
    ), 0.35, Dress(("blue", "green"), sleeves="long", head="cap", loose=1.2),
        Place("street", (0.5, 0.25, 0.2), day=(0.8, 1.0)), bounce=0.03),
    "pop": Style((
        Pose((-90, -180), (90, 0), (-8, -6), (8, 6), lean=6),
        Pose((-90, 0), (90, 180), (-14, -4), (8, 6), lean=-6),
        Pose((-45, -135), (45, 135), (-8, 0), (20, -10)),
        Pose((-90, -90), (90, 90), (-6, -4), (6, 4)),
        Pose((0, -90), (90, 180), (-20, 8), (10, 4), lean=8),
    ), 0.75, Dress(("white",), ("black",), sleeves="long", head="cap"),
        Place("stage", (0.05, 0.05, 0.1), (BLUE, VIOLET)), bounce=0.012),
    "lock": Style((
        Pose((-40, 70), (40, -70), (-26, 16), (26, -16)),
        Pose((-30, 40), (150, 152), (-10, -6), (14, 10), lean=-6),
        Pose((-110, -112), (110, 112), (-20, 12), (20, -12)),
        Pose((-30, 60), (50, -80), (-8, -4), (75, 70), lean=-8),
        Pose((-152, -150), (30, -50), (-16, 4), (16, -4), lean=6),
    ), 0.65, Dress(("yellow", "red"), ("black",), legs="short", gloves=True, head="cap", loose=1.15),
        Place("stage", (0.08, 0.03, 0.08), (AMBER,)), bounce=0.035),
    "waack": Style((
        Pose((-170, 140), (60, 165), (-8, -4), (16, 6), lean=8),
        Pose((-60, -170), (170, -140), (-16, -6), (8, 4), lean=-8),
        Pose((-100, 170), (100, -170), (-8, -4), (20, 8), lean=4),
        Pose((-30, 120), (165, 170), (-20, -8), (6, 2), lean=-10),
    ), 0.25, Dress(("purple", "red"), sleeves="none", loose=0.85),
        Place("club", (0.08, 0.03, 0.08), (PINK, VIOLET)), beats=0.5, bounce=0.02),
    "middle hip-hop": Style((
        Pose((-30, 60), (30, 80), (-24, 6), (10, 4), lean=9),
        Pose((-30, -80), (30, -60), (-10, -4), (24, -6), lean=-9),
        Pose((-50, 20), (50, -20), (-28, 14), (28, -14), lean=4),
        Pose((-20, -60), (60, 100), (-12, 0), (30, 4), lean=-6),
    ), 0.2, Dress(("white", "red"), ("denim",), ("red", "white"), sleeves="long", head="cap", loose=1.35),
        Place("street", (0.45, 0.4, 0.36), day=(0.7, 0.95)), bounce=0.065),
    "LA-style hip-hop": Style((
        Pose((-120, -60), (60, -40), (-30, 10), (16, 4), lean=8, turn=25),
        Pose((-60, 70), (130, 60), (-14, -4), (32, -12), lean=-8, turn=-25),
        Pose((-95, -20), (95, 20), (-34, 18), (34, -18)),
        Pose((-150, -100), (20, 80), (-12, -6), (40, 30), lean=-10),
        Pose((-40, 90), (150, 110), (-32, 10), (10, 2), lean=10),
    ), 0.5, Dress(("red", "green"), ("black", "grey"), legs="short", head="cap", loose=1.25),
        Place("studio", (0.62, 0.68, 0.72)), beats=0.5, bounce=0.05),
    "house": Style((
        Pose((-40, -70), (35, 60), (22, -8), (-24, 6)),
        Pose((-60, -30), (55, 40), (-36, -4), (30, 60)),
        Pose((-35, -60), (40, 70), (-30, -62), (34, 4)),
        Pose((-50, -80), (60, 40), (-10, -60), (12, 10), lift=0.03),
    ), 0.1, Dress(("yellow", "white"), ("denim",), ("green", "white"), loose=1.1),
        Place("club", (0.04, 0.06, 0.09), (GREEN, BLUE)), beats=0.5, bounce=0.055),
    "krump": Style((
        Pose((-60, -150), (95, 95), (-34, 6), (34, -6), lean=-14),
        Pose((-95, -95), (60, 150), (-34, 6), (34, -6), lean=14),
        Pose((-120, -160), (120, 160), (-40, 14), (40, -14), lean=-4),
        Pose((-30, 30), (30, -30), (-40, 20), (65, -5), lean=10),
        Pose((-80, 20), (80, -20), (-44, 22), (44, -22)),
    ), 0.55, Dress(("yellow", "red"), ("black", "brown"), ("red", "white"), sleeves="none", loose=1.35),
        Place("street", (0.4, 0.3, 0.26), day=(0.45, 0.65)), beats=0.5, bounce=0.05),
    "street jazz": Style((
        Pose((-60, 60), (150, 150), (-6, -2), (22, 8), lean=-10),
        Pose((-150, -30), (60, -60), (-22, -8), (6, 2), lean=10),
        Pose((-90, -90), (60, -60), (-4, -2), (100, 95), lean=-10),
        Pose((-165, -170), (90, 92), (-24, 2), (12, 4), turn=35),
        Pose((-70, 80), (70, -80), (-18, -6), (18, 6), lean=6),
    ), 0.5, Dress(("blue", "purple"), ("black",), ("red",), head="bun", loose=0.8),
        Place("stage", (0.04, 0.06, 0.09), (PINK,)), bounce=0.02),
    "ballet jazz": Style((
        Pose((-110, -100), (100, 110), (-2, 0), (92, 92), lean=-22),
        Pose((-150, 165), (150, -165), (-2, 0), (35, -60), turn=180),
        Pose((-95, -100), (95, 100), (-80, -82), (80, 82), lift=0.2),
        Pose((-60, -70), (140, 165), (-24, 14), (24, -14)),
        Pose((-160, -170), (80, 90), (-10, -6), (60, 62), lean=8),
    ), 0.08, Dress(("purple", "white"), sleeves="none", head="bun", loose=0.65),
        Place("studio", (0.8, 0.72, 0.66)), bounce=0.0, spin=0.35),
}  # fmt: skip

GENRES = tuple(STYLES)
