"""What is installed: reducers, model families and benchmarks, where they come from, and whether they behave.

``python -m tokenreduce.catalog`` lists, shows and checks plugins, and makes the package of a new one.
"""

from tokenreduce.catalog.table import models_table, table

__all__ = ["models_table", "table"]
