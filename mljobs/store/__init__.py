"""``JobStore`` and ``AsyncJobStore``: every operation with an engine and a transaction of its own."""
