"""CPU seconds to read evenly sampled, resized RGB frames from a video file, with rlvid's reader and others.

`python -m benchmarks.video_read` writes clips of textured layers that pan and move under film grain (H.264 with
B-frames, GOPs of 12 to 250 frames, HEVC, VP9, AV1; 480p and 1080p), then lets the readers take turns in one process:

  rlvid         what `ClipReader` does for a clip that is not in its cache (without the hash and the cache itself)
  decord        `VideoReader(width, height).get_batch`: resized at decode time
  pyav all      `container.decode` to the last frame asked for; `reformat` of those asked for
  opencv seek   `set(CAP_PROP_POS_FRAMES)` and `read`, for each frame asked for; `cv2.resize`
  opencv grab   `grab` each frame, `retrieve` those asked for; `cv2.resize`

All read the same frames, `linspace` over the clip, at the same size, as one uint8 array [T, H, W, 3]. The
other readers get frame numbers and size as arguments; ours computes both. Each other reader runs with one codec thread
and with its default number, OpenCV also with area and linear resizing, PyAV with bicubic and bilinear, and its best
setting is used: the first round tries all, and the two best settings of readers within 1.5 times the fastest stay. CPU
seconds are those of the process with all its threads. `worst_ratio` is the largest ratio over the clips of ours to
the best other reader, each the median over the rounds.

Each frame carries its number and a check sum as black and white cells along its top. `wrong_frames` counts our frames
that do not show the number asked for, over the timed clips and small difficult ones (variable frame rate, open GOP,
edit list, AVI with B-frames, few frames); those of the others are in the tables ("error": it cannot read the file).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from benchmarks.harness import cpu_in_turns, finish, machine, median_ratio, medians
from rlvid.config import VideoConfig
from rlvid.errors import BadClip
from rlvid.types import Medium
from rlvid.video import pyav_reader
from rlvid.video.container_check import missing_bytes
from rlvid.video.sizes import target_size

Frames = npt.NDArray[np.uint8]
Read = Callable[[str, Sequence[int], int, int], Frames]  # path, frame numbers, height, width -> [T, H, W, 3]

OURS = "rlvid"
RATE = 30
MULTIPLE = 28
NUMBER_BITS, CHECK_BITS = 12, 4
CELLS = NUMBER_BITS + CHECK_BITS
STILL_IN, HOPELESS = 1.5, 3.0  # times the fastest peer in the first round

H264 = {"preset": "fast", "crf": "23", "bf": "3"}
OPEN_GOP = {"g": "12", "bf": "3", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}


@dataclass(frozen=True)
class ClipSpec:
    """A file to write, and how many of its frames are asked for."""

    name: str
    codec: str = "libx264"
    options: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] = (854, 480)  # width, height
    n_frames: int = 300
    ask: tuple[int, ...] = (16,)
    times_ms: tuple[int, ...] | None = None  # a variable frame rate
    start: int = 0  # time of the first frame, in frames; an edit list hides what is before 0
    skip_packets: int = 0  # dropped at the start, as by a cut without re-encoding
    shown: range | None = None  # numbers of the frames that a player shows; None: all


TIMED = (
    ClipSpec("h264-480p-10s-gop250.mp4", options=H264 | {"g": "250"}, ask=(8, 64)),
    ClipSpec("h264-480p-10s-gop12.mp4", options=H264 | {"g": "12"}, ask=(8, 64)),
    ClipSpec("h264-480p-60s-gop250.mp4", options=H264 | {"g": "250"}, n_frames=1800, ask=(32,)),
    ClipSpec("h264-480p-60s-gop30.mkv", options=H264 | {"g": "30"}, n_frames=1800, ask=(16,)),
    ClipSpec("h264-1080p-10s-gop250.mp4", options=H264 | {"g": "250"}, size=(1920, 1080), ask=(16,)),
    ClipSpec("h264-1080p-10s-gop30.mp4", options=H264 | {"g": "30"}, size=(1920, 1080), ask=(8, 64)),
    ClipSpec(
        "hevc-480p-10s-gop250.mp4",
        codec="libx265",
        options={"preset": "veryfast", "x265-params": "log-level=none:keyint=250"},
        ask=(16,),
    ),
    ClipSpec(
        "vp9-480p-10s-gop128.webm",
        codec="libvpx-vp9",
        options={"cpu-used": "6", "deadline": "good", "row-mt": "1", "crf": "32", "b": "0"},
        ask=(16,),
    ),
    ClipSpec(
        "av1-480p-10s-gop160.mp4", codec="libsvtav1", options={"preset": "10", "crf": "35", "g": "160"}, ask=(16,)
    ),
)

_UNEVEN_MS = tuple(np.concatenate([[0], np.cumsum([20, 20, 20, 300, 20, 500] * 10)[:59]]).tolist())
_small = partial(ClipSpec, size=(320, 192), n_frames=60, ask=(8, 30))
AWKWARD = (
    _small("vfr.mp4", options={"g": "250", "bf": "3"}, times_ms=_UNEVEN_MS),
    _small("vfr.mkv", options={"g": "12", "bf": "3"}, times_ms=_UNEVEN_MS),
    _small("open-gop.mp4", options=OPEN_GOP),
    _small("open-gop.ts", options=OPEN_GOP),
    # Packet 9 is the keyframe of number 12: the B-frames before that one cannot be shown.
    *(
        _small(f"open-gop-cut.{suffix}", options=OPEN_GOP, skip_packets=9, shown=range(12, 60))
        for suffix in ("mp4", "mkv", "ts")
    ),
    _small("edit-list.mp4", options={"g": "12", "bf": "3"}, start=-5, shown=range(5, 60)),
    _small("b-frames.avi", codec="mpeg4", options={"g": "12", "bf": "2"}),
    _small("interlaced.mp4", options={"g": "30", "bf": "3", "x264-params": "tff=1"}),
    _small("ten-frames-hevc.mp4", codec="libx265", options={"x265-params": "log-level=none"}, n_frames=10, ask=(8,)),
)


# --- clips ---------------------------------------------------------------------------------------------------------


def code_of(number: int) -> int:
    """The number with a check sum of its 4-bit parts above it: a misread cell does not give another number."""
    check = (number ^ number >> 4 ^ number >> 8) & 15
    return number | (15 - check) << NUMBER_BITS


def read_numbers(frames: Frames) -> list[int | None]:
    """Read the numbers in the cells of frames [T, H, W, 3]; None where the check sum is wrong."""
    _, height, width, _ = frames.shape
    rows = slice(height // 32, max(height // 32 + 1, 3 * height // 32))  # the middle of the top eighth
    numbers: list[int | None] = []
    for frame in frames:
        cells = (frame[rows, (2 * cell + 1) * width // (2 * CELLS)].mean() > 127 for cell in range(CELLS))
        code = sum(int(is_white) << cell for cell, is_white in enumerate(cells))
        number = code & ((1 << NUMBER_BITS) - 1)
        numbers.append(number if code_of(number) == code else None)
    return numbers


def texture(width: int, height: int, rng: np.random.Generator) -> Frames:
    """Noise of several scales [height, width, 3], from 20 to 220."""
    total = np.zeros((height, width, 3), dtype=np.float32)
    for scale in (2, 6, 20, 80):
        small = rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3), dtype=np.uint8)
        frame = av.VideoFrame.from_ndarray(small, format="rgb24")
        total += np.sqrt(scale) * frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    low, high = np.percentile(total, (1, 99))
    return (20 + 200 * ((total - low) / (high - low)).clip(0, 1)).astype(np.uint8)


def scenes(spec: ClipSpec) -> Iterator[Frames]:
    """Frames [H, W, 3]: a background that pans, eight discs that cross it, grain, and the frame number at the top."""
    rng = np.random.default_rng(len(spec.name) + spec.n_frames)
    width, height = spec.size
    margin = height // 4
    ground = texture(width + 2 * margin, height + 2 * margin, rng)
    radius = height // 10
    side = 2 * radius
    y, x = np.mgrid[:side, :side] - radius + 0.5
    disc = np.hypot(x, y) < radius
    discs = [texture(side, side, rng) for _ in range(8)]
    speeds, phases = rng.uniform(0.3, 1.5, (8, 2)), rng.uniform(0, 2 * np.pi, (8, 2))
    grain = rng.integers(0, 7, (height + 64, width + 64, 1), dtype=np.uint8)
    cell = np.arange(width) * CELLS // width
    for number in range(spec.n_frames):
        t = number / RATE
        dx, dy = (int(margin * (1 + 0.95 * np.sin(rate * t))) for rate in (0.45, 0.31))
        frame = ground[dy : dy + height, dx : dx + width].copy()
        for picture, speed, phase in zip(discs, speeds, phases, strict=True):
            left, top = ((0.5 + 0.5 * np.sin(speed * t + phase)) * (width - side, height - side)).astype(int)
            frame[top : top + side, left : left + side][disc] = picture[disc]
        gx, gy = rng.integers(0, 64, 2)
        frame += grain[gy : gy + height, gx : gx + width]
        frame[: height // 8] = (255 * (code_of(number) >> cell & 1)).astype(np.uint8)[None, :, None]
        yield frame


def write(path: Path, spec: ClipSpec) -> None:
    """Encode one clip; the file is complete or absent."""
    part = path.with_name(f"part-{path.name}")
    with av.open(str(part), "w", options={"avoid_negative_ts": "disabled"} if spec.start else {}) as container:
        stream = cast(VideoStream, container.add_stream(spec.codec, rate=RATE, options=spec.options))
        stream.width, stream.height = spec.size
        stream.pix_fmt = "yuv420p"
        base = Fraction(1, RATE) if spec.times_ms is None else Fraction(1, 1000)
        stream.codec_context.time_base = base
        packets = []
        for number, picture in enumerate(scenes(spec)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.time_base = base
            frame.pts = spec.start + number if spec.times_ms is None else spec.times_ms[number]
            packets += stream.encode(frame)
        packets += stream.encode()
        for packet in packets[spec.skip_packets :]:
            container.mux(packet)
    part.replace(path)


# --- contestants ---------------------------------------------------------------------------------------------------


def read_ours(path: str, numbers: Sequence[int], height: int, width: int) -> Frames:
    if missing_bytes(path):
        raise BadClip(path, "is cut short")
    video = VideoConfig(frames=len(numbers))
    return pyav_reader.read_frames(Medium(path), video, MULTIPLE).frames


def read_decord(path: str, numbers: Sequence[int], height: int, width: int, *, threads: int) -> Frames:
    import decord

    reader = decord.VideoReader(path, num_threads=threads, width=width, height=height)
    return cast(Frames, reader.get_batch(numbers).asnumpy())


def read_pyav(path: str, numbers: Sequence[int], height: int, width: int, *, threads: str, resize: str) -> Frames:
    out = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
    reformatter = VideoReformatter()
    found = 0
    with av.open(path) as container:
        container.streams.video[0].thread_type = threads
        for number, frame in enumerate(container.decode(video=0)):
            if number != numbers[found]:
                continue
            out[found] = reformatter.reformat(frame, width, height, "rgb24", interpolation=resize).to_ndarray()
            found += 1
            if found == len(numbers):
                break
    return out[:found]


def read_opencv(
    path: str, numbers: Sequence[int], height: int, width: int, *, seek: bool, threads: int, resize: str
) -> Frames:
    import cv2

    cv2.setNumThreads(1)  # for resizing: more do not help at these sizes
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    out = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
    at = 0
    for i, number in enumerate(numbers):
        if seek:
            capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        else:
            while at < number and capture.grab():
                at += 1
        is_read, frame = capture.read()
        at += 1
        if not is_read:
            return out[:i]
        small = cv2.resize(frame, (width, height), interpolation=getattr(cv2, f"INTER_{resize}"))
        cv2.cvtColor(small, cv2.COLOR_BGR2RGB, dst=out[i])
    return out


def contestants() -> dict[str, dict[str, Read]]:
    """name -> settings -> reader; readers that are not installed are left out."""
    cores = os.cpu_count() or 1
    found: dict[str, dict[str, Read]] = {OURS: {"": read_ours}}
    found["pyav all"] = {
        f"{threads} {resize}".lower(): partial(read_pyav, threads=threads, resize=resize)
        for threads in ("NONE", "AUTO")
        for resize in ("BICUBIC", "BILINEAR")
    }
    try:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        found["decord"] = {f"threads {n or 'auto'}": partial(read_decord, threads=n) for n in (1, 0)}
    except ImportError as error:
        print(f"no decord: {error}")
    try:
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read when the library is loaded: nothing
        import cv2

        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        for name, seek in (("opencv seek", True), ("opencv grab", False)):
            found[name] = {
                f"threads {n} {resize.lower()}": partial(read_opencv, seek=seek, threads=n, resize=resize)
                for n in dict.fromkeys((1, cores))
                for resize in ("AREA", "LINEAR")
            }
    except ImportError as error:
        print(f"no OpenCV: {error}")
    return found


def attempt(read: Callable[[], Frames]) -> Frames | None:
    """Frames, or None if the reader cannot read the file."""
    try:
        frames = read()
    except Exception:  # each library has exceptions of its own
        return None
    return frames if len(frames) else None


def wrong_frames(frames: Frames, numbers: Sequence[int]) -> int:
    """Number of the frames asked for that are missing or wrong."""
    got = read_numbers(frames)
    return sum(a != b for a, b in zip(got, numbers, strict=False)) + max(0, len(numbers) - len(got))


# --- the comparison ------------------------------------------------------------------------------------------------


def asked(spec: ClipSpec, n: int) -> tuple[list[int], list[int]]:
    """Positions of `n` frames, first to last, and the numbers that they carry."""
    shown = spec.shown or range(spec.n_frames)
    positions = np.linspace(0, len(shown) - 1, n, dtype=np.int64).tolist()
    return positions, [shown[p] for p in positions]


def calls(path: Path, spec: ClipSpec, n: int, readers: dict[str, dict[str, Read]]) -> dict[str, dict[str, Any]]:
    height, width = target_size(spec.size[1], spec.size[0], VideoConfig(), MULTIPLE)
    args = str(path), asked(spec, n)[0], height, width
    return {name: {key: partial(read, *args) for key, read in by.items()} for name, by in readers.items()}


def compare(path: Path, spec: ClipSpec, n: int, readers: dict[str, dict[str, Read]], rounds: int) -> tuple[float, int]:
    """Time one clip; return our ratio to the best other reader and the number of our wrong frames."""
    by_name = calls(path, spec, n, readers)
    numbers = asked(spec, n)[1]
    path.read_bytes()  # into the page cache
    able: dict[str, Callable[[], Frames]] = {}
    first: dict[str, float] = {}
    wrong: dict[str, int] = {}
    fastest = float("inf")
    for name, by in by_name.items():
        for key, run in by.items():
            begin = time.process_time()
            frames = attempt(run)
            s = time.process_time() - begin
            if frames is None:
                break
            who = f"{name}|{key}"
            able[who], first[who], wrong[who] = run, s, wrong_frames(frames, numbers)
            if name != OURS:
                fastest = min(fastest, s)
                if s > HOPELESS * fastest:  # too slow for every setting
                    break
    timed: dict[str, Callable[[], Frames]] = {}
    for name in by_name:
        by_speed = sorted((who for who in able if who.split("|")[0] == name), key=first.__getitem__)
        timed |= {who: able[who] for who in by_speed[:2] if name == OURS or first[who] <= STILL_IN * fastest}
    seconds = cpu_in_turns(timed, rounds, warmup=0)
    median = first | medians(seconds)
    ours = f"{OURS}|"
    if ours not in able:
        print(f"{spec.name:28} {n:3d}  {OURS} cannot read this file")
        return float("inf"), n
    best = min((w for w in seconds if w != ours), key=lambda w: median[w])
    ratio = median_ratio(seconds[ours], seconds[best])
    for name in readers:
        mine = sorted((median[w], w) for w in median if w.split("|")[0] == name)
        if not mine:
            print(f"{spec.name:28} {n:3d}  {name:12} {'error':>8}")
            continue
        s, who = mine[0]
        key = who.split("|")[1]
        remark = "" if who in seconds else " (first round only)"
        relation = median_ratio(seconds[who], seconds[ours]) if who in seconds else s / median[ours]
        print(f"{spec.name:28} {n:3d}  {name:12} {s:8.3f} {relation:7.2f} {wrong[who]:6d}  {key}{remark}")
    print(f"{'':28} {'':3}  ours / best peer {ratio:.3f}", flush=True)
    return ratio, wrong[ours]


def check_awkward(folder: Path, readers: dict[str, dict[str, Read]]) -> int:
    """Print and count our wrong frames in the small difficult files; in an unreadable one, all are wrong."""
    total = 0
    print(f"\nwrong frames   {'file':22} {'asked':>5} " + " ".join(f"{name:>12}" for name in readers))
    for spec in AWKWARD:
        for n in spec.ask:
            numbers = asked(spec, n)[1]
            row = []
            for name, by in calls(folder / spec.name, spec, n, readers).items():
                frames = attempt(next(iter(by.values())))
                wrong = len(numbers) if frames is None else wrong_frames(frames, numbers)
                row.append("error" if frames is None else str(wrong))
                total += wrong if name == OURS else 0
            print(f"{'':14} {spec.name:22} {n:5d} " + " ".join(f"{cell:>12}" for cell in row), flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--clips", type=Path, help="keep the clips in this folder, and make only those that are missing"
    )
    parser.add_argument("--only", default="", help="time only clips whose name matches this regular expression")
    parser.add_argument("--make", action="store_true", help="write the clips and stop")
    args = parser.parse_args()
    if not any(re.search(args.only, spec.name) for spec in TIMED):
        parser.error(f"--only {args.only} matches none of {', '.join(spec.name for spec in TIMED)}")
    with tempfile.TemporaryDirectory() as tmp:
        folder = args.clips or Path(tmp)
        folder.mkdir(parents=True, exist_ok=True)
        timed = [spec for spec in TIMED if re.search(args.only, spec.name) and make(folder, spec)]
        for spec in AWKWARD:
            make(folder, spec)
        if args.make:
            return
        readers = contestants()
        print(f"{machine()}; {', '.join(versions())}")
        print(f"{'clip':28} {'n':>3}  {'reader':12} {'CPU s':>8} {'/ ours':>7} {'wrong':>6}  best setting")
        results = [compare(folder / spec.name, spec, n, readers, args.rounds) for spec in timed for n in spec.ask]
        wrong = sum(w for _, w in results) + check_awkward(folder, readers)
        finish({"worst_ratio": max(ratio for ratio, _ in results), "wrong_frames": wrong})


def make(folder: Path, spec: ClipSpec) -> bool:
    """Write the clip unless it exists; False if this FFmpeg does not have its encoder."""
    try:
        av.codec.Codec(spec.codec, "w")
    except ValueError:  # UnknownCodecError
        print(f"no {spec.codec}: {spec.name} is left out")
        return False
    if not (folder / spec.name).exists():
        print(f"writing {spec.name}", file=sys.stderr, flush=True)
        write(folder / spec.name, spec)
    return True


def versions() -> list[str]:
    found = [f"av {av.__version__}"]
    found += [f"{name} {sys.modules[name].__version__}" for name in ("decord", "cv2") if name in sys.modules]
    return found


if __name__ == "__main__":
    main()
