"""mljobs in a Flask application."""
