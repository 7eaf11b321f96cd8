"""Fires and blasts: crackles that throw sparks, and explosions whose flash is their bang."""

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
    tone,
)
from avdit.geometry import ClipGeometry


def _smoothstep(x: Tensor, low: float, high: float) -> Tensor:
    """0 below ``low``, 1 above ``high``, smooth between; the shape of ``x``."""
    x = ((x - low) / (high - low)).clamp(0, 1)
    return x * x * (3 - 2 * x)


def _enlarge(planes: Tensor, geometry: ClipGeometry) -> Tensor:
    """(N, h, w) to (N, H, W) of the clip."""
    size = (geometry.height, geometry.width)
    return F.interpolate(planes.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)


def _scroll(dice: Dice, frames: int, height: int, width: int, step: int, cells: int) -> Tensor:
    """Noise (frames, height, width) in [0, 1] that rises by ``step`` rows a frame."""
    texture = fractal_noise(dice, height + step * (frames - 1), width, cells=cells, octaves=4, gain=0.55)
    return texture.unfold(0, height, step).movedim(-1, 1)


def _small_grid(geometry: ClipGeometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """(x, y), each (H / 2, W / 2), in [0, 1] from the top left."""
    y = (torch.arange(geometry.height // 2, device=device) + 0.5) / (geometry.height // 2)
    x = (torch.arange(geometry.width // 2, device=device) + 0.5) / (geometry.width // 2)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return x, y


def _splat(geometry: ClipGeometry, x: Tensor, y: Tensor, value: Tensor, size: int) -> Tensor:
    """Draw points as squares of ``size`` pixels: x, y, value (F, N) to the brightest of each pixel (F, H, W)."""
    count, (height, width) = geometry.frames, (geometry.height, geometry.width)
    canvas = torch.zeros(count * height * width, device=x.device)
    offset = torch.arange(size, device=x.device)
    rows = (y * height).long()[..., None, None] + offset[:, None]
    columns = (x * width).long()[..., None, None] + offset
    rows, columns = torch.broadcast_tensors(rows, columns)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    frame = torch.arange(count, device=x.device)[:, None, None, None]
    index = (frame * height + rows.clamp(0, height - 1)) * width + columns.clamp(0, width - 1)
    canvas.scatter_reduce_(0, index.flatten(), (value[..., None, None] * inside).flatten(), "amax")
    return canvas.view(count, height, width)


def _capsule(x: Tensor, y: Tensor, ends: tuple[float, float, float, float]) -> tuple[Tensor, Tensor]:
    """Distance (H, W) to the segment ``ends`` (x0, y0, x1, y1), and the place along it in [0, 1]."""
    x0, y0, x1, y1 = ends
    dx, dy = x1 - x0, y1 - y0
    along = (((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy + 1e-8)).clamp(0, 1)
    return torch.hypot(x - x0 - along * dx, y - y0 - along * dy), along


def _paint(picture: Tensor, rgb: Tensor, mask: Tensor) -> None:
    """Paint ``rgb`` (3, 1, 1) or (3, H, W) over ``picture`` (3, H, W) where ``mask`` (H, W), in place."""
    picture.lerp_(rgb.expand_as(picture), mask.expand_as(picture))


def _rgb(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """(3, 1, 1) colour."""
    return colour(values, device).view(3, 1, 1)


def _burst(dice: Dice, geometry: ClipGeometry, seconds: float) -> Tensor:
    """A broadband click (n,) of peak 1 that dies away over ``seconds``."""
    n = max(4, int(seconds * geometry.sampling_rate))
    noise = dice.sound.randn(n)
    noise = noise - 0.5 * torch.roll(noise, 1)
    sound = noise * torch.exp(-4 * torch.arange(n) / n)
    return sound / sound.abs().max().clamp(min=1e-6)


def _fireplace(dice: Dice, x: Tensor, y: Tensor, cx: float, base: float, width: float) -> tuple[Tensor, Tensor]:
    """A brick hearth: its picture in flat light (3, H, W) and the mask (H, W) of the dark opening."""
    device, (height, columns) = dice.device, x.shape
    brick = _rgb((dice.uniform(0.3, 0.6), dice.uniform(0.18, 0.32), dice.uniform(0.12, 0.26)), device)
    if dice.uniform() < 0.25:
        brick = _rgb((0.42, 0.42, 0.4), device)
    rows = dice.integer(12, 24)
    row = torch.floor(y * rows)
    shift = x * rows * 0.5 + 0.5 * (row % 2)
    joint = ((y * rows) % 1 < 0.12) | (shift % 1 < 0.06)
    shade = 0.75 + 0.5 * torch.frac(torch.sin(row * 12.99 + torch.floor(shift) * 78.2).abs() * 437.5)
    picture = brick * shade * (0.8 + 0.4 * fractal_noise(dice, height, columns, cells=16, octaves=3))
    picture = torch.where(joint, picture * 0.45, picture)
    half, top = width * dice.uniform(1.5, 2.0), base - dice.uniform(0.55, 0.7)
    arch = dice.choice([0.0, 0.08, 0.16]) * (1 - ((x - cx) / half) ** 2).clamp(min=0)
    inside = ((x - cx).abs() < half) & (y > top + 0.1 - arch) & (y < base + 0.06)
    frame = ((x - cx).abs() < half + 0.03) & (y > top + 0.07 - arch) & (y < base + 0.06)
    _paint(picture, brick * 1.25, (frame & ~inside).float())
    _paint(picture, brick * 0.35 * shade, inside.float())
    _paint(picture, _rgb((0.3, 0.27, 0.25), device), (y > base + 0.06).float())
    return picture, inside.float()


def _camp(dice: Dice, x: Tensor, y: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """A clearing outdoors: what the fire can light (3, H, W) and what is seen without it (3, H, W)."""
    device, (height, width) = dice.device, x.shape
    horizon = base - dice.uniform(0.08, 0.3)
    sky = dice.choice([((0.01, 0.015, 0.05), (0.04, 0.05, 0.1)), ((0.05, 0.05, 0.14), (0.35, 0.17, 0.12)),
                       ((0.1, 0.15, 0.25), (0.3, 0.34, 0.4)), ((0.01, 0.01, 0.02), (0.02, 0.02, 0.03))])  # fmt: skip
    seen = torch.lerp(_rgb(sky[0], device), _rgb(sky[1], device), (y / horizon).clamp(0, 1))
    if sky[0][2] < 0.1:
        stars = dice.rand(height, width)
        seen = seen + ((stars > 0.9985) * (stars - 0.9985) * 500).clamp(max=0.7)
    ambient = max(sky[1])
    earth = dice.choice(
        [(0.35, 0.25, 0.17), (0.45, 0.38, 0.28), (0.2, 0.28, 0.13), (0.55, 0.55, 0.6), (0.3, 0.3, 0.28)]
    )
    texture = 0.55 + 0.9 * fractal_noise(dice, height, width, cells=12, octaves=4, gain=0.7)
    ground = _rgb(earth, device) * texture
    albedo = torch.full_like(ground, 0.05)
    style = dice.choice(["pines", "hills", "open"])
    profile = fractal_noise(dice, 8, width, cells=4, octaves=1)[4]
    if style == "pines":
        spacing = dice.integer(5, 14)
        peaks = 1 - 2 * (torch.frac(x[0] * spacing + profile) - 0.5).abs()
        top = horizon - peaks * (0.1 + 0.35 * profile)
    else:
        top = horizon - (0.2 * profile if style == "hills" else 0.01 * profile)
    land = (y > top).float()
    _paint(seen, _rgb((0.03, 0.045, 0.035), device) * (0.4 + ambient), land)
    _paint(albedo, _rgb((0.12, 0.15, 0.09), device), land)
    soil = (y > horizon + 0.01 * (profile - 0.5)).float()
    _paint(seen, ground * ambient * 0.5, soil)
    _paint(albedo, ground, soil)
    return albedo, seen


def fire_crackling(dice: Dice, geometry: ClipGeometry) -> Clip:
    """A campfire or a hearth; each crackle is heard as a click and seen as sparks shooting up."""
    device, count = dice.device, geometry.frames
    duration = count / geometry.fps
    times = frame_times(geometry, device)
    x, y = pixel_grid(geometry, device)
    cx, base = dice.uniform(0.35, 0.65), dice.uniform(0.72, 0.88)
    width, tall = dice.uniform(0.12, 0.24), dice.uniform(0.28, 0.55)

    # The place, split into what is seen anyway and what the fire lights.
    near = torch.exp(-(((x - cx) / (3.0 * width)) ** 2 + ((y - base + 0.1) / 0.4) ** 2))
    pool = torch.exp(-(((x - cx) / (2.2 * width)) ** 2 + ((y - base) / 0.1) ** 2))
    hearth = dice.uniform() < 0.35
    if hearth:
        albedo, inside = _fireplace(dice, x, y, cx, base, width)
        seen = albedo * dice.uniform(0.08, 0.45) * (1 - 0.6 * inside)
        tall = min(tall, 0.42)
    else:
        albedo, seen = _camp(dice, x, y, base)
    light = _rgb((1.0, dice.uniform(0.42, 0.55), dice.uniform(0.12, 0.2)), device)
    lit = albedo * light * (near * dice.uniform(0.7, 1.1) + 0.9 * pool + 0.06)
    lit += light * 0.12 * near

    # Logs lie in front of the flames' foot, dark with glowing cracks; a stone ring for some fires.
    bark = fractal_noise(dice, *x.shape, cells=24, octaves=3, gain=0.7)
    cover = torch.zeros_like(x)
    if not hearth and dice.uniform() < 0.5:
        stones, squash = dice.integer(7, 12), dice.uniform(0.25, 0.4)
        for k in range(stones):
            angle = math.pi * (k + dice.uniform(-0.2, 0.2)) / (stones - 1)
            sx, sy = cx + 1.5 * width * math.cos(angle), base + 0.02 + 1.3 * width * squash * math.sin(angle)
            r = dice.uniform(0.022, 0.036)
            stone = _smoothstep(r - torch.hypot(x - sx, (y - sy) * 1.3), -0.003, 0.003)
            _paint(seen, _rgb((0.06, 0.06, 0.065), device), stone)
            rim = ((sy - y) / r * 0.5 + 0.5).clamp(0, 1)
            _paint(lit, light * (0.08 + 0.35 * rim * bark), stone)
    for _ in range(dice.integer(3, 6)):
        tilt, reach = dice.uniform(-0.55, 0.55), width * dice.uniform(0.8, 1.3)
        mx, my = cx + dice.uniform(-0.3, 0.3) * width, base + dice.uniform(-0.025, 0.03)
        dx, dy = reach * math.cos(tilt), 0.45 * reach * math.sin(tilt)
        distance, along = _capsule(x, y, (mx - dx, my - dy, mx + dx, my + dy))
        thick = dice.uniform(0.018, 0.034)
        log = _smoothstep(thick - distance, -0.003, 0.003)
        hot = (1 - (2 * along - 1).abs()).clamp(0, 1)
        round_ = (1 - (distance / thick) ** 2).clamp(0, 1).sqrt()
        _paint(seen, _rgb((0.05, 0.035, 0.03), device) * (0.5 + bark), log)
        cracks = _smoothstep(bark, 0.5, 0.62) * hot
        _paint(lit, _rgb((0.32, 0.14, 0.06), device) * round_ * bark + light * (0.9 * cracks), log)
        cover = torch.maximum(cover, log)

    # Crackles: when, how loud, and the sparks each throws.
    audio = torch.zeros(geometry.samples)
    events: list[Event] = []
    pops = sorted(dice.uniform(0.02, 0.98) * duration for _ in range(max(2, int(dice.integer(6, 22) * duration / 1.6))))
    flicker = 0.85 + 0.12 * torch.sin(2 * math.pi * dice.uniform(1.5, 3.5) * times + 6.3 * dice.uniform())
    flicker += 0.08 * (dice.rand(count) - 0.5)
    born, spark_x, spark_y, loud = [], [], [], []
    for t in pops:
        gain = 0.07 + 0.75 * dice.uniform() ** 3
        ex, ey = cx + dice.uniform(-0.6, 0.6) * width, base - dice.uniform(0.0, 0.12)
        events.append(Event(t, "crackle", ex, ey))
        for repeat in range(dice.integer(1, 3)):
            click = _burst(dice, geometry, dice.uniform(0.001, 0.008)) * gain * 0.6**repeat
            add_at(audio, click, int((t + repeat * dice.uniform(0.004, 0.02)) * geometry.sampling_rate))
        for _ in range(3 + int(14 * gain)):
            born.append(t)
            spark_x.append(ex)
            spark_y.append(ey)
            loud.append(gain)
        flicker += 0.35 * gain * torch.exp(-(times - t).clamp(min=0) / 0.12) * (times >= t)
    start = torch.tensor(born, device=device)
    n = len(born)
    life = 0.25 + 0.7 * dice.rand(n)
    vx, vy = 0.28 * dice.randn(n), 0.35 + 0.55 * dice.rand(n)
    wiggle, phase = 0.012 * dice.rand(n), 6.3 * dice.rand(n)
    # Each spark is a short streak: three moments of one exposure.
    age = (times[:, None, None] - start - torch.tensor([0.0, 0.012, 0.024], device=device)[:, None]).clamp(min=-1)
    travelled = 0.6 * (1 - torch.exp(-age.clamp(min=0) / 0.6))
    px = torch.tensor(spark_x, device=device) + vx * travelled + wiggle * torch.sin(9 * age + phase)
    py = torch.tensor(spark_y, device=device) - vy * travelled * 1.5
    value = ((age >= -0.024) & (age < life)) * (0.45 + 0.5 * (1 - age.clamp(min=0) / life))
    sparks = _splat(geometry, px.flatten(1), py.flatten(1), value.flatten(1), 2)

    # Flames: tongues whose height sways, edges from noise that rises.
    sx, sy = _small_grid(geometry, device)
    rows, columns = sx.shape
    step = max(1, round(rows * dice.uniform(0.5, 0.9) / geometry.fps))
    noise = _scroll(dice, count, rows, columns, step, dice.integer(4, 7))
    height = torch.zeros(count, columns, device=device)
    wind = dice.uniform(-0.25, 0.25)
    for k in range(dice.integer(3, 6)):
        place = dice.uniform(-0.75, 0.75) if k else 0.0
        size = tall * (1.0 if k == 0 else dice.uniform(0.4, 0.85)) * (1 - 0.4 * abs(place))
        beat = torch.sin(2 * math.pi * dice.uniform(0.6, 2.0) * times + 6.3 * dice.uniform())
        middle = place + 0.12 * torch.sin(2 * math.pi * dice.uniform(0.4, 1.4) * times + 6.3 * dice.uniform())
        offset = ((sx[0] - cx) / width - middle[:, None]) / dice.uniform(0.35, 0.6)
        height = torch.maximum(height, (size * (1 + 0.2 * beat))[:, None] * torch.exp(-offset * offset))
    up = base + 0.01 - sy
    lean = int(wind * width * columns)
    if lean:
        height = torch.roll(height, lean, 1)
    v = up / (height[:, None, :] + 0.02)
    heat = (1 - v) * 1.25 + (noise - 0.5) * (0.9 + 2.6 * v.clamp(0, 1.2)) - 2 * (v - 1.3).clamp(min=0)
    heat = heat * _smoothstep(up, -0.02, 0.03) * _smoothstep(height, 0.03, 0.12)[:, None, :]
    heat = _enlarge(heat.clamp_(0, 1.3), geometry)
    heat *= 1 - 0.75 * cover
    smoke_noise = _scroll(dice, count, rows // 4, columns // 4, max(1, step // 3), 4)
    haze = torch.exp(-(((sx - cx - wind * (base - sy) * 0.5) / (width * (0.7 + 1.2 * (base - sy).abs()))) ** 2))
    haze = haze * _smoothstep(up, 0.2, 0.6) * dice.uniform(0.02, 0.16)
    smoke = F.interpolate(smoke_noise[:, None], (rows, columns), mode="bilinear", align_corners=False)[:, 0]
    smoke = _enlarge((smoke - 0.25).clamp(min=0) * haze, geometry)
    heat = torch.maximum(heat, sparks)

    planes = torch.empty(3, count, geometry.height, geometry.width, device=device)
    redness = dice.uniform(0.9, 1.1)
    for c, (gain, floor) in enumerate(((2.4, 0.06), (1.5 / redness, 0.24 * redness), (1.6, 0.72))):
        plane = planes[c]
        torch.mul(lit[c], flicker.view(-1, 1, 1), out=plane)
        plane += seen[c]
        plane += smoke
        plane += heat.sub(floor).clamp_(min=0).mul_(gain)

    t = sample_times(geometry)
    swell = 1 + 0.35 * torch.sin(2 * math.pi * dice.uniform(0.5, 2.5) * t + 6.3 * dice.uniform())
    audio += dice.uniform(0.02, 0.05) * swell * filtered_noise(dice, geometry, band(40, dice.uniform(180, 400)))
    audio += dice.uniform(0.003, 0.009) * filtered_noise(dice, geometry, band(800, 4000))
    return Clip(shown(planes), limit(audio), events)


def _landscape(dice: Dice, x: Tensor, y: Tensor, horizon: float) -> tuple[Tensor, bool]:
    """Sky and land (3, H, W), and whether it is dark."""
    device, (height, width) = dice.device, x.shape
    hour = dice.choice(["day", "day", "dusk", "night", "overcast"])
    top, low = {
        "day": ((0.25, 0.48, 0.85), (0.72, 0.84, 0.95)),
        "dusk": ((0.16, 0.14, 0.36), (0.95, 0.5, 0.25)),
        "night": ((0.01, 0.015, 0.05), (0.06, 0.08, 0.17)),
        "overcast": ((0.5, 0.53, 0.57), (0.75, 0.76, 0.77)),
    }[hour]
    bright = {"day": 1.0, "dusk": 0.5, "night": 0.14, "overcast": 0.75}[hour]
    picture = torch.lerp(_rgb(top, device), _rgb(low, device), (y / horizon).clamp(0, 1) ** dice.uniform(0.7, 1.5))
    if hour == "night":
        picture = picture + (dice.rand(height, width) > 0.9985) * 0.6
    else:
        clouds = _smoothstep(fractal_noise(dice, height, width, cells=3, octaves=4), dice.uniform(0.45, 0.6), 0.8)
        _paint(picture, _rgb(low, device) * 1.1, clouds * 0.8)
    sun = torch.hypot(x - dice.uniform(0.1, 0.9), y - dice.uniform(0.08, horizon - 0.08))
    if hour in ("dusk", "night"):
        _paint(picture, _rgb((1.0, 0.9, 0.7), device), _smoothstep(0.035 - sun, -0.003, 0.003))
    place = dice.choice(["desert", "hills", "city", "plain"])
    soil = {
        "desert": (0.78, 0.6, 0.38),
        "hills": (0.28, 0.4, 0.2),
        "city": (0.25, 0.25, 0.27),
        "plain": (0.5, 0.47, 0.28),
    }[place]
    tint = dice.uniform(0.8, 1.15)
    land = _rgb(soil, device) * bright * tint
    for layer in range(dice.integer(1, 3)):
        profile = fractal_noise(dice, 8, width, cells=dice.choice([3, 4, 6]), octaves=2)[dice.integer(1, 6)]
        edge = horizon - (0.05 + 0.12 * profile) * (1 - 0.35 * layer) + 0.02
        ridge = torch.lerp(land * 0.8, _rgb(low, device) * 0.8, 0.55 - 0.2 * layer)
        _paint(picture, ridge, _smoothstep(y - edge, -0.004, 0.004))
    if place == "city":
        towers = dice.integer(12, 26)
        tops = horizon - 0.03 - dice.uniform(0.12, 0.35) * dice.rand(towers) ** 1.5
        column = (x[0] * towers).long().clamp(0, towers - 1)
        building = (y > tops[column]).float()
        _paint(picture, _rgb((0.16, 0.17, 0.21), device) * (0.3 + bright), building)
        panes = dice.integer(60, 100)
        grid = ((x * panes) % 1 > 0.4) & ((y * panes) % 1 > 0.45)
        cells = dice.rand(panes + 1, panes + 1)[(y * panes).long(), (x * panes).long()]
        lights = grid & (cells > 0.6) & (building > 0)
        window = (1.0, 0.85, 0.5) if hour in ("dusk", "night") else (0.45, 0.55, 0.62)
        _paint(picture, _rgb(window, device), lights.float() * 0.7)
    texture = 0.75 + 0.5 * fractal_noise(dice, height, width, cells=10, octaves=4, gain=0.7)
    far = _smoothstep(y - horizon, 0.0, 0.004)
    depth = ((y - horizon) / (1 - horizon)).clamp(0, 1)
    _paint(picture, land * texture * (1.05 - 0.35 * depth), far)
    return picture, hour == "night"


def explosion(dice: Dice, geometry: ClipGeometry) -> Clip:
    """A blast in a landscape: flash, fireball, smoke and debris, with the bang at the flash."""
    device, count = dice.device, geometry.frames
    times = frame_times(geometry, device)
    x, y = pixel_grid(geometry, device)
    horizon = dice.uniform(0.55, 0.78)
    picture, dark = _landscape(dice, x, y, horizon)
    first = min(max(1, round(dice.uniform(0.2, 0.7) * geometry.fps)), max(count - 2, 0))
    blast = max(0.0, first / geometry.fps - dice.uniform(0.0, 0.03))
    after = times - blast
    alive = (torch.arange(count, device=device) >= first).float()
    since = after.clamp(min=0) * alive
    cx, ground = dice.uniform(0.25, 0.75), horizon + dice.uniform(0.0, 0.12)
    size = dice.uniform(0.13, 0.3)

    # Camera shake moves the whole picture after the blast.
    margin = max(2, geometry.height // 32)
    shake = dice.uniform(0.2, 1.0) * torch.exp(-since / 0.3) * alive
    jolt = ((dice.rand(2, count) * 2 - 1) * shake * margin).round().long().tolist()
    padded = F.pad(picture[None], (margin, margin, margin, margin), mode="replicate")[0]
    planes = torch.stack(
        [
            padded[:, margin + dy : margin + dy + geometry.height, margin + dx : margin + dx + geometry.width]
            for dx, dy in zip(*jolt, strict=True)
        ],
        1,
    )

    # The fireball: noise that grows with it, on a coarse grid.
    sx, sy = _small_grid(geometry, device)
    late, shift = since[first:], torch.tensor(jolt, device=device)[:, first:]
    radius = size * (0.35 + 0.75 * (1 - torch.exp(-late / 0.28)) + 0.12 * late)
    climb = dice.uniform(0.1, 0.3) * late + 0.35 * radius
    middle_x = cx - shift[0] / geometry.width + dice.uniform(-0.06, 0.06) * late
    base = ground - shift[1] / geometry.height
    u = (sx - middle_x.view(-1, 1, 1)) / radius.view(-1, 1, 1)
    v = (sy - (base - climb).view(-1, 1, 1)) / radius.view(-1, 1, 1)
    textures = torch.stack([fractal_noise(dice, 192, 192, cells=c, octaves=5, gain=0.55) for c in (7, 9)])
    turn = 0.12 * late.view(-1, 1, 1)
    grid = torch.stack([u / 2.4 + 0.15 * turn, v / 2.4 + turn], -1)
    sampled = F.grid_sample(
        textures.expand(len(late), -1, -1, -1), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    edge, inner = sampled[:, 0], sampled[:, 1]
    ball = 1 - torch.sqrt(u * u + v * v)
    stem = 0.45 - u.abs() - (-v).clamp(min=0)
    skirt = 1.15 - u.abs() - 3.5 * (sy - base.view(-1, 1, 1)).abs() / radius.view(-1, 1, 1)
    body = torch.maximum(torch.maximum(ball, stem), 0.6 * skirt) + (edge - 0.5) * 1.5
    body = body * _smoothstep((base + 0.03).view(-1, 1, 1) - sy, -0.03, 0.02)
    thick = _smoothstep(body, 0.02, 0.2)
    cool = torch.exp(-late / dice.uniform(0.35, 0.7)).view(-1, 1, 1)
    heat = (1.9 * cool * (0.35 + body.clamp(0, 1)) + 2.0 * (inner - 0.55) * (0.3 + cool)).clamp(0, 1.4)
    shade = (0.1 + 0.5 * inner - 0.12 * (u + v).clamp(-1, 1)) * dice.uniform(0.35, 0.9) * (0.45 if dark else 1.0)
    packed = torch.cat([thick, heat * thick, shade.clamp(0, 1)])
    thick, heat, shade = _enlarge(packed, geometry).chunk(3)

    # Light of the fire on everything, the flash over everything.
    lamp = torch.exp(-(((x - cx) / (size * 2.5)) ** 2 + ((y - ground + size * 0.6) / (size * 1.8)) ** 2)) + 0.15
    glow = lamp * (0.6 * torch.exp(-late / 0.35)).view(-1, 1, 1)
    flashes = [dice.uniform(0.75, 0.95), dice.uniform(0.1, 0.3)]

    # Debris flies, burning at first, and falls.
    n = dice.integer(25, 70)
    angle = math.pi * (0.08 + 0.84 * dice.rand(n))
    speed = size * (1.5 + 5.0 * dice.rand(n))
    moment = (since[:, None, None] - torch.tensor([0.0, 0.015, 0.03], device=device)[:, None]).clamp(min=0)
    px = cx + torch.cos(angle) * speed * moment
    py = ground - 0.02 - torch.sin(angle) * speed * moment + 0.5 * dice.uniform(0.9, 1.5) * moment**2
    flying = alive.view(-1, 1, 1) * (py < ground + 0.05) * (0.5 + 0.5 * dice.rand(n))
    chips = _splat(geometry, px.flatten(1), py.flatten(1), flying.flatten(1), max(2, geometry.height // 96))
    chips = chips[first:]
    burn = (torch.exp(-late / 0.45) + 0.04).view(-1, 1, 1)

    # Only the frames from the blast on change.
    dim = dice.uniform(0.2, 0.3) if dark else 0.15
    for c, (gain, floor, warm) in enumerate(((1.9, 0.12, 1.0), (1.3, 0.32, 0.55), (1.2, 0.72, 0.2))):
        plane = planes[c, first:]
        plane.addcmul_(glow, plane + dim, value=warm)
        plane.lerp_(shade, thick)
        plane += heat.sub(floor).clamp_(min=0).mul_(gain)
        plane.lerp_(burn * (1.1 * warm), chips)
    for k, amount in enumerate(flashes[: count - first]):
        planes[:, first + k] += (1 - planes[:, first + k]) * amount

    rate = geometry.sampling_rate
    audio = dice.uniform(0.008, 0.02) * filtered_noise(dice, geometry, band(80, dice.uniform(300, 700)))
    begin = int(blast * rate)
    seconds = geometry.samples / rate
    loud = dice.uniform(0.7, 1.0)
    add_at(audio, _burst(dice, geometry, dice.uniform(0.008, 0.03)) * loud, begin)
    fall = decay(dice.uniform(0.12, 0.3), seconds, rate)
    boom = tone(dice.uniform(35, 50) + dice.uniform(60, 90) * fall, rate)
    add_at(audio, 0.85 * loud * boom * decay(dice.uniform(0.3, 0.5), seconds, rate), begin)
    roar = filtered_noise(dice, geometry, band(30, dice.uniform(350, 900)))
    add_at(audio, 0.4 * loud * roar * decay(dice.uniform(0.4, 0.65), seconds, rate), begin)
    hiss = filtered_noise(dice, geometry, band(300, 6000))
    add_at(audio, 0.35 * loud * hiss * decay(dice.uniform(0.08, 0.2), seconds, rate), begin)
    for _ in range(dice.integer(6, 18)):
        tick = _burst(dice, geometry, dice.uniform(0.002, 0.01)) * dice.uniform(0.02, 0.14)
        add_at(audio, tick, begin + int(dice.uniform(0.25, 1.1) * rate))
    return Clip(shown(planes), limit(audio), [Event(blast, "explosion", cx, ground)])
