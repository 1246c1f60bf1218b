"""The two databases: engines, cached connections, prepared statements, COPY, timeouts, notifications."""
