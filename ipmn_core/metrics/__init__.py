"""From predictions to numbers."""

from ipmn_core.metrics.scores import (
    ARM,
    AS_GIVEN,
    COLUMNS,
    GLOBAL,
    REPEAT,
    RULES,
    RUN,
    PredictionsError,
    accuracy,
    auc,
    best_epoch,
    by_fold,
    check,
    none,
    optimism,
    over_folds,
    select,
    y_and_prob,
)
