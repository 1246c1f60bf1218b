"""``python -m benchmarks.drain``: how fast workers get through no-op jobs, beside raw psycopg and beside other job systems.

``python -m benchmarks.drain drain single latency idle`` are its parts; ``BENCH_REPEATS`` and ``BENCH_SCALE`` shorten them,
``BENCH_RIVALS=raw,pgqueuer`` names those to compare with, ``BENCH_PROCESSES=2`` how many processes drain. Every rival runs
in processes and a database of its own, in turn.
"""
