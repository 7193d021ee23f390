"""Every key of every job, its default and its meaning. Reading files and overrides: `load.py`."""

from rlvid.config.algorithms import DIMS, DIMS2, DpoConfig, JudgeConfig, RewardModelConfig, SftConfig
from rlvid.config.inputs import DataConfig, LoraConfig, ModelConfig, SyntheticConfig, TinyModelConfig, VideoConfig
from rlvid.config.jobs import (
    AuditJobConfig,
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
    OwnPart,
    RegressionPart,
    RewardPart,
    RewardPartConfig,
    SimilarityPart,
    TemporalIouPart,
    TinyLlavaPart,
    VerbatimPart,
)
from rlvid.config.section import Section
from rlvid.config.sections import (
    DeadlinesConfig,
    ParityConfig,
    PlacementConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    WarmStartConfig,
)
from rlvid.config.tune import SpaceConfig, TuneJobConfig
