"""Sections of what a job starts from: model, data, video."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from rlvid.config.section import Checkpoint, InputFile, InputFolder, LocalPath, Section, changeable


class TinyModelConfig(Section):
    """A random model with the family's real architecture and a tokenizer trained on the manifest's texts.

    Built in the run folder when `model.path` is empty. Nothing is downloaded.
    """

    family: Literal[
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "llava_onevision",
        "llava_next_video",
        "internvl",
        "smolvlm",
        "video_llama_3",
        "idefics2",
        "video_llava",
        "cobra",
        "qwen2",
        "qwen3",
    ] = "qwen2_vl"
    """Architecture. docs/families.md says which media each takes, and which of them vLLM serves."""
    hidden_size: int = Field(128, ge=64, multiple_of=64)
    """Width of the language model. One attention head per 64 (vLLM on CPU refuses a head size of 16)."""
    layers: int = Field(4, ge=1)
    """Layers of the language model."""
    vision_size: int = Field(128, ge=16)
    """Width of the vision tower."""
    vision_layers: int = Field(2, ge=1)
    """Layers of the vision tower."""
    vocab_size: int = Field(512, ge=300)
    """Tokens of the byte-level BPE tokenizer, special tokens included."""


class LoraConfig(Section):
    """Low-rank adapters on the language model (LoRA, arXiv 2106.09685). Only the adapters are trained and sent to the
    engines; the reference is the model with the adapters it began with."""

    rank: int = Field(16, ge=1, le=512)
    """Rank of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """An adapter's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter, by the last part of their names."""
    quantize: Literal["nf4", "fp4"] | None = None
    """QLoRA (arXiv 2305.14314): keep the frozen weights of those layers in 4 bits. For sft, dpo, reward-model and isrt;
    needs bitsandbytes. The exported model has the weights that were trained with, written out."""


class ModelConfig(Section):
    """The policy's checkpoint, or a tiny random model instead."""

    path: Checkpoint | None = None
    """Folder of a Hugging Face checkpoint (config, safetensors, tokenizer). Empty: `tiny` is required."""
    tiny: TinyModelConfig | None = None
    """Make a tiny random model if `path` is empty."""
    lora: LoraConfig | None = None
    """Train adapters instead of the whole model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of weights and activations. Use float32 on CPU (bfloat16 stops with SIGILL on many), bfloat16 on
    GPU."""


class SyntheticConfig(Section):
    """Clips of moving shapes with exact questions and answers, written as real H.264 files."""

    train: int = Field(1024, ge=1)
    """Number of training clips."""
    eval: int = Field(256, ge=1)
    """Number of held-out clips."""
    size: int = Field(56, ge=28, multiple_of=2)
    """Width and height, pixels."""
    frames: int = Field(16, ge=4)
    """Frames in a file, at 8 per second."""
    kinds: tuple[Literal["colour", "shape", "direction", "order", "count"], ...] = Field(
        ("colour", "shape", "direction", "order", "count"), min_length=1
    )
    """Kinds of question, in equal shares."""


Dialect = Literal[
    "hound", "llava", "mesc", "mmla", "mmla_text", "rlaif", "sharegpt", "swift", "video_r1", "videofeedback"
]


class MixedConfig(Section):
    """Manifests of one source of a mix."""

    train: InputFile | None = None
    """Manifest of training samples."""
    eval: InputFile | None = None
    """Manifest of held-out samples."""
    weight: float = Field(1.0, gt=0)
    """How often each of its samples is drawn in an epoch, on average."""
    dialect: Dialect | None = None
    """Form of its files. Empty: that of `data.dialect`."""
    root: InputFolder | None = None
    """Where its relative paths start. Empty: `data.root`."""


class DataConfig(Section):
    """Manifests, the clips they name, and the share of bad clips that is tolerated."""

    train: InputFile | None = None
    """Manifest of training samples (JSON lines, a JSON list or parquet). Empty: the `synthetic` set is made."""
    eval: InputFile | None = None
    """Manifest of held-out samples. An id that `train` has too is an error."""
    mix: dict[str, MixedConfig] = Field({})
    """Several sources in place of `train` and `eval`, each with a name, which is put before the ids of its samples."""
    balance: Literal["answer", "problem_type"] | None = None
    """Draw the samples of frequent answers, or problem types, less often and those of rare ones more often, so that all
    are trained equally often. An epoch keeps its length. Empty: each sample once an epoch."""
    dialect: Dialect | None = None
    """Form of `train` and `eval`, which are read as they were published; items that cannot be used are left out and
    listed in refused.jsonl. Empty: manifests (`rlvid data convert --help` says what each dialect is)."""
    path_map: dict[str, str] = Field({})
    """Beginnings of paths in published files, and what to put in their place: {/their/videos: /my/videos}."""
    root: InputFolder | None = None
    """Where relative paths of manifests start; all paths must stay in it. Empty: the manifest's folder."""
    synthetic: SyntheticConfig | None = None
    """Make a synthetic set if `train` is empty."""
    max_bad_fraction: float = changeable(0.25, "when to give up", ge=0.0, le=1.0)
    """The run stops when more than this share of the manifests' clips cannot be read."""
    cache_dir: LocalPath = changeable(
        Path("~/.cache/rlvid/frames"), "a cached clip equals a decoded one", validate_default=True
    )
    """Folder of decoded frames, shared by all runs."""
    cache_gib: float = changeable(50.0, "a cached clip equals a decoded one", gt=0)
    """Size limit of the frame cache. The least recently used clips are removed first."""
    system_prompt: str | None = None
    """System turn of every conversation that has none."""
    suffix: str = ""
    """Text after every question, for example how to format the answer."""

    def faults(self) -> Iterator[str]:
        is_made = self.train is None and self.synthetic is not None
        if self.dialect is not None and is_made and not self.mix:
            yield f"dialect={self.dialect} is of published files, and synthetic makes a manifest: give train"
        if self.path_map and not any((self.dialect, *(part.dialect for part in self.mix.values()))):
            yield "path_map has no effect without dialect: set it too"
        if self.mix and (self.train or self.eval or self.synthetic):
            yield "mix takes the place of train, eval and synthetic: leave those out, or give them as a part of mix"

    @property
    def sources(self) -> dict[str, DataConfig]:
        """The parts of `mix` by their names, each as the data of a run of its own; without a mix "" and this."""
        own = ("train", "eval", "dialect", "root")
        return {
            name: self.model_copy(update={key: getattr(part, key) or getattr(self, key) for key in own} | {"mix": {}})
            for name, part in self.mix.items()
        } or {"": self}


class VideoConfig(Section):
    """How clips are read: decoder, which frames, what size."""

    reader: Literal["pyav", "decord"] = "pyav"
    """Decoder. decord returns wrong frames for some files without an error: use it for comparison only."""
    sampling: Literal["linspace", "mid_segment", "fps", "first_seconds"] = "linspace"
    """Which frames. linspace: evenly from first to last. mid_segment: the middle of equal segments. fps: by frame rate
    up to `frames`. first_seconds: evenly in the first seconds."""
    frames: int = Field(8, ge=2, multiple_of=2)
    """Number of frames for linspace, mid_segment and first_seconds; upper limit for fps. Even: two frames make one
    patch."""
    fps: float = Field(2.0, gt=0)
    """sampling=fps: frames per second."""
    seconds: float = Field(10.0, gt=0)
    """sampling=first_seconds: length in seconds."""
    height: int | None = Field(None, ge=28)
    """Fixed height, pixels. Give height and width together."""
    width: int | None = Field(None, ge=28)
    """Fixed width, pixels."""
    max_pixels: int = Field(128 * 28 * 28, ge=28 * 28)
    """Largest area of a frame if no fixed size is given. The aspect ratio is kept."""
    image_max_pixels: int = Field(1024 * 28 * 28, ge=28 * 28)
    """Largest area of an image. The aspect ratio is kept, also where clips have a fixed size."""
    timeout_s: float = changeable(60.0, "a deadline", gt=0)
    """A clip that takes longer to read is bad. Its process is stopped, because native decoders cannot be
    interrupted."""

    needs: ClassVar = {
        "fps": ("sampling", "fps"),
        "seconds": ("sampling", "first_seconds"),
        "max_pixels": ("height", None),
    }

    def faults(self) -> Iterator[str]:
        if (self.height is None) != (self.width is None):
            yield "height and width go together: give both or none"
