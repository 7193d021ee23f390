"""When a call has failed, and when engine and trainer disagree."""

from __future__ import annotations

from pydantic import Field

from rlvid.config.sections import Section


class DeadlinesConfig(Section):
    """How long each call between the processes of a run may take. What takes longer has failed: a generator is
    replaced, any other process ends the run. When a clip counts as bad is `video.timeout_s`."""

    room_s: float = Field(900.0, gt=0)
    """For the cluster to have room for an actor. Nodes may have to start first."""
    start_s: float = Field(600.0, gt=0)
    """For a generator to load its model."""
    generate_s: float = Field(600.0, gt=0)
    """For a generator to answer the prompts of one message: up to `rollout.max_tokens` for its share of a step."""
    sync_s: float = Field(300.0, gt=0)
    """For a generator to take new weights, from its first bucket to its last."""
    heartbeat_s: float = Field(30.0, gt=0)
    """Without any sign of life of a generator, until it gets no new work. It answers while its engine computes."""
    suspect_s: float = Field(60.0, gt=0)
    """From then on until it is replaced."""
    train_s: float = Field(3600.0, gt=0)
    """For the trainer: a step, scoring a batch, a checkpoint, an export."""
    reward_s: float = Field(120.0, gt=0)
    """For a reward worker to score the responses to one prompt; it is replaced and asked once more."""
    model_s: float = Field(600.0, gt=0)
    """For a reward model to score its share of a step."""


class ParityConfig(Section):
    """How far the log-probs of engine and trainer may be apart, at the start of a run, for the same tokens.

    In bfloat16 two right implementations differ by rounding: a logit between 16 and 32 has steps of 0.125, so single
    tokens may be further apart than any useful limit. The mean and a high quantile are not moved by one of them; a side
    that sees another video is off by more in most tokens.
    """

    mean: float | None = Field(None, gt=0)
    """Largest mean difference. Empty: 1e-4 in float32, 0.05 in bfloat16 (measured: 0.013 for a random model of 2
    billion parameters)."""
    quantile: float = Field(0.95, gt=0, le=1)
    """The quantile that `at_quantile` limits; 1 is the maximum."""
    at_quantile: float | None = Field(None, gt=0)
    """Largest difference at the quantile. Empty: 1e-4 in float32, 0.2 in bfloat16."""
