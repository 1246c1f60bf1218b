"""Three hosts on one machine: two of workers, one of the database, each a network namespace of Linux on one bridge.

``python -m tests.slow.hosts`` as root. One link is taken off the bridge for longer than a lease, and for a moment, and put
back each time: what is sent meanwhile is lost in silence, as with a cable or a switch. The workers, the audit and the
verdict are those of ``tests.slow.chaos``.
"""
