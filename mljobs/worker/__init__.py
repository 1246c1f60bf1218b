"""Run jobs: claim them, call their handlers, keep their leases, record how they ended, stop well.

::

    Worker        what users write against: handlers, run, stop            worker
      |- Handler      what a kind of job calls, and what a failure leads to    handlers
      |- Intake       which job to start next; claims ahead of need            intake
      |- Place        where a handler runs: a thread, the loop, an executor    places
      |    +- perform     call it once, and say how it ended                   performing
      +- Outbox       outcomes on their way into the database                  outbox

Threads of a worker: one for each handler that may run at a time; one that writes what was left over after a few
milliseconds; one that keeps the leases (:class:`mljobs.store._run.Keeper`); and the caller's own, which waits for signals.
"""

from mljobs.worker._handlers import Handler, exponential
from mljobs.worker._outbox import Tally
from mljobs.worker._worker import Worker

__all__ = ["Handler", "Tally", "Worker", "exponential"]
