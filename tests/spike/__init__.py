"""Six published methods written against the reducer interface, to learn what it must be able to say.

What the core does not have yet, and a method needs, stands in :mod:`.sites` in the form that it ought to take there.
"""
