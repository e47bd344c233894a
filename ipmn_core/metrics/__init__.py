"""From predictions to numbers."""

from ipmn_core.metrics.scores import (
    ARM,
    COLUMNS,
    GLOBAL,
    RULES,
    RUN,
    PredictionsError,
    accuracy,
    auc,
    best_epoch,
    by_fold,
    check,
    optimism,
    over_folds,
    select,
    y_and_prob,
)
