"""`python -m emdiffuse_vol` is `emdvol`."""

from emdiffuse_vol.cli.main import run

# Guarded: worker processes of a dask cluster import this module again.
if __name__ == "__main__":
    run()
