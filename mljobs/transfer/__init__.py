"""Records in and out: NDJSON files, key-value stores, at the speed of COPY and in constant memory.

- :mod:`~mljobs.transfer._exporting`, :mod:`~mljobs.transfer._importing`: write the table to a file, and read it
  (``export_jobs``, ``import_jobs``)
- :mod:`~mljobs.transfer._kv`: the same with a mapping, Redis or Valkey (``dump_kv``, ``load_kv``)
- :mod:`~mljobs.transfer._mapping`: the table as a mapping (``JobMapping``)
- :mod:`~mljobs.transfer._comparing`, :mod:`~mljobs.transfer._digest`: whether finished records are what they were
  (``compare``, ``digest``, ``check_digest``)

- :mod:`~mljobs.transfer._arrow`, :mod:`~mljobs.transfer._frames`: as Arrow tables and data frames

What they are made of: :mod:`~mljobs.transfer._files` opens files, :mod:`~mljobs.transfer._lines` splits them into lines,
:mod:`~mljobs.transfer._rows` makes a row of a line, :mod:`~mljobs.transfer._encoding` a line of a row,
:mod:`~mljobs.transfer._judging` decides about a record that exists already, :mod:`~mljobs.transfer._writing` writes a
batch, :mod:`~mljobs.transfer._rejects` keeps the lines that were not imported, :mod:`~mljobs.transfer._alongside` reads the
table beside a file, :mod:`~mljobs.transfer._host_values` converts the columns of a host.
"""

from mljobs.jobs import FILTERS
from mljobs.jobs._base import accept_any_session
from mljobs.transfer._comparing import Compared, Difference, OnDifference, compare
from mljobs.transfer._digest import DigestCheck, DigestLine, check_digest, digest, pruned_note, read_digest
from mljobs.transfer._exporting import export_jobs
from mljobs.transfer._files import File
from mljobs.transfer._importing import import_jobs
from mljobs.transfer._judging import OnConflict
from mljobs.transfer._kv import KvStore, dump_kv, load_kv
from mljobs.transfer._mapping import JobMapping
from mljobs.transfer._results import Imported, OnProgress, Problem, Progress

__all__ = [
    "FILTERS",
    "Compared",
    "Difference",
    "DigestCheck",
    "DigestLine",
    "File",
    "Imported",
    "JobMapping",
    "KvStore",
    "OnConflict",
    "OnDifference",
    "OnProgress",
    "Problem",
    "Progress",
    "check_digest",
    "compare",
    "digest",
    "dump_kv",
    "export_jobs",
    "import_jobs",
    "load_kv",
    "pruned_note",
    "read_digest",
]

accept_any_session(globals(), __all__)
