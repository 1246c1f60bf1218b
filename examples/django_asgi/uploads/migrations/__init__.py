"""The history of its tables, and of ours."""
