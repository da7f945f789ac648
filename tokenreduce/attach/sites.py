"""Every site, in the order in which a picture passes them. A new one is a file beside these, and a line here."""

from __future__ import annotations

from tokenreduce.attach.decoder import DecoderSite
from tokenreduce.attach.input import InputSite
from tokenreduce.attach.output import OutputSite
from tokenreduce.attach.projector import ProjectorSite
from tokenreduce.attach.site import Site
from tokenreduce.attach.tower import TowerSite

SITES: tuple[type[Site], ...] = (InputSite, TowerSite, OutputSite, ProjectorSite, DecoderSite)
