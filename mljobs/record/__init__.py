"""One job as a row: its columns and values, its JSON, and the classes that hosts inherit from."""
