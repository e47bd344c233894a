"""The runs of a profile: their grid, one run from split to result, run folders, workers."""

from ipmn_core.names import TASKS
from ipmn_core.runs.grid import (
    LOCAL_ONLY,
    Run,
    RunSettings,
    folder_of,
    grid,
    named,
    networks,
    on_this_machine,
    protocols,
    run_settings,
    scored,
    shown,
)
from ipmn_core.runs.run import (
    build,
    execute,
    indices,
    learn,
    predictions_of,
    record,
    with_roles,
)
from ipmn_core.runs.store import (
    StaleRunError,
    cross,
    discard,
    finished_predictions,
    histories,
    left_out,
    predictions,
    seconds,
    updates,
    validation,
)
from ipmn_core.runs.workers import RunsFailedError, check_folds, run_grid, train
