"""Hydra's configuration groups, as data. A plugin's settings are not here: they are made from its dataclass."""
