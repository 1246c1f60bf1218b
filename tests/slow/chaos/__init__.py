"""Workers under sabotage: real processes, a real server, and an audit that nobody can talk out of what it saw.

::

    __main__    options, and the printed counts
    battle      sets everything up, waits for the end, asks for the verdict
      |- app        the worker that the processes run
      |- ledger     what handlers did, outside the database
      |- audit      what happened to every row, by triggers
      |- fleet      the processes
      |- proxy      the network between them and the server
      |- saboteur   kills, stops, restarts, cuts, cancels
      +- verdict    what must hold, checked one by one

``python -m tests.slow.chaos --jobs 20000``
"""

RETRIES = 2
"""Of the kinds that are retried."""
