"""What a user sees of a run: progress, tables, pictures, Weights & Biases.

Made from records, metrics and a benchmark's images, never from a model.
"""
