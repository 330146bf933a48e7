"""Calibration on several machines: what is in front of segments, and how long it takes."""

from omniquant_pl.cluster.borders import border_streams

__all__ = ["border_streams"]
