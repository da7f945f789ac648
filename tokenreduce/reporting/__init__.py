"""Everything that a user sees of a run: progress, tables, pictures, Weights & Biases.

Made from records, results and a benchmark's images, never from a model.
"""
