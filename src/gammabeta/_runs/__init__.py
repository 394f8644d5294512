"""Run folders: their names, their schema, writing them whole and reading them with suspicion.

    RUN/claims.json                             the registry as it was when the run was made
    RUN/cells/<experiment>/<name>/spec.json     a finished cell: what was run,
                                  rows.jsonl    what was measured, one JSON object per line,
                                  run.log       and what it said meanwhile
    RUN/failed/<experiment>/<name>/             a cell that raised: spec.json, error.txt
    RUN/verdicts.json, RUN/figures.json         derived from the rows; may be made again
    RUN/<experiment>.jsonl.gz                   packed cells, kept of accepted runs
    <any name>.jsonl                            the record of one training; no run folder

A cell's name is a hash of its specification and its folder arrives by one rename, so presence
means done, nothing is ever seen half-written, two writers need no lock (also on a network file
system), and run folders from several machines are merged by copying. What is read here may come
from a stranger: links are not followed, sizes are bounded, every field is checked.
"""

from gammabeta._runs._atomic import (
    remove_dead,
    write_json,
    write_whole,
)
from gammabeta._runs._cells import (
    StoredCell,
    cell_name,
    check_spec,
    forget_failure,
    has_cell,
    has_failed,
    read_failed,
    rows_text,
    write_cell,
    write_failed,
)
from gammabeta._runs._check import (
    SCHEMA,
    Row,
    RunError,
    Scalar,
    check_run,
    read_json,
)
from gammabeta._runs._derived import (
    STATUSES,
    check_figures,
    check_verdicts,
    read_claims,
    read_figures,
    read_verdicts,
)
from gammabeta._runs._packed import (
    MAX_PACKED,
    pack,
    packed_files,
    read_cells,
    read_packed,
    thin,
    write_packed,
)
from gammabeta._runs._record import (
    Record,
    Series,
    is_record,
    read_record,
)

__all__ = [
    "MAX_PACKED",
    "SCHEMA",
    "STATUSES",
    "Record",
    "Row",
    "RunError",
    "Scalar",
    "Series",
    "StoredCell",
    "cell_name",
    "check_figures",
    "check_run",
    "check_spec",
    "check_verdicts",
    "forget_failure",
    "has_cell",
    "has_failed",
    "is_record",
    "pack",
    "packed_files",
    "read_cells",
    "read_claims",
    "read_failed",
    "read_figures",
    "read_json",
    "read_packed",
    "read_record",
    "read_verdicts",
    "remove_dead",
    "rows_text",
    "thin",
    "write_cell",
    "write_failed",
    "write_json",
    "write_packed",
    "write_whole",
]
