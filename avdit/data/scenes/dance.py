"""Dancers of the ten genres of AIST++: articulated figures that reach a pose on every beat of their music."""

import math

import torch
from torch import Tensor

from avdit.data.scenes.base import Clip, Dice, Event, colour, fractal_noise, frame_times, pixel_grid, shown, window
from avdit.data.scenes.genres import CLOTH, HAIR, SKIN, STYLES, Place, Style
from avdit.data.scenes.music import play
from avdit.geometry import ClipGeometry

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


def room(dice: Dice, geometry: ClipGeometry, place: Place, floor: float, pulse: Tensor) -> Tensor:
    """The empty place (3, F, H, W); its lights follow ``pulse`` (F,) in [0, 1] where it has any."""
    x, y = pixel_grid(geometry, dice.device)
    height, width = geometry.height, geometry.width
    grain = fractal_noise(dice, height, width, cells=8, octaves=4)
    depth = ((y - floor) / (1 - floor)).clamp(0, 1)
    below = ((y - floor) * height).clamp(0, 1)
    tint = colour(place.tint, dice.device)
    if place.kind == "studio":
        wall = tint * (0.75 + 0.35 * y) * (0.95 + 0.1 * grain)
        panes = (((x * dice.integer(3, 6)) % 1 - 0.5).abs() > 0.485).float()
        wall = wall * (1 - 0.35 * panes)
        boards = ((((x - 0.5) / (0.35 + depth)) * 14) % 1 - 0.5).abs()
        ground = colour((0.62, 0.44, 0.28), dice.device) * (0.7 + 0.3 * boards + 0.25 * (grain - 0.5))
        ground = ground * (0.75 + 0.35 * depth)
    elif place.kind == "street":
        rows, light = 22, dice.uniform(*place.day)
        line = (y * rows).floor()
        brick = ((((x * 11 + 0.5 * (line % 2)) % 1) - 0.5).abs() > 0.46) | (((y * rows) % 1) > 0.88)
        wall = (tint * (0.7 + 0.6 * grain)) * light
        wall = torch.lerp(wall, colour((0.6, 0.57, 0.52), dice.device) * light, 0.55 * brick.float())
        ground = colour((0.34, 0.34, 0.36), dice.device) * (0.7 + 0.6 * grain) * light
    else:
        wall = tint * (0.6 + 0.8 * grain) * (1.2 - 0.4 * y)
        ground = tint * 2.2 * (0.8 + 0.4 * grain) * (0.5 + 0.8 * depth)
    lit = torch.lerp(wall, ground, below).repeat(1, geometry.frames, 1, 1)
    if not place.lights:
        return lit
    for k in range(3 if place.kind == "club" else 2):
        hue = colour(dice.choice(place.lights), dice.device)
        top, foot = dice.uniform(0.05, 0.95), dice.uniform(0.3, 0.7)
        middle = top + (foot - top) * (y / floor).clamp(max=1.15)
        beam = torch.exp(-(((x - middle) / (0.02 + 0.1 * y)) ** 2)) * (1 - 0.5 * y)
        pool = torch.exp(-(((x - foot) / 0.22) ** 2) - ((y - floor - 0.1) / 0.07) ** 2)
        strength = 0.3 + 0.7 * pulse if place.kind == "club" else 0.75 + 0.25 * pulse
        strength = torch.roll(strength, k * 2) if place.kind == "club" and k else strength
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
    picture = room(dice, geometry, style.place, floor, pulse)
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

    dress = style.dress
    top, shoes = (colour(CLOTH[dice.choice(names)], dice.device) for names in (dress.tops, dress.shoes))
    trousers = colour(CLOTH[dice.choice(dress.trousers)], dice.device) if dress.trousers else top
    skin, hair = colour(dice.choice(SKIN), dice.device), colour(dice.choice(HAIR), dice.device)
    upper_arm, forearm = skin if dress.sleeves == "none" else top, top if dress.sleeves == "long" else skin
    shin = skin if dress.legs == "short" else trousers
    side = dice.choice([-1.0, 1.0])  # from where the light comes
    light = 0.8 + (0.25 * pulse if style.place.kind == "club" else 0.1 * pulse).view(-1, 1, 1)

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

    wide = 0.75 + 0.25 * dress.loose
    calf = 1.0 if dress.legs == "short" else dress.loose
    order = ("left", "right") if side > 0 else ("right", "left")
    for which in order:
        draw(f"{which}_hip", f"{which}_knee", 0.06 * wide, 0.047 * dress.loose, trousers)
        draw(f"{which}_knee", f"{which}_foot", 0.045 * calf, 0.036 * calf, shin)
        at["toe"] = at[f"{which}_foot"] + size * torch.tensor(
            [0.03 if which == "right" else -0.03, 0.008], device=dice.device
        )
        draw(f"{which}_foot", "toe", 0.034, 0.031, shoes)
    far, near = order

    def arm(which: str) -> None:
        draw(f"{which}_shoulder", f"{which}_elbow", 0.045 * wide, 0.039 * wide, upper_arm)
        draw(f"{which}_elbow", f"{which}_hand", 0.034, 0.031, forearm)
        if dress.gloves:
            draw(f"{which}_hand", f"{which}_hand", 0.042, 0.042, colour(CLOTH["white"], dice.device))
        elif dress.sleeves == "long":
            draw(f"{which}_hand", f"{which}_hand", 0.033, 0.033, skin)

    arm(far)
    draw("left_hip", "right_hip", 0.06 * wide, 0.06 * wide, trousers)
    draw("pelvis", "chest", 0.066 * wide, 0.09 * wide, top)
    draw("left_shoulder", "right_shoulder", 0.047 * wide, 0.047 * wide, top)
    draw("chest", "head", 0.034, 0.034, skin)
    at["crown"] = at["head"] + (at["head"] - at["chest"]) * 0.25
    draw("head", "crown", HEAD * 0.86, HEAD * 0.8, skin)
    at["brow"] = at["head"] + (at["head"] - at["chest"]) * 0.5
    draw("brow", "crown", HEAD * 0.66, HEAD * 0.72, top if dress.head == "cap" else hair)
    draw("head", "head", HEAD * 0.7, HEAD * 0.7, skin)
    if dress.head == "bun":
        at["bun"] = at["head"] + (at["head"] - at["chest"]) * 0.95
        draw("bun", "bun", HEAD * 0.4, HEAD * 0.4, hair)
    arm(near)
    length = geometry.frames / geometry.fps
    events = [Event(t, "beat", float(centre.mean()), stand) for t in hits if 0 <= t < length]
    return Clip(shown(picture), audio, events)
