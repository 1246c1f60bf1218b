"""Into other people's frameworks: each module here needs its framework, and nothing else of mljobs needs the module.

- :mod:`mljobs.contrib.starlette`, :mod:`mljobs.contrib.fastapi`, :mod:`mljobs.contrib.flask`,
  :mod:`mljobs.contrib.litestar`, :mod:`mljobs.contrib.django`: our errors as HTTP answers, by ``mljobs.contrib.problems``
- :mod:`mljobs.contrib.pydantic`: ``MlJobRead``, the record as a Pydantic model
"""
