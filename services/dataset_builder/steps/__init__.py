"""The steps from an answer to a row, one a file.

A step is a function `(Draft, Recipe) -> Draft` that raises `Reject`. It knows one item at a time,
reads nothing and writes nothing. `pipeline.STEPS` is their order.
"""
