"""Synthesise a small speaker-verification data folder with espeak-ng.

A voice is a set of synthesiser settings drawn at random (accent, pitch, formants, vocal-tract length and so on).
Each of its utterances varies a little, and is heard in its own room, noise, microphone and level.
Everything drawn comes from the seed. The knobs below set how hard the trials are.
"""

import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copy, copytree

import click
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

Waveform = npt.NDArray[np.float32]

# What is made
SAMPLE_RATE = 16000
DEFAULT_SEED = 20
DEFAULT_VOICES, DEFAULT_UTTERANCES = 54, 7  # in the trials
CALIB_VOICES, CALIB_UTTERANCES = 12, 5  # in calib.scp only
NONTARGETS_PER_TARGET = 4  # half of them between voices of the same gender
DURATION_S = (2.5, 5.0)
OPUS_COMPRESSION = 0.91  # libsndfile's scale, 0 to 1; about 28 kbit/s

# Difference between voices: wider ranges make the trials easier
VOICE_SPREAD = 1.7  # scales the width of every range of this block
PITCH_HZ = {"m": (88.0, 142.0), "f": (155.0, 235.0)}
TRACT = {"m": (0.91, 1.01), "f": (1.03, 1.15)}  # frequency warp: 1 / vocal-tract length
FORMANT_SCALE = (0.92, 1.08)  # each of formants 1 to 5 on its own
FORMANT_LEVEL = (70.0, 115.0)  # in percent of espeak's
PITCH_RANGE = (1.2, 1.6)  # top over base of the intonation
SPEED_WPM = (125.0, 170.0)
ROUGHNESS, FLUTTER = (0.0, 4.0), (1.0, 9.0)
MIN_DISTANCE = 0.12  # between the timbres (log pitch, log formants) of any two voices
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
GLOTTAL_SOURCES = (0, 0, 0, 0, 1, 3)  # 0 is espeak's own synthesiser, others its Klatt synthesiser's

# Difference within a voice: standard deviations of log factors, one draw an utterance; larger is harder
PITCH_JITTER, PITCH_RANGE_JITTER, SPEED_JITTER, FORMANT_JITTER = 0.03, 0.05, 0.05, 0.006

# Recording conditions, one draw an utterance
RT60_S = (0.1, 0.4)
DIRECT_TO_REVERBERANT_DB = (6.0, 15.0)
SNR_DB = (15.0, 30.0)
MICROPHONE_DB = 3.0  # standard deviation of the response at each of 8 frequencies
LEVEL_DB = (-34.0, -20.0)  # RMS of the whole utterance, relative to full scale
NOISES = ("white", "pink", "brown", "hum", "babble")
BABBLE_TALKERS = 6  # voices of their own, heard only as noise

SENTENCES = re.findall(
    r"\S[^.]*\.",
    """
The morning train to the coast leaves from the second platform. We painted the kitchen wall a light shade of green.
My neighbour grows tomatoes and beans behind the garage. The library opens at nine and closes late in the evening.
Please put the empty boxes next to the back door. A thin layer of ice covered the pond last night.
She folded the map and walked slowly toward the bridge. They are going to repair the road before the winter comes.
The baker sells fresh rolls until eleven every Sunday. Our new table is too wide for the small dining room.
He keeps a spare key under the blue flower pot. The children counted seven boats on the quiet lake.
It took us two hours to climb the narrow path. I would like a bowl of soup and some dark bread.
The old clock in the hall runs five minutes slow. A gentle wind moved the leaves across the empty yard.
You can hear the river from the open window upstairs. The museum shows paintings and tools from the early farms.
Bring a warm jacket because the evenings are rather cold. The driver stopped the bus to let the sheep cross.
We found a good place to sit near the fountain. Her brother repairs bicycles in a workshop by the station.
The recipe needs three eggs and a cup of sugar. Nobody noticed that the lamp was on all day.
The gardener cut the hedge and swept the stone steps. I usually read the newspaper after my second cup of tea.
A large brown dog was sleeping in front of the shop. The teacher wrote the answer on the board with white chalk.
They moved the piano into the room with the tall windows. The last page of the letter is missing again.
He bought four tickets for the concert on Friday night. The path turns left behind the church and follows a stream.
Clouds gathered over the hills but it did not rain. We need more paper and a new pair of scissors.
The farmer stores his apples in a cool dry cellar. Yesterday the post arrived later than it usually does.
She learned to play the flute when she was nine. The bridge was closed for a week because of the flood.
This coat is warmer than the one I wore last year. A row of young trees stands along the southern wall.
The waiter brought two glasses of water and the menu. He measured the shelf twice before he cut the board.
Our cousins live in a village at the edge of the forest. The radio said that tomorrow will be bright and calm.
I left my umbrella under the seat in the tram. The cook added pepper, garlic and a little lemon juice.
There is a small market in the square on Thursdays. The kitten hid behind the curtain and would not come out.
They planned the journey with an old paper atlas. The carpenter used oak for the frame of the mirror.
You should water these plants only twice a month. The moon was so clear that we needed no lantern.
A young woman was drawing the harbour with a pencil. The phone rang just as we were leaving the house.
He told a short story about a fox and a goose. The windows on the north side let in very little light.
We had dinner on the porch and watched the fireflies. The shop across the street sells used books and records.
She sent a parcel with socks and honey to her uncle. The engine makes a strange noise when it is cold.
My favourite chair stands in the corner near the stove. The swimmers rested on the warm stones after lunch.
It is easy to find the office if you follow the signs. The baby laughed at the shadow of the moving fan.
A thick fog lay over the fields until almost noon. The tailor shortened the sleeves and changed the buttons.
They saw a heron standing still in the shallow water. We always buy cheese from the farm beyond the mill.
The tower has two hundred steps and no lift at all. He forgot the name of the street but knew the number.
The class visited a factory where they make glass bottles. Snow fell during the night and covered the garden bench.
I put the photographs in an album with a red cover. The ferry crosses the bay six times between dawn and dusk.
Their house has a round window above the front door. The coach asked the team to run one more lap.
She mixed blue and yellow until the colour was right. The cellar smells of wood, apples and old paper.
We waited in the hall while the rain grew louder. The new path makes the walk to school much shorter.
A friend of mine builds small boats out of pine. The dentist moved my visit to the middle of August.
He closed the gate quietly and went down to the shore. The orange cat follows the milkman every single morning.
The lecture was about the weather on other planets. You will find clean towels in the cupboard on the left.
They cooked rice and vegetables over an open fire. The pilot greeted the passengers and described the route.
My grandmother keeps her buttons in a round tin box. The sun had already set when we reached the cabin.
A sign at the corner points the way to the castle. The printer is out of ink, so I wrote it by hand.
""",
)


@dataclass(frozen=True)
class Voice:
    """The settings of one synthetic speaker."""

    name: str
    gender: str  # m or f
    accent: str  # a voice name of espeak-ng
    glottal_source: int
    pitch_hz: float
    pitch_range: float
    speed_wpm: float
    tract: float
    formant_scales: tuple[float, ...]
    formant_levels: tuple[float, ...]  # in percent
    roughness: int
    flutter: int

    @property
    def timbre(self) -> npt.NDArray[np.float64]:
        """Log pitch and log formant factors: the point that keeps voices apart."""
        return np.log([self.pitch_hz, *(scale * self.tract for scale in self.formant_scales)])


@dataclass(frozen=True)
class Utterance:
    """One finished waveform and what was said."""

    name: str
    voice: Voice
    text: str
    waveform: Waveform


def within(rng: np.random.Generator, bounds: tuple[float, float], spread: float = 1.0) -> float:
    """Draw uniformly from ``bounds``, their width scaled by ``spread`` about the centre."""
    centre, half = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
    return float(centre + spread * half * rng.uniform(-1, 1))


def draw_voice(rng: np.random.Generator, name: str, gender: str) -> Voice:
    """Draw every setting of one voice."""
    return Voice(
        name=name,
        gender=gender,
        accent=str(rng.choice(ACCENTS)),
        glottal_source=int(rng.choice(GLOTTAL_SOURCES)),
        pitch_hz=within(rng, PITCH_HZ[gender], VOICE_SPREAD),
        pitch_range=within(rng, PITCH_RANGE, VOICE_SPREAD),
        speed_wpm=within(rng, SPEED_WPM, VOICE_SPREAD),
        tract=within(rng, TRACT[gender], VOICE_SPREAD),
        formant_scales=tuple(within(rng, FORMANT_SCALE, VOICE_SPREAD) for _ in range(5)),
        formant_levels=tuple(within(rng, FORMANT_LEVEL, VOICE_SPREAD) for _ in range(5)),
        roughness=round(within(rng, ROUGHNESS)),
        flutter=round(within(rng, FLUTTER)),
    )


def draw_voices(count: int, seed: int, prefix: str, taken: Iterable[Voice] = ()) -> list[Voice]:
    """Draw ``count`` voices, genders in turn, none nearer than MIN_DISTANCE to another or to one ``taken``."""
    rng = np.random.default_rng(seed)
    timbres = [voice.timbre for voice in taken]
    voices: list[Voice] = []
    for attempt in itertools.count():
        if len(voices) == count:
            return voices
        if attempt > 1000 * count:
            raise click.ClickException(f"only {len(voices)} of {count} voices lie {MIN_DISTANCE} apart. Ask for fewer.")
        voice = draw_voice(rng, f"{prefix}{len(voices) + 1:03d}", "mf"[len(voices) % 2])
        if all(np.linalg.norm(voice.timbre - timbre) >= MIN_DISTANCE for timbre in timbres):
            voices.append(voice)
            timbres.append(voice.timbre)
    raise AssertionError("unreachable")


class Synthesiser:
    """espeak-ng with a private copy of its English data, where voice variants can be written."""

    def __init__(self, folder: Path) -> None:
        """Copy what English needs of the installed data into ``folder``."""
        version = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout
        installed, data = Path(version.split("Data at: ")[1].strip()), folder / "espeak-ng-data"
        self._folder, self._variant, self._wav = folder, data / "voices" / "!v" / "own", folder / "out.wav"
        self._variant.parent.mkdir(parents=True)
        copytree(installed / "lang", data / "lang")
        for name in ("phondata", "phonindex", "phontab", "intonations", "en_dict"):
            copy(installed / name, data)

    def speak(self, voice: Voice, text: str, rng: np.random.Generator) -> Waveform:
        """Say ``text`` once, pitch, speed and formants a little off the voice's own; returns SAMPLE_RATE samples."""

        def jitter(sigma: float) -> float:
            return math.exp(sigma * rng.standard_normal())

        # Playing the result faster by `tract` shortens the vocal tract; pitch and speed are set back beforehand.
        base_hz = voice.pitch_hz * jitter(PITCH_JITTER) / voice.tract
        top_hz = base_hz * (1 + (voice.pitch_range - 1) * jitter(PITCH_RANGE_JITTER))
        speed_wpm = voice.speed_wpm * jitter(SPEED_JITTER) / voice.tract
        lines = ["language variant", f"name own\ngender {'male' if voice.gender == 'm' else 'female'}"]
        lines += [f"pitch {base_hz:.0f} {top_hz:.0f}", f"roughness {voice.roughness}", f"flutter {voice.flutter}"]
        for number, (scale, level) in enumerate(zip(voice.formant_scales, voice.formant_levels, strict=True), start=1):
            lines.append(f"formant {number} {100 * scale * jitter(FORMANT_JITTER):.0f} {level:.0f} 100")
        if voice.glottal_source:
            lines.append(f"klatt {voice.glottal_source}")
        self._variant.write_text("\n".join(lines) + "\n")
        command = ["espeak-ng", f"--path={self._folder}", "-v", f"{voice.accent}+own", "-s", f"{speed_wpm:.0f}"]
        command += ["-a", "50", "-w", str(self._wav), text]  # at half amplitude, no voice clips
        subprocess.run(command, capture_output=True, check=True)
        samples, rate = soundfile.read(self._wav, dtype="float32")
        loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
        samples = samples[max(loud[0] - rate // 10, 0) : loud[-1] + rate // 10]
        resampled: Waveform = soxr.resample(samples, rate * voice.tract, SAMPLE_RATE)
        return resampled


def colour(samples: npt.NDArray[np.floating], gain: npt.NDArray[np.floating]) -> Waveform:
    """Filter by a zero-phase magnitude response given at the frequencies of ``rfft``."""
    filtered: Waveform = np.fft.irfft(np.fft.rfft(samples) * gain, n=len(samples)).astype(np.float32)
    return filtered


def frequencies_hz(num_samples: int) -> npt.NDArray[np.float64]:
    """Frequencies of ``rfft``, the zero replaced by the first above it."""
    frequencies = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE).astype(np.float64)
    frequencies[0] = frequencies[1]
    return frequencies


def reverberate(samples: Waveform, rng: np.random.Generator) -> Waveform:
    """Convolve with a direct path and an exponentially decaying tail of white noise."""
    rt60_s = within(rng, RT60_S)
    time_s = np.arange(int(rt60_s * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time_s)) * 10 ** (-3 * time_s / rt60_s)
    tail *= 10 ** (-within(rng, DIRECT_TO_REVERBERANT_DB) / 20) / np.linalg.norm(tail)
    response = np.concatenate([[1.0], np.zeros(SAMPLE_RATE // 400), tail])  # the tail starts after 2.5 ms
    size = len(samples) + len(response)
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), n=size)
    return wet[: len(samples)].astype(np.float32)


def draw_noise(num_samples: int, babble: list[Waveform], rng: np.random.Generator) -> Waveform:
    """Draw one of NOISES, at any level."""
    kind = rng.choice(NOISES)
    noise = np.zeros(num_samples, dtype=np.float32)
    if kind == "babble":
        for talk in babble:
            noise += np.resize(np.roll(talk, -rng.integers(SAMPLE_RATE)), num_samples)
        return noise
    frequencies = frequencies_hz(num_samples)
    white = rng.standard_normal(num_samples)
    if kind == "hum":
        mains_hz, time_s = rng.choice([50, 60]), np.arange(num_samples) / SAMPLE_RATE
        for harmonic in range(1, 12):
            noise += np.sin(2 * np.pi * (harmonic * mains_hz * time_s + rng.uniform())) / harmonic
        return noise + colour(white, 6 / np.sqrt(frequencies))
    slope = {"white": 0.0, "pink": -0.5, "brown": -1.0}[kind]
    return colour(white, np.maximum(frequencies, 40.0) ** slope)


def record(speech: Waveform, babble: list[Waveform], rng: np.random.Generator) -> Waveform:
    """Put the speech in a room, add noise, and pick both up with one microphone."""
    wet = reverberate(speech, rng)
    noise = draw_noise(len(wet), babble, rng)
    noise *= np.linalg.norm(wet) / np.linalg.norm(noise) * 10 ** (-within(rng, SNR_DB) / 20)
    frequencies = frequencies_hz(len(wet))
    knots_hz, knots_db = np.geomspace(80, 7600, 8), MICROPHONE_DB * rng.standard_normal(8)
    response_db = np.interp(np.log(frequencies), np.log(knots_hz), knots_db)
    response_db -= 10 * np.log10(1 + (60 / frequencies) ** 4)  # no microphone reaches down to 0 Hz
    return colour(wet + noise, 10 ** (response_db / 20))


def set_level(waveform: Waveform, rng: np.random.Generator) -> Waveform:
    """Scale to a level drawn from LEVEL_DB, lower if peaks would clip; refuse silence."""
    rms, peak = float(np.sqrt(np.mean(waveform**2))), float(np.abs(waveform).max())
    if not rms > 1e-6:  # also true of NaN
        raise click.ClickException(f"espeak-ng gave silence or broken samples (RMS {rms}).")
    return waveform * np.float32(min(10 ** (within(rng, LEVEL_DB) / 20) / rms, 0.8 / peak))


def speak_set(voices: list[Voice], utterances: list[int], seed: int, clean: bool) -> Iterator[Utterance]:
    """Say ``utterances[i]`` different sentences with ``voices[i]``; recording conditions unless ``clean``."""
    with tempfile.TemporaryDirectory() as folder:
        synthesiser = Synthesiser(Path(folder))
        rng = np.random.default_rng([seed, 0])
        talkers = draw_voices(BABBLE_TALKERS, seed + 1, "babble", voices)
        babble = [synthesiser.speak(talker, " ".join(rng.permutation(SENTENCES)[:3]), rng) for talker in talkers]
        for number, (voice, wanted) in enumerate(zip(voices, utterances, strict=True), start=1):
            done = 0
            for text in np.random.default_rng([seed, number]).permutation(SENTENCES).tolist():
                if done == wanted:
                    break
                rng = np.random.default_rng([seed, number, done + 1])
                speech = synthesiser.speak(voice, text, rng)
                if DURATION_S[0] <= len(speech) / SAMPLE_RATE <= DURATION_S[1]:
                    done += 1
                    waveform = set_level(speech if clean else record(speech, babble, rng), rng)
                    yield Utterance(f"{voice.name}-{done:02d}", voice, text, waveform)
            if done < wanted:
                raise click.ClickException(f"{voice.name} has {done} sentences of {DURATION_S} s; {wanted} were asked.")


def draw_trials(utterances: list[Utterance], seed: int) -> list[str]:
    """Pair every two utterances of a voice, and a fixed share of the other pairs, half within a gender."""
    targets: list[str] = []
    same_gender: list[str] = []
    other_gender: list[str] = []
    for enroll, test in itertools.combinations(utterances, 2):
        if enroll.voice is test.voice:
            targets.append(f"1 {enroll.name} {test.name}")
        else:
            pairs = same_gender if enroll.voice.gender == test.voice.gender else other_gender
            pairs.append(f"0 {enroll.name} {test.name}")
    rng = np.random.default_rng([seed, 0, 1])
    half = len(targets) * NONTARGETS_PER_TARGET // 2
    drawn = [str(t) for p in (same_gender, other_gender) for t in rng.choice(p, min(half, len(p)), replace=False)]
    return [str(trial) for trial in rng.permutation(targets + drawn)]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write one line an entry."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@click.command(context_settings={"show_default": True})
@click.option("--voices", default=DEFAULT_VOICES, help="Voices, without those for calibration.")
@click.option("--utterances", default=DEFAULT_UTTERANCES, help="Utterances of each voice.")
@click.option("--seed", default=DEFAULT_SEED, help="Fixes everything that is drawn.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent, help="Folder to write.")
@click.option("--prefix", default="v", help="Start of every voice name.")
@click.option("--no-trials", is_flag=True, help="A training set: no trials, no calib.scp, none of the default voices.")
@click.option("--clean", is_flag=True, help="No room, noise or microphone.")
def main(voices: int, utterances: int, seed: int, out: Path, prefix: str, no_trials: bool, clean: bool) -> None:
    """Synthesise speech and write it as a Kaldi-style data folder."""
    if (out / "wav").exists():
        raise click.ClickException(f"{out / 'wav'} exists. Remove it, so that no old audio is left among the new.")
    if no_trials:
        reserved = draw_voices(DEFAULT_VOICES + CALIB_VOICES, DEFAULT_SEED, "reserved")
        speakers, counts = draw_voices(voices, seed, prefix, reserved), [utterances] * voices
    else:
        speakers = draw_voices(voices + CALIB_VOICES, seed, prefix)
        counts = [utterances] * voices + [CALIB_UTTERANCES] * CALIB_VOICES
    spoken: list[Utterance] = []
    paths: list[str] = []
    for utterance in speak_set(speakers, counts, seed, clean):
        spoken.append(utterance)
        paths.append(f"{utterance.name} wav/{utterance.voice.name}/{utterance.name}.ogg")
        path = out / paths[-1].split()[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(
            path, utterance.waveform, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=OPUS_COMPRESSION
        )
    write_lines(out / "wav.scp", paths)
    write_lines(out / "utt2spk", (f"{u.name} {u.voice.name}" for u in spoken))
    write_lines(out / "utt2dur", (f"{u.name} {len(u.waveform) / SAMPLE_RATE:.2f}" for u in spoken))
    write_lines(out / "text", (f"{u.name} {u.text}" for u in spoken))
    write_lines(out / "spk2gender", (f"{voice.name} {voice.gender}" for voice in speakers))
    if not no_trials:
        write_lines(out / "trials", draw_trials(spoken[: voices * utterances], seed))
        write_lines(out / "calib.scp", paths[voices * utterances :])
    minutes = sum(len(u.waveform) for u in spoken) / SAMPLE_RATE / 60
    size_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    click.echo(f"{len(speakers)} voices, {len(spoken)} utterances, {minutes:.1f} minutes, {size_bytes} bytes in {out}")


if __name__ == "__main__":
    main()
