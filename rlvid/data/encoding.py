"""A sample's way from its video files to its prompt: each clip read once, one processor pass. In one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rlvid.config import JobConfig, VideoConfig
from rlvid.errors import BadClip, PromptTooLong
from rlvid.models.families import load_family
from rlvid.types import Clip, Prompt, Sample
from rlvid.video.cache import FrameCache
from rlvid.video.clip_reader import ClipReader
from rlvid.video.frame_variants import Variant, probe, thumbnails


@dataclass(frozen=True)
class Source:
    """What an encoder needs to know; one value for a whole run."""

    model: Path
    video: VideoConfig
    cache_dir: Path
    cache_bytes: int
    max_prompt_tokens: int

    @classmethod
    def of(cls, cfg: JobConfig, model: Path) -> Source:
        return cls(
            model=model.resolve(),
            video=cfg.video,
            cache_dir=cfg.data.cache_dir.expanduser().resolve(),
            cache_bytes=int(cfg.data.cache_gib * 2**30),
            max_prompt_tokens=cfg.rollout.max_model_len - cfg.rollout.max_tokens,
        )

    def reader(self) -> ClipReader:
        """
        Raises:
            UserError: a size or a cache folder that does not work.
        """
        cache = FrameCache(self.cache_dir, self.cache_bytes)
        return ClipReader(self.video, load_family(self.model).frame_multiple, cache)


@dataclass(frozen=True)
class Outcome:
    """The small row that comes beside a prompt."""

    n_tokens: int = 0
    cost: int = 0
    patch_bytes: int = 0
    decodes: int = 0
    cache_hits: int = 0
    clip_ids: tuple[str, ...] = ()
    bad: tuple[str, str] | None = None  # what is set aside, and why: a clip, by its path
    is_prompt_bad: bool = False  # or the sample, by its id: the prompt does not fit


class SampleEncoder:
    """Needs neither torch nor transformers, so its process starts in about a second and stays small."""

    def __init__(self, source: Source):
        self.family = load_family(source.model)
        self.source = source
        self.reader = source.reader()

    def encode(self, sample: Sample, variant: Variant = "as_is") -> tuple[Prompt | None, Outcome]:
        """Read a sample's clips and make its prompt. A bad clip, and a prompt that is too long, are rows, not
        exceptions."""
        clips: list[Clip] = []
        hits = 0
        for medium in sample.media:
            try:
                clip, is_hit = self.reader.read(medium)
            except BadClip as e:
                return None, Outcome(decodes=len(clips) - hits, cache_hits=hits, bad=(medium.name, e.reason))
            clips.append(probe(clip, variant, self.family.frame_multiple))
            hits += is_hit
        read = Outcome(decodes=len(clips) - hits, cache_hits=hits)
        try:
            prompt = self.family.encode(sample, clips, self.source.max_prompt_tokens)
        except PromptTooLong as e:
            return None, replace(read, bad=(sample.id, str(e)), is_prompt_bad=True)
        return prompt, replace(
            read, n_tokens=prompt.length, cost=prompt.cost, patch_bytes=prompt.patches.nbytes, clip_ids=prompt.clip_ids
        )

    def strip(self, sample: Sample) -> list[bytes]:
        """A few frames of a sample's clips as JPEG files, for the report."""
        return [jpeg for medium in sample.media for jpeg in thumbnails(self.reader.read(medium)[0].frames)]
