"""The two databases: engines, prepared statements, bulk transfer, waiting for a server, waking of sleepers."""
