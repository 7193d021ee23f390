"""Every key of every job, its default and its meaning. Reading files and overrides: `load.py`."""

from rlvid.config.algorithms import (
    DIMS,
    DIMS2,
    DpoConfig,
    GrpoConfig,
    IsrtConfig,
    JudgeConfig,
    RewardModelConfig,
)
from rlvid.config.jobs import (
    DpoJobConfig,
    EvalJobConfig,
    GrpoJobConfig,
    IsrtJobConfig,
    JobConfig,
    RewardModelJobConfig,
    SftJobConfig,
    SpaceConfig,
    TuneJobConfig,
)
from rlvid.config.limits import DeadlinesConfig, ParityConfig
from rlvid.config.rewards import (
    AnswerPart,
    ChoicePart,
    ExactPart,
    FormatPart,
    LengthPart,
    ModelPart,
    NumberPart,
    RewardPart,
    RewardPartConfig,
)
from rlvid.config.sections import (
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    PlacementConfig,
    RolloutConfig,
    RunConfig,
    ScheduleConfig,
    Section,
    SyntheticConfig,
    TinyModelConfig,
    TrainConfig,
    VideoConfig,
    WarmStartConfig,
)
