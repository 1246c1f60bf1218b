"""mljobs in a Litestar application."""
