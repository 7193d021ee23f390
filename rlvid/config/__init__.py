"""Every key of every job, its default and its meaning. Reading files and overrides: `load.py`."""

from rlvid.config.algorithms import (
    DIMS,
    DIMS2,
    DpoConfig,
    IsrtConfig,
    JudgeConfig,
    RewardModelConfig,
    SftConfig,
)
from rlvid.config.jobs import (
    DpoJobConfig,
    EvalJobConfig,
    GrpoJobConfig,
    IsrtJobConfig,
    JobConfig,
    PolicyGradientJobConfig,
    PpoJobConfig,
    RewardModelJobConfig,
    SftJobConfig,
)
from rlvid.config.limits import DeadlinesConfig, ParityConfig
from rlvid.config.policy_gradient import GrpoConfig, PolicyGradientConfig, PpoConfig
from rlvid.config.rewards import (
    AnswerPart,
    BoxIouPart,
    ChoicePart,
    CustomPart,
    EndpointPart,
    ExactPart,
    FormatPart,
    FreeFormPart,
    GlueIouPart,
    JudgePart,
    LengthPart,
    MathPart,
    ModelPart,
    NumberPart,
    NumericalPart,
    OcrPart,
    RegressionPart,
    RewardPart,
    RewardPartConfig,
    SimilarityPart,
    TemporalIouPart,
    TinyLlavaPart,
    VerbatimPart,
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
from rlvid.config.tune import SpaceConfig, TuneJobConfig
