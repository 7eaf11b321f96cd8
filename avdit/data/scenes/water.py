"""Scenes of water: splashes, squelching mud, bubbles under water and a waterfall."""

import math
from collections.abc import Callable

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
    discs,
    filtered_noise,
    fractal_noise,
    frame_times,
    limit,
    minnaert_hertz,
    pixel_grid,
    sample_times,
    shown,
    stamp,
    tone,
    window,
)
from avdit.geometry import ClipGeometry


def bubble_sound(dice: Dice, radius: float, loud: float, rate: int) -> Tensor:
    """A bubble's ring: a decaying sine at Minnaert's pitch that rises a little."""
    shape = decay(dice.uniform(0.02, 0.05), 0.16, rate)
    t = torch.arange(len(shape)) / rate
    return tone(minnaert_hertz(radius) * (1 + 2.5 * t), rate) * shape * loud * (1 - torch.exp(-t / 0.002))


def waves(phases: Tensor, speeds: Tensor, times: Tensor) -> Tensor:
    """The sum (F, H, W) of N travelling waves, the sines of ``phases`` (N, H, W) - ``speeds`` (N,) * ``times`` (F,)."""
    turn = times.unsqueeze(1) * speeds
    # sin(a - b) = sin a cos b - cos a sin b: two products of matrices in place of a sine for each pixel and frame.
    return torch.einsum("fn,nhw->fhw", torch.cat([turn.cos(), -turn.sin()], 1), torch.cat([phases.sin(), phases.cos()]))


CROWN_SECONDS, JET_SECONDS = 0.55, 0.74  # how long they stand over the water


def crown(age: Tensor, across: Tensor, up: Tensor, size: float, teeth: Tensor, pixel: float) -> Tensor:
    """Opacity (F, h, w) of the sheet of water that a splash throws up: a ring that widens and falls back.

    Args:
        age: Seconds since the stone struck, below :data:`CROWN_SECONDS`, (F, 1, 1).
        across, up: Of every pixel from where it struck, as shares of the picture, (1, w) and (h, 1).
        size: Of the splash, as a share of the picture.
        teeth: How far each column of pixels reaches above or below the sheet's mean height, (w,), about 0.
        pixel: Height of a pixel, as a share of the picture.
    """
    radius = size * (0.3 + 0.75 * (age / 0.3).sqrt().clamp(max=1.2))
    tall = size * (1.15 * torch.sin(math.pi * ((age + 0.13) / 0.68).clamp(0, 1)))
    u = (across / radius).clamp(-1, 1)
    rim = 0.28 * radius * (1 - u.square()).sqrt()
    # The sheet leans outwards, so that it is wider where it is higher.
    inside = ((1 - (across / (radius + 0.22 * up.clamp(min=0))).abs()) * 12).clamp(0, 1)
    sheets = []
    for foot, clear in ((rim, 0.55), (-rim, 0.85)):  # the far side of the ring, then the near one
        level = up - foot
        # Thrown outwards: the sheet's edges stand higher than its middle, which the eye looks through.
        top = tall * (0.55 + 0.45 * u.square() + 0.5 * teeth)
        share = (level / top.clamp(min=1e-4)).clamp(0, 1)
        body = ((top - level) / (3 * pixel)).clamp(0, 1) * ((level + 0.004) / (2 * pixel)).clamp(0, 1)
        sheets.append(body * inside * (0.35 + 0.65 * (share.pow(3) + u.square().square()).clamp(max=1)) * clear)
    return torch.maximum(*sheets)


def brighten(canvas: Tensor, part: tuple[slice, slice, slice], values: Tensor) -> None:
    """Where ``values`` are above ``part`` of ``canvas`` (F, H, W) they take its place."""
    torch.maximum(canvas[part], values, out=canvas[part])


def splashing_water(dice: Dice, geometry: ClipGeometry) -> Clip:
    """Stones strike a lake: crowns and jets of water, drops, spray, foam and growing rings; slaps and bubbles."""
    height, width, frames, rate = geometry.height, geometry.width, geometry.frames, geometry.sampling_rate
    x, y = pixel_grid(geometry, dice.device)
    times = frame_times(geometry, dice.device)
    shore = dice.uniform(0.22, 0.36)
    deep, pale = dice.choice(
        [
            ((0.05, 0.25, 0.35), (0.65, 0.8, 0.85)),
            ((0.06, 0.2, 0.3), (0.9, 0.75, 0.6)),
            ((0.08, 0.3, 0.25), (0.75, 0.85, 0.8)),
        ]
    )
    deep, pale = colour(deep, dice.device), colour(pale, dice.device)
    bank = colour((0.16, 0.24, 0.14), dice.device) * (0.6 + 0.8 * fractal_noise(dice, height, width, cells=12))
    sky = torch.lerp(pale * 0.85, pale, (y / shore).clamp(0, 1))
    edge = shore - 0.1 + 0.06 * fractal_noise(dice, height, width, cells=5)[:1]
    picture = torch.lerp(sky, bank, ((y - edge) * height / 3).clamp(0, 1)).repeat(1, frames, 1, 1)
    lake = window(shore, 1, height)
    far = ((y - shore) / (1 - shore)).clamp(min=0)[lake, :1]  # 0 at the shore, 1 at the viewer
    scale = 0.25 + far
    # Waves of several lengths, whose crests the bent phase breaks into pieces.
    bent = 5 * (fractal_noise(dice, height, width, cells=6)[lake] - 0.5)
    phases, speeds = [], []
    for _ in range(4):
        k, direction, speed = dice.uniform(14, 45), dice.uniform(-0.5, 0.5), dice.uniform(2, 5)
        phases.append(k * (far.sqrt() * 3 + direction * (x[:1] - 0.5) / scale) + bent)
        speeds.append(speed)
    surface = 0.1 * waves(torch.stack(phases), torch.tensor(speeds, device=dice.device), times)
    audio = filtered_noise(dice, geometry, band(200, 1200)) * 0.012
    white, foam = torch.zeros(2, frames, height, width, device=dice.device)
    events = []
    froth = fractal_noise(dice, height, width, cells=16, octaves=3)
    moments = sorted(dice.uniform(0.1, 1.2) for _ in range(dice.integer(1, 2)))
    for moment in moments:
        first = math.floor(moment * geometry.fps)
        struck = first / geometry.fps
        cx, cy, power = dice.uniform(0.25, 0.75), dice.uniform(shore + 0.33, 0.88), dice.uniform(0.85, 1.2)
        depth = 0.25 + (cy - shore) / (1 - shore)
        size = 0.29 * depth * power
        since = (times[first:] - struck).clamp(min=0).view(-1, 1, 1)
        across, up = x[:1] - cx, cy - y[:, :1]
        away = ((across / scale).square() + (up[lake] * 2.4 / scale).square()).sqrt()
        ahead = away - 0.42 * since
        ring = torch.sin(40 * ahead) * torch.exp(-(ahead / 0.11).square())
        surface[first:] += ring * torch.exp(-since / 0.8) * 0.9 * power
        teeth = F.interpolate(dice.rand(1, 1, 1, 28) - 0.5, (1, width), mode="bicubic", align_corners=True)[0, 0, 0]
        # Sheet and jet are drawn where they can be seen only.
        rows = window(cy - 1.9 * size, cy + 0.4 * size, height)
        columns = window(cx - 1.6 * size, cx + 1.6 * size, width)
        age, over = since[: math.ceil(CROWN_SECONDS * geometry.fps)], up[rows]
        sheet = crown(age, across[:, columns], over, size, teeth[columns], 1 / height)
        brighten(white, (slice(first, first + len(age)), rows, columns), sheet)
        # The jet that shoots up where the hole in the water closes.
        age, columns = since[: math.ceil(JET_SECONDS * geometry.fps)], window(cx - 0.2 * size, cx + 0.2 * size, width)
        rise = size * 1.5 * torch.sin(math.pi * ((age + 0.06) / 0.8).clamp(0, 1))
        thick = size * 0.15 * (1.25 - (over / rise.clamp(min=1e-3)).clamp(0, 1))
        jet = ((thick - across[:, columns].abs()) * width / 2).clamp(0, 1) * ((rise - over) * height / 3).clamp(0, 1)
        brighten(white, (slice(first, first + len(age)), rows, columns), 0.9 * jet * (over > 0))
        count = 64
        angle, lift = dice.rand(count) * 2 * math.pi, 0.9 + 1.1 * dice.rand(count)
        reach, drop = 0.15 + 0.6 * dice.rand(count), (0.004 + 0.013 * dice.rand(count).square()) * (0.5 + depth)
        a = (times - struck + 0.05).unsqueeze(1)
        px = cx + torch.cos(angle) * reach * a * depth
        py = cy + (torch.sin(angle) * reach * 0.3 * a - (lift * power * a - 2.8 * a * a)) * depth
        alive = (a >= 0.045) & (py <= cy + 0.03)
        f, k = alive.nonzero(as_tuple=True)
        discs(white, f, px[f, k], py[f, k], drop[k])
        # Spray hangs over the place and drifts apart, foam stays on the water.
        spread = size * (0.7 + 0.9 * since)
        mist = torch.exp(-(across / spread).square()) * torch.exp(-((0.7 * size - up) / (0.8 * spread)).square())
        brighten(foam, (slice(first, None), slice(None), slice(None)), 0.4 * torch.exp(-since / 0.35) * mist)
        later = math.ceil(0.09 * geometry.fps)
        since = since[later:]
        patch = torch.exp(-2 * (away / (0.16 + 0.12 * since)).square()) * ((froth[lake] - 0.42) * 6).clamp(0, 1)
        brighten(foam, (slice(first + later, None), lake, slice(None)), 0.8 * torch.exp(-since / 0.9) * patch)
        start = int(struck * rate)
        slap = filtered_noise(dice, geometry, band(400, 5000))[: rate // 2]
        slap = slap * torch.exp(-torch.arange(len(slap)) / rate / dice.uniform(0.05, 0.12)) * 0.28 * power
        add_at(audio, slap, start)
        for _ in range(dice.integer(5, 10)):
            bubble = bubble_sound(dice, dice.uniform(0.0022, 0.008), dice.uniform(0.1, 0.3), rate)
            add_at(audio, bubble, start + int(dice.uniform(0.02, 0.35) * rate))
        events.append(Event(struck, "splash", cx, cy))
    slope = torch.diff(surface, dim=1, prepend=surface[:, :1]) * 3 / scale
    water = torch.lerp(deep, pale, (0.42 - 0.25 * far + slope + 0.1 * surface).clamp(0, 1))
    picture[:, :, lake].lerp_(water, ((y - shore) * height).clamp(0, 1)[lake])
    picture.lerp_((1 + pale) / 2, foam.clamp(0, 1))  # lit by the sky
    picture.lerp_(colour((0.97, 0.97, 0.97), dice.device), white.clamp(0, 1))
    return Clip(shown(picture), limit(audio), events)


def squishing_water(dice: Dice, geometry: ClipGeometry) -> Clip:
    """A boot presses into wet mud again and again: squelches, a glistening dent and drops to the sides."""
    height, width, rate = geometry.height, geometry.width, geometry.sampling_rate
    x, y = pixel_grid(geometry, dice.device)
    times = frame_times(geometry, dice.device)
    mud = colour(dice.choice([(0.36, 0.25, 0.15), (0.32, 0.29, 0.24), (0.28, 0.2, 0.12)]), dice.device)
    rough = fractal_noise(dice, height, width, cells=6, octaves=5)
    level = dice.uniform(0.6, 0.72)
    period, first = dice.uniform(0.45, 0.7), dice.uniform(0.1, 0.3)
    presses = [first + k * period for k in range(4) if first + k * period < geometry.seconds - 0.15]
    phase = ((times - first) / period).view(-1, 1, 1)
    lift = (0.5 - 0.5 * torch.cos(2 * math.pi * phase)).pow(0.8) * 0.24
    cx, sole = dice.uniform(0.35, 0.65), dice.uniform(0.16, 0.22)
    away = ((x - cx) / sole).square() + ((y - level - 0.06) / 0.07).square()
    press = 1 - lift / 0.24
    shine = ((rough - 0.58).clamp(0) * 5).clamp(max=0.8)
    wall = colour(dice.choice([(0.42, 0.46, 0.4), (0.5, 0.48, 0.45), (0.35, 0.42, 0.48)]), dice.device)
    ground = ((y - level + 0.12 * (rough - 0.5)) * height / 4).clamp(0, 1)
    base = torch.lerp(wall * (0.6 + 0.5 * y), mud * (0.45 + 1.0 * rough), ground)
    base = base + ground * shine * colour((0.8, 0.85, 0.9), dice.device) * 0.4 - ground * 0.3 * torch.exp(-away) * mud
    bulge = ground * torch.exp(-(away - 1.6).square() / 0.3) * mud * 0.4  # where the boot presses mud aside
    picture = base + bulge * press
    boot = colour(
        dice.choice([(0.75, 0.62, 0.1), (0.15, 0.35, 0.2), (0.6, 0.12, 0.12), (0.12, 0.15, 0.35)]), dice.device
    )
    bottom = level + 0.09 - lift
    columns = window(cx - 0.05 - sole, cx + 0.03 + sole, width)
    across, py = x[:1, columns] - cx, y[:, :1]
    foot = (1 - ((across - 0.03) / sole).abs().pow(4) - ((py - bottom + 0.055) / 0.06).abs().pow(4)) > 0
    leg = ((across + 0.05) / (sole * 0.62)).abs().lt(1) & (py < bottom - 0.04) & (py > bottom - 0.55)
    gloss = 0.75 + 0.5 * torch.exp(-((across + 0.1) / 0.04).square())
    picture[..., columns].lerp_(boot * gloss, (foot | leg).float())
    picture[..., columns].lerp_(boot * 0.35, (foot & (py > bottom - 0.02)).float())
    spray, events = torch.zeros(len(times), height, width, device=dice.device), []
    audio = filtered_noise(dice, geometry, band(100, 500)) * 0.008
    for moment in presses:
        pressed = round(moment * geometry.fps) / geometry.fps
        events.append(Event(pressed, "squish", cx, level))
        way, up, out = dice.rand(22).round() * 2 - 1, 0.4 + 0.55 * dice.rand(22), 0.25 + 0.5 * dice.rand(22)
        size, a = 0.006 + 0.006 * dice.rand(22), (times - pressed + 0.05).unsqueeze(1)
        px, py = cx + way * (sole + out * a), level + 0.06 - up * a + 2.2 * a * a
        f, k = ((a > 0) & (a < 0.45)).expand_as(px).nonzero(as_tuple=True)
        discs(spray, f, px[f, k], py[f, k], size[k])
        length = int(dice.uniform(0.2, 0.32) * rate)
        t = torch.linspace(0, 1, length)
        low, high = dice.uniform(250, 450), dice.uniform(900, 1600)
        sweep = tone(high * (low / high) ** t, rate)
        grain = filtered_noise(dice, geometry, band(20, 90))[:length].abs()
        wet = filtered_noise(dice, geometry, band(300, 2200))[:length]
        shape = torch.sin(math.pi * t.sqrt()).clamp(min=0)
        add_at(audio, (0.35 * sweep * grain + 0.16 * wet * (0.3 + grain)) * shape, int(pressed * rate))
        for _ in range(3):
            pop = bubble_sound(dice, dice.uniform(0.004, 0.01), dice.uniform(0.1, 0.25), rate)
            add_at(audio, pop, int((pressed + dice.uniform(0.05, 0.3)) * rate))
    picture.lerp_(mud * 1.5 + 0.12, spray)
    return Clip(shown(picture), limit(audio), events)


def underwater_bubbling(dice: Dice, geometry: ClipGeometry) -> Clip:
    """Bubbles rise through light shafts; each rings at Minnaert's pitch as it leaves."""
    height, width, frames, rate = geometry.height, geometry.width, geometry.frames, geometry.sampling_rate
    x, y = pixel_grid(geometry, dice.device)
    times = frame_times(geometry, dice.device)
    top, low = dice.choice(
        [
            ((0.15, 0.7, 0.8), (0.0, 0.1, 0.3)),
            ((0.1, 0.55, 0.75), (0.0, 0.05, 0.25)),
            ((0.2, 0.7, 0.6), (0.0, 0.15, 0.2)),
        ]
    )
    water = torch.lerp(colour(top, dice.device), colour(low, dice.device), (y * dice.uniform(0.85, 1.15)).clamp(0, 1))
    lean, strips = dice.uniform(-0.5, 0.5), dice.rand(3, 1, 24)
    strips = F.interpolate(strips.unsqueeze(0).flatten(1, 2), width * 2, mode="linear", align_corners=True)[0]
    at = (((x - lean * y) * 0.8 + 0.3) * width).long().clamp(0, 2 * width - 9)
    drifting = torch.stack([strips[0].roll(-(k // 2)) * 0.5 + strips[1].roll(k) * 0.5 for k in range(frames)])
    shafts = ((drifting - 0.45).clamp(0) * 1.1)[:, at] * (1 - y)
    picture = water + shafts * colour((0.6, 0.9, 0.9), dice.device)
    caustic = fractal_noise(dice, height, width, cells=9, octaves=2)
    floor = ((y - dice.uniform(0.86, 0.95)) * 14).clamp(0, 1)
    sand, below = colour((0.25, 0.4, 0.42), dice.device) * (0.5 + caustic), window(0.86, 1, height)
    picture[:, :, below].lerp_(sand[:, :, below], floor[below])
    rim, light, dark = torch.zeros(3, frames, height, width, device=dice.device)
    audio = filtered_noise(dice, geometry, band(60, 320)) * 0.06
    sources = [dice.uniform(0.15, 0.85) for _ in range(dice.integer(1, 3))]
    events = []
    for _ in range(dice.integer(11, 19)):
        radius = 0.026 * 3.2 ** dice.uniform()  # few are large
        cx = dice.choice(sources) + dice.uniform(-0.14, 0.14)
        born, speed = dice.uniform(-1.8, geometry.seconds), 0.3 + 3 * radius + dice.uniform(0, 0.15)
        sway, pace, phase = dice.uniform(0.004, 0.02), dice.uniform(4, 9), dice.uniform(0, 6.28)
        age = times - born
        py = 0.95 - speed * age
        f = ((age >= 0) & (py >= -radius)).nonzero().flatten()
        # Large ones wobble: they are flattened now, and round again a moment later.
        flat = 1 + min(4 * radius, 0.3) * (0.6 + 0.4 * torch.sin(2 * pace * age + phase))
        bubbles((rim, light, dark), f, (cx + sway * torch.sin(pace * age + phase))[f], py[f], radius, flat[f])
        if born >= 0:
            sound = bubble_sound(dice, 0.0025 + radius * 0.11, 0.12 + radius * 6, rate)
            add_at(audio, sound, int(born * rate))
            events.append(Event(born, "bubble", cx, 0.95))
    # A bubble shows what is behind it upside down: the dark deep above, the light below.
    picture *= 1 - 0.45 * dark
    picture += light * (0.4 * colour(top, dice.device))
    picture.lerp_(colour((0.88, 1.0, 1.0), dice.device), rim.clamp(0, 1))
    return Clip(shown(picture), limit(audio), sorted(events, key=lambda e: e.time))


def bubbles(
    canvases: tuple[Tensor, Tensor, Tensor], frame: Tensor, cx: Tensor, cy: Tensor, radius: float, flat: Tensor
) -> None:
    """Draw one bubble in n frames into three canvases (F, H, W): rim and highlight, the light part, the dark part.

    Args:
        frame: The frames, (n,).
        cx, cy: Its middle in each, as shares of the picture, (n,).
        radius: As a share of the picture's width.
        flat: How many times as wide as tall it is in each, (n,).
    """
    if not len(frame):
        return
    _, height, width = canvases[0].shape
    r, wide = radius * width, flat.sqrt().view(-1, 1, 1)

    def away(dx: Tensor, dy: Tensor) -> Tensor:
        return ((dx / wide).square() + (dy * wide).square()).sqrt()

    def rim(dx: Tensor, dy: Tensor) -> Tensor:
        line = torch.exp(-((away(dx, dy) - r) / (1.5 + 0.06 * r)).square()) * 0.9
        spot = torch.exp(-((dx + 0.4 * r).square() + (dy + 0.4 * r).square()) / (0.2 * r + 0.6) ** 2)
        return torch.maximum(line, spot * 0.95)

    def part(side: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda dx, dy: (r - away(dx, dy) + 0.5).clamp(0, 1) * (0.15 + side * dy / r).clamp(0, 1)

    for canvas, shape in zip(canvases, (rim, part(1), part(-1)), strict=True):
        stamp(canvas, frame, cx * width, cy * height, math.ceil(1.2 * r) + 3, shape)


def waterfall_burbling(dice: Dice, geometry: ClipGeometry) -> Clip:
    """Water falls between rocks into a foaming pool; broadband noise with burbling bubbles."""
    height, width, frames, rate = geometry.height, geometry.width, geometry.frames, geometry.sampling_rate
    x, y = pixel_grid(geometry, dice.device)
    times = frame_times(geometry, dice.device)
    rough = fractal_noise(dice, height, width, cells=6, octaves=5)
    stone = colour(dice.choice([(0.32, 0.3, 0.28), (0.36, 0.3, 0.24), (0.26, 0.3, 0.3)]), dice.device)
    rocks = stone * (0.35 + 1.2 * rough)
    moss = ((fractal_noise(dice, height, width, cells=8) - 0.5) * 5).clamp(0, 1) * dice.uniform(0.3, 0.9)
    rocks = torch.lerp(rocks, colour((0.18, 0.36, 0.12), dice.device) * (0.5 + rough), moss)
    top = dice.uniform(0.05, 0.2)
    sky = colour((0.7, 0.82, 0.92), dice.device) * dice.uniform(0.75, 1.0)
    rocks = torch.lerp(rocks, sky, ((top - y + 0.08 * (rough - 0.5)) * 40).clamp(0, 1))
    picture = rocks.repeat(1, frames, 1, 1)
    cx, half, pool = dice.uniform(0.35, 0.65), dice.uniform(0.11, 0.22), dice.uniform(0.7, 0.8)
    spread = half * (1 + 0.35 * (y - top).clamp(0))
    inside = ((spread - (x - cx).abs() + 0.05 * (rough - 0.5)) * 40).clamp(0, 1) * ((y - top) * 60).clamp(0, 1)
    # Round and round, so that no edge falls with the water: two of eight rows before and after them, cut off again.
    strands = F.pad(dice.rand(1, 1, 8, 44), (0, 0, 2, 2), mode="circular")
    strands = F.interpolate(strands, (height * 3, width), mode="bicubic")[0, 0, height // 2 : -(height // 2)]
    speed = dice.uniform(0.16, 0.24) * height
    columns = window(cx - 1.35 * half - 0.05, cx + 1.35 * half + 0.05, width)
    across = (((x - cx) / spread * 0.5 + 0.5).clamp(0, 1) * (width - 1)).long()[:, columns]
    rows = (y * height).long()[:, columns]
    falling = torch.stack([strands[(rows - int(speed * k)) % (2 * height), across] for k in range(frames)])
    pale, shadow = colour((0.95, 0.98, 1.0), dice.device), colour((0.45, 0.6, 0.68), dice.device)
    fall = torch.lerp(shadow, pale, ((falling - 0.25) * 1.7).clamp(0, 1))
    picture[..., columns].lerp_(fall, inside[:, columns])
    below = window(pool, 1, height)
    far = ((y[below, :1] - pool) / (1 - pool)).clamp(min=0)
    phases, paces = [], []
    for _ in range(4):
        k, lean, pace = dice.uniform(18, 42), dice.uniform(-0.4, 0.4), dice.uniform(4, 8)
        phases.append(k * (far.sqrt() + lean * (x[:1] - cx)))
        paces.append(pace)
    wave = 0.25 * waves(torch.stack(phases), torch.tensor(paces, device=dice.device), times)
    green = colour(dice.choice([(0.1, 0.32, 0.32), (0.12, 0.3, 0.38), (0.16, 0.34, 0.24)]), dice.device)
    lake = torch.lerp(green, sky, (0.2 + 0.35 * wave).clamp(0, 1))
    picture[:, :, below].lerp_(lake, ((y[below] - pool) * 120).clamp(0, 1))
    # Mist rolls over the fall's foot.
    foot = window(pool - 0.2, pool + 0.2, height)
    mist = fractal_noise(dice, height, 2 * width, cells=7, octaves=4)[foot]
    rolling = torch.stack([mist[:, 6 * k : 6 * k + width] for k in range(frames)])
    pulse = 0.9 + 0.1 * torch.sin(9 * times + dice.uniform(0, 6)).view(-1, 1, 1)
    foam = torch.exp(-((y[foot] - pool) / 0.055).square() - ((x[foot] - cx) / (half * 1.5)).square().square())
    picture[:, :, foot].lerp_(pale, (foam * pulse * (0.45 + rolling) * 1.1).clamp(0, 1))

    t = sample_times(geometry)
    swell = 1 + 0.2 * torch.sin(2 * math.pi * dice.uniform(2, 5) * t + dice.uniform(0, 6))
    audio = filtered_noise(dice, geometry, lambda f: band(180, 4500)(f) / f.clamp(min=100).sqrt()) * 0.13 * swell
    events = []
    for _ in range(dice.integer(24, 40)):
        moment = dice.uniform(0, geometry.seconds)
        sound = bubble_sound(dice, dice.uniform(0.003, 0.012), dice.uniform(0.06, 0.2), rate)
        add_at(audio, sound, int(moment * rate))
        events.append(Event(moment, "bubble", cx, pool))
    return Clip(shown(picture), limit(audio), sorted(events, key=lambda e: e.time))
