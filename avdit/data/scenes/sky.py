"""Scenes of the sky: rain, thunder and wind."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from avdit.data.scenes.base import (
    Clip,
    Dice,
    Event,
    add_at,
    band,
    colour,
    decay,
    filtered_noise,
    fractal_noise,
    frame_times,
    limit,
    pixel_grid,
    sample_times,
    shown,
    stamp,
    window,
)
from avdit.geometry import ClipGeometry


def ridge(dice: Dice, geometry: ClipGeometry, level: float, rough: float) -> Tensor:
    """Height of a line of hills (1, W), as a share of the picture from the top."""
    profile = F.interpolate(dice.rand(1, 1, 7), geometry.width, mode="linear", align_corners=True)
    fine = F.interpolate(dice.rand(1, 1, 40), geometry.width, mode="linear", align_corners=True)
    return level + rough * (profile[0] - 0.5) + 0.12 * rough * (fine[0] - 0.5)


def land(dice: Dice, geometry: ClipGeometry, sky: Tensor, tint: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """Hills over ``sky`` (3, 1, H, W) that darken towards the viewer; returns the picture and the ground's mask."""
    _, y = pixel_grid(geometry, dice.device)
    picture, ground = sky, torch.zeros_like(y)
    level = dice.uniform(0.5, 0.66)
    for depth in range(3):
        edge = ridge(dice, geometry, level + 0.09 * depth, 0.16)
        mask = ((y - edge) * geometry.height).clamp(0, 1)
        texture = 0.75 + 0.5 * fractal_noise(dice, *y.shape, cells=16, octaves=3)
        shade = colour(tint, dice.device) * (1.15 - 0.25 * depth) * texture
        haze = sky[:, :, geometry.height // 3].mean(-1)[..., None, None]
        picture = torch.lerp(picture, shade * (0.6 + 0.2 * depth) + haze * (0.4 - 0.2 * depth), mask)
        ground = torch.maximum(ground, mask)
    return picture, ground


def scroll(texture: Tensor, shifts: list[int]) -> Tensor:
    """Windows of half the width of ``texture`` (H, 2W) that start at each of ``shifts``: (F, H, W)."""
    width = texture.shape[1] // 2
    return torch.stack([texture[:, s % width : s % width + width] for s in shifts])


def raining(dice: Dice, geometry: ClipGeometry) -> Clip:
    """Slanting rain at three depths over land, with splashes on wet ground; hiss and drops."""
    height, width, frames = geometry.height, geometry.width, geometry.frames
    x, y = pixel_grid(geometry, dice.device)
    light = dice.uniform(0.35, 0.8)
    top, low = colour((0.45, 0.5, 0.58), dice.device) * light, colour((0.72, 0.74, 0.76), dice.device) * light
    clouds = fractal_noise(dice, height, width, cells=3, octaves=5)
    sky = torch.lerp(top, low, (y * 1.4 + (clouds - 0.5)).clamp(0, 1))
    tint = dice.choice([(0.16, 0.26, 0.14), (0.22, 0.22, 0.2), (0.2, 0.25, 0.24)])
    scene, ground = land(dice, geometry, sky, tuple(c * (0.5 + light) for c in tint))
    scene = scene + ground * (y - 0.7).clamp(0) * 0.8 * low * dice.uniform(0.3, 1.0)
    intensity, slant = dice.uniform(0.35, 1.0), dice.uniform(-0.35, 0.35)
    rain = torch.zeros(frames, height, width, device=dice.device)
    for depth, (thick, length) in enumerate(((1.2, 18), (1.8, 30), (2.6, 48))):
        count = int((70, 42, 20)[depth] * (0.4 + intensity))
        speed = height * (4.0 + 1.8 * depth) / geometry.fps
        left, start = dice.rand(count) * 1.4 - 0.2, dice.rand(count) * (height + length)
        fall = (start + speed * torch.arange(frames, device=dice.device).unsqueeze(1)) % (height + length) - length
        rows = torch.arange(length, device=dice.device)
        py = (fall.unsqueeze(-1) + rows).round().long()  # (F, count, length)
        px = left.unsqueeze(-1) * width + slant * (py - height / 2)
        for dx in range(math.ceil(thick)):
            column = (px + dx).round().long()
            inside = (py >= 0) & (py < height) & (column >= 0) & (column < width)
            f = torch.arange(frames, device=dice.device).view(-1, 1, 1).expand_as(py)
            glow = (0.25 + 0.22 * depth) * torch.sin(math.pi * (rows + 1) / (length + 1)).expand_as(py)
            # The brightest of crossing streaks wins, whichever is drawn first.
            cell = (f[inside] * height + py[inside]) * width + column[inside]
            rain.view(-1).scatter_reduce_(0, cell, glow[inside], "amax")
    # Rings that spread where drops meet the wet ground.
    rings = torch.zeros_like(rain)
    for _ in range(int(10 + 20 * intensity)):
        cx, cy, born = dice.uniform(), dice.uniform(0.78, 0.99), dice.integer(0, frames - 1)
        for age in range(min(3, frames - born)):
            radius = 0.012 + 0.014 * age
            reach = radius + 0.02
            rows, columns = window(cy - reach / 2.6, cy + reach / 2.6, height), window(cx - reach, cx + reach, width)
            away = ((x[:1, columns] - cx).square() + ((y[rows, :1] - cy) * 2.6).square()).sqrt()
            ring = 0.35 * (1 - age / 3) * torch.exp(-((away - radius) / 0.006).square())
            rings[born + age, rows, columns] += ring
    picture = scene + (rain + rings).clamp(0, 0.8) * (0.6 + 0.4 * light)

    wash = filtered_noise(dice, geometry, band(900, 6500)) * (0.05 + 0.09 * intensity)
    audio = wash + filtered_noise(dice, geometry, band(150, 900)) * 0.02 * intensity
    events, rate = [], geometry.sampling_rate
    for _ in range(int(25 + 70 * intensity)):
        time = dice.uniform(0, geometry.seconds)
        shape = decay(dice.uniform(0.001, 0.004), 0.02, rate)
        t = torch.arange(len(shape)) / rate
        drop = torch.sin(2 * math.pi * dice.uniform(1500, 5500) * t) * shape * dice.uniform(0.03, 0.16)
        add_at(audio, drop, int(time * rate))
        events.append(Event(time, "drop", dice.uniform(), 0.9))
    return Clip(shown(picture), limit(audio), sorted(events, key=lambda e: e.time))


def thunder(dice: Dice, geometry: ClipGeometry) -> Clip:
    """A stroke of lightning that lights clouds and land, and its crack and rumble."""
    height, width, frames = geometry.height, geometry.width, geometry.frames
    x, y = pixel_grid(geometry, dice.device)
    clouds = fractal_noise(dice, height, 2 * width, cells=4, octaves=6)
    night = colour(dice.choice([(0.1, 0.1, 0.16), (0.13, 0.1, 0.16), (0.08, 0.11, 0.15)]), dice.device)
    drift = dice.uniform(-5, 5)
    moving = scroll(clouds, [int(width / 2 + drift * k) for k in range(frames)])
    edge = ridge(dice, geometry, dice.uniform(0.7, 0.85), 0.2)
    ground = ((y - edge) * height).clamp(0, 1)
    time = dice.uniform(0.15, 0.9)
    strikes = [time] + ([time + dice.uniform(0.25, 0.5)] if dice.uniform() < 0.3 else [])
    bolt, cx = torch.zeros(height, width, device=dice.device), dice.uniform(0.2, 0.8)
    reach = int(edge.mean() * height)
    rows = torch.arange(reach, device=dice.device)
    path = cx + torch.cumsum(dice.randn(reach) * 0.011, 0) + dice.uniform(-0.1, 0.1) * rows / max(reach - 1, 1)
    branches = [(path, rows, 1.0)]
    for _ in range(dice.integer(2, 4)):
        origin, length = dice.integer(reach // 8, reach * 2 // 3), dice.integer(25, 70)
        lean = dice.uniform(0.004, 0.012) * dice.choice([-1, 1])
        side = path[origin] + torch.cumsum(dice.randn(length) * 0.008 + lean, 0)
        branches.append((side, origin + torch.arange(length, device=dice.device), 0.6))
    for line, at, strength in branches:
        inside = at < height
        near = strength * torch.exp(-((x[:1] - line[inside].unsqueeze(1)) * (width / 2.4)).square())
        bolt.scatter_reduce_(0, at[inside].unsqueeze(1).expand_as(near), near, "amax")
    glow_shape = torch.exp(-((x - cx) / 0.35).square()) * (1.1 - y)
    times = frame_times(geometry, dice.device)
    flash, stroke = torch.zeros(2, frames, device=dice.device)
    for moment in strikes:
        age = times - math.floor(moment * geometry.fps) / geometry.fps
        flash += (age >= -1e-4) * torch.exp(-age.clamp(0) / 0.13)
        stroke += ((age >= -1e-4) & (age < 0.15)).float()
    light = flash.clamp(max=1).view(-1, 1, 1)
    violet = colour((0.8, 0.78, 1.0), dice.device)
    picture = (0.5 + 1.2 * moving) * night
    picture += light * (0.25 + moving) * (0.35 + 0.65 * glow_shape) * violet
    below = window(edge.amin().item(), 1, height)
    earth = night * 0.25 + light * 0.22 * (0.6 + glow_shape[below]) * colour((0.35, 0.42, 0.4), dice.device)
    picture[:, :, below].lerp_(earth, ground[below])
    lit = bolt * (1 - ground) * colour((1.0, 0.98, 1.0), dice.device)
    struck = (stroke > 0).nonzero().flatten()
    picture[:, struck] += lit

    audio = filtered_noise(dice, geometry, band(120, 500)) * 0.012
    delay, rate = dice.uniform(0, 0.06), geometry.sampling_rate
    events = []
    for moment in strikes:
        seen = math.floor(moment * geometry.fps) / geometry.fps
        start = int((seen + delay) * rate)
        t = sample_times(geometry)
        crack = filtered_noise(dice, geometry, band(300, 4000)) * torch.exp(-t / dice.uniform(0.03, 0.09)) * 0.5
        rumble = filtered_noise(dice, geometry, band(35, 220)) * torch.exp(-t / dice.uniform(0.5, 1.0))
        roll = 0.6 + 0.4 * torch.sin(2 * math.pi * dice.uniform(3, 7) * t + dice.uniform(0, 6))
        add_at(audio, crack + rumble * roll * 0.45, start)
        events.append(Event(seen, "lightning", cx, 0.4))
    return Clip(shown(picture), limit(audio), events)


def wind_noise(dice: Dice, geometry: ClipGeometry) -> Clip:
    """Grass and a tree that lean with the gusts that are heard; leaves drift past."""
    height, width, frames = geometry.height, geometry.width, geometry.frames
    x, y = pixel_grid(geometry, dice.device)
    times = frame_times(geometry, dice.device)
    sound_times = sample_times(geometry)
    speed, phase, depth = dice.uniform(0.5, 1.1), dice.uniform(0, 6.28), dice.uniform(0.35, 0.5)

    def gust(t: Tensor) -> Tensor:
        slow = torch.sin(2 * math.pi * speed * t + phase)
        return 0.5 + depth * slow + 0.12 * torch.sin(2 * math.pi * 2.7 * speed * t + 2 * phase)

    force = gust(times).clamp(0, 1)
    day = dice.uniform(0.7, 1.0)
    top = colour(dice.choice([(0.35, 0.55, 0.85), (0.5, 0.6, 0.75), (0.85, 0.6, 0.45)]), dice.device) * day
    low = colour((0.85, 0.88, 0.9), dice.device) * day
    clouds = fractal_noise(dice, height, 2 * width, cells=4, octaves=5)
    moving = scroll(clouds, [int(5 * k + 10) for k in range(frames)])
    cover = ((moving - 0.5) * 4).clamp(0, 1)
    picture = torch.lerp(torch.lerp(top, low, y), colour((0.95, 0.95, 0.97), dice.device) * day, cover * 0.8)
    grass = colour(dice.choice([(0.35, 0.5, 0.15), (0.6, 0.52, 0.22), (0.25, 0.42, 0.2)]), dice.device) * day
    way = dice.choice([-1, 1])
    horizon = dice.uniform(0.58, 0.72)
    # Each row of blades is one strip of noise, sheared more towards its tips. All is drawn where it can be seen only.
    for layer in range(5):
        base = horizon + (1.08 - horizon) * (layer + 1) / 5
        tall = 0.07 + 0.05 * layer
        strip = F.interpolate(dice.rand(1, 1, 26 + 14 * (5 - layer)), width, mode="linear", align_corners=True)[0, 0]
        part = window(base - tall, base + 0.12, height)
        px, py = x[:1], y[part, :1]
        up = ((base - py) / tall).clamp(0, 1)
        wave = 0.25 * torch.sin(9 * px + 7 * times.view(-1, 1, 1) * way + layer)
        lean = way * (0.02 + 0.1 * force.view(-1, 1, 1) * (1 + wave)) * up.square()
        tips = strip[(((px - lean) % 1) * (width - 1)).long()]
        blades = ((tips * 1.1 - up) * 6).clamp(0, 1) * (py < base + 0.02) * (up < 0.999)
        blades = torch.maximum(blades, ((py > base - 0.01) & (py < base + 0.12)).float())
        shade = grass * (0.55 + 0.13 * layer) * (0.75 + 0.5 * tips)
        picture[:, :, part].lerp_(shade, blades)
    trunk, crown, tall = dice.uniform(0.2, 0.8), dice.uniform(0.14, 0.2), dice.uniform(0.3, 0.36)
    leaf = fractal_noise(dice, height, width, cells=14, octaves=3)
    rows = window(horizon - tall - 1.5 * crown, horizon + 0.06, height)
    columns = window(trunk - 1.6 * crown - 0.12, trunk + 1.6 * crown + 0.12, width)
    px, py, part = x[:1, columns], y[rows, :1], picture[:, :, rows, columns]
    up = ((horizon + 0.05 - py) / (tall + 0.12)).clamp(0, 1)
    sway = way * 0.12 * force.view(-1, 1, 1) * up.square()
    across, level = px - trunk - sway, py - horizon + tall  # from the middle of the crown
    texture = leaf[rows].expand(frames, -1, -1).gather(2, (((px - sway) % 1) * (width - 1)).long())
    # A trunk that is wider at its foot and bears two limbs; light comes from the left.
    half = 0.026 + 0.022 * (1 - up).square()
    limbs = (across.abs() - 0.5 * (0.12 - level).clamp(min=0)).abs() < 0.014
    wood = (across.abs() < half) & (level > 0) & (py < horizon + 0.06) | limbs & (level > -0.06) & (level < 0.12)
    bark = colour((0.26, 0.18, 0.12), dice.device) * (0.8 - 0.3 * (across / half).clamp(-1, 1))
    part.lerp_(bark, wood.float())
    away = torch.full_like(across, torch.inf)
    for side, high, size in ((0.0, -0.25, 0.85), (-0.55, 0.25, 0.6), (0.6, 0.2, 0.62)):
        lobe = ((across - side * crown) / size).square() + ((level - high * crown) / (0.9 * size)).square()
        away = torch.minimum(away, lobe / crown**2)
    lit = (0.85 - 0.35 * (level + 0.4 * across) / crown).clamp(0.4, 1.3)
    foliage = grass * 0.8 * (lit * (0.5 + texture))
    part.lerp_(foliage, ((1.2 - away + (texture - 0.5) * 1.8) * 5).clamp(0, 1))
    leaves = torch.zeros(frames, height, width, device=dice.device)
    each = torch.arange(frames, device=dice.device)
    for _ in range(dice.integer(4, 10)):
        px, py, rate = dice.uniform(), dice.uniform(0.15, 0.8), dice.uniform(0.4, 0.9)
        cx = (px + way * torch.cumsum(force, 0) / geometry.fps * rate) % 1 * width
        cy = (py + 0.04 * torch.sin(6 * times + px * 9)) * height
        wide, tall = 0.014 * width, 0.008 * height
        stamp(leaves, each, cx, cy, 8, lambda dx, dy, w=wide, h=tall: torch.exp(-2 * ((dx / w) ** 2 + (dy / h) ** 2)))
    picture.lerp_(colour((0.5, 0.3, 0.1), dice.device), leaves)

    heard = gust(sound_times).clamp(0, 1)
    low_band = filtered_noise(dice, geometry, band(90, 350)) * (0.05 + 0.2 * heard)
    centre = dice.uniform(350, 700)
    whistle = filtered_noise(dice, geometry, band(centre * 0.8, centre * 1.25)) * 0.2 * heard.square()
    rustle = filtered_noise(dice, geometry, band(1500, 5000)) * 0.035 * heard.square()
    audio = low_band + whistle + rustle
    peak = int(force.argmax())
    return Clip(shown(picture), limit(audio), [Event(peak / geometry.fps, "gust")])
