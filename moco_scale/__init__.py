"""MoCo from two views to an encoder: trainer, evaluation, report, and the command line."""
