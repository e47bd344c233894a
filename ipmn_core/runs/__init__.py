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
    run_settings,
    scored,
    shown,
)
from ipmn_core.runs.run import (
    build,
    execute,
    indices,
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
from ipmn_core.runs.workers import RunsFailedError, check_folds, progress_bar, run_grid, train
