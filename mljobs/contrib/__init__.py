"""Modules for frameworks: each needs its framework, and no other module of mljobs needs it.

- :mod:`mljobs.contrib.starlette`, :mod:`mljobs.contrib.fastapi`, :mod:`mljobs.contrib.flask`,
  :mod:`mljobs.contrib.litestar`, :mod:`mljobs.contrib.django`: our errors as HTTP answers, by ``mljobs.contrib.problems``
- :mod:`mljobs.contrib.pydantic`: ``MlJobRead``, the record as a Pydantic model
"""
