"""A rank of `test_learner_lora.py`: as `lora_rank`, with weights in 4 bits below the adapters."""

from __future__ import annotations

from functools import partial

from tests.training import lora_rank

run = partial(lora_rank.run, quantize="nf4")
