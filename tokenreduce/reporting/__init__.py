"""What a user sees of a run: progress, tables, pictures and Weights & Biases. Made from records and metrics, never from a model."""
