"""The ops as Python sees them, a module for each family: shapes without data, FLOPs, autograd."""
