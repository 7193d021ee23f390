"""`python -m benchmarks.sft_learns`: checks that supervised tuning learns from texts, videos and images.

Rows of MMLA (MUStARD's speaking styles and MELD's emotions, their texts alone, from ../shared/data/mmla), questions
about synthetic videos and about single pictures of them are mixed with `data.mix`, and a tiny Qwen2-VL is trained on
them, once whole and once with adapters on all of its linear layers. `gain_points` is the smallest distance, over the
four sources and both ways, of the accuracy on the trained rows from that of the most frequent answer.
`packed_loss_diff` compares the first losses with and without rows that share a prompt, `merged_diff` the logits of the
merged model with those of base and adapter, relative to the largest.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av

from benchmarks.harness import finish, machine
from benchmarks.runs import run, seconds_of, steps_of
from rlvid.config import SyntheticConfig
from rlvid.models import torchvision_ops
from rlvid.synthetic.moving_shapes import make_synthetic

MMLA = Path(__file__).parents[2] / "shared" / "data" / "mmla"
ROWS = 96  # of each source
LORA = "{rank: 64, alpha: 128}"

CONFIG = """
data: {{mix: {mix}, cache_dir: {tmp}/cache}}
video: {{frames: 4, height: 56, width: 56}}
run: {{wandb: disabled, checkpoint_every: 10000}}
evaluate: {{every: 10000}}
rollout: {{max_tokens: 16, max_model_len: 1024}}
placement: {{threads: 2}}
train: {{batch_size: 48, schedule: cosine, warmup_steps: 20, steps: {steps}}}
"""


def make_sources(tmp: Path) -> dict[str, dict[str, str]]:
    """Manifests of the four sources, by their names."""
    mustard = MMLA / "llamafactory_MUStARD_dev_text_speaking_style.json"
    (tmp / "mustard.json").write_text(json.dumps(json.loads(mustard.read_text())[:ROWS]))
    with gzip.open(MMLA / "swift_MELD_dev.jsonl.gz", "rt") as file:
        items = [json.loads(line) for _, line in zip(range(ROWS), file, strict=False)]
    meld = [{"id": i, "question": item["query"], "answer": item["response"]} for i, item in enumerate(items)]
    _write(tmp / "meld.jsonl", meld)
    make_synthetic(tmp, SyntheticConfig(train=ROWS, eval=1, kinds=("colour", "shape")), seed=0)
    videos = [json.loads(line) for line in (tmp / "train.jsonl").read_text().splitlines()]
    # a second question about some, so that rows share the forward of a video
    asked = [
        {**r, "id": f"{r['id']}-n", "question": "How many shapes are there?", "answer": "one"} for r in videos[:24]
    ]
    _write(tmp / "train.jsonl", [*videos, *asked])
    images = []
    for row in videos:
        with av.open(tmp / row["video"]) as clip:
            next(clip.decode(video=0)).to_image().save(tmp / f"{row['id']}.png")
        images.append({key: value for key, value in row.items() if key != "video"} | {"image": f"{row['id']}.png"})
    _write(tmp / "images.jsonl", images)
    files = {"mustard": "mustard.json", "meld": "meld.jsonl", "videos": "train.jsonl", "images": "images.jsonl"}
    return {
        name: {"train": str(tmp / file)} | ({"dialect": "sharegpt"} if name == "mustard" else {})
        for name, file in files.items()
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers_of(sources: dict[str, dict[str, str]]) -> dict[str, str]:
    """The right answers by the ids of the mix."""
    answers = {}
    for name, source in sources.items():
        text = Path(source["train"]).read_text()
        for row in json.loads(text) if name == "mustard" else map(json.loads, text.splitlines()):
            answer = row["conversations"][-1]["value"] if name == "mustard" else row["answer"]
            answers[f"{name}/{row['id']}"] = answer
    return answers


def gains(folder: Path, answers: dict[str, str]) -> dict[str, float]:
    """Points above the most frequent answer, by source."""
    (file,) = (folder / "predictions").glob("*.jsonl")
    said = {row["id"]: row["text"] for row in map(json.loads, file.read_text().splitlines())}
    found = {}
    for source in dict.fromkeys(name.partition("/")[0] for name in answers):
        own = {name: answer for name, answer in answers.items() if name.startswith(f"{source}/")}
        right = sum(said[name].strip() == answer for name, answer in own.items())
        found[source] = 100 * (right - max(Counter(own.values()).values())) / len(own)
    return found


def merged_difference(adapter: Path, merged: Path) -> float:
    """Largest difference of the logits of a text, relative to the largest logit."""
    torchvision_ops.ensure()  # before peft, which imports transformers
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    tokens = torch.arange(200)[None]
    with torch.no_grad():
        whole = AutoModelForImageTextToText.from_pretrained(merged)(tokens).logits
        network = AutoModelForImageTextToText.from_pretrained(base)
        apart = PeftModel.from_pretrained(network, str(adapter))(tokens).logits
        return float((apart - whole).abs().max() / whole.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dir", type=Path, help="keep the run folders here")
    args = parser.parse_args()
    print(f"{machine()}; {args.steps} steps\n")
    with TemporaryDirectory() as temporary:
        tmp = args.dir or Path(temporary)
        tmp.mkdir(exist_ok=True)
        sources = make_sources(tmp)
        answers = answers_of(sources)
        config = tmp / "config.yaml"
        config.write_text(CONFIG.format(mix=json.dumps(sources), tmp=tmp, steps=args.steps))
        held_out = {
            name: {"eval" if key == "train" else key: value for key, value in source.items()}
            for name, source in sources.items()
        }
        all_gains: list[float] = []
        packed: list[float] = []
        ways = {"whole": ("train.lr=1.0e-3",), "lora": (f"model.lora={LORA}", "train.lr=3.0e-3")}
        for way, overrides in ways.items():
            folder = tmp / way
            run("sft", config, folder, ["model.tiny={}", *overrides])
            alone = tmp / f"{way}_alone"
            options = ["sft.share_media=true", "train.steps=1", f"model.path={folder / 'model'}", *overrides]
            run("sft", config, alone, options)
            run("sft", config, tmp / f"{way}_apart", [*options, "train.shared_prefix=false"])
            first, other = (steps_of(f)[0]["loss"] for f in (alone, tmp / f"{way}_apart"))
            packed.append(abs(first - other))
            eval_config = tmp / "eval.yaml"
            eval_config.write_text(CONFIG.format(mix=json.dumps(held_out), tmp=tmp, steps=args.steps))
            run("eval", eval_config, tmp / f"{way}_eval", [f"model.path={folder / 'policy'}"])
            own = gains(tmp / f"{way}_eval", answers)
            shown = ", ".join(f"{name} {points:.1f}" for name, points in own.items())
            print(f"{way}: {seconds_of(folder):.0f} s; points above the most frequent answer: {shown}", flush=True)
            all_gains += own.values()
        merged = merged_difference(tmp / "lora" / "policy" / "adapter", tmp / "lora" / "policy")
    finish({"gain_points": min(all_gains), "packed_loss_diff": max(packed), "merged_diff": merged})


if __name__ == "__main__":
    main()
