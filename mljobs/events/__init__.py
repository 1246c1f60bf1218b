"""Tell the host that a job has finished: after the commit, once, with the record.

A job that finishes is read in the transaction in which it does, for it never changes again, and is kept beside that
transaction until it commits. What a rollback, or the rollback to a savepoint, takes back is forgotten.

::

    subscribing     on_finished, and to whom it can be said
      |- sessions     flushes, ``update(...)`` through ``session.execute``, and every operation of mljobs.jobs
      |- connections  every operation; delivered when the connection begins its next transaction or is given back
      |- stores       every operation of a store or worker
      +- pending      what has finished, until the transaction commits
           +- delivering  who listens, and calling them

What goes past all of these (raw SQL, another process) is seen by ``store.watch`` and ``store.wait``.
"""

from mljobs.events._connections import deliver_by
from mljobs.events._delivering import Subscription, deliver, deliver_async, subscribed
from mljobs.events._sessions import add_finished
from mljobs.events._stores import collecting, delivering, join, origin_of
from mljobs.events._subscribing import EventSource, on_finished

__all__ = [
    "EventSource",
    "Subscription",
    "add_finished",
    "collecting",
    "deliver",
    "deliver_async",
    "deliver_by",
    "delivering",
    "join",
    "on_finished",
    "origin_of",
    "subscribed",
]
