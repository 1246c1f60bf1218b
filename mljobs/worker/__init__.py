"""Run jobs: claim them, call their handlers, keep their leases, record their outcomes, stop when told to.

::

    Worker             what users write against: handlers, run, stop               _worker
      +- WorkerRun        one run, from the first claim to the last outcome          _running
           |- Prefetcher     gives the next run; claims jobs before they are needed  _prefetching
           |- ThreadPlace, LoopPlace, ExecutorPlace: where a handler runs            _places, _executors
           |    |- call_handler      call it once, and return what to record         _calling
           |    +- run_remote_call   the same in another process                     _remote
           +- OutcomeWriter  writes outcomes to the database                         _recording

    Handler            what a kind of job calls, and what a failure leads to       _handlers

Threads of a worker: one for each handler that may run at a time; one that writes the outcomes that no claim has taken
along within a few milliseconds; one that keeps the leases (``Keeper``); and the caller's own, which waits for signals.
A row of the table of workers says that the worker is there (``Registration`` in ``_registering``).
"""

from mljobs.worker._finished import Tally
from mljobs.worker._handlers import Handler, exponential
from mljobs.worker._worker import Worker

__all__ = ["Handler", "Tally", "Worker", "exponential"]
