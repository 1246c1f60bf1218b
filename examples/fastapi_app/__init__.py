"""mljobs in a FastAPI application."""
