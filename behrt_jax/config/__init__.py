"""Every setting of every command, as frozen dataclasses.

A field's docstring is its ``--help`` text on the command line. Checks that concern several fields
live in :mod:`behrt_jax.workflows.checks`; nothing here imports anything else of the package.
"""
