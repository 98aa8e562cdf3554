"""The folder of a run, on a disk or in a bucket.

folder   where its files are, and which run they belong to
owner    which program trains in it
"""

from flax_projector.run_folder.folder import STATE, Origin, RunFolder, find_from_projector

__all__ = ["STATE", "Origin", "RunFolder", "find_from_projector"]
