"""Six published methods, each a plain reducer: the interface can say what they need."""
