"""Records in and out: NDJSON files, key-value stores, at the speed of COPY and in constant memory.

By the question they answer:

- :mod:`~mljobs.transfer.exporting`, :mod:`~mljobs.transfer.importing`: the table to a file and back (``export_jobs``,
  ``import_jobs``)
- :mod:`~mljobs.transfer.kv`: to a mapping, Redis or Valkey and back (``dump_kv``, ``load_kv``)
- :mod:`~mljobs.transfer.mapping`: the table as a mapping (``JobMapping``)

Beneath them: :mod:`~mljobs.transfer.files` opens, :mod:`~mljobs.transfer.lines` cuts, :mod:`~mljobs.transfer.rows` turns a
line into a row and back, :mod:`~mljobs.transfer.judging` says what becomes of a record that is there already,
:mod:`~mljobs.transfer.writing` writes a batch, :mod:`~mljobs.transfer.rejects` keeps what was not imported.
"""

from mljobs.jobs import FILTERS
from mljobs.transfer.exporting import export_jobs
from mljobs.transfer.files import File
from mljobs.transfer.importing import Import, file_import, import_jobs
from mljobs.transfer.judging import OnConflict
from mljobs.transfer.kv import KvStore, dump_kv, kv_import, load_kv
from mljobs.transfer.mapping import JobMapping
from mljobs.transfer.results import Imported, OnProgress, Problem, Progress

__all__ = [
    "FILTERS",
    "File",
    "Import",
    "Imported",
    "JobMapping",
    "KvStore",
    "OnConflict",
    "OnProgress",
    "Problem",
    "Progress",
    "dump_kv",
    "export_jobs",
    "file_import",
    "import_jobs",
    "kv_import",
    "load_kv",
]
