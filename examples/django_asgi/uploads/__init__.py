"""Files that users sent."""
