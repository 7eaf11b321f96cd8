"""Music of the dance genres: drum pattern, bass and chords at the genre's tempo, on one grid of beats."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from avdit.data.scenes.base import Dice, add_at, band, decay, limit, tone
from avdit.geometry import ClipGeometry

STEPS = 16  # of a bar of four beats


@dataclass(frozen=True)
class Groove:
    """One bar of a genre: a character a sixteenth. ``x`` strikes, a digit or letter is a scale step, ``.`` rests."""

    tempo: tuple[float, float]  # beats a minute
    kick: str
    snare: str
    hat: str
    bass: str
    chords: str
    voice: str  # of the chords: stab, strings, piano, organ, brass or pluck
    backbeat: str = "snare"  # or clap
    swing: float = 0.0  # share of a sixteenth by which every second one comes late
    minor: bool = True


GROOVES = {
    "break": Groove(
        (108, 126),
        "x.x.......x..x..",
        "....x..x.x..x..x",
        "x.x.x.x.x.x.x.x.",
        "0..0..3.5...0.3.",
        "x.....x.........",
        "brass",
    ),
    "pop": Groove(
        (100, 112),
        "x.....x...x.....",
        "....x.......x...",
        "x.x.x.x.x.x.x.x.",
        "0.0...7.0...5.3.",
        "..x...x...x...x.",
        "organ",
    ),
    "lock": Groove(
        (102, 116),
        "x..x..x...x..x..",
        "....x.......x...",
        "xxxxxxxxxxxxxxxx",
        "0.07..5.7.0.3.5.",
        "..x.x...x.x...x.",
        "pluck",
        minor=False,
    ),
    "waack": Groove(
        (116, 128),
        "x...x...x...x...",
        "....x.......x...",
        "..x...x...x...x.",
        "0.7.0.7.0.7.0.7.",
        "x.......x.......",
        "strings",
    ),
    "middle hip-hop": Groove(
        (86, 98),
        "x......x..x.....",
        "....x.......x...",
        "x.x.x.x.x.x.x.x.",
        "0......3..5.....",
        "x.........x.....",
        "piano",
        swing=0.25,
    ),
    "LA-style hip-hop": Groove(
        (92, 104),
        "x.....x..x......",
        "....x.......x...",
        "x.xxx.x.x.xxxxxx",
        "0.....0..3......",
        "x..x..x.........",
        "stab",
        "clap",
    ),
    "house": Groove(
        (118, 128),
        "x...x...x...x...",
        "....x.......x...",
        "..x...x...x...x.",
        "..0...0...3...5.",
        "x..x..x...x..x..",
        "stab",
        "clap",
    ),
    "krump": Groove(
        (78, 92),
        "x..x......x..x..",
        "....x.......x..x",
        "x...x...x...x.x.",
        "0..0......3..0..",
        "x.......x...x...",
        "brass",
    ),
    "street jazz": Groove(
        (94, 106),
        "x....x..x.......",
        "....x.......x...",
        "x.x.x.xxx.x.x.x.",
        "0....0..5...3...",
        "x.....x...x.....",
        "organ",
        "clap",
    ),
    "ballet jazz": Groove(
        (80, 96),
        "x...............",
        "............x...",
        "....x..x....x..x",
        "0.......7.......",
        "x..x..x..x..x..x",
        "piano",
        swing=0.3,
        minor=False,
    ),
}


def note(root: float, semitones: float) -> float:
    """Frequency in Hz ``semitones`` above ``root`` Hz."""
    return root * 2 ** (semitones / 12)


def harmonics(hertz: float, seconds: float, rate: int, weights: list[float]) -> Tensor:
    """A tone (n,) of ``hertz`` whose partials have ``weights``, none above the Nyquist frequency."""
    t = torch.arange(int(seconds * rate)) / rate
    parts = [
        w * torch.sin(2 * math.pi * hertz * (k + 1) * t) for k, w in enumerate(weights) if hertz * (k + 1) < rate / 2
    ]
    return torch.stack(parts).sum(0)


def noise_burst(dice: Dice, seconds: float, fall: float, low: float, high: float, rate: int) -> Tensor:
    """Noise (n,) between ``low`` and ``high`` Hz that dies with the time constant ``fall``."""
    count = int(seconds * rate)
    spectrum = torch.fft.rfft(dice.randn(count))
    hertz = torch.fft.rfftfreq(count, 1 / rate)
    noise = torch.fft.irfft(spectrum * band(low, high)(hertz), n=count)
    return noise / noise.square().mean().sqrt().clamp(min=1e-8) * decay(fall, seconds, rate)[:count]


def kick_drum(dice: Dice, rate: int) -> Tensor:
    """A sine that falls to the bottom, with a click."""
    fall = decay(0.035, 0.3, rate)
    body = tone(46 + dice.uniform(90, 150) * fall, rate) * decay(0.11, 0.3, rate)
    body[: int(0.004 * rate)] += 0.4
    return body


def snare_drum(dice: Dice, rate: int, clap: bool) -> Tensor:
    """Noise over a drum's tone; a clap is several bursts of noise."""
    if clap:
        out = torch.zeros(int(0.22 * rate))
        for delay in (0.0, 0.011, 0.022):
            add_at(out, 0.35 * noise_burst(dice, 0.15, 0.035 if delay else 0.01, 900, 5000, rate), int(delay * rate))
        return out
    noise = 0.35 * noise_burst(dice, 0.2, 0.06, 1200, 7500, rate)
    return noise + 0.5 * harmonics(185, 0.2, rate, [1, 0.4]) * decay(0.045, 0.2, rate)


def bass_note(dice: Dice, hertz: float, seconds: float, rate: int, voice: str) -> Tensor:
    """A round bass for hip-hop and krump, a bright one for the rest."""
    weights = [1, 0.15, 0.05] if voice in ("piano", "brass") else [1, 0.6, 0.4, 0.25, 0.15]
    sound = harmonics(hertz, seconds, rate, weights)
    return sound * decay(seconds * 0.6, seconds, rate)[: len(sound)]


def chord(dice: Dice, notes: list[float], seconds: float, rate: int, voice: str) -> Tensor:
    """Several notes in the genre's voice."""
    shapes = {
        "stab": ([1 / k for k in range(1, 9)], 0.12, 0.003),
        "strings": ([1 / k for k in range(1, 9)], 0.9, 0.06),
        "piano": ([1, 0.5, 0.25, 0.15, 0.08], 0.35, 0.002),
        "organ": ([1, 0.8, 0, 0.5, 0, 0, 0, 0.3], 0.3, 0.005),
        "brass": ([0.6, 1, 0.9, 0.7, 0.5, 0.3, 0.2], 0.25, 0.02),
        "pluck": ([1, 0.7, 0.5, 0.4, 0.3, 0.2], 0.06, 0.001),
    }
    weights, fall, attack = shapes[voice]
    sound = torch.stack([harmonics(hertz, seconds, rate, weights) for hertz in notes]).mean(0)
    rise = (torch.arange(len(sound)) / (attack * rate)).clamp(max=1)
    end = (torch.arange(len(sound), 0, -1) / (0.01 * rate)).clamp(max=1)
    return sound * decay(fall, seconds, rate)[: len(sound)] * rise * end


def play(dice: Dice, geometry: ClipGeometry, genre: str) -> tuple[Tensor, list[float], float]:
    """Music of a genre: audio (samples,), the times of its beats in seconds, and the seconds of a beat.

    The clip starts somewhere in the bar, so beats fall anywhere in it; the first may lie before its start.
    """
    groove, rate, dice = GROOVES[genre], geometry.sampling_rate, dice.sound
    beat = 60 / dice.uniform(*groove.tempo)
    step, start = beat / 4, -dice.uniform(0, 4) * beat
    length = geometry.samples / rate
    root = note(55, dice.integer(-3, 6))
    scale = [0, 3, 7, 10] if groove.minor else [0, 4, 7, 9]
    audio = torch.zeros(geometry.samples)
    kick = kick_drum(dice, rate)
    snare = snare_drum(dice, rate, groove.backbeat == "clap")
    open_hat = groove.hat.startswith("..x.")  # the offbeat hats of disco and house ring
    hat = 0.16 * noise_burst(dice, 0.2, 0.07 if open_hat else 0.018, 6000, 7900, rate)
    changes = [0, 0, dice.choice([-2, 3, 5]), dice.choice([0, -4, 5])]  # of the chords, a beat each
    count = int((length - start) / step) + 1
    for k in range(count):
        place = k % STEPS
        late = groove.swing * step if place % 2 else 0.0
        at = round((start + k * step + late) * rate)
        if groove.kick[place] == "x":
            add_at(audio, 0.85 * kick, at)
        if groove.snare[place] == "x":
            add_at(audio, 0.7 * snare * (1 if place % 4 == 0 else 0.5), at)
        if groove.hat[place] == "x":
            add_at(audio, hat * dice.uniform(0.7, 1.0), at)
        if groove.bass[place] != ".":
            hertz = note(root, int(groove.bass[place]))
            add_at(audio, 0.4 * bass_note(dice, hertz, 2 * step, rate, groove.voice), at)
        if groove.chords[place] == "x":
            base = note(4 * root, changes[place // 4])
            notes = [note(base, s) for s in scale]
            held = 8 * step if groove.voice == "strings" else 2.5 * step
            add_at(audio, 0.4 * chord(dice, notes, held, rate, groove.voice), at)
    beats = [start + k * beat for k in range(int((length - start) / beat) + 2)]
    return limit(audio * dice.uniform(0.45, 0.7)), [t for t in beats if t > -beat], beat
