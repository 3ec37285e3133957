"""Families of transformers, small."""

FAMILIES = ()
