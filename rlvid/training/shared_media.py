"""Several conversations about the same media as one group: what their prompts begin with has one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rlvid.training.batch import Group
from rlvid.types import Prompt

TRAINED = "trained"  # array of tokens: 1 for a token that is trained, 0 for one that only stands before others


def with_trained(group: Group[Prompt]) -> Group[Prompt]:
    """The group of one conversation, all of whose tokens are trained."""
    return group.with_tokens(**{TRAINED: np.ones(group.n_tokens, dtype=np.float32)})


def merged(groups: Sequence[Group[Prompt]]) -> list[Group[Prompt]]:
    """Groups with the same clips become one, in the order of their first ones. Its prompt is what their prompts have in
    common, media included; each response is the rest of a prompt and the answer. Exact: a row of such a group has the
    log-probs and gradients of separate conversations.

    Args:
        groups: of one response each, with `TRAINED`.
    """
    by_clips: dict[object, list[Group[Prompt]]] = {}
    for i, group in enumerate(groups):
        by_clips.setdefault(group.prompt.clip_ids or i, []).append(group)
    found: list[Group[Prompt]] = []
    for own in by_clips.values():
        n = _common([group.prompt.token_ids for group in own])
        n = min([n, *(span.offset for group in own for span in group.in_prompt)])
        together = _together(own, n) if len(own) > 1 and n > 1 and all(_can_end(group, n) for group in own) else None
        found += own if together is None else [together]
    return found


def _common(sequences: Sequence[npt.NDArray[np.int32]]) -> int:
    """Number of tokens that all begin with."""
    n = min(map(len, sequences))
    differs = np.any([ids[:n] != sequences[0][:n] for ids in sequences], axis=0)
    return int(np.argmax(differs)) if differs.any() else n


def _can_end(group: Group[Prompt], n: int) -> bool:
    """Whether a prompt may end after n tokens, the last of which is text: all media are before, and positions after
    count up as those of a response do."""
    prompt = group.prompt
    rest = prompt.positions[:, n:]
    following = prompt.positions[:, :n].max() + 1 + np.arange(rest.shape[1])
    return all(span.offset + span.length < n for span in prompt.spans) and bool((rest == following).all())


def _together(groups: Sequence[Group[Prompt]], n: int) -> Group[Prompt]:
    first = groups[0].prompt
    prompt = replace(first, token_ids=first.token_ids[:n], positions=first.positions[:, :n], answered=())
    responses, trained = [], []
    for group in groups:
        rest = group.prompt.token_ids[n:]
        is_trained = np.zeros(len(rest), dtype=np.float32)
        for span in group.in_prompt:
            is_trained[span.offset - n : span.offset - n + span.length] = 1.0
        responses.append(np.concatenate([rest, *group.responses]))
        trained += [is_trained, np.ones(len(responses[-1]) - len(rest), dtype=np.float32)]
    return Group(prompt, prompt.cost, tuple(responses), {TRAINED: np.concatenate(trained)})
