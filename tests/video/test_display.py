"""Frames are as a player shows them: all orientations of a display matrix, pixel aspect, HDR."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorTrc

from rlvid.errors import BadClip
from rlvid.types import Medium
from rlvid.video import pyav_reader
from rlvid.video.pyav_reader import DecodedFrames
from tests.video.media import TRIAL, Frames, Matrix, painted, read_numbers, set_matrix, video_config, write_video

# a, b, c, d -> the filters that ffmpeg's own autorotation inserts (fftools/ffmpeg_filter.c, FFmpeg 8)
ORIENTATIONS: dict[Matrix, list[tuple[str, str | None]]] = {
    (1, 0, 0, 1): [],
    (-1, 0, 0, 1): [("hflip", None)],
    (1, 0, 0, -1): [("vflip", None)],
    (-1, 0, 0, -1): [("hflip", None), ("vflip", None)],
    (0, 1, -1, 0): [("transpose", "clock")],
    (0, -1, 1, 0): [("transpose", "cclock")],
    (0, 1, 1, 0): [("transpose", "cclock_flip")],
    (0, -1, -1, 0): [("transpose", "clock_flip")],
}
EVENLY = [0, 4, 8, 12, 16, 20, 24, 29]


def read(path: Path, **keys: Any) -> DecodedFrames:
    return pyav_reader.read_frames(Medium(str(path)), video_config(**{"height": None, "width": None} | keys), 28)


def filtered(frames: Frames, filters: list[tuple[str, str | None]]) -> Frames:
    """Frames [T, H, W, 3] through libavfilter."""
    graph = Graph()
    first = av.VideoFrame.from_ndarray(frames[0], format="rgb24")
    nodes = [graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=Fraction(1, 10))]
    nodes += [graph.add(*given) for given in filters]
    nodes.append(graph.add("buffersink"))
    graph.link_nodes(*nodes).configure()
    shown = []
    for frame in frames:
        graph.push(av.VideoFrame.from_ndarray(frame, format="rgb24"))
        shown.append(graph.pull().to_ndarray(format="rgb24"))  # type: ignore[union-attr]
    return np.stack(shown)


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_every_orientation_is_shown_as_ffmpeg_rotates_it(tmp_path: Path, matrix: Matrix) -> None:
    path = write_video(tmp_path / "a.mp4", size=(168, 84))
    stored = read(path).frames
    shown = read(set_matrix(path, matrix)).frames
    np.testing.assert_array_equal(shown, filtered(stored, ORIENTATIONS[matrix]))
    a, b, c, d = matrix
    for x, y in ((0, 0), (167, 0), (5, 80)):  # by the definition: ISO 14496-12, 6.2.2
        at_x = a * x + c * y if a + c > 0 else shown.shape[2] - 1 + a * x + c * y
        at_y = b * x + d * y if b + d > 0 else shown.shape[1] - 1 + b * x + d * y
        np.testing.assert_array_equal(shown[:, at_y, at_x], stored[:, y, x])


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_decord_shows_it_right_or_refuses(tmp_path: Path, matrix: Matrix) -> None:
    decord_reader = pytest.importorskip("rlvid.video.decord_reader", exc_type=ImportError)
    path = set_matrix(write_video(tmp_path / "a.mp4", size=(168, 84), pixel_aspect=Fraction(2)), matrix)
    video = video_config(height=None, width=None)
    a, b, c, d = matrix
    if a * d - b * c < 0:
        with pytest.raises(BadClip, match=r"is mirrored.*video\.reader=pyav"):
            decord_reader.read_frames(Medium(str(path)), video, 28)
    else:
        theirs, ours = decord_reader.read_frames(Medium(str(path)), video, 28).frames, read(path).frames
        assert theirs.shape == ours.shape and np.abs(theirs.astype(int) - ours).mean() < 4.0


def test_slanted_matrix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadClip, match="no multiple of 90 degrees"):
        read(set_matrix(write_video(tmp_path / "a.mp4"), (1, 1, -1, 1)))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
@pytest.mark.parametrize(("aspect", "width"), [("2/1", 336), ("1/2", 84), ("16/15", 168), ("8/9", 140)])
def test_pixel_aspect_widens_or_narrows_the_picture(tmp_path: Path, name: str, aspect: str, width: int) -> None:
    codec = "mpeg4" if name == "a.avi" else "libx264"
    path = write_video(tmp_path / name, codec=codec, size=(168, 84), pixel_aspect=Fraction(aspect))
    decoded = read(path)  # 168 * 16/15 = 179.2 -> 6.4 multiples of 28; 168 * 8/9 = 149.3 -> 5.3
    assert decoded.frames.shape == (8, 84, width, 3)
    assert read_numbers(decoded.frames) == EVENLY


def test_pixel_aspect_turns_with_the_picture(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", size=(168, 84), pixel_aspect=Fraction(2))
    assert read(set_matrix(path, (0, 1, -1, 0))).frames.shape == (8, 336, 84, 3)


def test_largest_area_counts_displayed_pixels(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", size=(168, 84), pixel_aspect=Fraction(2))
    # 336 x 84 as displayed, shrunk by sqrt(336 * 84 / 9408) = 1.732: 194 x 48.5, rounded down
    assert read(path, max_pixels=12 * 28 * 28).frames.shape == (8, 28, 168, 3)


def pq(nits: float) -> float:
    """Signal 0 to 1 (SMPTE ST 2084)."""
    y = (nits / 10000) ** 0.1593017578125
    return float(((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375)


def hlg(nits: float) -> float:
    """Signal 0 to 1 of grey on a display of 1000 nits (ITU-R BT.2100: system gamma 1.2)."""
    scene = (nits / 1000) ** (1 / 1.2)
    return float(np.sqrt(3 * scene) if scene <= 1 / 12 else 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073)


def write_hdr(path: Path, signals: list[float], transfer: ColorTrc) -> Path:
    """Columns of grey, each 56 pixels wide, 10 bits."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx265", rate=10, options={"x265-params": "log-level=none:bframes=0", "crf": "4"}
        )
        stream.width, stream.height, stream.pix_fmt = 56 * len(signals), 56, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, ColorPrimaries.BT2020, 9
        frame = av.VideoFrame(stream.width, stream.height, "yuv420p10le")
        luma = np.repeat([round(64 + 876 * signal) for signal in signals], 56)
        for plane, row in zip(frame.planes, (luma, luma[::2] * 0 + 512, luma[::2] * 0 + 512), strict=True):
            padded = np.zeros((plane.height, plane.line_size // 2), dtype="<u2")
            padded[:, : plane.width] = row
            plane.update(padded.tobytes())
        frame.color_trc, frame.color_primaries, frame.colorspace = transfer, ColorPrimaries.BT2020, 9
        for number in range(2):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("transfer", "signal"), [(ColorTrc.SMPTE2084, pq), (ColorTrc.ARIB_STD_B67, hlg)])
def test_hdr_is_tone_mapped(tmp_path: Path, transfer: ColorTrc, signal: Any) -> None:
    # Reference white is 203 nits (ITU-R BT.2408). A share v of it is grey 255 * v ** (1 / 2.4) (ITU-R BT.1886).
    shares = [0.02, 0.18, 0.5, 1.0, 3.0]
    path = write_hdr(tmp_path / "a.mp4", [signal(203 * share) for share in shares], transfer)
    frames = read(path, frames=2).frames.astype(int)
    assert frames.shape == (2, 56, 280, 3)
    got = frames[0, 28, 28::56]
    np.testing.assert_allclose(got, np.array([[50], [125], [191], [255], [255]]).repeat(3, axis=1), atol=3)


def test_decord_refuses_hdr(tmp_path: Path) -> None:
    decord_reader = pytest.importorskip("rlvid.video.decord_reader", exc_type=ImportError)
    path = write_hdr(tmp_path / "a.mp4", [0.5], ColorTrc.ARIB_STD_B67)
    with pytest.raises(BadClip, match=r"is HDR.*video\.reader=pyav"):
        decord_reader.read_frames(Medium(str(path)), video_config(), 28)


@pytest.mark.parametrize(("matrix", "full_range"), [(1, False), (5, False), (1, True)])
def test_colour_matrix_and_range_are_those_of_the_file(tmp_path: Path, matrix: int, full_range: bool) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 168, 84, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full_range else 1
        for number in range(2):
            rgb = av.VideoFrame.from_ndarray(painted(0, 168, 84), format="rgb24")
            frame = rgb.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=2 if full_range else 1)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    off = np.abs(read(path, frames=2).frames.astype(int) - painted(0, 168, 84))[:, 30:]
    assert off.mean() < 3.0


@pytest.mark.skipif(not TRIAL.is_dir(), reason="the media of the trial are not there")
def test_files_of_the_trial() -> None:
    assert read(TRIAL / "pixel_aspect_2to1.mp4", max_pixels=10**6).frames.shape == (8, 252, 644, 3)
    mirrored = read(TRIAL / "mirror_matrix.mp4", max_pixels=10**6)
    assert mirrored.frames.shape == (8, 252, 308, 3)
    with av.open(str(TRIAL / "mirror_matrix.mp4")) as container:
        stored = next(container.decode(video=0)).reformat(308, 252, "rgb24", interpolation="BICUBIC").to_ndarray()
    np.testing.assert_array_equal(mirrored.frames[0], stored[:, ::-1])
    assert read(TRIAL / "avi_from_pipe.avi").n_frames == 25
