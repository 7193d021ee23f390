"""`rlvid merge`: the checkpoint of an adapter and its base, for transformers and vLLM. One process, no Ray."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

from rlvid.errors import UserError
from rlvid.files import copy_other_files, replace_folder
from rlvid.models import torchvision_ops
from rlvid.models.families import load_family

CONFIG_FILE = "adapter_config.json"  # peft's name


def merge(adapter: Path, out: Path, base: Path | None = None) -> None:
    """Write `base` with the adapter's weights added, in the base's number format. The whole model is in memory.

    Args:
        adapter: folder of a LoRA adapter as peft writes it, or of a run that trained one.
        base: checkpoint folder. Default: the one that the adapter names.

    Raises:
        UserError: there is no adapter, its base is no checkpoint that rlvid knows or another one, or `out` exists.
    """
    places = (adapter, adapter / "adapter", adapter / "policy" / "adapter")
    folder = next((place for place in places if (place / CONFIG_FILE).is_file()), None)
    if folder is None:
        raise UserError(f"{adapter} has no {CONFIG_FILE}; expected a folder of an adapter, or of a run with model.lora")
    if out.exists():
        raise UserError(f"{out} exists already; give another --out")
    base = base or Path(json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"] or "")
    if not (base / "config.json").is_file():
        raise UserError(f"{folder} is an adapter of {base}, which is no checkpoint folder; give it with --base")
    family = load_family(base)
    torchvision_ops.ensure()  # before transformers
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if family.placeholders else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            network = PeftModel.from_pretrained(kind.from_pretrained(base, dtype="auto"), str(folder))
        except (RuntimeError, ValueError, UserWarning) as e:  # shapes, targets, names
            raise UserError(f"the adapter in {folder} does not fit {base}: {str(e).splitlines()[0]}") from e
    part = out.with_name(f"{out.name}.part")
    network.merge_and_unload(safe_merge=True).save_pretrained(part)
    copy_other_files(base, part)
    replace_folder(part, out)


def main(arguments: argparse.Namespace) -> None:
    merge(arguments.adapter, arguments.out, arguments.base)
    print(arguments.out)
