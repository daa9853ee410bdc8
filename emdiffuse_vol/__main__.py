"""`python -m emdiffuse_vol` is `emdvol`."""

from emdiffuse_vol.cli.main import main

# Guarded: worker processes of a dask cluster import this module again.
if __name__ == "__main__":
    main(prog_name="emdvol")
