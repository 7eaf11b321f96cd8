"""Dancers of the ten genres of AIST++: articulated figures that reach a pose on every beat of their music."""

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from avdit.data.scenes.base import Clip, Dice, Event, colour, fractal_noise, frame_times, pixel_grid, shown, window
from avdit.data.scenes.music import play
from avdit.geometry import ClipGeometry

Pair = tuple[float, float]


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
class Style:
    """How a genre moves and dresses."""

    poses: tuple[Pose, ...]
    sharpness: float  # share of the time between two poses that is spent still
    beats: float = 1.0  # between two poses
    bounce: float = 0.03  # dip on every beat, share of the body's height
    spin: float = 0.0  # turns a beat
    loose: float = 1.0  # width of the clothes
    head: str = "hair"  # hair, cap or bun
    places: tuple[str, ...] = field(default=("studio", "street"))


STYLES = {
    "break": Style((
        Pose((-75, 40), (65, -60), (-28, 12), (24, -8), lean=10),
        Pose((-30, -20), (20, 40), (-75, -30), (70, 150), tilt=80),
        Pose((-15, -10), (25, 15), (-70, 20), (50, 130), tilt=180),
        Pose((-15, -5), (15, 5), (-85, -85), (85, 85), tilt=180),
        Pose((-60, 30), (40, -70), (10, -30), (-35, 5), lean=-8),
    ), 0.35, bounce=0.03, loose=1.2, head="cap", places=("street", "street", "studio")),
    "pop": Style((
        Pose((-90, -180), (90, 0), (-8, -6), (8, 6), lean=6),
        Pose((-90, 0), (90, 180), (-14, -4), (8, 6), lean=-6),
        Pose((-45, -135), (45, 135), (-8, 0), (20, -10)),
        Pose((-90, -90), (90, 90), (-6, -4), (6, 4)),
        Pose((0, -90), (90, 180), (-20, 8), (10, 4), lean=8),
    ), 0.75, bounce=0.012, loose=1.0, head="cap", places=("stage", "studio")),
    "lock": Style((
        Pose((-40, 70), (40, -70), (-26, 16), (26, -16)),
        Pose((-30, 40), (150, 152), (-10, -6), (14, 10), lean=-6),
        Pose((-110, -112), (110, 112), (-20, 12), (20, -12)),
        Pose((-30, 60), (50, -80), (-8, -4), (75, 70), lean=-8),
        Pose((-152, -150), (30, -50), (-16, 4), (16, -4), lean=6),
    ), 0.65, bounce=0.035, loose=1.15, head="cap", places=("stage", "street")),
    "waack": Style((
        Pose((-170, 140), (60, 165), (-8, -4), (16, 6), lean=8),
        Pose((-60, -170), (170, -140), (-16, -6), (8, 4), lean=-8),
        Pose((-100, 170), (100, -170), (-8, -4), (20, 8), lean=4),
        Pose((-30, 120), (165, 170), (-20, -8), (6, 2), lean=-10),
    ), 0.25, beats=0.5, bounce=0.02, loose=0.85, places=("stage", "club")),
    "middle hip-hop": Style((
        Pose((-30, 60), (30, 80), (-24, 6), (10, 4), lean=9),
        Pose((-30, -80), (30, -60), (-10, -4), (24, -6), lean=-9),
        Pose((-50, 20), (50, -20), (-28, 14), (28, -14), lean=4),
        Pose((-20, -60), (60, 100), (-12, 0), (30, 4), lean=-6),
    ), 0.2, bounce=0.065, loose=1.35, head="cap", places=("street", "studio")),
    "LA-style hip-hop": Style((
        Pose((-120, -60), (60, -40), (-30, 10), (16, 4), lean=8, turn=25),
        Pose((-60, 70), (130, 60), (-14, -4), (32, -12), lean=-8, turn=-25),
        Pose((-95, -20), (95, 20), (-34, 18), (34, -18)),
        Pose((-150, -100), (20, 80), (-12, -6), (40, 30), lean=-10),
        Pose((-40, 90), (150, 110), (-32, 10), (10, 2), lean=10),
    ), 0.5, beats=0.5, bounce=0.05, loose=1.25, head="cap", places=("studio", "club")),
    "house": Style((
        Pose((-40, -70), (35, 60), (22, -8), (-24, 6)),
        Pose((-60, -30), (55, 40), (-36, -4), (30, 60)),
        Pose((-35, -60), (40, 70), (-30, -62), (34, 4)),
        Pose((-50, -80), (60, 40), (-10, -60), (12, 10), lift=0.03),
    ), 0.1, beats=0.5, bounce=0.055, loose=1.1, places=("club", "club", "studio")),
    "krump": Style((
        Pose((-60, -150), (95, 95), (-34, 6), (34, -6), lean=-14),
        Pose((-95, -95), (60, 150), (-34, 6), (34, -6), lean=14),
        Pose((-120, -160), (120, 160), (-40, 14), (40, -14), lean=-4),
        Pose((-30, 30), (30, -30), (-40, 20), (65, -5), lean=10),
        Pose((-80, 20), (80, -20), (-44, 22), (44, -22)),
    ), 0.55, beats=0.5, bounce=0.05, loose=1.35, places=("street", "street", "stage")),
    "street jazz": Style((
        Pose((-60, 60), (150, 150), (-6, -2), (22, 8), lean=-10),
        Pose((-150, -30), (60, -60), (-22, -8), (6, 2), lean=10),
        Pose((-90, -90), (60, -60), (-4, -2), (100, 95), lean=-10),
        Pose((-165, -170), (90, 92), (-24, 2), (12, 4), turn=35),
        Pose((-70, 80), (70, -80), (-18, -6), (18, 6), lean=6),
    ), 0.5, bounce=0.02, loose=0.8, head="bun", places=("studio", "stage")),
    "ballet jazz": Style((
        Pose((-110, -100), (100, 110), (-2, 0), (92, 92), lean=-22),
        Pose((-150, 165), (150, -165), (-2, 0), (35, -60), turn=180),
        Pose((-95, -100), (95, 100), (-80, -82), (80, 82), lift=0.2),
        Pose((-60, -70), (140, 165), (-24, 14), (24, -14)),
        Pose((-160, -170), (80, 90), (-10, -6), (60, 62), lean=8),
    ), 0.08, bounce=0.0, spin=0.35, loose=0.65, head="bun", places=("studio", "stage")),
}  # fmt: skip

GENRES = tuple(STYLES)
TORSO, UPPER_ARM, FOREARM, THIGH, SHIN = 0.29, 0.165, 0.16, 0.245, 0.25  # shares of the body's height
SHOULDER, HIP, NECK, HEAD = 0.1, 0.055, 0.085, 0.068


def choreography(
    dice: Dice, style: Style, beats: list[float], beat: float, times: Tensor
) -> tuple[Tensor, list[float]]:
    """Pose values (F, 12) at ``times`` (F,), and the times at which poses are reached."""
    hits = [beats[0] - beat + k * beat * style.beats for k in range(int((len(beats) + 2) / style.beats))]
    poses, last = [], -1
    for _ in hits:
        pick = dice.integer(0, len(style.poses) - 1)
        last = (pick + 1) % len(style.poses) if pick == last else pick
        pose = style.poses[last].mirrored() if dice.uniform() < 0.5 else style.poses[last]
        poses.append(pose.vector() + dice.randn(12).cpu() * torch.tensor([6.0] * 8 + [2, 4, 4, 0]))
    table, moments = torch.stack(poses).to(dice.device), torch.tensor(hits, device=dice.device)
    after = torch.searchsorted(moments, times.contiguous(), right=False).clamp(1, len(hits) - 1)
    phase = ((times - moments[after - 1]) / (moments[after] - moments[after - 1])).clamp(0, 1)
    moving = ((phase - style.sharpness) / (1 - style.sharpness)).clamp(0, 1)
    eased = (moving * moving * (3 - 2 * moving)).unsqueeze(1)
    values = table[after - 1] * (1 - eased) + table[after] * eased
    values[:, 9] += 360 * style.spin * (times - times[0]) / beat
    values[:, 11] = values[:, 11].clamp(min=0)
    return values, hits


def direction(degrees: Tensor) -> Tensor:
    """Unit vectors (F, 2) as (x, y down) of angles (F,) from straight down."""
    radians = torch.deg2rad(degrees)
    return torch.stack([radians.sin(), radians.cos()], 1)


def skeleton(values: Tensor, dip: Tensor) -> dict[str, Tensor]:
    """Joints (F, 2) in shares of the body's height, the floor at y = 0 and up negative.

    Args:
        values: Pose values (F, 12).
        dip: How far the knees give, (F,): the legs shorten by it.
    """
    la1, la2, ra1, ra2, ll1, ll2, rl1, rl2, lean, turn, tilt, lift = values.unbind(1)
    squeeze = torch.deg2rad(turn).cos()  # widths as they are seen
    across = torch.stack([squeeze, torch.zeros_like(squeeze)], 1)
    up = -direction(-lean)
    seen = torch.stack([0.25 + 0.75 * squeeze.abs(), torch.ones_like(squeeze)], 1)
    joints = {"pelvis": torch.zeros_like(up)}
    joints["chest"] = up * TORSO
    joints["head"] = joints["chest"] + up * (NECK + HEAD * 0.4)
    for side, sign, arm, leg in (("left", -1, (la1, la2), (ll1, ll2)), ("right", 1, (ra1, ra2), (rl1, rl2))):
        joints[f"{side}_shoulder"] = joints["chest"] + sign * SHOULDER * across
        joints[f"{side}_elbow"] = joints[f"{side}_shoulder"] + direction(arm[0]) * UPPER_ARM * seen
        joints[f"{side}_hand"] = joints[f"{side}_elbow"] + direction(arm[1]) * FOREARM * seen
        bend = torch.rad2deg(torch.acos((1 - dip / (THIGH + SHIN)).clamp(-1, 1)))
        joints[f"{side}_hip"] = sign * HIP * across
        joints[f"{side}_knee"] = joints[f"{side}_hip"] + direction(leg[0] + sign * bend) * THIGH * seen
        joints[f"{side}_foot"] = joints[f"{side}_knee"] + direction(leg[1] - sign * bend) * SHIN * seen
    c, s = torch.deg2rad(tilt).cos(), torch.deg2rad(tilt).sin()
    turned = {k: torch.stack([p[:, 0] * c - p[:, 1] * s, p[:, 0] * s + p[:, 1] * c], 1) for k, p in joints.items()}
    lowest = torch.stack([p[:, 1] + (HEAD if k == "head" else 0.03) for k, p in turned.items()]).amax(0)
    shift = torch.stack([torch.zeros_like(lowest), -lowest - lift], 1)
    return {k: p + shift for k, p in turned.items()}


def capsule(x: Tensor, y: Tensor, a: Tensor, b: Tensor, ra: float, rb: float) -> tuple[Tensor, Tensor]:
    """Distance (F, h, w) from the edge of a tapered limb, negative inside, and the place across it in [-1, 1].

    Args:
        x, y: Places, (1, w) and (h, 1), or of each frame (F, 1, w) and (F, h, 1).
        a, b: Ends (F, 2).
        ra, rb: Radii at the ends; all in the same unit.
    """
    d = (b - a).view(-1, 2, 1, 1)
    px, py = x - a[:, 0].view(-1, 1, 1), y - a[:, 1].view(-1, 1, 1)
    length = (d[:, 0] ** 2 + d[:, 1] ** 2).clamp(min=1e-6)
    along = ((px * d[:, 0] + py * d[:, 1]) / length).clamp(0, 1)
    qx, qy = px - along * d[:, 0], py - along * d[:, 1]
    radius = ra + (rb - ra) * along
    return (qx * qx + qy * qy).sqrt() - radius, (qx / radius).clamp(-1, 1)


def room(dice: Dice, geometry: ClipGeometry, place: str, floor: float, pulse: Tensor) -> Tensor:
    """The empty place (3, F, H, W); its lights follow ``pulse`` (F,) in [0, 1] where it has any."""
    x, y = pixel_grid(geometry, dice.device)
    height, width = geometry.height, geometry.width
    grain = fractal_noise(dice, height, width, cells=8, octaves=4)
    depth = ((y - floor) / (1 - floor)).clamp(0, 1)
    below = ((y - floor) * height).clamp(0, 1)
    if place == "studio":
        wall = colour(dice.choice([(0.78, 0.76, 0.72), (0.62, 0.68, 0.72), (0.8, 0.72, 0.66)]), dice.device)
        wall = wall * (0.75 + 0.35 * y) * (0.95 + 0.1 * grain)
        panes = (((x * dice.integer(3, 6)) % 1 - 0.5).abs() > 0.485).float()
        wall = wall * (1 - 0.35 * panes)
        boards = ((((x - 0.5) / (0.35 + depth)) * 14) % 1 - 0.5).abs()
        ground = colour((0.62, 0.44, 0.28), dice.device) * (0.7 + 0.3 * boards + 0.25 * (grain - 0.5))
        ground = ground * (0.75 + 0.35 * depth)
    elif place == "street":
        rows, light = 22, dice.uniform(0.45, 1.0)
        line = (y * rows).floor()
        brick = ((((x * 11 + 0.5 * (line % 2)) % 1) - 0.5).abs() > 0.46) | (((y * rows) % 1) > 0.88)
        tint = colour(dice.choice([(0.5, 0.25, 0.2), (0.45, 0.4, 0.36), (0.4, 0.3, 0.26)]), dice.device)
        wall = (tint * (0.7 + 0.6 * grain)) * light
        wall = torch.lerp(wall, colour((0.6, 0.57, 0.52), dice.device) * light, 0.55 * brick.float())
        ground = colour((0.34, 0.34, 0.36), dice.device) * (0.7 + 0.6 * grain) * light
    else:
        dark = colour(dice.choice([(0.05, 0.05, 0.1), (0.08, 0.03, 0.08), (0.04, 0.06, 0.09)]), dice.device)
        wall = dark * (0.6 + 0.8 * grain) * (1.2 - 0.4 * y)
        ground = dark * 2.2 * (0.8 + 0.4 * grain) * (0.5 + 0.8 * depth)
    lit = torch.lerp(wall, ground, below).repeat(1, geometry.frames, 1, 1)
    if place not in ("stage", "club"):
        return lit
    for k in range(3 if place == "club" else 2):
        hue = colour(
            dice.choice([(1.0, 0.3, 0.5), (0.3, 0.6, 1.0), (0.5, 1.0, 0.5), (1.0, 0.8, 0.4), (0.7, 0.4, 1.0)]),
            dice.device,
        )
        top, foot = dice.uniform(0.05, 0.95), dice.uniform(0.3, 0.7)
        middle = top + (foot - top) * (y / floor).clamp(max=1.15)
        beam = torch.exp(-(((x - middle) / (0.02 + 0.1 * y)) ** 2)) * (1 - 0.5 * y)
        pool = torch.exp(-(((x - foot) / 0.22) ** 2) - ((y - floor - 0.1) / 0.07) ** 2)
        strength = 0.3 + 0.7 * pulse if place == "club" else 0.75 + 0.25 * pulse
        strength = torch.roll(strength, k * 2) if place == "club" and k else strength
        lit.addcmul_((0.35 * beam + 0.5 * pool) * hue, strength.view(-1, 1, 1))
    return lit


def dance(dice: Dice, geometry: ClipGeometry, genre: str) -> Clip:
    """A dancer of ``genre`` who reaches a pose on every beat of the music."""
    style = STYLES[genre]
    audio, beats, beat = play(dice, geometry, genre)
    times = frame_times(geometry, dice.device)
    values, hits = choreography(dice, style, beats, beat, times)
    moments = torch.tensor(beats, device=dice.device)
    since = times.unsqueeze(1) - moments
    since = torch.where(since < -0.02, torch.inf, since.clamp(min=0)).amin(1)  # seconds since the last beat
    pulse = torch.exp(-since / 0.15)
    joints = skeleton(values, 0.01 + style.bounce * torch.cos(math.pi * (since / beat).clamp(max=1)).clamp(min=0))

    floor, size = dice.uniform(0.7, 0.75), dice.uniform(0.66, 0.76)
    stand = floor + dice.uniform(0.14, 0.19)
    sway = dice.uniform(0.0, 0.05) * torch.sin(2 * math.pi * times / (4 * beat) + dice.uniform(0, 6.3))
    centre = dice.uniform(0.42, 0.58) + sway
    place = dice.choice(style.places)
    picture = room(dice, geometry, place, floor, pulse)
    origin = torch.stack([centre, torch.full_like(centre, stand)], 1)
    at = {name: origin + size * point for name, point in joints.items()}

    # The shadow: the body's outline folded down onto the floor.
    slant = dice.uniform(-0.25, 0.25)
    folded = {}
    for name, point in at.items():
        rise = (stand - point[:, 1]).clamp(min=0)
        folded[name] = torch.stack([point[:, 0] + slant * rise, stand + 0.01 - 0.16 * rise], 1)
    points, reach = torch.cat(list(folded.values())), 0.08 * size
    (left, upper), (right, lower) = (points.amin(0) - reach).tolist(), (points.amax(0) + reach).tolist()
    rows, columns = window(upper, lower, geometry.height), window(left, right, geometry.width)
    x, y = pixel_grid(geometry, dice.device)
    view = picture[:, :, rows, columns]
    shadow = torch.zeros_like(view[0])
    for a, b, r in (("pelvis", "head", 0.05), ("left_hip", "left_foot", 0.04), ("right_hip", "right_foot", 0.04)):
        distance, _ = capsule(x[:1, columns], y[rows, :1], folded[a], folded[b], r * size, r * size)
        shadow = torch.maximum(shadow, (0.5 - distance / (0.05 * size)).clamp(0, 1))
    view *= 1 - 0.45 * shadow

    skin = colour(
        dice.choice([(0.93, 0.76, 0.64), (0.8, 0.58, 0.43), (0.55, 0.37, 0.26), (0.38, 0.25, 0.18)]), dice.device
    )
    bright = [
        (0.85, 0.2, 0.2),
        (0.2, 0.4, 0.85),
        (0.95, 0.75, 0.2),
        (0.9, 0.9, 0.9),
        (0.2, 0.65, 0.4),
        (0.6, 0.25, 0.7),
    ]
    dark = [(0.12, 0.14, 0.2), (0.25, 0.25, 0.28), (0.2, 0.28, 0.45), (0.35, 0.28, 0.2)]
    top, trousers = colour(dice.choice(bright), dice.device), colour(dice.choice(dark), dice.device)
    shoes, hair = (
        colour(dice.choice(bright), dice.device),
        colour(dice.choice([(0.08, 0.06, 0.05), (0.3, 0.18, 0.1), (0.6, 0.45, 0.25)]), dice.device),
    )
    side = dice.choice([-1.0, 1.0])  # from where the light comes
    light = 0.8 + (0.25 * pulse if place == "club" else 0.1 * pulse).view(-1, 1, 1)

    pixels, each = picture.view(3, -1), torch.arange(geometry.frames, device=dice.device).view(-1, 1, 1)

    def around(ends: Tensor, reach: float, axis: int, pixels: int) -> Tensor:
        """Indices (F, n) of the rows or columns round the ``ends`` (2, F, 2) of a limb in each frame."""
        low = ((ends[..., axis].amin(0) - reach) * pixels).floor().long() - 1
        high = ((ends[..., axis].amax(0) + reach) * pixels).long() + 2
        count = min(int((high - low).amax()), pixels)
        return low.clamp(0, pixels - count).unsqueeze(1) + torch.arange(count, device=low.device)

    def draw(a: str, b: str, ra: float, rb: float, tint: Tensor) -> None:
        ends, reach = torch.stack([at[a], at[b]]), max(ra, rb) * size
        rows = around(ends, reach, 1, geometry.height).unsqueeze(2)
        columns = around(ends, reach, 0, geometry.width).unsqueeze(1)
        x, y = (columns + 0.5) / geometry.width, (rows + 0.5) / geometry.height
        distance, across = capsule(x, y, at[a], at[b], ra * size, rb * size)
        cover = (0.5 - distance * geometry.height).clamp(0, 1)
        shade = light * (0.82 + 0.3 * side * across - 0.12 * across * across)
        places = ((each * geometry.height + rows) * geometry.width + columns).flatten()
        seen = pixels.index_select(1, places).view(3, *cover.shape)
        pixels.index_copy_(1, places, seen.lerp_(shade * tint, cover).flatten(1))

    wide = 0.75 + 0.25 * style.loose
    order = ("left", "right") if side > 0 else ("right", "left")
    for which in order:
        draw(f"{which}_hip", f"{which}_knee", 0.06 * wide, 0.047 * style.loose, trousers)
        draw(f"{which}_knee", f"{which}_foot", 0.045 * style.loose, 0.036 * style.loose, trousers)
        at["toe"] = at[f"{which}_foot"] + size * torch.tensor(
            [0.03 if which == "right" else -0.03, 0.008], device=dice.device
        )
        draw(f"{which}_foot", "toe", 0.034, 0.031, shoes)
    far, near = order

    def arm(which: str) -> None:
        draw(f"{which}_shoulder", f"{which}_elbow", 0.045 * wide, 0.039 * wide, top)
        draw(f"{which}_elbow", f"{which}_hand", 0.034, 0.031, skin)

    arm(far)
    draw("left_hip", "right_hip", 0.06 * wide, 0.06 * wide, trousers)
    draw("pelvis", "chest", 0.066 * wide, 0.09 * wide, top)
    draw("left_shoulder", "right_shoulder", 0.047 * wide, 0.047 * wide, top)
    draw("chest", "head", 0.034, 0.034, skin)
    at["crown"] = at["head"] + (at["head"] - at["chest"]) * 0.25
    draw("head", "crown", HEAD * 0.86, HEAD * 0.8, skin)
    at["brow"] = at["head"] + (at["head"] - at["chest"]) * 0.5
    draw("brow", "crown", HEAD * 0.66, HEAD * 0.72, top if style.head == "cap" else hair)
    draw("head", "head", HEAD * 0.7, HEAD * 0.7, skin)
    if style.head == "bun":
        at["bun"] = at["head"] + (at["head"] - at["chest"]) * 0.95
        draw("bun", "bun", HEAD * 0.4, HEAD * 0.4, hair)
    arm(near)
    length = geometry.frames / geometry.fps
    events = [Event(t, "beat", float(centre.mean()), stand) for t in hits if 0 <= t < length]
    return Clip(shown(picture), audio, events)
